r"""The whole journey on videos made here: bouncing balls, from frames to an imagined future.

  python pipelines/demo.py

Renders and encodes clips of two balls in front of flickering backgrounds, runs every stage on them by the very
commands that one runs on one's own videos, and draws the imagined future beside the real one. Interrupted, it goes on
where it was.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.embedding_cache import EmbeddingCache
from data.synthetic import BALL_COLOURS, STATE_COLUMNS, BallWorld, write_ball_videos
from data.video import read_on_clock
from jepa.predictor import Predictor
from jepa.probe import Probe
from jepa.skill import imagine
from pipelines.artefacts import load_predictor
from pipelines.evaluate_rollout import fit_probe_on
from pipelines.stage import LAUNCH, run_python, run_stage

SPLITS = {"train": 0, "val": 1, "test": 2}
SHOWN_CLIPS = 4
SCALE = 3
"""The videos are small: pictures show each pixel this many times."""


@dataclass(frozen=True)
class Options:
    """Bouncing balls, from videos to an imagined future."""

    output_dir: Path = Path("demo")
    """Where videos, caches, models and pictures are left."""
    train_clips: int = 1000
    """Clips to train on; a tenth as many, at most 100, are made for validation, and as many again for the test."""
    encoder_steps: int = 500
    """Optimiser steps of the encoder."""
    predictor_steps: int = 400
    """Optimiser steps of the predictor."""
    predictor_options: str = ""
    """Further options of train_predictor, as they stand on its command line."""
    seed: int = 0
    """Of the videos and of all stages."""


def main(options: Options) -> None:
    """The story: make videos, run the five stages, look at the imagined future."""
    folder, world = options.output_dir, BallWorld()
    videos = {split: folder / "videos" / split for split in SPLITS}
    for split, number in SPLITS.items():
        clips = options.train_clips if split == "train" else min(100, max(10, options.train_clips // 10))
        write_ball_videos(videos[split], clips, world, seed=3 * options.seed + number)

    launch, seed = LAUNCH.split(), ["--seed", str(options.seed)]
    encoder, predictor = folder / "encoder", folder / "predictor"
    clock: list[object] = ["--fps", str(world.fps)]
    stage(
        *launch, "pipelines/pretrain_encoder.py", "--videos", videos["train"], "--output-dir", encoder, *clock,
        "--steps", options.encoder_steps, "--resume", *seed, done=encoder / "metrics.json",
    )  # fmt: skip
    for split in SPLITS:
        stage(
            *launch, "pipelines/cache_embeddings.py", "--videos", videos[split], "--encoder", encoder / "encoder",
            "--output-dir", folder / "cache" / split, *clock, *seed,
        )  # fmt: skip
    stage(
        *launch, "pipelines/train_predictor.py", "--train-cache", folder / "cache" / "train", "--validation-cache",
        folder / "cache" / "val", "--output-dir", predictor, "--steps", options.predictor_steps, "--resume", *seed,
        *options.predictor_options.split(),
        done=predictor / "metrics.json",
    )  # fmt: skip
    stage(
        "python", "pipelines/evaluate_rollout.py", "--cache", folder / "cache" / "test", "--predictor",
        predictor / "predictor", "--output-dir", folder / "evaluation", "--probe-cache", folder / "cache" / "train",
        "--probe-columns", *STATE_COLUMNS, "--overwrite", *seed,
    )  # fmt: skip
    stage(
        "python", "pipelines/score_surprise.py", "--videos", videos["test"] / "clip_00000.mp4", "--encoder",
        encoder / "encoder", "--predictor", predictor / "predictor", "--output-dir", folder / "surprise",
        "--overwrite", *seed,
    )  # fmt: skip

    draw_futures(EmbeddingCache(folder / "cache" / "train"), EmbeddingCache(folder / "cache" / "test"),
                 load_predictor(predictor / "predictor"), folder, world)  # fmt: skip
    print(f"""
