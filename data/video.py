"""Decode videos with PyAV: frames with exact presentation times, resized; in order, on a clock, at times, in clips.

A frame is a planar RGB `uint8` array of shape (3, height, width); a time is in seconds since the first
displayed frame. Videos are sampled by *time*, never by frame index: recordings of different or variable
frame rate land on one clock.

Conventions. The whole picture is stretched to the requested size (nothing is cropped away), with swscale's
bilinear filter, which widens with the reduction and so does not alias. A display matrix (phone videos) is
applied. Streams that do not tag their colour space are read as BT.601 of limited range, as every other decoder does;
those that do are read as tagged; nothing is done about high dynamic range. Alpha is ignored. Of several video streams
FFmpeg's best is read (the default one, then the largest); a cover picture is no video.

Damage. What cannot be decoded is left out, never replaced: reading goes on at the next keyframe, and frames that the
decoder had to guess (`is_corrupt`) are dropped. Each function takes a `Damage` to write this down in. Without one,
damage raises `VideoError` after the good frames before it: nothing is lost in silence.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from data.decoder import CLOCK_TOLERANCE_S, Damage, Decoder, VideoDecoder, VideoError
from data.image_sequence import ImageSequenceDecoder, is_image_sequence

VIDEO_SUFFIXES = frozenset(
    f".{name}"
    for names in ("mp4 mov m4v 3gp", "mkv webm", "avi wmv flv ogv gif mjpeg", "mpg mpeg ts mts m2ts", "h264 hevc")
    for name in names.split()
)

FrameSize = tuple[int, int]
"""(height, width) in pixels."""

TRANSFORM = "stretched, swscale bilinear (antialiased), upright, bt601 where untagged"
"""What happens to each picture; recorded beside embeddings."""

IMAGE_FPS = 25.0
"""Rate of image sequences, unless another is given: images have no times."""
GAP_PERIODS = 5
"""An interval between two frames of more than this many median intervals is reported as a gap."""
STEADY_GAP_PERIODS = 1.5
"""The same where the rate is constant: there a single lost frame can be seen."""
STEADY_SHARE = 0.8
"""The rate is constant if this share of the intervals is as long as the median."""


Label = TypeVar("Label")


class TimedFrame(NamedTuple):
    """One decoded frame and when it is shown."""

    frame: np.ndarray
    """Planar RGB, uint8, shape (3, height, width)."""
    time_s: float
    """Presentation time in seconds since the first displayed frame."""
    tick: int
    """Which tick of the clock this frame stands for; consecutive ticks are `1 / fps` apart."""
    clock: int = 0
    """Which of several clocks the tick belongs to."""


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video: from its header (`probe_video`), or from all of its frames (`count_frames`)."""

    path: Path
    codec: str
    height: int
    """Of the upright picture, in pixels."""
    width: int
    rotation: int
    """Degrees by which the stored picture is turned counterclockwise to stand upright."""
    duration_s: float
    """Duration in seconds; 0 where the header has none and nobody has counted."""
    average_fps: float
    """Average frame rate; 0 where the header has none and nobody has counted."""
    seekable: bool
    """Whether decoding can begin in the middle and give the same frames."""
    keyframes_s: tuple[float, ...]
    """Times at which decoding can begin, as far as they are known."""
    frames: int | None = None
    """Frames that decode; None: nobody has counted. Headers lie about it."""
    gaps_s: tuple[tuple[float, float], ...] = ()
    """(begin, length) of the gaps in presentation times, in seconds; only after counting."""
    damage: str = ""
    """What counting found wrong."""

    def sampled_fps(self, ticks_per_second: float) -> float:
        """Frames per second that clocks of so many ticks together ask for at most, each counted once."""
        return min(ticks_per_second, self.average_fps or ticks_per_second)


def clock_phases_s(fps: float, phases: int) -> list[float]:
    """Shifts in seconds of several clocks of one rate, evenly between its ticks."""
    return [phase / phases / fps for phase in range(phases)]


def probe_video(path: Path, image_fps: float = IMAGE_FPS) -> VideoInfo:
    """Read the header and decode one frame, so that what is accepted can really be decoded.

    Raises:
        VideoError: the file is missing, empty, not a video, has no video stream, or not one frame decodes.
    """
    with open_video(path, Damage(), image_fps) as decoder:
        frame, _ = _first_frame(decoder)
        return _describe(decoder, frame, decoder.keyframes_s)


