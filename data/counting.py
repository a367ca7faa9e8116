"""Frames, gaps and damage of a video, found by decoding all of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from data.decoder import Damage
from data.video import CLOCK_TOLERANCE_S, IMAGE_FPS, VideoInfo, open_video, probe_video

GAP_PERIODS, STEADY_GAP_PERIODS = 5, 1.5
"""An interval of more than this many median ones is a gap; at a constant rate a single lost frame can be seen."""
STEADY_SHARE = 0.8
"""The rate is constant if this share of the intervals is as long as the median."""


def count_frames(path: Path, image_fps: float = IMAGE_FPS) -> VideoInfo:
    """Decode all of a video: its frames, keyframes, gaps and damage. Raises `VideoError` as `probe_video`."""
    info = probe_video(path, image_fps)
    damage, times_s, keyframes_s = Damage(), [], []
    with open_video(path, damage, image_fps) as decoder:
        for frame, time_s in decoder:
            times_s.append(time_s)
            if frame.key_frame or info.codec == "images":
                keyframes_s.append(time_s)
    intervals_s = np.diff(times_s)
    period_s, is_steady, average_fps = 1 / (info.average_fps or 25), False, info.average_fps
    if len(intervals_s):
        period_s = float(np.median(intervals_s))
        is_steady = bool(np.mean(np.abs(intervals_s - period_s) <= 2 * CLOCK_TOLERANCE_S) >= STEADY_SHARE)
        # The rate of images is given, and their times depend on it: gaps do not lower it.
        average_fps = average_fps if info.codec == "images" else len(intervals_s) / float(intervals_s.sum())
    gaps = np.flatnonzero(intervals_s > (STEADY_GAP_PERIODS if is_steady else GAP_PERIODS) * period_s)
    return replace(
        info,
        duration_s=times_s[-1] + period_s,
        average_fps=average_fps,
        keyframes_s=tuple(keyframes_s) if info.seekable else (),
        frames=len(times_s),
        gaps_s=tuple((times_s[at], float(intervals_s[at])) for at in gaps),
        damage=str(damage),
    )
