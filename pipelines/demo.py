r"""The whole journey on videos made here: bouncing balls, from frames to an imagined future.

  video-jepa demo

Renders and encodes clips of two balls in front of flickering backgrounds, runs every stage on them by the very
commands that one runs on one's own videos, draws the imagined future beside the real one, and ends with a page about it
all, `report/report.html`. Interrupted, it goes on where it was.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.cache import EmbeddingCache
from data.clock import read_on_clock
from data.synthetic import BALL_COLOURS, STATE_COLUMNS, BallWorld, write_ball_videos
from jepa.calibration import Calibration
from jepa.config import Bounded, NotNegativeInt, PositiveInt
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence
from pipelines.run.command import run_command
from pipelines.run.evaluation import Readout, fit_readout
from pipelines.run.journey import Given, run_journey
from pipelines.run.models import load_predictor

SPLITS = {"train": 0, "val": 1, "test": 2}
SHOWN_CLIPS = 4
SCALE = 3
"""The videos are small: pictures show each pixel this many times."""


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
        "train": {"steps": options.predictor_steps},
    }  # fmt: skip
    run_journey(
        folder, videos, given, fps=world.fps, seed=options.seed, columns=STATE_COLUMNS,
        shown=tuple(videos["test"] / f"clip_{number:05d}.mp4" for number in range(SHOWN_CLIPS)), is_opened=options.open,
    )  # fmt: skip
    caches = folder / "cache"
    draw_futures(EmbeddingCache(caches / "train"), EmbeddingCache(caches / "test"), folder / "predictor", folder=folder)
    print(f"""and at {folder}/imagined_future.gif. The same page about your own videos:

  video-jepa all VIDEOS --output-dir runs --open""")


def draw_futures(train: EmbeddingCache, test: EmbeddingCache, predictor_folder: Path, *, folder: Path) -> None:
    """Real clips above, below them what the model imagines after the first frames, as a moving and a still picture.

    Embeddings cannot be decoded to pixels; a linear probe reads the balls' positions off the imagined embeddings.
    """
    predictor, calibration = load_predictor(predictor_folder)
    world, readout = BallWorld(), fit_readout(train, STATE_COLUMNS, predictor)
    columns = []
    for clip in test.clips[:SHOWN_CLIPS]:
        source, size = Path(clip.key.source), (world.size, world.size)
        real = np.stack([timed.frame for timed in read_on_clock(source, size, fps=world.fps)])
        embeddings = torch.from_numpy(test.clip_embeddings(clip))[: len(real)]
        imagined = draw_imagined(predictor, calibration, embeddings, readout=readout)
        columns.append(np.concatenate([real.transpose(0, 2, 3, 1), imagined], axis=1))  # (T, 2 H, W, 3)
    film = np.concatenate(columns, axis=2).repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    first, *others = map(Image.fromarray, film)
    first.save(folder / "imagined_future.gif", save_all=True, append_images=others, duration=1000 // world.fps, loop=0)
    context = predictor.config.context
    moments = [context - 1, *range(context + 1, min(len(film), context + 20), 3)]
    sheet = np.concatenate(list(film[moments][:, :, : SCALE * world.size]), axis=1)
    Image.fromarray(sheet).save(folder / "imagined_future.png")


@torch.no_grad()
def draw_imagined(
    predictor: Predictor, calibration: Calibration, embeddings: torch.Tensor, *, readout: Readout
) -> np.ndarray:
    """Balls where the probe reads them: off true embeddings while the model watches, then off the believed forecast.

    Returns:
        uint8 (frames, H, W, 3); the frames that the model has seen are grey behind, the imagined ones white.
    """
    world, context, frames = BallWorld(), predictor.config.context, len(embeddings)
    past, future = embeddings[:context], Future.ticks(frames - context, predictor.fps)
    believed = rollout(predictor, Sequence.on_clock(past[None], predictor.fps), future, calibration=calibration)[0]
    read = readout.probe(predictor.standardise(torch.cat([past, believed])))
    positions = read.reshape(frames, 2, 2, 1, 1).numpy()
    vertical, horizontal = np.mgrid[0 : world.size, 0 : world.size] + 0.5
    distance = np.hypot(horizontal - positions[:, :, 0], vertical - positions[:, :, 1])  # (frames, balls, H, W)
    covers = np.clip(world.radius + 0.5 - distance, 0, 1)[..., None]
    film = np.where(np.arange(frames) < context, 0.75, 1.0)[:, None, None, None]
    for ball, colour in enumerate(BALL_COLOURS):
        film = film * (1 - covers[:, ball]) + colour * covers[:, ball]
    return (film * 255 + 0.5).astype(np.uint8)


if __name__ == "__main__":
    run_command(main, Options)
