"""Which embeddings are held out or drawn together: those of one video or, where videos are few, of one stretch of it.

Neighbouring frames are nearly equal; to count or to test them one by one would flatter every result.
"""

import math
from itertools import groupby

import numpy as np

from data.embedding_cache import EmbeddingCache


def group_rows(cache: EmbeddingCache, stretch_s: float = math.inf) -> np.ndarray:
    """The group of each row in a cache: one for each video, all phases together, or for each of its stretches.

    Args:
        cache: the embeddings.
        stretch_s: into stretches of this length each video is cut, in seconds; whole by default.

    Returns:
        int64 (rows,); -1 for rows that belong to no clip.
    """
    groups = np.full(len(cache.times_s), -1)
    first = 0
    for _, clips in groupby(cache.clips, key=lambda clip: clip.key.source):
        rows = np.concatenate([np.arange(clip.start, clip.start + clip.frames) for clip in clips])
        groups[rows] = first + (cache.times_s[rows] // stretch_s).astype(int)
        first = int(groups[rows].max()) + 1
    return groups


def stretch_for(cache: EmbeddingCache, groups: int) -> float:
    """Length of the stretches, in seconds, that make about so many groups; infinite if there are as many videos."""
    ends_s = {
        source: max(float(cache.clip_times_s(clip)[-1]) for clip in clips)
        for source, clips in groupby(cache.clips, key=lambda clip: clip.key.source)
    }
    return math.inf if len(ends_s) >= groups else (sum(ends_s.values()) + 1 / cache.provenance.fps) / groups
