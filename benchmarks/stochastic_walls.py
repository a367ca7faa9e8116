r"""Futures that cannot be known: balls that leave walls at random angles, several seeds.

  python -m benchmarks.stochastic_walls --seeds 0 1 2 --runs runs/benchmarks/balls

Uses the encoders of `benchmarks/balls.py` (`RUNS/seed_N/encoder/encoder`). For each seed: videos of its own with random
walls, cached; a predictor with a latent, and one without, trained alike; on the test clips the sampled futures of the
one against a plain Gaussian around the forecasts of the other.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import Figures, Recipe, SeedOptions, embed, evaluate, forecasts, measure_seeds, train_on
from data.synthetic import BallWorld, write_ball_videos
from pipelines.run.command import run_command

CLIPS = {"train": 4000, "val": 200, "test": 1000}
TRAINING = {"steps": 5000, "precision": "bf16", "log-every": 500}
PREDICTORS = {"latent": {"predictor.latent-dimension": 16}, "point": {}}
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
class Options(SeedOptions):
    """Sampled futures where chance decides, several seeds."""

    runs: Path = Path("runs/benchmarks/balls")
    """Where benchmarks/balls.py left its runs: the encoder of the same seed is used."""
    output_dir: Path = Path("runs/benchmarks/stochastic_walls")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: each seed, then tables over seeds."""

    def measure(seed: int, folder: Path) -> Figures:
        videos = {split: folder / "videos" / split for split in CLIPS}
        for number, (split, clips) in enumerate(CLIPS.items()):
            write_ball_videos(videos[split], clips, RandomWalls(), seed=5000 + 3 * seed + number)
        embed(folder / "cache", videos, options.runs / f"seed_{seed}" / "encoder", Recipe(RandomWalls().fps))
        scores = {}
        for name, extra in PREDICTORS.items():
            train_on(folder / "cache", folder / f"predictor_{name}", TRAINING, extra, {"seed": seed})
            given = {"samples": SAMPLES, "seed": seed}
            scores[name] = evaluate(folder / "cache", folder / f"predictor_{name}", given)
        ours, plain = (forecasts(evaluation, "energy_score")["model"] for evaluation in scores.values())
        held = {name: forecasts(scores["latent"], name)["model"] for name in ("coverage_50", "coverage_90")}
        energies = {"energy score": ours, "of Gaussian": (np.array(ours) / plain).tolist()}
        return Figures({"sampled futures": energies | held}, {})

    measure_seeds(options, measure)


if __name__ == "__main__":
    run_command(main, Options)
