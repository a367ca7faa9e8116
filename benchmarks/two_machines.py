r"""Rehearse a run on two machines, and the loss of one of them, on a single machine (as root, Linux only).

  python -m benchmarks.two_machines

Two network namespaces, joined by a virtual cable, stand for the machines: each has its own address and its own ports,
and reaches the other over that cable alone; the output folder is shared, as it must be between real machines. In each
the encoder is trained by the command of `configs/accelerate/multi_node.yaml`, one process a side, on the CPU.

First undisturbed. Then, after the first checkpoint, one side is lost: every process of the second or of the first is
killed, or the cable is cut, which no socket notices. Whoever is left must end by itself within a minute, with an
error. With --resume the two then finish, and the weights must be
those of the undisturbed run, bit for bit.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file

from benchmarks.common import ROOT, words
from data.synthetic import BallWorld, write_ball_videos
from jepa.config import Bounded, Positive, PositiveInt
from pipelines.run.command import require, run_command
from pipelines.run.folder import write_json

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
ENCODER = "--fps 8 --encoder.image-size 32 32 --encoder.embedding-dimension 8 --expander.widths 16 16 --batch-size 16"

Loss = Literal["kill_second", "kill_first", "cut_cable"]


@dataclass(frozen=True)
class Options(Bounded):
    """Rehearse a run on two machines."""

    losses: tuple[Loss, ...] = ("kill_second", "kill_first", "cut_cable")
    """How a side is lost, each in a run of its own."""
    steps: PositiveInt = 200
    """Optimiser steps of a run; there is a checkpoint after each tenth of them."""
    limit_s: Positive = 60
    """Seconds that a side may take to notice that the other is gone."""
    output_dir: Path = Path("runs/benchmarks/two_machines")
    """Where results.json is left."""


@dataclass(frozen=True)
class Stop:
    """How a side ended that had lost the other."""

    side: int
    seconds: float | None  # None: it never did
    exit_code: int | None
    said: list[str]
    """Lines that begin with "error:"."""

    @property
    def complaint(self) -> str:
        """What is wrong with it; empty if nothing."""
        if self.seconds is None:
            return f"side {self.side} hung"
        return f"side {self.side} ended as if all were well" if self.exit_code == 0 else ""


class TwoMachines:
    """Two network namespaces and the cable between them; nothing of them is left afterwards."""

    def __init__(self, logs: Path) -> None:
        self.names = [f"jepa-{os.getpid()}-{side}" for side in (0, 1)]
        self.logs = logs

    def __enter__(self) -> Self:
        try:
            for name in self.names:
                ip("netns", "add", name)
            ip("link", "add", "eth0", "netns", self.names[0], "type", "veth", "peer", "eth0", "netns", self.names[1])
            for name, address in zip(self.names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "lo", "up")
            self.set_cable("up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for side, name in enumerate(self.names):
            if Path("/run/netns", name).exists():
                self.kill(side)
                ip("netns", "delete", name)  # its end of the cable goes with it, and so does the other end

    def set_cable(self, state: Literal["up", "down"]) -> None:
        """Plug the cable in or out."""
        for name in self.names:
            ip("-n", name, "link", "set", "eth0", state)

    def kill(self, side: int) -> None:
        """SIGKILL to every process of a side."""
        for process in ip("netns", "pids", self.names[side]).split():
            os.kill(int(process), signal.SIGKILL)

    def launch(self, side: int, arguments: list[str]) -> "subprocess.Popen[bytes]":
        """Start training on a side with the shipped configuration; what it says goes to its log."""
        command = [
            *["ip", "netns", "exec", self.names[side], sys.executable, "-m", "accelerate.commands.accelerate_cli"],
            *["launch", "--config_file", "configs/accelerate/multi_node.yaml", "--num_machines", "2"],
            *["--num_processes", "2", "--machine_rank", str(side), "--main_process_ip", ADDRESSES[0]],
            *["pipelines/pretrain_encoder.py", *arguments],
        ]
        with self.log(side).open("wb") as log:
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)

    def log(self, side: int) -> Path:
        """Where a side's output goes."""
        return self.logs / f"side_{side}.log"

    def said(self, side: int) -> str:
        """What a side has said; progress bars leave carriage returns."""
        return self.log(side).read_text(errors="replace").replace("\r", "\n")