def _first_frame(decoder: Decoder) -> tuple[VideoFrame, float]:
    first = next(decoder, None)
    if first is None:
        reason = str(decoder.damage) or f"the {decoder.codec} stream is empty"
        raise VideoError(f"{decoder.path}: no frame can be decoded ({reason})")
    return first


def _describe(decoder: Decoder, frame: VideoFrame, keyframes_s: tuple[float, ...]) -> VideoInfo:
    """What header and first frame say."""
    upright = frame.rotation % 180 == 0
    return VideoInfo(
        path=decoder.path,
        codec=decoder.codec,
        height=frame.height if upright else frame.width,
        width=frame.width if upright else frame.height,
        rotation=frame.rotation % 360,
        duration_s=decoder.header_duration_s,
        average_fps=decoder.average_fps,
        seekable=decoder.seekable,
        keyframes_s=keyframes_s,
    )


def count_frames(path: Path, image_fps: float = IMAGE_FPS) -> VideoInfo:
    """Decode all of a video: what is really in it.

    Raises:
        VideoError: as `probe_video`.
    """
    damage, times_s, keyframes_s = Damage(), [], []
    with open_video(path, damage, image_fps) as decoder:
        first = _first_frame(decoder)
        info = _describe(decoder, first[0], ())
        for frame, time_s in chain([first], decoder):
            times_s.append(time_s)
            if frame.key_frame or info.codec == "images":
                keyframes_s.append(time_s)
    intervals_s = np.diff(times_s)
    period_s = float(np.median(intervals_s)) if len(intervals_s) else 1 / (info.average_fps or 25)
    is_steady = (
        np.mean(np.abs(intervals_s - period_s) <= 2 * CLOCK_TOLERANCE_S) >= STEADY_SHARE if times_s[1:] else False
    )
    gaps = np.flatnonzero(intervals_s > (STEADY_GAP_PERIODS if is_steady else GAP_PERIODS) * period_s)
    return replace(
        info,
        duration_s=times_s[-1] + period_s,
        # The rate of images is given, and their times depend on it: gaps do not lower it.
        average_fps=float(len(intervals_s) / intervals_s.sum())
        if len(intervals_s) and info.codec != "images"
        else info.average_fps,
        keyframes_s=tuple(keyframes_s) if info.seekable else (),
        frames=len(times_s),
        gaps_s=tuple((times_s[at], float(intervals_s[at])) for at in gaps),
        damage=str(damage),
    )


