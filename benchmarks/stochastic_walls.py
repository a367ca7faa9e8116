r"""Futures that cannot be known: balls that leave walls at random angles, several seeds.

  python benchmarks/stochastic_walls.py --seeds 0 1 2 --runs runs/benchmarks/balls

Uses the encoders of `benchmarks/balls.py` (`RUNS/seed_N/encoder/encoder`). For each seed: videos of its own with random
walls, cached; a predictor with a latent, and one without, trained alike; on the test clips the sampled futures of the
one against a plain Gaussian around the rollouts of the other (`pipelines/evaluate_samples.py`). Prints a table in
Markdown and writes `results.json`.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.synthetic import BallWorld, write_ball_videos
from pipelines.stage import require, run_python, run_stage, write_json

CLIPS = {"train": 4000, "val": 200, "test": 1000}
STRIDE = 2
"""Test moments are this many steps apart: intervals are over clips, and moments of one clip are much alike."""
TRAINING = ["--steps", 5000, "--compute.precision", "bf16"]
LATENT = ["--predictor.latent-dimension", 16]


@dataclass(frozen=True)
class Options:
    """Sampled futures where chance decides, several seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each makes its own videos and predictors."""
    runs: Path = Path("runs/benchmarks/balls")
    """Where benchmarks/balls.py left its runs: the encoder of the same seed is used."""
    output_dir: Path = Path("runs/benchmarks/stochastic_walls")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: run each seed, gather, print."""
    for seed in options.seeds:
        encoder = options.runs / f"seed_{seed}" / "encoder" / "encoder"
        require(encoder.is_dir(), f"{encoder}: there is no encoder: run benchmarks/balls.py first")
    runs = [measure_seed(seed, options) for seed in options.seeds]
    write_json(options.output_dir / "results.json", runs)
    print("| measure | mean | range |\n| --- | --- | --- |")
    for name in dict.fromkeys(name for run in runs for name in run):
        values = [float(run[name]) for run in runs if name in run]  # training is timed where it ran from the beginning
        print(f"| {name} | {np.mean(values):.3f} | {min(values):.3f} to {max(values):.3f} |")


def measure_seed(seed: int, options: Options) -> dict[str, Any]:
    """All figures of one seed, flat."""
    folder = (options.output_dir / f"seed_{seed}").absolute()
    encoder = (options.runs / f"seed_{seed}" / "encoder" / "encoder").absolute()
    world = BallWorld(walls="random")
    for number, (split, clips) in enumerate(CLIPS.items()):
        write_ball_videos(folder / "videos" / split, clips, world, seed=5000 + 3 * seed + number)
        run_python(
            "pipelines/cache_embeddings.py", "--videos", folder / "videos" / split, "--encoder", encoder, "--fps",
            world.fps, "--output-dir", folder / "cache" / split,
        )  # fmt: skip
    caches = ["--train-cache", folder / "cache" / "train", "--validation-cache", folder / "cache" / "val"]
    results: dict[str, Any] = {}
    for name, extra in {"latent": LATENT, "point": []}.items():
        started, fresh = time.monotonic(), not (folder / name).exists()
        if not (folder / name / "metrics.json").exists():
            run_python(
                "pipelines/train_predictor.py", *caches, "--output-dir", folder / name, "--seed", seed, "--resume",
                *TRAINING, *extra,
            )  # fmt: skip
        if fresh:
            results[f"training, {name}: seconds"] = time.monotonic() - started
    run_python(
        "pipelines/evaluate_samples.py", "--cache", folder / "cache" / "test", "--validation-cache",
        folder / "cache" / "val", "--predictor", folder / "latent" / "predictor", "--point-predictor",
        folder / "point" / "predictor", "--seed", seed, "--stride", STRIDE, "--output-dir", folder / "samples",
        "--overwrite",
    )  # fmt: skip
    found = json.loads((folder / "samples" / "samples.json").read_text())
    for horizon in (1, 5, 10, 20):
        ours, plain = found["model"][horizon - 1], found["gaussian"][horizon - 1]
        apart = ours["energy_score_interval"][1] < plain["energy_score_interval"][0]
        results |= {
            f"horizon {horizon}: energy score, model": ours["energy_score"],
            f"horizon {horizon}: energy score, Gaussian": plain["energy_score"],
            f"horizon {horizon}: model of Gaussian": ours["energy_score_relative_to_gaussian"],
            f"horizon {horizon}: upper end of that": ours["energy_score_relative_to_gaussian_interval"][1],
            f"horizon {horizon}: intervals apart (1 = yes)": float(apart),
            f"horizon {horizon}: best of 32, model of Gaussian": ours["best_of"] / plain["best_of"],
            **{
                f"horizon {horizon}: central {share}, {name}": record[f"coverage_{share}"]
                for share in ("50%", "90%")
                for name, record in (("model", ours), ("Gaussian", plain))
            },
        }
    return results


if __name__ == "__main__":
    run_stage(main, Options)