def main(options: Options) -> None:
    """The story: train undisturbed, then lose a side in each way, resume, and compare."""
    require(shutil.which("ip") is not None and os.geteuid() == 0, "network namespaces need root and the `ip` command")
    results: dict[str, Any] = {}
    complaints: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, TwoMachines(Path(scratch)) as machines:
        folder = Path(scratch)
        write_ball_videos(folder / "videos", 8, BallWorld(size=32, radius=3, frames=24, fps=8), seed=0)
        arguments = words("--videos", folder / "videos", ENCODER.split(), "--tracker", "none", "--steps",
                          options.steps, "--checkpoint-every", max(1, options.steps // 10))  # fmt: skip
        results["undisturbed: seconds"] = train(machines, [*arguments, *words("--output-dir", folder / "undisturbed")])
        print(f"undisturbed: 2 ranks, one on each side, {options.steps} steps", flush=True)
        for loss in options.losses:
            run = [*arguments, *words("--output-dir", folder / loss)]
            for stop in lose(machines, loss, run, folder / loss / "training_state", options.limit_s):
                results[f"{loss}: side {stop.side}"] = vars(stop)
                when = "never ended" if stop.seconds is None else f"ended after {stop.seconds:.1f} s"
                print(
                    f"{loss}: side {stop.side} {when}, exit code {stop.exit_code}", *stop.said, sep="\n  ", flush=True
                )
                complaints += [f"{loss}: {stop.complaint}"] if stop.complaint else []
            train(machines, [*run, "--resume"])
            equal = same_weights(folder / "undisturbed", folder / loss)
            results[f"{loss}: same weights"] = equal
            complaints += [] if equal else [f"{loss}: other weights than undisturbed"]
            print(f"{loss}: resumed and finished, weights {'bit-equal' if equal else 'DIFFERENT'}", flush=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)
    require(not complaints, "; ".join(complaints))
    print(f"as it should be: {', '.join(options.losses)}")


def train(machines: TwoMachines, arguments: list[str], limit_s: float = 300) -> float:
    """Train on both sides to the end; the seconds it took."""
    began = time.monotonic()
    sides = [machines.launch(side, arguments) for side in (0, 1)]
    for side, process in enumerate(sides):
        try:
            process.wait(timeout=max(1, began + limit_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            machines.kill(0)
            machines.kill(1)
        require(process.returncode == 0, f"side {side} ended with {process.wait()}:\n{last_words(machines.said(side))}")
    ranks = re.search(r" on (\d+) x ", machines.said(0))
    require(ranks is not None and ranks[1] == "2", f"the run does not have 2 ranks:\n{last_words(machines.said(0))}")
    return time.monotonic() - began


def lose(machines: TwoMachines, loss: Loss, arguments: list[str], checkpoints: Path, limit_s: float) -> list[Stop]:
    """Train until there is a checkpoint, lose a side, and see how the others end. Nothing runs afterwards."""
    sides = [machines.launch(side, arguments) for side in (0, 1)]
    while not list(checkpoints.glob("step_*[1-9]*")):
        for side, process in enumerate(sides):
            require(process.poll() is None, f"side {side} ended by itself:\n{last_words(machines.said(side))}")
        time.sleep(0.05)
    lost_at = time.monotonic()
    if loss == "cut_cable":
        machines.set_cable("down")
        left = [0, 1]
    else:
        machines.kill(0 if loss == "kill_first" else 1)
        left = [1 if loss == "kill_first" else 0]
    ended: dict[int, float] = {}
    while len(ended) < len(left) and time.monotonic() < lost_at + limit_s:
        time.sleep(0.05)
        ended |= {
            side: time.monotonic() - lost_at for side in left if side not in ended and sides[side].poll() is not None
        }
    stops = [
        Stop(side, ended.get(side), sides[side].poll(), re.findall(r"error: .*", machines.said(side))) for side in left
    ]
    for side, process in enumerate(sides):
        machines.kill(side)  # also ranks that have outlived their launcher
        process.wait()
    machines.set_cable("up")
    return stops


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs left the same encoder, bit for bit."""
    first, second = (load_file(run / "encoder" / "model.safetensors") for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def last_words(said: str) -> str:
    """The last that a side said before its launcher began to speak."""
    return "\n".join(re.split(r"\n.*torch/distributed/elastic", said)[0].strip().splitlines()[-20:])


def ip(*arguments: str) -> str:
    """Run `ip`."""
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    require(result.returncode == 0, f"ip {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


if __name__ == "__main__":
    run_command(main, Options)
