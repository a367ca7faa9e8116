"""Still images with labels: an ImageFolder (`PATH/class/**/*.jpg`), or a zip of one.

Where the classes lie one level deeper, under `train` and `test` (or `val`), the split is chosen by name, and what lies
beside these folders is left alone. A data set that fits in memory is decoded once, and may lie on a GPU; a larger one
is decoded batch by batch.
"""

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
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
        ImageError: there are none, or the path or the split is not there.
        VideoError: the zip file is damaged.
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
    names = [name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts)]
    known = {name for names_of_split in SPLITS.values() for name in names_of_split}
    folders = {parts[:2] for name in names if len(parts := PurePosixPath(name).parts) > 2}
    if len({first for first, _ in folders}) == 1 and any(second in known for _, second in folders):
        path, names = _enter(path, names, next(iter(folders))[0])  # a folder around it all, as archives have
    firsts = {parts[0] for name in names if len(parts := PurePosixPath(name).parts) > 1}
    if firsts & known:
        own = [name for name in SPLITS[split] if name in firsts]
        if not own:
            raise ImageError(f"{path} holds {', '.join(sorted(firsts))}, and nothing to {split} on: name another path")
        path, names = _enter(path, names, own[0])
    if not names:
        raise ImageError(f"{path}: no images in it")
    names.sort()
    of_image = [PurePosixPath(name).parts[0] if "/" in name else "" for name in names]
    classes = sorted(set(of_image))
    number = {name: index for index, name in enumerate(classes)}
    return ImageList(path, tuple(names), torch.tensor([number[name] for name in of_image]), tuple(classes))


def _enter(path: Path, names: list[str], folder: str) -> tuple[Path, list[str]]:
    """A path one folder deeper, and the names inside that."""
    return path / folder, [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]


@dataclass
class Images:
    """The pixels of a list of images, all of one size: the shorter side is resized, what juts out is cut off.

    Raises:
        ImageError: no image could be decoded; with `strict`, one could not be.
    """

    found: ImageList
    size: FrameSize
    """(height, width)."""
    strict: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    """Why an image could not be decoded, by path. Batches show the image before it, or grey, in its place."""
    pixels: Tensor | None = None
    """uint8 (N, 3, H, W), once they have been loaded."""

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

    def labels(self, rows: Sequence[int]) -> Tensor:
        """int64, of some of the images after they have been read; -1 for those that others stand in for."""
        unknown = [f"{self.found.root}/{self.found.names[row]}" in self.refused for row in rows]
        return self.found.labels[torch.tensor(rows)].masked_fill(torch.tensor(unknown), -1)

    def _decode(self, name: str) -> np.ndarray | None:
        """Pixels (3, H, W) of an image; None, and a note, if it is damaged."""
        height, width = self.size
        try:
            with Image.open(self._content(name)) as image:
                pixels = Image.fromarray(to_rgb(ImageOps.exif_transpose(image)))
                fitted = ImageOps.fit(pixels, (width, height), Image.Resampling.BICUBIC)
        except Exception as error:  # damaged bytes make Pillow, zlib and zipfile raise errors of many kinds
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise  # no fault of the image
            reason = f"{self.found.root}/{name}: cannot be decoded ({error})"
            if self.strict:
                raise ImageError(reason) from error
            self.refused[f"{self.found.root}/{name}"] = reason
            return None
        return rearrange(np.asarray(fitted), "h w c -> c h w")

    def _content(self, name: str) -> BytesIO | Path:
        if self._archive is None:
            return self.found.root / name
        archive, inside = self._archive
        return BytesIO(archive.read((inside / name).as_posix()))

    @cached_property
    def _archive(self) -> tuple[zipfile.ZipFile, PurePosixPath] | None:
        """Opened once, which takes long for many files; threads may read from it side by side."""
        zipped = split_zip(self.found.root)
        return zipped and (zipfile.ZipFile(zipped[0]), PurePosixPath(zipped[1]))


def require_batch(images: Images, size: int) -> None:
    """Raises ImageError if there are fewer images than a batch of all ranks together."""
    if (count := len(images.found.names)) < size:
        raise ImageError(
            f"{images.found.root}: {count:,} images are fewer than a batch of {size:,}: "
            "lower --batch-size, or bring more"
        )


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
        require_batch(images, batch_size * ranks)
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
                yield Pairs(images, images, names, replace(self.state), self.images.labels(rows.tolist()))
            self.state = ClipsState(self.state.epoch + 1)
