"""Still images with labels: an ImageFolder (`PATH/class/**/*.jpg`), or a zip of one.

Where the classes lie one level deeper, under `train` and `test` (or `val`), the split is chosen by name. A data set
that fits in memory is decoded once, and may lie on a GPU; a larger one is decoded batch by batch.
"""

import os
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from data.frames import ClipsState, Pairs
from data.image_sequence import is_image, split_zip, to_rgb, zipped_images
from data.map_ahead import map_ahead
from data.video import FrameSize

Split = Literal["train", "test"]
SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train", "training"), "test": ("test", "val", "validation")}


class ImageError(Exception):
    """Images that cannot be used; the message names the path and the reason."""


@dataclass(frozen=True)
class ImageList:
    """Which images there are, and what they show."""

    root: Path
    """The folder or the zip file (or a folder inside it) that names are relative to."""
    names: tuple[str, ...]
    labels: Tensor
    """int64 (N,), which of the classes."""
    classes: tuple[str, ...]
    """Names of the folders."""


def find_images(path: Path, split: Split) -> ImageList:
    """All images under a folder or inside a zip, sorted; their first folder is their class.

    Raises:
        ImageError: there are none, the path or the split is not there, or the zip file is damaged.
    """
    zipped = split_zip(path)
    if zipped is not None:
        archive, inside = zipped
        prefix = "" if inside == "." else f"{inside}/"
        names = [name.removeprefix(prefix) for name in zipped_images(archive) if name.startswith(prefix)]
    elif path.is_dir():
        names = [
            (Path(folder) / name).relative_to(path).as_posix()
            for folder, _, files in os.walk(path, followlinks=True)
            for name in files
            if is_image(name)
        ]
    else:
        raise ImageError(f"{path}: there is no folder of images and no zip file here")
    firsts = {PurePosixPath(name).parts[0] for name in names}
    known = {name for names_of_split in SPLITS.values() for name in names_of_split}
    if names and firsts <= known:
        own = [name for name in SPLITS[split] if name in firsts]
        if not own:
            raise ImageError(f"{path} holds {', '.join(sorted(firsts))}, and nothing to {split} on: name another path")
        path /= own[0]
        names = [name.removeprefix(f"{own[0]}/") for name in names if name.startswith(f"{own[0]}/")]
    if not names:
        raise ImageError(f"{path}: no images in it")
    names.sort()
    of_image = [PurePosixPath(name).parts[0] if "/" in name else "" for name in names]
    classes = sorted(set(of_image))
    number = {name: index for index, name in enumerate(classes)}
    return ImageList(path, tuple(names), torch.tensor([number[name] for name in of_image]), tuple(classes))


