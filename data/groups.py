"""Which embeddings are held out or drawn together: those of one video or, where videos are few, of one stretch of it.

Neighbouring frames are nearly equal; to count or to test them one by one would flatter every result.
"""

import math
from itertools import groupby

import numpy as np

from data.embedding_cache import EmbeddingCache
from data.windows import Windows

ENOUGH_VIDEOS = 20
"""With fewer videos, the bootstrap resamples stretches of a video instead of videos."""


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


def group_windows(windows: Windows) -> tuple[np.ndarray, str]:
    """Which windows are resampled together, and what they have in common, in the plural.

    Those of a video or, where fewer than `ENOUGH_VIDEOS` have any, of a stretch that is twice as long as a window, so
    that windows reach into the next stretch, but not beyond.

    Returns:
        int64 (windows,), and such as "videos" or "stretches of 6 s".
    """
    cache = windows.cache
    if len({cache.clips[clip].key.source for clip in np.unique(windows.clips)}) >= ENOUGH_VIDEOS:
        return group_rows(cache)[windows.starts], "videos"
    stretch_s = 2 * windows.length / cache.provenance.fps
    return group_rows(cache, stretch_s)[windows.starts], f"stretches of {stretch_s:.3g} s"


def stretch_for(cache: EmbeddingCache, groups: int) -> float:
    """Length of the stretches, in seconds, that make about so many groups; infinite if there are as many videos."""
    ends_s = {
        source: max(float(cache.clip_times_s(clip)[-1]) for clip in clips)
        for source, clips in groupby(cache.clips, key=lambda clip: clip.key.source)
    }
    return math.inf if len(ends_s) >= groups else (sum(ends_s.values()) + 1 / cache.provenance.fps) / groups
