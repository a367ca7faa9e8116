"""Frames of videos at given times."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.decoder import Damage, VideoError
from data.video import IMAGE_FPS, FrameConverter, FrameSize, NearestFrames, open_video


def read_frames_at(
    path: Path,
    size: FrameSize,
    *,
    times_s: Sequence[float] | np.ndarray,
    damage: Damage | None = None,
    image_fps: float = IMAGE_FPS,
) -> tuple[np.ndarray, np.ndarray]:
    """Frames nearest to given times, decoded in one pass that jumps where that saves work.

    The times, (T,) seconds since the first displayed frame, may be in any order; before the first frame and after the
    last, those are the nearest. Else as `read_on_clock`.

    Returns:
        Frames uint8 (T, 3, height, width) and their own times, float64 (T,), in seconds.
    """
    convert = FrameConverter(size)
    frames, shown_s = np.empty((len(times_s), 3, *size), np.uint8), np.empty(len(times_s))
    with open_video(path, damage, image_fps) as decoder:
        nearest = NearestFrames(decoder, reach_s=math.inf)
        for index in np.argsort(times_s, kind="stable"):
            frame, shown_s[index], _ = nearest.at(float(times_s[index]))
            if frame is None:
                raise VideoError(f"{path}: no frame can be decoded")
            frames[index] = convert(frame)
    return frames, shown_s