@dataclass
class Images:
    """The pixels of a list of images, all of one size: the shorter side is resized, what juts out is cut off.

    Raises:
        ImageError: from `load`, no image could be decoded.
    """

    found: ImageList
    size: FrameSize
    """(height, width)."""
    refused: dict[str, str] = field(default_factory=dict)
    """Why an image could not be decoded, by name. Batches show the image before it, or grey, in its place."""
    pixels: Tensor | None = None
    """uint8 (N, 3, H, W), once they have been loaded."""

    def __post_init__(self) -> None:
        self._local = threading.local()

    def keep(self, rows: Sequence[int]) -> None:
        """Leave out all but some of them, before they are loaded."""
        names = tuple(self.found.names[row] for row in rows)
        self.found = replace(self.found, names=names, labels=self.found.labels[torch.tensor(rows)])

    @property
    def bytes_needed(self) -> int:
        """By the pixels of all images."""
        return 3 * self.size[0] * self.size[1] * len(self.found.names)

    def load(self, device: torch.device, workers: int | None = None, progress: bool = True) -> None:
        """Decode all images, leave out those that cannot be, and keep the others on a device."""
        names = self.found.names
        pixels = np.empty((len(names), 3, *self.size), np.uint8)
        kept: list[int] = []
        bar = tqdm(names, unit="image", desc="decoding images", leave=False, disable=not progress)
        for index, image in enumerate(map_ahead(self._decode, bar, workers)):
            if image is not None:
                pixels[len(kept)] = image
                kept.append(index)
        if not kept:
            raise ImageError(f"{self.found.root}: none of its {len(names):,} images can be decoded")
        self.keep(kept)
        self.pixels = torch.from_numpy(pixels[: len(kept)]).to(device)

    def read(self, rows: Sequence[int], workers: int | None = None) -> Tensor:
        """Some of the images, uint8 (len(rows), 3, H, W), on the device that they were loaded to, or on the CPU."""
        if self.pixels is not None:
            return self.pixels[torch.as_tensor(rows, device=self.pixels.device)]
        pixels = np.full((len(rows), 3, *self.size), 128, np.uint8)
        for index, image in enumerate(map_ahead(self._decode, [self.found.names[row] for row in rows], workers)):
            pixels[index] = pixels[max(0, index - 1)] if image is None else image
        return torch.from_numpy(pixels)

    def _decode(self, name: str) -> np.ndarray | None:
        """Pixels (3, H, W) of an image; None, and a note, if it is damaged."""
        height, width = self.size
        try:
            with Image.open(self._content(name)) as image:
                pixels = Image.fromarray(to_rgb(ImageOps.exif_transpose(image)))
                fitted = ImageOps.fit(pixels, (width, height), Image.Resampling.BICUBIC)
        except Exception as error:  # damaged bytes make Pillow, zlib and zipfile raise errors of many kinds
            self.refused[f"{self.found.root}/{name}"] = f"{self.found.root}/{name}: cannot be decoded ({error})"
            return None
        return rearrange(np.asarray(fitted), "h w c -> c h w")

    def _content(self, name: str) -> BytesIO | Path:
        zipped = split_zip(self.found.root)
        if zipped is None:
            return self.found.root / name
        archive, inside = zipped
        if not hasattr(self._local, "archive"):  # one for each thread: they seek
            self._local.archive = zipfile.ZipFile(archive)
        return BytesIO(self._local.archive.read((PurePosixPath(inside) / name).as_posix()))


class ImagePairs:
    """Endless batches of images, each a pair with itself, in the form of `data.frames.FramePairs`.

    The order is a pure function of (seed, epoch); each rank takes its own part of every batch. What fills no whole
    batch at the end of an epoch is left out.

    Args:
        images: loaded or not.
        batch_size: on this rank.
        seed: of the order.
        rank: this process.
        ranks: number of processes.
        workers: threads that decode.

    Raises:
        ImageError: there are fewer images than one batch on all ranks.
    """

    def __init__(
        self, images: Images, batch_size: int, seed: int, rank: int = 0, ranks: int = 1, workers: int | None = None
    ) -> None:
        count = len(images.found.names)
        if count < batch_size * ranks:
            raise ImageError(
                f"{images.found.root}: {count:,} images are fewer than a batch of {batch_size * ranks:,}: "
                "lower --batch-size, or bring more"
            )
        self.images, self.batch_size, self.seed, self.rank, self.ranks = images, batch_size, seed, rank, ranks
        self.workers = workers
        self.state = ClipsState()

    def close(self) -> None:
        """No further batch is wanted."""

    def __iter__(self) -> Iterator[Pairs]:
        count = len(self.images.found.names)
        while True:
            order = np.random.default_rng([self.seed, self.state.epoch]).permutation(count)
            while self.state.batch < count // (self.batch_size * self.ranks):
                rows = order[(self.state.batch * self.ranks + self.rank) * self.batch_size :][: self.batch_size]
                images = self.images.read(rows.tolist(), self.workers)
                self.state.batch += 1
                names = tuple(self.images.found.root / self.images.found.names[row] for row in rows)
                yield Pairs(images, images, names, replace(self.state), self.images.found.labels[rows])
            self.state = ClipsState(self.state.epoch + 1)
