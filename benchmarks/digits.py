"""Moving MNIST as real videos: handwritten digits that bounce off the walls of a black box, not off each other.

Srivastava, Mansimov, Salakhutdinov 2015 (arXiv:1502.04681): two digits of 28 x 28 pixels in a frame of 64 x 64, each
in a direction of its own at a tenth of its span a frame; where they overlap, the brighter pixel is seen. As there,
digits lie on whole pixels, so that two frames tell the velocity only roughly.
"""

import csv
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import joblib
import numpy as np
from tqdm import tqdm

from data.synthetic import write_video

STATE_COLUMNS = ("digit_1_x", "digit_1_y", "digit_2_x", "digit_2_y")
SIZE, DIGIT_SIZE, SPEED = 64, 28, 3.6
"""Pixels: width and height of the box and of a digit, and the way of a digit in a frame."""
FPS = 10
VALIDATION_DIGITS = 5000
"""Digits of the 60,000 training digits, the last ones, that appear in no training clip."""


def read_digits(archive: Path) -> dict[str, np.ndarray]:
    """The digits of each split, `train`, `val` and `test`, uint8 (N, 28, 28); no digit is in two of them."""
    with np.load(archive) as images:
        train, test = images["train_images"], images["test_images"]
    return {"train": train[:-VALIDATION_DIGITS], "val": train[-VALIDATION_DIGITS:], "test": test}


def simulate_digits(frames: int, generator: np.random.Generator) -> np.ndarray:
    """Centres of two digits that the walls reflect, float64 (frames, 2, 2), x and y in pixels."""
    span = SIZE - DIGIT_SIZE
    angle = generator.uniform(0, 2 * np.pi, size=2)
    start, velocity = generator.uniform(0, span, size=(2, 2)), SPEED * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    # Reflection at both walls unfolds into a straight line through mirrored boxes.
    unfolded = (start + velocity * np.arange(frames)[:, None, None]) % (2 * span)
    return span - np.abs(span - unfolded) + DIGIT_SIZE / 2


def render_digits(centres: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """Digits uint8 (2, 28, 28) on black at the nearest whole pixels, uint8 (frames, 64, 64, 3)."""
    frames = np.zeros((len(centres), SIZE, SIZE), dtype=np.uint8)
    for frame, corners in zip(frames, np.rint(centres - DIGIT_SIZE / 2).astype(int), strict=True):
        for digit, (x, y) in zip(digits, corners, strict=True):
            under = frame[y : y + DIGIT_SIZE, x : x + DIGIT_SIZE]
            np.maximum(under, digit, out=under)
    return frames[..., None].repeat(3, axis=3)


def write_digit_clip(folder: Path, index: int, digits: np.ndarray, *, frames: int, seed: int) -> Path:
    """Write `clip_<index>.mp4` and, last, `clip_<index>.csv` with the centres in each frame."""
    path = folder / f"clip_{index:05d}.mp4"
    table = path.with_suffix(".csv")
    if not table.exists():
        centres = simulate_digits(frames, np.random.default_rng([seed, index]))
        write_video(path, render_digits(centres, digits), FPS)
        unfinished = table.with_suffix(".tmp")
        with unfinished.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["frame", "time_s", *STATE_COLUMNS])
            writer.writerows(
                [frame, f"{frame / FPS:.6f}", *both.ravel().round(4)] for frame, both in enumerate(centres)
            )
        unfinished.replace(table)
    return path


def write_digit_videos(folder: Path, clips: int, images: np.ndarray, *, frames: int, seed: int) -> list[Path]:
    """Write clips of digits drawn from `images`, uint8 (N, 28, 28), on all cores, going on where a run stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = images[np.random.default_rng(seed).integers(len(images), size=(clips, 2))]  # (clips, 2, 28, 28)
    write = partial(write_digit_clip, folder, frames=frames, seed=seed)
    with ProcessPoolExecutor(joblib.cpu_count()) as pool:
        written = pool.map(write, range(clips), drawn, chunksize=8)
        return list(tqdm(written, total=clips, unit="clip", desc=f"rendering {folder.name}", leave=False))
