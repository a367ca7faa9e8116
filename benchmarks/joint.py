r"""Encoder and predictor trained together, or fine-tuned together, beside the two stages: the same balls and test.

  python benchmarks/joint.py --seeds 0 1 2 --run runs/benchmarks/balls --output-dir runs/benchmarks/joint

`--run` is what benchmarks/balls.py has left: videos and models of each seed, trained in two stages. Here the same
videos are trained on jointly from scratch, and the models of the two stages are fine-tuned end to end. Either way
embeddings are cached anew, the predictor is calibrated on them (`train_predictor --initial-predictor`, without a
step), and rollouts on the test clips are evaluated. Prints a table in Markdown and writes `results.json`.

Errors relative to copying are in each encoder's own space; across encoders compare what the probes read.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.synthetic import STATE_COLUMNS, BallWorld
from pipelines.seed_tables import print_by_contestant
from pipelines.stage import require, run_python, run_stage, write_json

HORIZONS = (1, 5, 10, 20)
Figures = dict[str, float]


@dataclass(frozen=True)
class Options:
    """Joint training and fine-tuning beside two stages."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the runs to compare with; ours take the same."""
    run: Path = Path("runs/benchmarks/balls")
    """Holds seed_0 and so on, each with videos, encoder, cache and predictor."""
    steps: int = 1000
    """Optimiser steps of joint training from scratch."""
    tuning_steps: int = 300
    """Optimiser steps of fine-tuning."""
    tuning_learning_rate: float = 5e-4
    """Of the predictor while fine-tuning."""
    encoder_learning_rate_factor: float = 0.2
    """Times that, for the encoder."""
    output_dir: Path = Path("runs/benchmarks/joint")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: for each seed train jointly, fine-tune, evaluate all alike; print."""
    for seed in options.seeds:
        two_stages = options.run / f"seed_{seed}"
        require(
            (two_stages / "predictor" / "metrics.json").exists(), f"{two_stages}: benchmarks/balls.py makes a run here"
        )
    results: dict[str, list[Figures]] = {"two stages": [], "joint": [], "fine-tuned": []}
    for seed in options.seeds:
        two_stages, folder = ((base / f"seed_{seed}").absolute() for base in (options.run, options.output_dir))
        encoder, predictor = two_stages / "encoder" / "encoder", two_stages / "predictor" / "predictor"
        tuning: list[object] = [
            "--steps", options.tuning_steps, "--encoder-weights", encoder, "--predictor-weights", predictor,
            "--optimizer.learning-rate", options.tuning_learning_rate, "--encoder-learning-rate-factor",
            options.encoder_learning_rate_factor,
        ]  # fmt: skip
        results["two stages"].append(evaluate(two_stages / "cache", predictor, folder / "two_stages", seed))
        results["joint"].append(measure(two_stages / "videos", folder / "joint", seed, ["--steps", options.steps]))
        results["fine-tuned"].append(measure(two_stages / "videos", folder / "tuned", seed, tuning))
    write_json(options.output_dir / "results.json", results)
    print_by_contestant(results, list(results["two stages"][0]))


def measure(videos: Path, folder: Path, seed: int, training: list[object]) -> Figures:
    """Train by these options on the videos of a run, cache, calibrate, evaluate; what has been trained stays."""
    cache, clock = folder / "cache", ("--fps", BallWorld().fps, "--seed", seed)
    if not (folder / "metrics.json").exists():
        run_python(
            "pipelines/train_jointly.py", "--videos", videos / "train", "--output-dir", folder, "--resume", *clock,
            *training,
        )  # fmt: skip
    for split in ("train", "val", "test"):
        run_python(
            "pipelines/cache_embeddings.py", "--videos", videos / split, "--encoder", folder / "encoder",
            "--output-dir", cache / split, *clock,
        )  # fmt: skip
    run_python(
        "pipelines/train_predictor.py", "--train-cache", cache / "train", "--validation-cache", cache / "val",
        "--initial-predictor", folder / "predictor", "--steps", 0, "--output-dir", folder / "calibrated",
        "--overwrite", "--seed", seed,
    )  # fmt: skip
    return evaluate(cache, folder / "calibrated" / "predictor", folder / "evaluation", seed)


def evaluate(cache: Path, predictor: Path, folder: Path, seed: int) -> Figures:
    """What a predictor reaches on the test clips."""
    run_python(
        "pipelines/evaluate_rollout.py", "--cache", cache / "test", "--predictor", predictor, "--output-dir", folder,
        "--probe-cache", cache / "train", "--probe-columns", *STATE_COLUMNS, "--overwrite", "--seed", seed,
    )  # fmt: skip
    results = json.loads((folder / "rollout.json").read_text())
    model = results["predictors"]["model"]
    found = {"position R2 of true embeddings": float(np.mean(results["truth"][0]["probe_r2"]))}
    for horizon in HORIZONS:
        found[f"horizon {horizon}: of copy-last"] = model[horizon - 1]["relative_to_copy_last"]
        found[f"horizon {horizon}: position R2"] = float(np.mean(model[horizon - 1]["probe_r2"]))
    return found


if __name__ == "__main__":
    run_stage(main, Options)
