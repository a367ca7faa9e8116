"""A folder of images as a video: `frames/000001.jpg ...`.

Their order, and their times where they have any, are told by their names (`data.image_order`). Where a number counts, a
missing one is a gap in time, the rate is given, and the most usual step from image to image is one.
"""

import errno
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from av.video.frame import VideoFrame
from PIL import UnidentifiedImageError

from data.decoder import Damage, Decoder
from data.errors import VideoError
from data.image_order import order_of
from data.picture import is_image, read_image

FEWEST_IMAGES = 2
OF_THE_IMAGE = (None, errno.ELOOP, errno.ENOENT)
"""Errors that are damage: of what it holds, and that it is gone. That it may not be read is the machine's."""


class ImageSequenceDecoder(Decoder):
    """Images one after the other, `fps` of them in a second unless their names are times; all can be skipped to.

    Raises `VideoError` where there are fewer than two images, or their names do not tell their order.
    """

    def __init__(self, path: Path, fps: float, damage: Damage | None) -> None:
        super().__init__(path, damage)
        self.names, times, are_seconds = _images_in(path, path.stat().st_mtime_ns)
        self.times_s = times if are_seconds else times / fps
        self.average_fps = 1 / float(np.median(np.diff(times))) if are_seconds else fps
        self.at_image_fps = not are_seconds
        in_names = f"its images are shown at the times that are their names, over {self.times_s[-1]:,.2f} s"
        self.assumed = in_names if are_seconds else f"{fps:g} images a second, for their names are no times"
        self.position = 0
        self.codec = "images"
        self.header_duration_s = float(self.times_s[-1]) + 1 / self.average_fps
        self.keyframes_s = tuple(self.times_s.tolist())

    def __exit__(self, *error: object) -> None:
        """Each image is closed once it is read."""

    def __next__(self) -> tuple[VideoFrame, float]:
        while self.position < len(self.names):
            name, time_s = self.names[self.position], float(self.times_s[self.position])
            self.position += 1
            try:
                pixels = read_image(self.path / name)
            except Exception as error:  # damaged bytes make Pillow raise errors of many kinds
                number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
                if number not in OF_THE_IMAGE:
                    raise OSError(number, os.strerror(number), str(self.path / name)) from error
                reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
                self.note(f"image {name} cannot be decoded ({getattr(error, 'strerror', None) or reason})")
                continue
            return VideoFrame.from_ndarray(pixels, format="rgb24"), time_s
        raise StopIteration

    def skip_to(self, time_s: float) -> bool:
        target = int(np.searchsorted(self.times_s, time_s, side="right")) - 1
        is_ahead = target > self.position
        self.position = max(target, self.position)
        return is_ahead


@lru_cache(maxsize=8)  # a video is opened for each minute of it
def _images_in(path: Path, modified_ns: int) -> tuple[list[str], np.ndarray, bool]:
    """`order_of` the images in a folder that was last changed at a time."""
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if is_image(entry.name) and not entry.is_dir(follow_symlinks=False)]
    if len(names) < FEWEST_IMAGES:
        raise VideoError(f"{path}: not a readable video, but a folder with {len(names)} images in it")
    try:
        return order_of(names)
    except ValueError as error:
        raise VideoError(f"{path}: {error}") from error
