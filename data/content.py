"""What tells a video from all others, wherever it lies."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from data.picture import is_image

STRETCH, STRETCH_OF_IMAGE, DIGITS = 1 << 15, 1 << 10, 32
"""Bytes at the beginning, in the middle and at the end of a file by which its content is told, of images fewer."""


def content_of(path: Path, *, of_all: bool = False, stretch: int = STRETCH) -> str:
    """What tells a video from others wherever it lies, or `OSError`: a hash.

    It is taken of a file's size and of stretches at its beginning, in its middle and at its end, or of all of it, twice
    as long; of a folder's names of images, and of each image in the same way.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for image in sorted(image for image in path.iterdir() if is_image(image.name) and image.is_file()):
            digest.update(os.fsencode(image.name))
            with suppress(OSError):  # one image never costs the others
                digest.update(content_of(image, of_all=of_all, stretch=STRETCH_OF_IMAGE).encode())
    else:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for begin in (0, max(0, (size - stretch) // 2), max(0, size - stretch)):
                file.seek(begin)
                digest.update(file.read(stretch))
            if of_all:
                file.seek(0)
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[: 2 * DIGITS if of_all else DIGITS]


def is_content_of(path: Path, content: str) -> bool:
    """Whether a video holds what it was told by, be it all of it; or `OSError`."""
    return content_of(path, of_all=len(content) > DIGITS) == content
