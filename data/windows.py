"""Windows of cached embeddings: what a predictor is trained and judged on.

A window is a run of embeddings on consecutive ticks of one clip: it never crosses a clip or a gap in time.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from data.embedding_cache import CachedClip, CacheError, EmbeddingCache


class Windows:
    """All windows of one length in a cache.

    Args:
        cache: the embeddings.
        length: embeddings in a window.
        stride: ticks between the beginnings of windows.

    Raises:
        CacheError: no clip is long enough for a single window.
    """

    def __init__(self, cache: EmbeddingCache, length: int, stride: int = 1) -> None:
        self.cache, self.length = cache, length
        starts, clips = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        longest = 0
        for index, clip in enumerate(cache.clips):
            for run in cache.unbroken_runs(clip):
                longest = max(longest, len(run))
                found = run[: max(0, len(run) - length + 1) : stride]
                starts.append(found)
                clips.append(np.full(len(found), index))
        self.starts = np.concatenate(starts)
        """int64 (windows,): row of each window's first embedding."""
        self.clips = np.concatenate(clips)
        """int64 (windows,): index into `cache.clips`."""
        if len(self.starts) == 0:
            fps = cache.provenance.fps
            raise CacheError(
                f"no clip in {cache.folder} is long enough: a window takes {length} embeddings "
                f"({length / fps:.1f} s at {fps:g} fps), the longest unbroken clip has {longest}; "
                "bring longer videos, or lower the context or the horizon"
            )

    def __len__(self) -> int:
        return len(self.starts)

    def by_clip(self) -> list[slice]:
        """The windows of each clip that has any, as slices of all; within a clip they are in the order of time."""
        edges = np.flatnonzero(np.diff(self.clips, prepend=-1, append=-1))
        return [slice(*ends) for ends in pairwise(edges.tolist())]

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows in the cache of the given windows, (N,) -> (N, length)."""
        return self.starts[indices][:, None] + np.arange(self.length)

    def take(self, indices: np.ndarray) -> Tensor:
        """The given windows, (N,) -> float32 (N, length, D), gathered at once."""
        # Gathered as stored and converted by torch: half the bytes to gather, and NumPy is slow with float16.
        return torch.from_numpy(self.cache.windows(self.starts[indices], self.length)).float()

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, list[CachedClip]]:
        """`count` windows drawn uniformly with replacement, float32 (count, length, D), and the clips they are from."""
        drawn = torch.randint(len(self), (count,), generator=generator).numpy()
        return self.take(drawn), [self.cache.clips[clip] for clip in np.unique(self.clips[drawn])]
