r"""Futures that cannot be known: balls that leave walls at random angles, several seeds.

  python -m benchmarks.stochastic_walls --seeds 0 1 2 --runs runs/benchmarks/balls

Uses the encoders of `benchmarks/balls.py` (`RUNS/seed_N/encoder/encoder`). For each seed: videos of its own with random
walls, cached; a predictor with a latent, and one without, trained alike; on the test clips the sampled futures of the
one against a plain Gaussian around the forecasts of the other. Prints a table in Markdown and writes `results.json`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import evaluate, read_json, run, table_of_measures, train
from data.synthetic import BallWorld, write_ball_videos
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json

CLIPS = {"train": 4000, "val": 200, "test": 1000}
TRAINING = {"steps": 5000, "precision": "bf16"}
PREDICTORS = {"latent": {"predictor.latent-dimension": 16}, "point": {}}
HORIZONS = (1, 5, 10, 20)
SAMPLES = 32
WIDEST_BOUNCE = np.pi / 3
"""A ball leaves a wall within this angle of the wall's normal, in radians."""


class RandomWalls(BallWorld):
    """Balls that leave walls at a random angle, their speed kept.

    The angle is uniform within `WIDEST_BOUNCE` of the wall's inward normal; in a corner, of the diagonal between both
    normals, as far as that leads into the box.
    """

    def leave_walls(
        self, velocity: np.ndarray, below: np.ndarray, above: np.ndarray, generator: np.random.Generator
    ) -> np.ndarray:
        """Velocities (2, 2) after the walls."""
        if not (below | above).any():
            return velocity
        inward = below.astype(float) - above  # (balls, 2), the sum of the normals
        widest = np.where((inward != 0).all(axis=1), np.pi / 4, WIDEST_BOUNCE)
        angle = np.arctan2(inward[:, 1], inward[:, 0]) + generator.uniform(-widest, widest)
        speed = np.linalg.norm(velocity, axis=1)
        leaving = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return np.where((below | above).any(axis=1, keepdims=True), leaving, velocity)


@dataclass(frozen=True)
class Options:
    """Sampled futures where chance decides, several seeds."""

    seeds: tuple[int, ...] = (0,)
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
    results = [measure_seed(seed, options) for seed in options.seeds]
    write_json(options.output_dir / "results.json", results)
    print(table_of_measures({"": results}))


def measure_seed(seed: int, options: Options) -> dict[str, float]:
    """All figures of one seed."""
    folder = options.output_dir / f"seed_{seed}"
    world = RandomWalls()
    for number, (split, clips) in enumerate(CLIPS.items()):
        write_ball_videos(folder / "videos" / split, clips, world, seed=5000 + 3 * seed + number)
        run("cache_embeddings", {"videos": folder / "videos" / split, "fps": world.fps},
            {"encoder": options.runs / f"seed_{seed}" / "encoder" / "encoder"},
            "--output-dir", folder / "cache" / split)  # fmt: skip
    caches = {"train-cache": folder / "cache" / "train", "validation-cache": folder / "cache" / "val"}
    measures = {}
    for name, extra in PREDICTORS.items():
        seconds = train("train_predictor", folder / f"predictor_{name}", caches, TRAINING, extra, {"seed": seed})
        measures |= {} if seconds is None else {f"training, {name}: seconds": seconds}
        evaluate(folder / "cache", folder / f"predictor_{name}", {"samples": SAMPLES, "seed": seed})
    sampled, point = (read_json(folder / f"evaluation_{name}" / "rollout.json")["predictors"] for name in PREDICTORS)
    for horizon in HORIZONS:
        ours, plain = sampled["model"][horizon - 1], point["model"][horizon - 1]
        measures |= {
            f"horizon {horizon}: energy score, model": ours["energy_score"],
            f"horizon {horizon}: energy score, Gaussian": plain["energy_score"],
            f"horizon {horizon}: model of Gaussian": ours["energy_score"] / plain["energy_score"],
            f"horizon {horizon}: central 50 %, model": ours["coverage_50"],
            f"horizon {horizon}: central 90 %, model": ours["coverage_90"],
        }
    return measures


if __name__ == "__main__":
    run_command(main, Options)
