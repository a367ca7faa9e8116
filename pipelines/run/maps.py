"""A map of embeddings in a plane, with what is known of each moment and its picture."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from einops import rearrange
from PIL import Image

from data.cache import EmbeddingCache
from data.errors import DataError
from data.files import apart
from data.frames import fitting_size, read_frames
from pipelines.run.command import imported, require

MapKind = Literal["pca", "umap"]
POINTS, ACROSS, THUMBNAIL = 600, 30, 64
"""Moments on a map, their pictures in a row of the sheet, and the longer side of one in pixels."""
LEAST = 5  # moments that UMAP finds neighbours among


def map_of(folder: Path, kind: MapKind = "pca") -> dict[str, Any]:
    """Places of moments, evenly over a cache, what they may be coloured by, and a sheet of their pictures in base64.

    Where videos are gone there are no pictures, and `said` says why. Raises `CacheError`, and
    `UserError` where what the map takes is not installed.
    """
    cache = EmbeddingCache(folder)
    rows = cache.rows[np.linspace(0, len(cache.rows) - 1, min(POINTS, len(cache.rows))).astype(int)]
    flat = cache.take(rows).reshape(len(rows), -1)
    flat = (flat - flat.mean(axis=0)) / np.maximum(flat.std(axis=0), 1e-6)
    places, how = project(flat, kind)
    sources = np.array([clip.key.source for clip in cache.clips])[cache.clip_of(rows)]
    colours = {"time in its video": cache.take(rows, "times_s"), "video": np.unique(sources, return_inverse=True)[1]}
    own = [name for name, column in cache.provenance.columns.items() if column.shape == ()]
    colours |= {shown: cache.take(rows, name) for shown, name in apart(own, colours).items()}
    sheet, size, said = BytesIO(), (0, 0), ""
    try:
        size = fitting_size(Path(sources[0]), cache.provenance, (THUMBNAIL, THUMBNAIL))
        frames = read_frames(cache, np.resize(rows, -(-len(rows) // ACROSS) * ACROSS), size, keep_shape=True)
        pixels = rearrange(frames, "(r a) c h w -> (r h) (a w) c", a=ACROSS)
        Image.fromarray(pixels).save(sheet, "JPEG", quality=60)
    except (DataError, OSError) as error:
        said = str(error)
    return {
        "x": places[:, 0], "y": places[:, 1], "how": how, "said": said,
        "colours": colours, "names": sources, "times_s": cache.take(rows, "times_s"), "size": size, "across": ACROSS,
        "sheet": base64.b64encode(sheet.getvalue()).decode(),
    }  # fmt: skip


def project(flat: np.ndarray, kind: MapKind) -> tuple[np.ndarray, str]:
    """Places (N, 2) of standardised embeddings (N, D), and how they were found. Raises `UserError`."""
    if kind == "umap":
        umap = imported("umap.umap_", "--map umap takes umap-learn: pip install 'video-jepa[umap]', or --map pca")
        require(len(flat) >= LEAST, f"--map umap takes {LEAST} moments, and there are {len(flat)}: take --map pca")
        near = umap.UMAP(n_neighbors=min(15, len(flat) - 1), random_state=0, n_jobs=1)  # by one thread: always the same
        return near.fit_transform(flat), "by UMAP: neighbours are alike; how far apart others lie says little"
    left, singular, _ = np.linalg.svd(flat, full_matrices=False)
    shares = singular**2 / max(float((singular**2).sum()), 1e-12)
    said = f"by their two first principal components, which have {100 * shares[:2].sum():.0f} % of the variance"
    places = left[:, :2] * singular[:2]
    return np.pad(places, ((0, 0), (0, 2 - places.shape[1]))), said  # one number, or one moment, lies on a line
