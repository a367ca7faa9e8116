r"""What does imagining cost? Rollouts with and without remembering, and imagined frames a second.

  python -m benchmarks.rollout

For each kind of predictor, at its default size: a rollout of 256 clips over 100 steps, with the state that networks
carry along (keys and values, hidden states) against reading the sequence again at each step, as far back as it can
matter, in turn, in one run; and imagined frames a second, in float32 and in bf16. Prints a table in Markdown and writes
`results.json`.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from benchmarks.common import markdown
from jepa.config import Bounded, PositiveInt
from jepa.networks import NetworkConfig, PredictorConfig
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence
from pipelines.run.command import run_command
from pipelines.run.files import write_json

FPS = 10.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REACH: dict[str, Callable[[NetworkConfig], int]] = {
    "mlp": lambda config: config.context + 1,
    "transformer": lambda config: config.depth * (config.context - 1) + 2,
}
"""Embeddings that can matter to a prediction, that before the first change included."""


@dataclass(frozen=True)
class Options(Bounded):
    """What imagining costs."""

    output_dir: Path = Path("runs/benchmarks/rollout")
    """Where the results are left."""
    clips: PositiveInt = 256
    """Futures imagined at once."""
    horizon: PositiveInt = 100
    """Steps of each."""
    width: PositiveInt = 512
    """Width of the predictors."""
    dimension: PositiveInt = 64
    """Numbers of an embedding."""
    grid: tuple[PositiveInt, ...] = ()
    """Rows and columns of its places, where it has any."""
    rounds: PositiveInt = 3
    """Turns of each measurement and its rival; medians are reported."""


@torch.no_grad()
def main(options: Options) -> None:
    """The story: each kind of predictor, then the table."""
    rows = [measure(kind(width=options.width), options) for kind in get_args(PredictorConfig)]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", {row["kind"]: row for row in rows})
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{options.clips} clips, {options.horizon} steps, {where}\n")
    cells = [[f"{cell:,.1f}" if isinstance(cell, float) else cell for cell in row.values()] for row in rows]
    print(markdown([list(rows[0]), *cells]))


def measure(config: NetworkConfig, options: Options) -> dict[str, str | float]:
    """All figures of one kind."""
    torch.manual_seed(0)
    kind = config.kind
    shape = (*options.grid, options.dimension)
    predictor = Predictor(config, shape, fps=FPS, encoder_fingerprint="benchmark")
    predictor = predictor.to(DEVICE).eval()
    past = Sequence.on_clock(torch.randn(options.clips, config.context, *shape, device=DEVICE), FPS)
    future = Future.ticks(options.horizon, FPS)
    seconds(lambda: rollout(predictor, past, Future.ticks(2, FPS)))  # warm up
    remembering, reading, halved = [], [], []
    for _ in range(options.rounds):
        remembering.append(seconds(lambda: rollout(predictor, past, future)))
        with torch.autocast(DEVICE, torch.bfloat16):
            halved.append(seconds(lambda: rollout(predictor, past, future)))
        reading.append(seconds(lambda: read_again(predictor, past, options.horizon, REACH[kind](config))))
    cost, frames = statistics.median(remembering), options.clips * options.horizon
    return {
        "kind": kind,
        "seconds": cost,
        "seconds without state": statistics.median(reading),
        "times faster": statistics.median(reading) / cost,
        "imagined frames a second": frames / cost,
        "the same in bf16": frames / statistics.median(halved),
    }


def read_again(predictor: Predictor, past: Sequence, horizon: int, reach: int) -> Tensor:
    """The same rollout without any state: at each step the last `reach` embeddings again."""
    embeddings = past.embeddings
    for _ in range(horizon):
        recent = Sequence.on_clock(embeddings[:, -reach:], FPS)
        embeddings = torch.cat([embeddings, predictor(recent)], dim=1)
    return embeddings[:, past.embeddings.shape[1] :]


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    run_command(main, Options)
