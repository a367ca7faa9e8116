"""Frames, gaps and damage of a video, found by decoding all of it."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from data.decoder import GAP_PERIODS, Damage, usual_interval
from data.picture import IMAGE_FPS
from data.video import VideoInfo, look_at, open_video, tolerance_s

STEADY_GAP_PERIODS = 1.5  # at a constant rate a single lost frame can be seen, and is a gap
STEADY_SHARE = 0.8  # the rate is constant if this share of the intervals is as long as the median


def count_frames(path: Path, image_fps: float = IMAGE_FPS) -> VideoInfo:
    """Decode all of a video: its frames, keyframes, gaps and damage. Raises `VideoError` as `probe_video`."""
    damage, times_s, keyframes_s = Damage(), [], []
    with open_video(path, damage, image_fps) as decoder:
        info, first = look_at(decoder)
        for frame, time_s in chain([first], decoder):
            times_s.append(time_s)
            if frame.key_frame or info.codec == "images":
                keyframes_s.append(time_s)
    intervals_s = np.diff(times_s)
    average_fps, is_steady = info.average_fps, False
    period_s = 1 / (average_fps or 25)
    if len(intervals_s) and (usual_s := float(np.median(intervals_s))) > 0:
        period_s = usual_s
        is_steady = bool(np.mean(np.abs(intervals_s - period_s) <= 2 * tolerance_s(period_s)) >= STEADY_SHARE)
        average_fps = average_fps if info.codec == "images" or info.at_image_fps else 1 / usual_interval(intervals_s)
    gaps = np.flatnonzero(intervals_s > (STEADY_GAP_PERIODS if is_steady else GAP_PERIODS) * period_s)
    return replace(
        info, duration_s=times_s[-1] + period_s, average_fps=average_fps,
        keyframes_s=tuple(keyframes_s) if info.seekable else (), frames=len(times_s),
        gaps_s=tuple((times_s[at], float(intervals_s[at])) for at in gaps), damage=str(damage),
    )  # fmt: skip
