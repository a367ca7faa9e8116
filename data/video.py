"""Decode videos with PyAV: frames with exact presentation times, resized, on a clock.

A frame is a planar RGB `uint8` array of shape (3, height, width); a time is in seconds since the first
displayed frame. Videos are sampled by *time*, never by frame index: recordings of different or variable
frame rate land on one clock.

Conventions. The whole picture is stretched to the requested size (nothing is cropped away), with swscale's
bilinear filter, which widens with the reduction and so does not alias. A display matrix (phone videos) is
applied. Streams that do not tag their colour space are read as BT.601, as every other decoder does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

VIDEO_SUFFIXES = frozenset(
    [
        ".mp4",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".m4v",
        ".mpg",
        ".mpeg",
        ".ts",
        ".mts",
        ".m2ts",
        ".wmv",
        ".flv",
        ".ogv",
        ".3gp",
        ".gif",
        ".mjpeg",
        ".h264",
        ".hevc",
    ]
)

FrameSize = tuple[int, int]
"""(height, width) in pixels."""


CLOCK_TOLERANCE_S = 1e-3
"""Containers round times to a millisecond: a tick half way between two frames goes to the later one, always."""
SEEKABLE = ("mp4", "matroska")
"""Containers in which a seek was found exact. In all others (AVI and MPEG streams lose or misplace frames) videos are
decoded from the beginning."""


class VideoError(Exception):
    """A video that cannot be used; the message names the file and the reason."""


class TimedFrame(NamedTuple):
    """One decoded frame and when it is shown."""

    frame: np.ndarray
    """Planar RGB, uint8, shape (3, height, width)."""
    time_s: float
    """Presentation time in seconds since the first displayed frame."""
    tick: int
    """Which tick of the clock this frame stands for; consecutive ticks are `1 / fps` apart."""


@dataclass(frozen=True)
class VideoInfo:
    """What the container's header says. Headers lie about frame counts, so none is here."""

    path: Path
    codec: str
    height: int
    width: int
    duration_s: float
    """Duration in seconds, 0 where the header has none."""
    average_fps: float
    """Average frame rate, 0 where the header has none."""
    seekable: bool
    """Whether decoding can begin in the middle and give the same frames."""


def probe_video(path: Path) -> VideoInfo:
    """Read the header and decode one frame, so that what is accepted can really be decoded.

    Raises:
        VideoError: the file is missing, empty, not a video, has no video stream, or not one frame decodes.
    """
    with _open(path) as container:
        stream = _video_stream(container, path)
        try:
            frame = next(container.decode(stream), None)
        except av.FFmpegError as error:
            raise VideoError(f"{path}: no frame can be decoded ({error.strerror})") from error
        if frame is None:
            raise VideoError(f"{path}: no frame can be decoded (the {stream.codec_context.name} stream is empty)")
        if stream.duration is not None and stream.time_base is not None:
            duration_s = float(stream.duration * stream.time_base)
        else:
            duration_s = (container.duration or 0) / av.time_base
        upright = frame.rotation % 180 == 0
        return VideoInfo(
            path=path,
            codec=stream.codec_context.name,
            height=frame.height if upright else frame.width,
            width=frame.width if upright else frame.height,
            duration_s=duration_s,
            average_fps=float(stream.average_rate or 0),
            seekable=_is_seekable(container),
        )


def read_frames(path: Path, size: FrameSize, start_s: float = 0.0) -> Iterator[tuple[np.ndarray, float]]:
    """Yield every frame from `start_s` on, in presentation order, with its time.

    Yields:
        (frame uint8 (3, height, width), time in seconds since the first displayed frame).

    Raises:
        VideoError: the file cannot be opened, or decoding fails part way (after the frames before the failure).
    """
    convert = _FrameConverter(size)
    for frame, time_s in _decode(path, start_s):
        yield convert(frame), time_s