Look at {folder}/imagined_future.gif (and .png), {folder}/evaluation/rollout.png and {folder}/surprise/pictures.
On your own videos, in folders for training, validation and test:

  {LAUNCH} pipelines/pretrain_encoder.py --videos TRAIN --output-dir runs/encoder
  {LAUNCH} pipelines/cache_embeddings.py --videos TRAIN --encoder runs/encoder/encoder --output-dir cache/train
  (the same with VALIDATION to cache/val, and with TEST to cache/test)
  {LAUNCH} pipelines/train_predictor.py --train-cache cache/train --validation-cache cache/val
  python pipelines/evaluate_rollout.py --cache cache/test
  python pipelines/score_surprise.py --videos TEST""")


def stage(*words: object, done: Path | None = None) -> None:
    """Show a command and run it, unless what it leaves is already there; our own Python stands for `python`."""
    command = [str(word) for word in words]
    print(f"\n$ {' '.join(command)}", flush=True)
    if done is not None and done.exists():
        print("(already done)")
        return
    # `accelerate launch` by its other name, `accelerate-launch`, which starts two seconds sooner.
    if command[:2] == ["accelerate", "launch"]:
        run_python("-m", "accelerate.commands.launch", *words[2:])
    else:
        run_python(*words[1:])


def draw_futures(
    train: EmbeddingCache, test: EmbeddingCache, predictor: Predictor, folder: Path, world: BallWorld
) -> None:
    """Real clips above, below them what the model imagines after the first frames, as a moving and a still picture.

    Embeddings cannot be decoded to pixels; a linear probe reads the balls' positions off the imagined embeddings.
    """
    probe = fit_probe_on(train, STATE_COLUMNS, predictor)
    context = predictor.config.context
    columns = []
    for clip in test.clips[:SHOWN_CLIPS]:
        real = np.stack([timed.frame for timed in read_on_clock(Path(clip.key.source), (world.size,) * 2, world.fps)])
        embeddings = predictor.standardise(torch.from_numpy(test.clip_embeddings(clip)))
        imagined = draw_imagined(predictor, probe, embeddings, len(real), world)
        columns.append(np.concatenate([real.transpose(0, 2, 3, 1), imagined], axis=1))  # (T, 2 H, W, 3)
    film = np.concatenate(columns, axis=2)
    pictures = [Image.fromarray(frame.repeat(SCALE, axis=0).repeat(SCALE, axis=1)) for frame in film]
    pictures[0].save(
        folder / "imagined_future.gif", save_all=True, append_images=pictures[1:], duration=1000 // world.fps, loop=0
    )
    moments = [context - 1, *range(context + 1, min(len(film), context + 20), 3)]
    first_clip = film[moments][:, :, : world.size]
    sheet = np.concatenate(list(first_clip), axis=1)
    Image.fromarray(sheet.repeat(SCALE, axis=0).repeat(SCALE, axis=1)).save(folder / "imagined_future.png")


@torch.no_grad()
def draw_imagined(
    predictor: Predictor, probe: Probe, embeddings: torch.Tensor, frames: int, world: BallWorld
) -> np.ndarray:
    """Balls where the probe reads them: off true embeddings while the model watches, then off imagined ones.

    Returns:
        uint8 (frames, H, W, 3); the frames that the model has seen are grey behind, the imagined ones white.
    """
    context = predictor.config.context
    future = imagine(predictor, embeddings[None, :context], frames - context)[0]
    positions = probe(torch.cat([embeddings[:context], future])).reshape(frames, 2, 2).numpy()
    vertical, horizontal = np.mgrid[0 : world.size, 0 : world.size] + 0.5
    film = np.empty((frames, world.size, world.size, 3))
    for index, balls in enumerate(positions):
        film[index] = 0.75 if index < context else 1.0
        for (x, y), colour in zip(balls, BALL_COLOURS, strict=True):
            cover = np.clip(world.radius + 0.5 - np.hypot(horizontal - x, vertical - y), 0, 1)[..., None]
            film[index] = film[index] * (1 - cover) + colour * cover
    return (film * 255 + 0.5).astype(np.uint8)


if __name__ == "__main__":
    run_stage(main, Options)
