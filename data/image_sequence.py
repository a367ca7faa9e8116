"""A folder of numbered images as a video: `frames/000001.jpg ...`.

Images have no times, so the rate is given. Where all names end in a number, a missing number is a gap in time; numbers
that go up in steps (every fifth frame) count as consecutive.
"""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image, ImageOps

from data.decoder import Damage, Decoder, VideoError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
FEWEST_IMAGES = 2


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not Path(name).name.startswith(".")


class ImageSequenceDecoder(Decoder):
    """Images one after the other, `fps` of them in a second; every one can be skipped to. Raises `VideoError`."""

    def __init__(self, path: Path, fps: float, damage: Damage | None) -> None:
        super().__init__(path, damage)
        names = list(filter(is_image, os.listdir(path)))
        if len(names) < FEWEST_IMAGES:
            raise VideoError(f"{path}: not a readable video, but a folder with {len(names)} images in it")
        self.names, self.times_s = _in_order(names, fps)
        self.position = 0
        self.codec, self.seekable, self.average_fps = "images", True, fps
        self.header_duration_s = float(self.times_s[-1]) + 1 / fps
        self.keyframes_s = tuple(self.times_s.tolist())

    def __exit__(self, *error: object) -> None:
        """Each image is closed once it is read."""

    def __next__(self) -> tuple[VideoFrame, float]:
        while self.position < len(self.names):
            name, time_s = self.names[self.position], float(self.times_s[self.position])
            self.position += 1
            try:
                with Image.open(self.path / name) as image:
                    pixels = _to_rgb(ImageOps.exif_transpose(image))
            except Exception as error:  # damaged bytes make Pillow raise errors of many kinds
                self.note(f"image {name} cannot be decoded ({error})")
                continue
            return VideoFrame.from_ndarray(pixels, format="rgb24"), time_s
        raise StopIteration

    def skip_to(self, time_s: float) -> bool:
        target = int(np.searchsorted(self.times_s, time_s, side="right")) - 1
        is_ahead = target > self.position
        self.position = max(target, self.position)
        return is_ahead


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Pixels (height, width, 3), uint8."""
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of kind {image.mode}, whose range is not known")
    if image.mode.startswith("I;16"):  # Pillow would clip, not scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def _in_order(names: list[str], fps: float) -> tuple[list[str], np.ndarray]:
    """Names in the order of their numbers, and their times, float64 (T,), in seconds from the first."""
    numbers = {int(match[1]): name for name in names if (match := re.search(r"(\d+)$", Path(name).stem))}
    if len(numbers) < len(names):  # some have none, or two the same
        return sorted(names), np.arange(len(names)) / fps
    order = np.array(sorted(numbers))
    step = Counter(np.diff(order).tolist()).most_common(1)[0][0]
    return [numbers[number] for number in sorted(numbers)], (order - order[0]) / step / fps
