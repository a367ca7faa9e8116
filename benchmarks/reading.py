"""Every frame of a video in order, and clips of consecutive frames: what decoding is measured and tested by."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.decoder import Damage
from data.picture import IMAGE_FPS
from data.video import FrameConverter, FrameSize, open_video

Clip = tuple[np.ndarray, np.ndarray]
"""Frames uint8 (T, 3, height, width) and their times float64 (T,) in seconds."""


def read_frames(
    path: Path, size: FrameSize, *, start_s: float = 0.0, damage: Damage | None = None, image_fps: float = IMAGE_FPS
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield every frame from a time on, uint8 (3, height, width), in presentation order, with its time."""
    convert = FrameConverter(size)
    with open_video(path, damage, image_fps) as decoder:
        decoder.skip_to(start_s)
        for frame, time_s in decoder:
            if time_s >= start_s:
                yield convert(frame), time_s


def read_clips(
    path: Path,
    size: FrameSize,
    starts_s: Sequence[float] | np.ndarray,
    *,
    length: int,
    damage: Damage | None = None,
    image_fps: float = IMAGE_FPS,
) -> list[Clip]:
    """Clips of consecutive frames, decoded in one pass that jumps where that saves work.

    A clip begins with the first frame that is shown at its time or later, and is shorter where the video ends.
    """
    convert = FrameConverter(size)
    clips: list[list[tuple[np.ndarray, float]]] = [[] for _ in starts_s]
    waiting = [int(index) for index in np.argsort(starts_s, kind="stable")]
    filling: list[int] = []
    with open_video(path, damage, image_fps) as decoder:
        while waiting or filling:
            if not filling:
                decoder.skip_to(float(starts_s[waiting[0]]))
            frame, time_s = next(decoder, (None, 0.0))
            if frame is None:
                break
            while waiting and starts_s[waiting[0]] <= time_s:
                filling.append(waiting.pop(0))
            for index in filling:
                clips[index].append((convert(frame), time_s))
            filling = [index for index in filling if len(clips[index]) < length]
    empty = np.empty((0, 3, *size), np.uint8)
    return [
        (np.array([frame for frame, _ in clip]) if clip else empty, np.array([time_s for _, time_s in clip]))
        for clip in clips
    ]
