"""Groups of windows that a bootstrap resamples together."""

import numpy as np

from data.windows import Windows

ENOUGH_VIDEOS = 20
"""Number of videos from which on the bootstrap resamples videos instead of segments of them."""


def group_windows(windows: Windows, indices: np.ndarray) -> tuple[np.ndarray, str]:
    """Groups of windows to be resampled together.

    Neighbouring frames are nearly equal; to count them one by one would flatter every result. So windows of a video
    are together or, where there are fewer than `ENOUGH_VIDEOS`, of a segment that is twice as long as a window, so
    that windows reach into the next segment, but not beyond.

    Returns:
        int64 (N,), groups of the given windows numbered from 0, and what they are: "videos" or "segments of 6 s".
    """
    names, videos = np.unique(windows.video_of(indices), return_inverse=True)
    if len(names) >= ENOUGH_VIDEOS:
        return videos, "videos"
    segment_s = 2 * windows.length / windows.cache.provenance.fps
    segments = windows.cache.take(windows.rows(indices)[:, 0], "times_s") // segment_s
    _, groups = np.unique(np.stack([videos, segments]), axis=1, return_inverse=True)
    return groups.ravel(), f"segments of {segment_s:.3g} s"
