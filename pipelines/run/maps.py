"""A map of embeddings: two principal components, with what is known of each moment and its picture."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image

from data.cache import EmbeddingCache
from data.errors import DataError
from data.frames import fitting_size, read_frames

POINTS, ACROSS, THUMBNAIL = 600, 30, 64
"""Moments on a map, their pictures in a row of the sheet, and the longer side of one in pixels."""


def map_of(folder: Path) -> dict[str, Any]:
    """Places of moments, evenly over a cache, what they may be coloured by, and a sheet of their pictures in base64.

    Where videos are gone there are no pictures, and `said` says why. Raises `CacheError`.
    """
    cache = EmbeddingCache(folder)
    rows = cache.rows[np.linspace(0, len(cache.rows) - 1, min(POINTS, len(cache.rows))).astype(int)]
    flat = cache.take(rows).reshape(len(rows), -1)
    flat = (flat - flat.mean(axis=0)) / np.maximum(flat.std(axis=0), 1e-6)
    left, singular, _ = np.linalg.svd(flat, full_matrices=False)
    shares = singular**2 / max(float((singular**2).sum()), 1e-12)
    sources = np.array([clip.key.source for clip in cache.clips])[cache.clip_of(rows)]
    colours = {"time in its video": cache.take(rows, "times_s"), "video": np.unique(sources, return_inverse=True)[1]}
    colours |= {name: cache.take(rows, name) for name in cache.provenance.columns if name != "embeddings"}
    sheet, size, said = BytesIO(), (0, 0), ""
    try:
        size = fitting_size(Path(sources[0]), cache.provenance, THUMBNAIL)
        frames = read_frames(cache, np.resize(rows, -(-len(rows) // ACROSS) * ACROSS), size)
        pixels = rearrange(frames, "(r a) c h w -> (r h) (a w) c", a=ACROSS)
        Image.fromarray(pixels).save(sheet, "JPEG", quality=60)
    except (DataError, OSError) as error:
        said = str(error)
    return {
        "x": left[:, 0] * singular[0], "y": left[:, 1] * singular[1], "share": float(shares[:2].sum()), "said": said,
        "colours": colours, "names": sources, "times_s": cache.take(rows, "times_s"), "size": size, "across": ACROSS,
        "sheet": base64.b64encode(sheet.getvalue()).decode(),
    }  # fmt: skip
