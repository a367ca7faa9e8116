"""Moving MNIST as real videos: handwritten digits that bounce off the walls of a black box, not off each other.

Srivastava, Mansimov, Salakhutdinov 2015 (arXiv:1502.04681): two digits of 28 x 28 pixels in a frame of 64 x 64, each
in a direction of its own at a tenth of its span a frame; where they overlap, the brighter pixel is seen. As there,
digits lie on whole pixels, so that two frames tell the velocity only roughly. The frames are encoded to H.264 mp4
files; beside each lies a CSV with the true state of every frame.
"""

import csv
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import joblib
import numpy as np
from tqdm import tqdm

from data.synthetic import write_video

STATE_COLUMNS = ("digit_1_x", "digit_1_y", "digit_2_x", "digit_2_y")
VELOCITY_COLUMNS = ("digit_1_vx", "digit_1_vy", "digit_2_vx", "digit_2_vy")
DIGIT_SIZE = 28
"""Width and height of an MNIST image in pixels."""
VALIDATION_DIGITS = 5000
"""Of the 60,000 training digits, the last so many appear in no training clip."""


@dataclass(frozen=True)
class DigitWorld:
    """The box and the digits. Lengths are in pixels, speeds in pixels per frame."""

    size: int = 64
    """Width and height of the box and of the video, in pixels."""
    speed: float = 3.6
    """Of each digit, in pixels per frame: a tenth of the 36 pixels that it can move in the box of 64."""
    frames: int = 20
    """Frames in a clip."""
    fps: int = 10
    """Frame rate of the video."""


def read_digits(archive: Path) -> dict[str, np.ndarray]:
    """The digits of each split, `train`, `val` and `test`, uint8 (N, 28, 28); no digit is in two of them.

    Args:
        archive: an npz with `train_images` and `test_images`.
    """
    with np.load(archive) as images:
        train, test = images["train_images"], images["test_images"]
    return {"train": train[:-VALIDATION_DIGITS], "val": train[-VALIDATION_DIGITS:], "test": test}


def simulate_digits(world: DigitWorld, generator: np.random.Generator) -> np.ndarray:
    """Simulate two digits that the walls reflect.

    Returns:
        float64 (frames, 2, 4): x, y of the centre in pixels and vx, vy in pixels per frame, of each digit in each
        frame.
    """
    span = world.size - DIGIT_SIZE
    start = generator.uniform(0, span, size=(2, 2))
    angle = generator.uniform(0, 2 * np.pi, size=2)
    velocity = world.speed * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    # Reflection at both walls unfolds into a straight line through mirrored boxes.
    unfolded = (start + velocity * np.arange(world.frames)[:, None, None]) % (2 * span)  # (frames, 2, 2)
    position = span - np.abs(span - unfolded)
    return np.concatenate([position + DIGIT_SIZE / 2, np.where(unfolded < span, velocity, -velocity)], axis=2)


def render_digits(states: np.ndarray, digits: np.ndarray, world: DigitWorld) -> np.ndarray:
    """Draw digits on black, at the nearest whole pixels.

    Args:
        states: (frames, 2, 4) as from `simulate_digits`.
        digits: uint8 (2, 28, 28).
        world: the world that `states` came from.

    Returns:
        uint8 (frames, size, size, 3), RGB.
    """
    frames = np.zeros((len(states), world.size, world.size), dtype=np.uint8)
    corners = np.rint(states[:, :, :2] - DIGIT_SIZE / 2).astype(int)  # (frames, 2, 2)
    for frame, both in zip(frames, corners, strict=True):
        for digit, (x, y) in zip(digits, both, strict=True):
            under = frame[y : y + DIGIT_SIZE, x : x + DIGIT_SIZE]
            np.maximum(under, digit, out=under)
    return frames[..., None].repeat(3, axis=3)


def write_digit_clip(folder: Path, index: int, digits: np.ndarray, world: DigitWorld, seed: int) -> Path:
    """Simulate, render and encode one clip of the given digits, uint8 (2, 28, 28); write its state beside it.

    Leaves `clip_<index>.mp4` and `clip_<index>.csv` (`frame,time_s`, positions in pixels, velocities in pixels
    per frame). The CSV is written last, so a clip that has one is whole.
    """
    path = folder / f"clip_{index:05d}.mp4"
    if path.with_suffix(".csv").exists():
        return path
    states = simulate_digits(world, np.random.default_rng([seed, index]))
    write_video(path, render_digits(states, digits, world), world.fps)
    unfinished = path.with_suffix(".csv.tmp")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["frame", "time_s", *STATE_COLUMNS, *VELOCITY_COLUMNS])
        for frame, both in enumerate(states):
            values = [*both[:, :2].ravel(), *both[:, 2:].ravel()]
            writer.writerow([frame, f"{frame / world.fps:.6f}", *(f"{value:.4f}" for value in values)])
    unfinished.replace(path.with_suffix(".csv"))
    return path


def write_digit_videos(folder: Path, clips: int, images: np.ndarray, world: DigitWorld, seed: int) -> list[Path]:
    """Write `clips` clips into `folder` on all cores, continuing where an interrupted run stopped.

    The digits are drawn from `images`, uint8 (N, 28, 28). The clips of one seed are the same on every machine and
    for every number of cores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = images[np.random.default_rng(seed).integers(len(images), size=(clips, 2))]  # (clips, 2, 28, 28)
    write = partial(write_digit_clip, folder, world=world, seed=seed)
    with ProcessPoolExecutor(joblib.cpu_count()) as pool:
        written = pool.map(write, range(clips), drawn, chunksize=8)
        return list(tqdm(written, total=clips, unit="clip", desc=f"rendering {folder.name}", leave=False))
