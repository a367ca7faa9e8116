r"""The whole journey on videos made here: bouncing balls, from frames to an imagined future.

  video-jepa demo

Renders clips of two balls in front of flickering backgrounds, and runs `video-jepa all` on them, as one runs it on
one's own videos: it encodes them, trains, evaluates, films the imagined future beside the real one, and ends with a
page about it all, `report/report.html`. Interrupted, it goes on where it was.
"""

from dataclasses import dataclass
from pathlib import Path

from data.synthetic import STATE_COLUMNS, BallWorld, write_ball_videos
from jepa.config import Bounded, NotNegativeInt, PositiveInt
from pipelines.run.command import run_command
from pipelines.run.stages import run_stage


@dataclass(frozen=True)
class Options(Bounded):
    """Bouncing balls, from videos to an imagined future."""

    output_dir: Path = Path("demo")
    """Where videos, caches and models are left."""
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
    """Make videos, run all commands on them."""
    folder, world = options.output_dir.absolute(), BallWorld()
    for number, split in enumerate(("train", "val", "test")):
        clips = options.train_clips if split == "train" else min(100, max(10, options.train_clips // 10))
        write_ball_videos(folder / "balls" / split, clips, world, seed=3 * options.seed + number)
    run_stage("all", {
        "": folder / "balls", "output-dir": folder, "fps": world.fps, "columns": STATE_COLUMNS,
        "encoder-steps": options.encoder_steps, "predictor-steps": options.predictor_steps,
        "decoder-steps": options.decoder_steps, "seed": options.seed, "open": options.open,
    })  # fmt: skip
    print("The same page about your own videos:\n\n  video-jepa all VIDEOS --output-dir runs --open")


if __name__ == "__main__":
    run_command(main, Options)
