r"""Bouncing balls, several seeds: what the recipe reaches on clips that were never looked at.

  python -m benchmarks.balls --seeds 0 1 2

For each seed: what the demo does with more clips and steps; videos, models and test clips are of that seed. In the
table of positions the row `truth` is read off the embeddings of true frames. Other benchmarks go on from here.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Figures, Recipe, SeedOptions, figures, make_model, measure_seeds
from data.synthetic import STATE_COLUMNS, BallWorld, write_ball_videos
from pipelines.run.command import run_command

CLIPS = {"train": 4000, "val": 100, "test": 100}
RECIPE = Recipe(
    fps=BallWorld().fps,
    encoder={"steps": 1500},
    predictor={"steps": 4500, "precision": "bf16", "rollout-steps": 5, "log-every": 500},
    columns=STATE_COLUMNS,
)
"""What ten minutes of training on 2 cores allow; the demo has less time."""


@dataclass(frozen=True)
class Options(SeedOptions):
    """Bouncing balls, several seeds."""

    output_dir: Path = Path("runs/benchmarks/balls")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: each seed, then tables over seeds."""
    measure_seeds(options, measure)


def measure(seed: int, folder: Path) -> Figures:
    """All figures of one seed."""
    videos = {split: folder / "videos" / split for split in CLIPS}
    for number, (split, clips) in enumerate(CLIPS.items()):
        write_ball_videos(videos[split], clips, BallWorld(), seed=3 * seed + number)
    evaluation = make_model(folder, videos, RECIPE, seed)
    return figures(evaluation, "relative_to_ridge", "relative_to_mean", "probe_r2")


if __name__ == "__main__":
    run_command(main, Options)