def read_frames(
    path: Path, size: FrameSize, start_s: float = 0.0, damage: Damage | None = None, image_fps: float = IMAGE_FPS
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield every frame from `start_s` on, in presentation order, with its time.

    Yields:
        (frame uint8 (3, height, width), time in seconds since the first displayed frame).

    Raises:
        VideoError: the file cannot be opened; without `damage`, also what is wrong inside.
    """
    convert = _FrameConverter(size)
    with open_video(path, damage, image_fps) as decoder:
        decoder.skip_to(start_s)
        for frame, time_s in decoder:
            if time_s >= start_s:
                yield convert(frame), time_s


def read_on_clock(
    path: Path,
    size: FrameSize,
    fps: float,
    phase_s: float | Sequence[float] = 0.0,
    start_s: float = 0.0,
    end_s: float = float("inf"),
    damage: Damage | None = None,
    image_fps: float = IMAGE_FPS,
) -> Iterator[TimedFrame]:
    """Yield the frame nearest in time to each tick of a clock: tick k lies at `phase_s + k / fps` seconds.

    A tick that has no frame within half a tick is left out, so a gap in the recording is a gap in `tick`;
    no frame stands for two ticks of one clock.

    Args:
        path: the video.
        size: (height, width) of the frames.
        fps: ticks per second.
        phase_s: shifts the clock, in seconds, non-negative; several values make several clocks, decoded in one go.
        start_s: ticks before this time are not sampled.
        end_s: ticks at or after this time are not sampled.
        damage: where to write down what is wrong inside.
        image_fps: rate of an image sequence; videos have their own times.

    Raises:
        VideoError: as `read_frames`.
        ValueError: `fps` is not positive, or `phase_s` is negative.
    """
    phases_s = [phase_s] if isinstance(phase_s, int | float) else list(phase_s)
    if not fps > 0:
        raise ValueError(f"fps is {fps:g}: it must be positive")
    if not min(phases_s) >= 0:
        raise ValueError(f"phase_s is {min(phases_s):g}: it must not be negative")
    convert = _FrameConverter(size)
    reach_s = 0.5 / fps + CLOCK_TOLERANCE_S

    def first_tick(phase_s: float, time_s: float) -> int:
        return int(max(0.0, np.ceil((time_s - phase_s) * fps - 1e-9)))

    def ticks(clock: int, phase_s: float) -> Iterator[tuple[float, tuple[int, int]]]:
        last = first_tick(phase_s, end_s) - 1 if end_s < float("inf") else float("inf")
        tick = first_tick(phase_s, start_s)
        while tick <= last:
            yield phase_s + tick / fps, (clock, tick)
            # Where times are damaged a gap may last for years: its ticks are not gone through one by one.
            tick = max(tick + 1, first_tick(phase_s, gap_until_s))

    wanted = heapq.merge(*(ticks(clock, phase_s) for clock, phase_s in enumerate(phases_s)))
    gap_until_s = 0.0
    last_time_s = [-np.inf] * len(phases_s)
    with open_video(path, damage, image_fps) as decoder:
        for (tick_s, (clock, tick)), frame, time_s, until_s in _nearest(decoder, wanted, reach_s):
            if abs(time_s - tick_s) > reach_s:
                gap_until_s = (time_s if tick_s < time_s else until_s) - reach_s
                continue
            if time_s == last_time_s[clock]:
                continue
            last_time_s[clock] = time_s
            # Converted only once it is known to be wanted: conversion costs more than decoding.
            yield TimedFrame(convert(frame), time_s, tick, clock)


def read_frames_at(
    path: Path,
    size: FrameSize,
    times_s: Sequence[float] | np.ndarray,
    damage: Damage | None = None,
    image_fps: float = IMAGE_FPS,
) -> tuple[np.ndarray, np.ndarray]:
    """The frames nearest to given times, decoded in one pass that jumps where that saves work.

    Args:
        path: the video.
        size: (height, width) of the frames.
        times_s: (T,) seconds since the first displayed frame, in any order; before the first frame and after the last,
            those are the nearest.
        damage: where to write down what is wrong inside.
        image_fps: rate of an image sequence; videos have their own times.

    Returns:
        Frames uint8 (T, 3, height, width) and their own times, float64 (T,), in seconds.

    Raises:
        VideoError: as `read_frames`, or no frame decodes.
    """
    convert = _FrameConverter(size)
    frames = np.empty((len(times_s), 3, *size), np.uint8)
    found_s = np.full(len(times_s), np.nan)
    wanted = ((float(times_s[index]), int(index)) for index in np.argsort(times_s, kind="stable"))
    with open_video(path, damage, image_fps) as decoder:
        for (_, index), frame, time_s, _ in _nearest(decoder, wanted, reach_s=np.inf):
            frames[index], found_s[index] = convert(frame), time_s
    if np.isnan(found_s).any():
        raise VideoError(f"{path}: no frame can be decoded")
    return frames, found_s


def read_clips(
    path: Path,
    size: FrameSize,
    starts_s: Sequence[float] | np.ndarray,
    length: int,
    damage: Damage | None = None,
    image_fps: float = IMAGE_FPS,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Clips of consecutive frames from given times on, decoded in one pass that jumps where that saves work.

    Args:
        path: the video.
        size: (height, width) of the frames.
        starts_s: each clip's first frame is the first that is shown at this time or later; in any order.
        length: frames in a clip.
        damage: where to write down what is wrong inside.
        image_fps: rate of an image sequence; videos have their own times.

    Returns:
        For each start: frames uint8 (T, 3, height, width) and times float64 (T,) in seconds; T is `length`, or less
        where the video ends.

    Raises:
        VideoError: as `read_frames`.
    """
    convert = _FrameConverter(size)
    clips: list[list[tuple[np.ndarray, float]]] = [[] for _ in starts_s]
    waiting = [int(index) for index in np.argsort(starts_s, kind="stable")]
    filling: list[int] = []
    with open_video(path, damage, image_fps) as decoder:
        while waiting or filling:
            if not filling:
                decoder.skip_to(float(starts_s[waiting[0]]))
            following = next(decoder, None)
            if following is None:
                break
            frame, time_s = following
            while waiting and starts_s[waiting[0]] <= time_s:
                filling.append(waiting.pop(0))
            if filling:
                shown = convert(frame)
                for index in filling:
                    clips[index].append((shown, time_s))
                filling = [index for index in filling if len(clips[index]) < length]
    return [
        (np.stack([frame for frame, _ in clip]), np.array([time_s for _, time_s in clip]))
        if clip
        else (np.empty((0, 3, *size), np.uint8), np.empty(0))
        for clip in clips
    ]


def random_clips(
    video: VideoInfo, size: FrameSize, count: int, length: int, seed: int, damage: Damage | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Clips of consecutive frames from random places of a video, as `read_clips` gives them.

    Args:
        video: with a known duration (`count_frames` knows it of every video).
        size: (height, width) of the frames.
        count: how many clips.
        length: frames in a clip.
        seed: of the places; the same seed gives the same clips.
        damage: where to write down what is wrong inside.

    Raises:
        VideoError: as `read_frames`, or the video is shorter than a clip.
    """
    latest_s = video.duration_s - length / (video.average_fps or 25)
    if latest_s < 0:
        raise VideoError(f"{video.path}: its {video.duration_s:.2f} s are shorter than a clip of {length} frames")
    starts_s = np.random.default_rng(seed).uniform(0, latest_s, count)
    return read_clips(video.path, size, starts_s, length, damage, video.average_fps)


def open_video(path: Path, damage: Damage | None, image_fps: float = IMAGE_FPS) -> Decoder:
    """A video file, a folder of images or a folder of images inside a zip file, ready to be decoded.

    Raises:
        VideoError: it cannot be opened.
    """
    if is_image_sequence(path):
        return ImageSequenceDecoder(path, image_fps, damage)
    return VideoDecoder(path, damage)


def _nearest(
    decoder: Decoder, wanted: Iterator[tuple[float, Label]], reach_s: float
) -> Iterator[tuple[tuple[float, Label], VideoFrame, float, float]]:
    """For each wanted (time, label), in ascending order, the frame nearest in time, when it is shown, and until when.

    Ends at the first time that lies `reach_s` after the last frame.
    """
    pending = next(wanted, None)
    candidate: tuple[VideoFrame, float] | None = None
    while pending is not None:
        # A keyframe at or before the wanted time is nearer to it than any frame before the keyframe.
        if decoder.skip_to(pending[0]):
            candidate = None
        following = next(decoder, None)
        if candidate is not None:
            until_s = candidate[1] + 2 * reach_s if following is None else following[1]
            while pending is not None and pending[0] < (candidate[1] + until_s) / 2 - CLOCK_TOLERANCE_S:
                yield pending, *candidate, until_s
                pending = next(wanted, None)
        if following is None:
            return
        candidate = following


class _FrameConverter:
    """Resize, convert to planar RGB and rotate, with one scaler for the whole stream.

    A new scaler for each frame costs up to four times as much, and packed RGB loses accuracy in swscale. A frame that
    several clocks ask for, one after the other, is converted once.
    """

    def __init__(self, size: FrameSize) -> None:
        self.height, self.width = size
        self.reformatter = VideoReformatter()
        self.last: tuple[VideoFrame, np.ndarray] | None = None

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        if self.last is None or self.last[0] is not frame:
            self.last = frame, self._convert(frame)
        return self.last[1]

    def _convert(self, frame: VideoFrame) -> np.ndarray:
        quarter_turns = frame.rotation // 90 % 4
        height, width = (self.height, self.width) if quarter_turns % 2 == 0 else (self.width, self.height)
        interpolation = Interpolation.BILINEAR
        if (frame.height, frame.width) == (height, width):
            # Without resizing swscale takes a short cut that is 1.1 levels too bright.
            interpolation |= Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        planar = self.reformatter.reformat(
            frame, width=width, height=height, format="gbrp", interpolation=interpolation, threads=1
        )
        red_green_blue = (planar.planes[2], planar.planes[0], planar.planes[1])
        output = np.empty((3, height, width), dtype=np.uint8)
        for channel, plane in enumerate(red_green_blue):
            rows = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)
            output[channel] = rows[:height, :width]
        if quarter_turns == 0:
            return output
        return np.ascontiguousarray(np.rot90(output, quarter_turns, axes=(1, 2)))
