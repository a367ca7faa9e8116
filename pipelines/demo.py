r"""The whole journey on videos made here: bouncing balls, from frames to an imagined future.

  video-jepa demo

Renders and encodes clips of two balls in front of flickering backgrounds, runs every stage on them by the very
commands that one runs on one's own videos, films the imagined future beside the real one, and ends with a page about it
all, `report/report.html`. Interrupted, it goes on where it was.
"""

from dataclasses import dataclass
from pathlib import Path

from data.synthetic import STATE_COLUMNS, BallWorld, write_ball_videos
from jepa.config import Bounded, NotNegativeInt, PositiveInt
from pipelines.run.command import run_command
from pipelines.run.journey import Given, run_journey

SPLITS = {"train": 0, "val": 1, "test": 2}
SHOWN_CLIPS = 4


@dataclass(frozen=True)
class Options(Bounded):
    """Bouncing balls, from videos to an imagined future."""

    output_dir: Path = Path("demo")
    """Where videos, caches, models and pictures are left."""
    train_clips: PositiveInt = 1000
    """Clips to train on; a tenth as many, at most 100, are made for validation, and as many again for the test."""
    encoder_steps: PositiveInt = 500
    """Optimiser steps of the encoder."""
    predictor_steps: PositiveInt = 400
    """Optimiser steps of the predictor."""
    decoder_steps: PositiveInt = 500
    """Optimiser steps of the decoder, through which one sees what the predictor imagines."""
    seed: NotNegativeInt = 0
    """Seed of the videos and of all commands."""
    open: bool = False
    """Open the page in a browser at the end."""


def main(options: Options) -> None:
    """Make videos, run the commands on them, look at the imagined future."""
    folder, world = options.output_dir.absolute(), BallWorld()
    videos = {split: folder / "videos" / split for split in SPLITS}
    for split, number in SPLITS.items():
        clips = options.train_clips if split == "train" else min(100, max(10, options.train_clips // 10))
        write_ball_videos(videos[split], clips, world, seed=3 * options.seed + number)

    given: dict[str, Given] = {
        "pretrain": {"steps": options.encoder_steps}, "embed": {}, "images": {}, "evaluate": {},
        "train": {"steps": options.predictor_steps}, "train-decoder": {"steps": options.decoder_steps},
    }  # fmt: skip
    run_journey(
        folder, videos, given, fps=world.fps, seed=options.seed, columns=STATE_COLUMNS,
        shown=tuple(videos["test"] / f"clip_{number:05d}.mp4" for number in range(SHOWN_CLIPS)), is_opened=options.open,
    )  # fmt: skip
    print("The same page about your own videos:\n\n  video-jepa all VIDEOS --output-dir runs --open")


if __name__ == "__main__":
    run_command(main, Options)
