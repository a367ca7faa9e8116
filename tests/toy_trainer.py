"""A trainer in its smallest form, for tests of `Run`: what a person would write, and ways to disturb it."""

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from jepa.config import Bounded, Positive, PositiveInt
from jepa.errors import ConfigurationError
from pipelines.run.command import run_command
from pipelines.run.run import Run
from pipelines.run.training import OptimizerOptions, RunOptions


@dataclass(frozen=True)
class Narrow(Bounded):
    """A narrow network."""

    kind: ClassVar[str] = "narrow"
    width: PositiveInt = 8
    """Hidden units."""


@dataclass(frozen=True)
class Deep(Bounded):
    """A deep network."""

    kind: ClassVar[str] = "deep"
    width: PositiveInt = 8
    """Hidden units."""
    layers: PositiveInt = 2
    """Hidden layers."""


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Learn the sum of eight numbers."""

    videos: tuple[Path, ...] = (Path("a.mp4"),)
    """Videos that nobody reads."""
    output_dir: Path = Path("runs/toy")
    """Folder for everything that the run leaves."""
    steps: PositiveInt = 12
    """Optimiser steps."""
    noise: Positive = 0.1
    """Noise on what is learned from."""
    data: str = "sums"
    """Name of the data."""
    size: tuple[int, int] = (64, 64)
    """Height and width."""
    network: Narrow | Deep = field(default_factory=Narrow)
    optimizer: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(learning_rate=1e-2))


class Batch(NamedTuple):
    numbers: Tensor
    place: dict[str, int]
    videos: tuple[str, ...]


def draw_batches(seed: int, rank: int, place: dict[str, int]) -> Iterator[Batch]:
    for index in count(place.get("index", 0)):
        generator = torch.Generator().manual_seed(1_000_003 * seed + 7 * index + rank)
        yield Batch(torch.randn(4, 8, generator=generator), {"index": index + 1}, (f"{index}.mp4",))


def make_network(options: Options) -> nn.Module:
    if options.network.width == 13:
        raise ConfigurationError("width", "is 13: take any other number")
    hidden = [nn.LayerNorm(options.network.width), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(nn.Linear(8, options.network.width), *hidden, nn.Linear(options.network.width, 1))


def main(options: Options) -> None:
    """Learn, and keep the best."""
    run = Run(options, "toy_trainer", ("sum",))
    run.begin({"data": options.data}, "sums")
    network = make_network(options)
    trained = run.prepare(network, options.optimizer, clip_norm=1.0)
    best = run.keep_best(network, "validation")
    disturbance, at, rank = os.environ.get("TOY_DISTURBED", "none -1 0").split()  # NAME STEP RANK
    for step, batch in run.steps(lambda place: draw_batches(options.seed, run.rank, place)):
        noise = options.noise * torch.randn(batch.numbers.shape, generator=run.generator(step))
        errors = trained(batch.numbers + noise) - batch.numbers.sum(dim=1, keepdim=True)
        loss = errors.square().mean()
        if step == int(at) and run.rank == int(rank):
            if disturbance == "nan":
                loss = loss * float("nan")
            else:
                os.kill(os.getpid(), getattr(signal, disturbance))
        run.update(loss, {"bias": errors.mean()}, batch.videos)
        if run.due:
            run.log(judge(network), ["no spread"] if options.data == "collapsing" else [])
    best.restore()
    run.finish({"undefined": float("nan")}, {"sum": ("toy", {"width": options.network.width}, network)}, next="sum")


@torch.no_grad()
def judge(network: nn.Module) -> dict[str, float]:
    numbers = torch.linspace(-1, 1, 64).view(8, 8)
    network.eval()
    error = (network(numbers) - numbers.sum(dim=1, keepdim=True)).square().mean().item()
    network.train()
    return {"validation": error}


if __name__ == "__main__":
    run_command(main, Options)
