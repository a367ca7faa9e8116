r"""What does imagining cost? Rollouts with and without remembering, and imagined frames a second.

  python benchmarks/rollout.py

For each kind of predictor, at its default size: a rollout of 256 clips over 100 steps, with the state that networks
carry along (keys and values, hidden states) against reading the sequence again at each step, as far back as it can
matter, in turn, in one run; imagined frames a second, in float32 and in bf16; and how much memory tensors hold at once
for 100 and for 400 steps, beside what is returned.
Prints a table in Markdown and writes `results.json`.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from jepa.networks import NETWORKS
from jepa.predictor import Predictor, PredictorConfig
from jepa.rollout import rollout
from pipelines.stage import run_stage, write_json

REACH: dict[str, Callable[[PredictorConfig], int]] = {
    "mlp": lambda config: config.context + 1,
    "transformer": lambda config: config.depth * (config.context - 1) + 2,
}
"""How many embeddings can matter to a prediction, that before the first change included. A GRU never forgets."""


@dataclass(frozen=True)
class Options:
    """What imagining costs."""

    output_dir: Path = Path("runs/benchmarks/rollout")
    """Where the results are left."""
    clips: int = 256
    """Futures imagined at once."""
    horizon: int = 100
    """Steps of each."""
    dimension: int = 64
    """Of the embeddings."""
    rounds: int = 3
    """Each measurement is repeated, in turns with its rival; medians are reported."""


@torch.no_grad()
def main(options: Options) -> None:
    """The story: each kind of predictor, then the table."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str | float]] = []
    for kind in NETWORKS:
        torch.manual_seed(0)
        predictor = Predictor(PredictorConfig(kind=kind), options.dimension, 10.0, "benchmark").eval()  # type: ignore[arg-type]
        past = torch.randn(options.clips, predictor.config.context, options.dimension)
        rollout(predictor, past, 2)  # warm up
        remembering, reading, halved = [], [], []
        for _ in range(options.rounds):
            remembering.append(seconds(lambda p=predictor, x=past: rollout(p, x, options.horizon)))  # type: ignore[misc]
            with torch.autocast("cpu", torch.bfloat16):
                halved.append(seconds(lambda p=predictor, x=past: rollout(p, x, options.horizon)))  # type: ignore[misc]
            if kind in REACH:
                reach = REACH[kind](predictor.config)
                reading.append(seconds(lambda p=predictor, x=past, r=reach: read_again(p, x, options.horizon, r)))  # type: ignore[misc]
        cost = statistics.median(remembering)
        rows.append(
            {
                "kind": kind,
                "seconds": cost,
                "seconds without state": statistics.median(reading) if reading else "",
                "times faster": statistics.median(reading) / cost if reading else "",
                "imagined frames a second": options.clips * options.horizon / cost,
                "the same in bf16": options.clips * options.horizon / statistics.median(halved),
                "MB held at once, 100 steps": memory_mb(predictor, past, 100),
                "MB held at once, 400 steps": memory_mb(predictor, past, 400),
                "MB returned, 100 steps": options.clips * 100 * options.dimension * 4 / 1e6,
            }
        )
    write_json(options.output_dir / "results.json", rows)
    print(f"{options.clips} clips, {options.horizon} steps, {torch.get_num_threads()} threads\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{cell:,.1f}" if isinstance(cell, float) else cell for cell in row.values()) + " |")


def read_again(predictor: Predictor, past: Tensor, horizon: int, reach: int) -> Tensor:
    """The same rollout without any state: at each step the last `reach` embeddings again."""
    sequence = past
    for _ in range(horizon):
        sequence = torch.cat([sequence, predictor(sequence[:, -reach:])], dim=1)
    return sequence[:, past.shape[1] :]


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    gc.collect()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def memory_mb(predictor: Predictor, past: Tensor, horizon: int) -> float:
    """The most memory that tensors of one rollout hold at the same time, in MB, what it returns included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        rollout(predictor, past, horizon)
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


if __name__ == "__main__":
    run_stage(main, Options)
