"""Frames of videos on clocks, and at given times."""

import heapq
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.decoder import Damage, Decoder
from data.errors import VideoError
from data.picture import IMAGE_FPS
from data.video import FrameConverter, FrameSize, NearestFrames, open_video, tolerance_s


class TimedFrame(NamedTuple):
    """A decoded frame and its time."""

    frame: np.ndarray
    """Planar RGB, uint8, shape (3, height, width)."""
    time_s: float
    """Presentation time in seconds since the first displayed frame."""
    tick: int
    """Number of the clock's tick; consecutive ticks are `1 / fps` apart."""
    clock: int = 0
    """Index of the clock among several."""


def clock_offsets_s(fps: float, clocks: int) -> list[float]:
    """Shifts in seconds of several clocks of one rate, evenly between its ticks."""
    return [clock / clocks / fps for clock in range(clocks)]


def read_on_clock(
    path: Path, size: FrameSize, *, fps: float, offsets_s: Sequence[float] = (0.0,), start_s: float = 0.0,
    end_s: float = math.inf, damage: Damage | None = None, image_fps: float = IMAGE_FPS,
) -> Iterator[TimedFrame]:  # fmt: skip
    """Yield the frame nearest in time to each tick of a clock: tick k lies at `offset_s + k / fps` seconds.

    A tick that has no frame within half a tick is left out, so a gap in the recording is a gap in `tick`; no frame
    stands for two ticks of one clock. Several clocks, shifted by `offsets_s` >= 0, are decoded in one go. Ticks from
    `start_s` on and before `end_s` are sampled. `damage` is where to write down what is wrong inside; without one it
    raises `VideoError`, as does a file that cannot be opened. `image_fps` is the rate of a sequence of images.
    """
    with open_video(path, damage, image_fps) as decoder:
        yield from sample(decoder, size, fps=fps, offsets_s=offsets_s, start_s=start_s, end_s=end_s)


def sample(
    decoder: Decoder, size: FrameSize, *, fps: float, offsets_s: Sequence[float], start_s: float = 0.0,
    end_s: float = math.inf,
) -> Iterator[TimedFrame]:  # fmt: skip
    """The same of a video that is open."""
    convert = FrameConverter(size)
    reach_s = 0.5 / fps + tolerance_s(1 / fps)
    first_ticks = [_first_tick(start_s - offset_s, fps) for offset_s in offsets_s]
    ticks = [(offsets_s[clock] + tick / fps, clock, tick) for clock, tick in enumerate(first_ticks)]
    heapq.heapify(ticks)
    last_time_s = [-math.inf] * len(offsets_s)
    nearest = NearestFrames(decoder, reach_s)
    while ticks:
        tick_s, clock, tick = heapq.heappop(ticks)
        if end_s < math.inf and tick >= _first_tick(end_s - offsets_s[clock], fps):
            continue
        frame, time_s, until_s = nearest.at(tick_s)
        if frame is None:
            return
        is_gap = abs(time_s - tick_s) > reach_s
        # Where times are damaged a gap may last for years: its ticks are not gone through one by one.
        gap_end_s = (time_s if tick_s < time_s else until_s) - reach_s if is_gap else 0.0
        following = max(tick + 1, _first_tick(gap_end_s - offsets_s[clock], fps))
        heapq.heappush(ticks, (offsets_s[clock] + following / fps, clock, following))
        if not is_gap and time_s != last_time_s[clock]:
            last_time_s[clock] = time_s
            # Converted only once it is known to be wanted: conversion costs more than decoding.
            yield TimedFrame(convert(frame), time_s, tick, clock)


def read_frames_at(
    path: Path, size: FrameSize, *, times_s: Sequence[float] | np.ndarray, damage: Damage | None = None,
    image_fps: float = IMAGE_FPS,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Frames nearest to given times, decoded in one pass that jumps where that saves work.

    The times, (T,) in seconds, may be in any order. Returns frames uint8 (T, 3, height, width) and their own times,
    float64 (T,); before the first frame and after the last, those are the nearest. Else as `read_on_clock`.
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


def _first_tick(time_s: float, fps: float) -> int:
    """Number of the first tick at or after a time."""
    return int(max(0.0, np.ceil(time_s * fps - 1e-9)))
