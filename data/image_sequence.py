"""A folder of numbered images, or a zip of such folders, as a video: `frames/000001.jpg ...`.

Images have no times, so the rate is given. Where all names end in a number, a missing number is a gap in time; numbers
that go up in steps (every fifth frame) count as consecutive.
"""

import os
import re
import zipfile
from collections import Counter
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from av.video.frame import VideoFrame
from PIL import Image, ImageOps

from data.decoder import Damage, Decoder, VideoError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
FEWEST_IMAGES = 2


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not Path(name).name.startswith(".")


def is_image_sequence(path: Path) -> bool:
    """Whether a path is a folder or a zip (or a folder inside a zip), and so not a video file."""
    return path.is_dir() or split_zip(path) is not None


def split_zip(path: Path) -> tuple[Path, PurePosixPath] | None:
    """(zip file, folder inside) of a path such as `frames.zip/clip_1`; None if there is no zip file in it."""
    for parent in (path, *path.parents):
        if parent.suffix.lower() == ".zip" and parent.is_file():
            return parent, PurePosixPath(path.relative_to(parent))
    return None


def find_zipped_sequences(path: Path) -> list[Path]:
    """The folders of images inside a zip file, as `frames.zip/folder`; there may be none. Raises `VideoError`."""
    with _open_zip(path) as archive:
        counts = Counter(PurePosixPath(name).parent for name in archive.namelist() if is_image(name))
    return sorted(path / folder for folder, images in counts.items() if images >= FEWEST_IMAGES)


class ImageSequenceDecoder(Decoder):
    """Images one after the other, `fps` of them in a second; every one can be skipped to. Raises `VideoError`."""

    def __init__(self, path: Path, fps: float, damage: Damage | None) -> None:
        super().__init__(path, damage)
        split = split_zip(path)
        self.archive = _open_zip(split[0]) if split else None
        names = list(filter(is_image, self.archive.namelist() if self.archive else os.listdir(path)))
        if split:
            names = [name for name in names if PurePosixPath(name).parent == split[1]]
        if len(names) < FEWEST_IMAGES:
            raise VideoError(f"{path}: not a readable video, but a folder with {len(names)} images in it")
        self.names, self.times_s = _in_order(names, fps)
        self.position = 0
        self.codec, self.seekable, self.average_fps = "images", True, fps
        self.header_duration_s = float(self.times_s[-1]) + 1 / fps
        self.keyframes_s = tuple(self.times_s.tolist())

    def __exit__(self, *error: object) -> None:
        if self.archive is not None:
            self.archive.close()

    def __next__(self) -> tuple[VideoFrame, float]:
        while self.position < len(self.names):
            name, time_s = self.names[self.position], float(self.times_s[self.position])
            self.position += 1
            try:
                content = BytesIO(self.archive.read(name)) if self.archive else self.path / name
                with Image.open(content) as image:
                    pixels = _to_rgb(ImageOps.exif_transpose(image))
            except Exception as error:  # damaged bytes make Pillow, zlib and zipfile raise errors of many kinds
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


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise VideoError(f"{path}: not a readable zip file ({error})") from error


def _in_order(names: list[str], fps: float) -> tuple[list[str], np.ndarray]:
    """Names in the order of their numbers, and their times, float64 (T,), in seconds from the first."""
    numbers = {int(match[1]): name for name in names if (match := re.search(r"(\d+)$", PurePosixPath(name).stem))}
    if len(numbers) < len(names):  # some have none, or two the same
        return sorted(names), np.arange(len(names)) / fps
    order = np.array(sorted(numbers))
    step = Counter(np.diff(order).tolist()).most_common(1)[0][0]
    return [numbers[number] for number in sorted(numbers)], (order - order[0]) / step / fps
