r"""Which predictor for what? Every kind on the same embeddings, trained alike.

  python -m benchmarks.predictors --runs runs/benchmarks/balls/seed_0 runs/benchmarks/robot/seed_0

Needs finished runs of `benchmarks/balls.py`, `robot.py`, `driving.py` or `percentiles.py` (the walkway), each with its
caches. For each run, kind of predictor (that of `examples/direct_predictor.py` among them) and seed: trains it with
default sizes and losses, or those of `--options`, and evaluates its forecasts on the test clips. Prints a table for
each run in Markdown and writes `results.json`.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import evaluate, forecasts, read_json, table_of_measures, train
from jepa.config import Bounded, PositiveInt
from pipelines.run.command import run_command
from pipelines.run.files import write_json

HORIZONS = (1, 5, 10, 20)
ANY_KIND = "examples/direct_predictor.py"
"""Runs a command that knows the example's kind beside those of `jepa/networks.py`."""


@dataclass(frozen=True)
class Options(Bounded):
    """Every kind of predictor on the same embeddings."""

    runs: tuple[Path, ...]
    """Folders that hold `cache/train`, `cache/val` and `cache/test`."""
    kinds: tuple[str, ...] = ("mlp", "transformer", "gru", "direct")
    """Kinds of predictor."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the weights and the windows; the embeddings are the same."""
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
    write_json(options.output_dir / "results.json", results)


def measure(run: Path, kind: str, seed: int, options: Options) -> dict[str, float]:
    """What one kind reaches on the test clips."""
    folder = options.output_dir / f"{run.parent.name}_{run.name}" / f"predictor_{kind}_{seed}"
    caches = {"train-cache": run / "cache" / "train", "validation-cache": run / "cache" / "val"}
    train(f"{ANY_KIND} train_predictor", folder, caches, {"predictor.kind": kind, "steps": options.steps, "seed": seed},
          options.options.split())  # fmt: skip
    evaluate(run / "cache", folder, command=f"{ANY_KIND} evaluate_rollout")
    evaluation = folder.with_name(folder.name.replace("predictor", "evaluation"))
    figures = {"training: seconds": float(read_json(folder / "metrics.json")["seconds"])}
    for name in ("model", "ridge"):
        for horizon, error in zip(
            HORIZONS, forecasts(evaluation, "relative_to_copy_last", HORIZONS)[name], strict=True
        ):
            figures[f"{name}, {horizon} ahead, of copying"] = error
    return figures


if __name__ == "__main__":
    run_command(main, Options)
