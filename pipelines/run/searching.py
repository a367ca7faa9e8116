"""Search in a cache: the embeddings nearest to others, exact, in memory that does not depend on its size."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.cache import EmbeddingCache
from jepa.diagnostics import floor_std
from jepa.search import nearest
from pipelines.run.caches import BATCH_NUMBERS, require_finite

BLOCK = 4096  # embeddings that are compared with each other at a time, at most


class Search:
    """Nearest embeddings of a cache, each feature in units of its standard deviation."""

    def __init__(self, cache: EmbeddingCache, *, mean: Tensor, std: Tensor) -> None:
        self.cache, self.rows, self.mean, self.std = cache, cache.rows, mean.cpu(), std.cpu()
        sources = [clip.key.source for clip in cache.clips]
        self.videos = np.unique(sources, return_inverse=True)[1][cache.clip_of(self.rows)]
        self.middles: Tensor | None = None
        self.size = max(1, min(BLOCK, BATCH_NUMBERS // int(np.prod(cache.shape))))

    @classmethod
    def within(cls, cache: EmbeddingCache) -> "Search":
        """In units of the cache's own standard deviations, of frames evenly over it."""
        rows = cache.rows[np.linspace(0, len(cache.rows) - 1, min(BLOCK, len(cache.rows))).astype(int)]
        some = require_finite(cache, torch.from_numpy(cache.take(rows))).flatten(0, -2)
        return cls(cache, mean=some.mean(dim=0), std=floor_std(some.std(dim=0, correction=0)))

    def standardise(self, embeddings: Tensor) -> Tensor:
        """(N, *tokens, D) -> (N, tokens x D)."""
        return ((embeddings.cpu() - self.mean) / self.std).flatten(1)

    def blocks(self, doing: str = "") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Standardised embeddings, their rows and their videos' numbers, of the whole cache."""
        for start in tqdm(range(0, len(self.rows), self.size), doing, unit="block", leave=False, disable=not doing):
            part = slice(start, start + self.size)
            taken = require_finite(self.cache, torch.from_numpy(self.cache.take(self.rows[part])))
            videos = torch.from_numpy(self.videos[part])
            embeddings = self.standardise(taken)
            embeddings = embeddings if self.middles is None else embeddings - self.middles[videos]
            yield embeddings, torch.from_numpy(self.rows[part]), videos

    def centre(self) -> None:
        """From now on embeddings of the cache are those around their video's mean."""
        frames = torch.from_numpy(np.bincount(self.videos))
        middles = torch.zeros(len(frames), int(np.prod(self.cache.shape)))
        for embeddings, _, videos in self.blocks("measuring"):
            middles.index_add_(0, videos, embeddings / frames[videos, None])
        self.middles = middles

    def near(self, queries: Tensor, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows (Q, most) of the embeddings nearest to others (Q, *tokens, D)."""
        parts = [nearest(part, self.blocks(), most) for part in self.standardise(queries).split(self.size)]
        distances, rows = (torch.cat(part) for part in zip(*parts, strict=True))
        return distances.numpy(), rows.numpy()

    def to_others(self, most: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Block by block places in `rows`, and distances and rows (N, most) of the nearest of other videos."""
        first = 0
        for queries, _, videos in self.blocks("searching"):
            distances, rows = nearest(queries, self.blocks(), most, groups=videos)
            yield np.arange(first, first + len(queries)), distances.numpy(), rows.numpy()
            first += len(queries)
