r"""Rehearse a run on two machines, and the loss of one of them, on a single machine (as root, Linux only).

  python -m benchmarks.two_machines

Two network namespaces, joined by a virtual cable, stand for the machines: each has its own address and its own ports,
and reaches the other over that cable alone; the output folder is shared, as it must be between real machines. In each
the encoder is trained by the command of `configs/accelerate/multi_node.yaml`, one process a side, on the CPU.

First undisturbed. Then, after the first checkpoint, every process of the second side or of the first is killed. The
other must end by itself within a minute, with an error. With --resume the two then finish, and the weights must be
those of the undisturbed run, bit for bit.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL

import torch
from safetensors.torch import load_file

from benchmarks.common import ROOT, words, write_results
from data.synthetic import BallWorld, write_ball_videos
from jepa.config import Bounded, Positive, PositiveInt
from pipelines.run.command import require, run_command

ADDRESSES = ("10.77.0.1", "10.77.0.2")
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    # Without it gloo takes the address that the host's name resolves to; on many systems that is the loopback.
    "GLOO_SOCKET_IFNAME": "eth0",
    # No name server answers in a namespace, and c10d warns that it cannot name the other side.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
ENCODER = "--fps 8 --encoder.image-size 32 32 --encoder.embedding-dimension 8 --expander.widths 16 --batch-size 16"


@dataclass(frozen=True)
class Options(Bounded):
    """Rehearse a run on two machines."""

    steps: PositiveInt = 200
    """Optimiser steps of a run; there is a checkpoint after each tenth of them."""
    limit_s: Positive = 60
    """Seconds that a side may take to notice that the other is gone."""
    output_dir: Path = Path("runs/benchmarks/two_machines")
    """Where results.json is left."""


def main(options: Options) -> None:
    """The story: train undisturbed, then lose each side, resume, and compare."""
    require(shutil.which("ip") is not None and os.geteuid() == 0, "network namespaces need root and the `ip` command")
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as scratch, two_namespaces() as names:
        folder = Path(scratch)
        write_ball_videos(folder / "videos", 8, BallWorld(size=32, radius=3, frames=24, fps=8), seed=0)
        common = words("--videos", folder / "videos", ENCODER.split(), "--tracker", "none", "--steps", options.steps,
                       "--checkpoint-every", max(1, options.steps // 10), "--output-dir")  # fmt: skip
        train(names, [*common, str(folder / "undisturbed")], folder)
        for lost in (1, 0):
            output = folder / f"lost_{lost}"
            seconds = lose(names, lost, [*common, str(output)], output, options.limit_s)
            train(names, [*common, str(output), "--resume"], folder)
            first, second = (load_file(run / "encoder/model.safetensors") for run in (folder / "undisturbed", output))
            equal = all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())
            results[f"side {lost} lost"] = {"seconds": seconds, "bit-equal": equal}
            print(f"side {lost} lost: the other ended after {seconds:.1f} s; resumed, bit-equal: {equal}", flush=True)
            require(equal, f"side {lost} lost: the resumed run has other weights")
    write_results(options.output_dir, results)


@contextmanager
def two_namespaces() -> Iterator[list[str]]:
    """Two network namespaces and a cable between them; nothing of them is left afterwards."""
    names = [f"jepa-{os.getpid()}-{side}" for side in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            if Path("/run/netns", name).exists():
                kill(name)
                ip("netns", "delete", name)  # its end of the cable goes with it, and so does the other end


def kill(name: str) -> None:
    """SIGKILL to every process of a side."""
    for process in ip("netns", "pids", name).split():
        os.kill(int(process), SIGKILL)


def launch(names: list[str], arguments: list[str], logs: Path) -> list["subprocess.Popen[bytes]"]:
    """Start training on both sides with the shipped configuration; what they say goes to a log of each."""
    sides = []
    for side, name in enumerate(names):
        command = [
            *["ip", "netns", "exec", name, sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"],
            *["--config_file", "configs/accelerate/multi_node.yaml", "--num_machines", "2", "--num_processes", "2"],
            *["--machine_rank", str(side), "--main_process_ip", ADDRESSES[0], "pipelines/pretrain_encoder.py"],
        ]
        with (logs / f"side_{side}.log").open("wb") as log:
            sides.append(subprocess.Popen([*command, *arguments], cwd=ROOT, env=os.environ | ENVIRONMENT,
                                          stdout=log, stderr=log))  # fmt: skip
    return sides


def said(logs: Path, side: int) -> str:
    """What a side has said."""
    return (logs / f"side_{side}.log").read_text(errors="replace")


def train(names: list[str], arguments: list[str], logs: Path) -> None:
    """Train on both sides to the end."""
    for side, process in enumerate(launch(names, arguments, logs)):
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=300)
        require(process.poll() == 0, f"side {side} ended with {process.poll()}:\n{said(logs, side)[-2000:]}")
    require(" on 2 x " in said(logs, 0), f"the run does not have 2 ranks:\n{said(logs, 0)[-2000:]}")


def lose(names: list[str], lost: int, arguments: list[str], output: Path, limit_s: float) -> float:
    """Train until there is a checkpoint, kill a side, and see the other end with an error; the seconds it took."""
    sides = launch(names, arguments, output.parent)
    while not list((output / "training_state").glob("step_*[1-9]*")):
        for side, process in enumerate(sides):
            require(process.poll() is None, f"side {side} ended by itself:\n{said(output.parent, side)[-2000:]}")
        time.sleep(0.05)
    began, left = time.monotonic(), sides[1 - lost]
    kill(names[lost])
    with suppress(subprocess.TimeoutExpired):
        left.wait(timeout=limit_s)
    seconds, code = time.monotonic() - began, left.poll()
    for name in names:
        kill(name)  # also ranks that have outlived their launcher
    for process in sides:
        process.wait()
    require(bool(code), f"side {1 - lost} should have ended with an error, and not with {code}")
    return seconds


def ip(*arguments: str) -> str:
    """Run `ip`."""
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    require(result.returncode == 0, f"ip {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


if __name__ == "__main__":
    run_command(main, Options)
