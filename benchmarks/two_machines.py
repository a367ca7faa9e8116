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
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.common import ROOT, words
from data.synthetic import BallWorld, write_ball_videos
from jepa.config import Bounded, Positive, PositiveInt
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json

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
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, two_namespaces() as names:
        folder = Path(scratch)
        write_ball_videos(folder / "videos", 8, BallWorld(size=32, radius=3, frames=24, fps=8), seed=0)
        common = words("--videos", folder / "videos", ENCODER.split(), "--tracker", "none", "--steps", options.steps,
                       "--checkpoint-every", max(1, options.steps // 10), "--output-dir")  # fmt: skip
        results["undisturbed: seconds"] = train(names, [*common, str(folder / "undisturbed")], folder)
        for lost in (1, 0):
            output = folder / f"lost_{lost}"
            seconds, code, said = lose(names, lost, [*common, str(output)], output, limit_s=options.limit_s)
            train(names, [*common, str(output), "--resume"], folder)
            equal = same_weights(folder / "undisturbed", output)
            results[f"side {lost} lost"] = {"seconds": seconds, "exit code": code, "said": said, "bit-equal": equal}
            print(
                f"side {lost} lost: the other ended after {seconds:.1f} s with {code} ({'; '.join(said)})", flush=True
            )
            print(f"  resumed: the weights are {'bit-equal' if equal else 'DIFFERENT'}", flush=True)
            require(code not in (None, 0) and equal, f"side {lost} lost: this is not as it should be")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)


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
    """What a side has said; progress bars leave carriage returns."""
    return (logs / f"side_{side}.log").read_text(errors="replace").replace("\r", "\n")


def train(names: list[str], arguments: list[str], logs: Path, limit_s: float = 300) -> float:
    """Train on both sides to the end; the seconds it took."""
    began = time.monotonic()
    for side, process in enumerate(launch(names, arguments, logs)):
        try:
            process.wait(timeout=max(1, began + limit_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            kill(names[0])
            kill(names[1])
        require(process.wait() == 0, f"side {side} ended with {process.returncode}:\n{said(logs, side)[-2000:]}")
    ranks = re.search(r" on (\d+) x ", said(logs, 0))
    require(ranks is not None and ranks[1] == "2", f"the run does not have 2 ranks:\n{said(logs, 0)[-2000:]}")
    return time.monotonic() - began


def lose(
    names: list[str], lost: int, arguments: list[str], output: Path, *, limit_s: float
) -> tuple[float, int | None, list[str]]:
    """Train until there is a checkpoint, kill a side, and see how the other ends; seconds, exit code, error lines."""
    logs = output.parent
    sides = launch(names, arguments, logs)
    while not list((output / "training_state").glob("step_*[1-9]*")):
        for side, process in enumerate(sides):
            require(process.poll() is None, f"side {side} ended by itself:\n{said(logs, side)[-2000:]}")
        time.sleep(0.05)
    began, left = time.monotonic(), sides[1 - lost]
    kill(names[lost])
    try:
        left.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        print(f"side {1 - lost} is still there after {limit_s:g} s")
    seconds, code = time.monotonic() - began, left.poll()
    for name in names:
        kill(name)  # also ranks that have outlived their launcher
    for process in sides:
        process.wait()
    return seconds, code, re.findall(r"error: .*", said(logs, 1 - lost))


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs left the same encoder, bit for bit."""
    first, second = (load_file(run / "encoder" / "model.safetensors") for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def ip(*arguments: str) -> str:
    """Run `ip`."""
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    require(result.returncode == 0, f"ip {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


if __name__ == "__main__":
    run_command(main, Options)
