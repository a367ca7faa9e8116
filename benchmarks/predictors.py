r"""Which predictor for what? Every kind on the same embeddings, trained alike.

  python -m benchmarks.predictors --runs runs/benchmarks/balls/seed_0 runs/benchmarks/robot/published

Needs finished runs of `benchmarks/balls.py`, `robot.py`, `driving.py` or `percentiles.py` (the walkway), each with its
caches. For each run, kind of predictor (that of `examples/direct_predictor.py` among them) and seed: trains it with
default sizes and losses, or those of `--options`, and evaluates its forecasts on the test clips. Prints a table for
each run in Markdown and leaves `results.json`.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import (
    HORIZONS,
    SeedOptions,
    evaluate,
    forecasts,
    read_json,
    table_of_measures,
    train_on,
    write_results,
)  # fmt: skip
from jepa.config import PositiveInt
from pipelines.run.command import run_command

ANY_KIND = "examples/direct_predictor.py"
"""Runs a command that knows the example's kind beside those of `jepa/networks.py`."""


@dataclass(frozen=True, kw_only=True)
class Options(SeedOptions):
    """Every kind of predictor on the same embeddings."""

    runs: tuple[Path, ...]
    """Folders that hold `cache/train`, `cache/val` and `cache/test`."""
    kinds: tuple[str, ...] = ("mlp", "transformer", "direct")
    """Kinds of predictor."""
    steps: PositiveInt = 800
    """Optimiser steps of each."""
    options: str = ""
    """More options of `train_predictor`."""
    output_dir: Path = Path("runs/benchmarks/predictors")
    """Where all predictors and the results are left."""


def main(options: Options) -> None:
    """The story: train and evaluate each kind with each seed on each run, print."""
    results = {}
    for run in options.runs:
        found = {kind: [measure(run, kind, seed, options) for seed in options.seeds] for kind in options.kinds}
        results[str(run)] = found
        print(f"\n{run}\n\n{table_of_measures(found)}")
    write_results(options.output_dir, results)


def measure(run: Path, kind: str, seed: int, options: Options) -> dict[str, float]:
    """What one kind reaches on the test clips."""
    folder = options.output_dir / f"{run.parent.name}_{run.name}" / f"predictor_{kind}_{seed}"
    given = {"predictor.kind": kind, "steps": options.steps, "seed": seed}
    train_on(run / "cache", folder, given, options.options.split(), command=f"{ANY_KIND} train_predictor")
    evaluation = evaluate(run / "cache", folder, command=f"{ANY_KIND} evaluate_rollout")
    errors = forecasts(evaluation, "relative_to_copy_last")
    return {"training: seconds": float(read_json(folder / "metrics.json")["seconds"])} | {
        f"{name}, {horizon} ahead, of copying": error
        for name in ("model", "ridge")
        for horizon, error in zip(HORIZONS, errors[name], strict=True)
    }


if __name__ == "__main__":
    run_command(main, Options)