def read_on_clock(
    path: Path, size: FrameSize, fps: float, phase_s: float = 0.0, start_s: float = 0.0, end_s: float = float("inf")
) -> Iterator[TimedFrame]:
    """Yield the frame nearest in time to each tick of a clock: tick k lies at `phase_s + k / fps` seconds.

    A tick that has no frame within half a tick is left out, so a gap in the recording is a gap in `tick`;
    no frame stands for two ticks.

    Args:
        path: the video.
        size: (height, width) of the frames.
        fps: ticks per second.
        phase_s: shifts the clock, in seconds; non-negative.
        start_s: ticks before this time are not sampled.
        end_s: ticks at or after this time are not sampled.

    Raises:
        VideoError: as `read_frames`.
        ValueError: `fps` is not positive, or `phase_s` is negative.
    """
    if not fps > 0:
        raise ValueError(f"fps is {fps:g}: it must be positive")
    if phase_s < 0:
        raise ValueError(f"phase_s is {phase_s:g}: it must not be negative")
    convert = _FrameConverter(size)
    half_tick_s = 0.5 / fps

    def first_tick(from_s: float) -> float:
        return max(0.0, float(np.ceil((from_s - phase_s) * fps - 1e-9)))

    tick, end_tick = int(first_tick(start_s)), first_tick(end_s)
    candidate: tuple[VideoFrame, float] | None = None

    # A frame is converted only once it is known to be the nearest to a tick: conversion costs more than decoding.
    def settle(until_s: float) -> Iterator[TimedFrame]:
        """Emit the candidate for the ticks that are nearer to it than to a frame at `until_s`."""
        nonlocal tick
        if candidate is None:
            return
        frame, time_s = candidate
        used = False
        while tick < end_tick and (tick_s := phase_s + tick / fps) < (time_s + until_s) / 2 - CLOCK_TOLERANCE_S:
            if not used and abs(time_s - tick_s) <= half_tick_s + CLOCK_TOLERANCE_S:
                used = True
                yield TimedFrame(convert(frame), time_s, tick)
            tick += 1

    for frame, time_s in _decode(path, start_s - half_tick_s - CLOCK_TOLERANCE_S):
        if time_s > end_s + half_tick_s + CLOCK_TOLERANCE_S:
            break
        yield from settle(time_s)
        candidate = (frame, time_s)
    if candidate is not None:
        yield from settle(candidate[1] + 2 * (half_tick_s + CLOCK_TOLERANCE_S))


class _FrameConverter:
    """Resize, convert to planar RGB and rotate, with one scaler for the whole stream.

    A new scaler for each frame costs up to four times as much, and packed RGB loses accuracy in swscale.
    """

    def __init__(self, size: FrameSize) -> None:
        self.height, self.width = size
        self.reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        quarter_turns = frame.rotation // 90 % 4
        height, width = (self.height, self.width) if quarter_turns % 2 == 0 else (self.width, self.height)
        planar = self.reformatter.reformat(
            frame, width=width, height=height, format="gbrp", interpolation=Interpolation.BILINEAR, threads=1
        )
        red_green_blue = (planar.planes[2], planar.planes[0], planar.planes[1])
        output = np.empty((3, height, width), dtype=np.uint8)
        for channel, plane in enumerate(red_green_blue):
            rows = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)
            output[channel] = rows[:height, :width]
        if quarter_turns == 0:
            return output
        return np.ascontiguousarray(np.rot90(output, quarter_turns, axes=(1, 2)))


def _open(path: Path) -> InputContainer:
    if not path.exists():
        raise VideoError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty")
    try:
        return av.open(str(path), metadata_errors="replace")
    except av.FFmpegError as error:
        raise VideoError(f"{path}: not a readable video ({error.strerror})") from error


def _is_seekable(container: InputContainer) -> bool:
    return any(name in container.format.name for name in SEEKABLE)


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    if not container.streams.video:
        raise VideoError(f"{path}: there is no video stream in it")
    return container.streams.video[0]


def _decode(path: Path, start_s: float) -> Iterator[tuple[VideoFrame, float]]:
    """Decode forward from the keyframe before `start_s`; yield the frames from `start_s` on with their times."""
    with _open(path) as container:
        stream = _video_stream(container, path)
        # Clips are decoded in parallel, one thread each: frame threads would only add latency and memory.
        stream.thread_type = "SLICE"
        stream.codec_context.thread_count = 1
        if stream.time_base is None:
            raise VideoError(f"{path}: the stream has no time base, so its frames have no times")
        time_base = stream.time_base
        first_pts = stream.start_time if _is_seekable(container) else None
        if start_s > 0 and first_pts is not None:
            container.seek(first_pts + int(start_s / time_base), stream=stream, backward=True, any_frame=False)
        frame_period_s = 1 / float(stream.average_rate or 25)
        previous_s: float | None = None
        try:
            for frame in container.decode(stream):
                # AVI has no presentation times: what PyAV calls so runs backwards around B-frames.
                pts = frame.dts if "avi" in container.format.name else frame.pts
                if pts is None:
                    time_s = 0.0 if previous_s is None else previous_s + frame_period_s
                else:
                    if first_pts is None:
                        first_pts = pts
                    time_s = float((pts - first_pts) * time_base)
                previous_s = time_s
                if time_s >= start_s:
                    yield frame, time_s
        except av.FFmpegError as error:
            reached = "before the first frame" if previous_s is None else f"after {previous_s:.2f} s"
            raise VideoError(f"{path}: decoding failed {reached} ({error.strerror})") from error
