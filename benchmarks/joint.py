r"""Encoders trained with a prediction term beside those without: the same balls, caches, predictors and test.

  python -m benchmarks.joint --seeds 0 1 2 --run runs/benchmarks/balls --output-dir runs/benchmarks/joint

`--run` is what benchmarks/balls.py has left: videos and models of each seed. Here encoders are trained on the same
videos with `--prediction-weight`, on as many frames a step; embeddings are cached, predictors trained and evaluated as
ever. Errors relative to copying are in each encoder's own space; across encoders compare what the probes read.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Recipe, forecasts, make_model, table_of_measures
from data.synthetic import STATE_COLUMNS, BallWorld
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json

HORIZONS = (1, 5, 10, 20)


@dataclass(frozen=True)
class Options:
    """Encoders with and without a prediction term."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs to compare with; ours take the same."""
    run: Path = Path("runs/benchmarks/balls")
    """Folder with seed_0 and so on, each with videos and evaluation."""
    weights: tuple[float, ...] = (1.0, 25.0)
    """Prediction weights."""
    batch_size: int = 21
    """Clips of 12 frames in a batch: as many frames as in the pairs of the others."""
    output_dir: Path = Path("runs/benchmarks/joint")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: for each seed and weight make a model, gather, print."""
    results: dict[str, list[dict[str, float]]] = {"without": []}
    for seed in options.seeds:
        others = options.run / f"seed_{seed}"
        require((others / "evaluation" / "rollout.json").exists(), f"{others}: benchmarks/balls.py makes a run here")
        results["without"].append(figures(others / "evaluation"))
        videos = {split: others / "videos" / split for split in ("train", "val", "test")}
        for weight in options.weights:
            folder = options.output_dir / f"seed_{seed}" / f"weight_{weight:g}"
            encoder = {"prediction-weight": weight, "batch-size": options.batch_size}
            make_model(folder, videos, Recipe(BallWorld().fps, encoder, columns=STATE_COLUMNS), seed)
            results.setdefault(f"weight {weight:g}", []).append(figures(folder / "evaluation"))
    write_json(options.output_dir / "results.json", results)
    print(table_of_measures(results))


def figures(evaluation: Path) -> dict[str, float]:
    """What a predictor reaches on the test clips."""
    skill = forecasts(evaluation, "relative_to_copy_last", HORIZONS)["model"]
    position = forecasts(evaluation, "probe_r2", HORIZONS)["model"]
    return {f"horizon {horizon}: {name}": values[at] for at, horizon in enumerate(HORIZONS)
            for name, values in (("of copy-last", skill), ("position R2", position))}  # fmt: skip


if __name__ == "__main__":
    run_command(main, Options)
