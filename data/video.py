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
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

VIDEO_SUFFIXES = frozenset(
    f".{name}"
    for names in ("mp4 mov m4v 3gp", "mkv webm", "avi wmv flv ogv gif mjpeg", "mpg mpeg ts mts m2ts", "h264 hevc")
    for name in names.split()
)

FrameSize = tuple[int, int]
"""(height, width) in pixels."""

TRANSFORM = "stretched, swscale bilinear (antialiased), upright, bt601 where untagged"
"""What happens to each picture; recorded beside embeddings."""

CLOCK_TOLERANCE_S = 1e-3
"""Containers round times to a millisecond: a tick half way between two frames goes to the later one, always."""
SEEKABLE = ("mp4", "matroska")
"""Containers in which a seek was found exact. In all others (AVI and MPEG streams lose or misplace frames) videos are
decoded from the beginning."""
WORTH_SKIPPING_S = 0.5
"""What lies this near is decoded up to rather than looked up."""
EARLY_S = 0.5
"""A video that ends this much before the time in its header is reported as cut off."""
GAP_PERIODS = 5
"""An interval between two frames of more than this many median intervals is reported as a gap."""


Label = TypeVar("Label")


class VideoError(Exception):
    """A video that cannot be used; the message names the file and the reason."""


@dataclass
class Damage:
    """What was found wrong with a video while it was read; filled in by the function that reads."""

    corrupt_frames: int = 0
    """Frames left out because the decoder marked them as guessed."""
    breaks: list[str] = field(default_factory=list)
    """Where decoding failed or the video ended early, and why."""

    def __bool__(self) -> bool:
        return bool(self.corrupt_frames or self.breaks)

    def __str__(self) -> str:
        corrupt = [f"{self.corrupt_frames} corrupt frames left out"] if self.corrupt_frames else []
        return "; ".join(corrupt + self.breaks)


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


def probe_video(path: Path) -> VideoInfo:
    """Read the header and decode one frame, so that what is accepted can really be decoded.

    Raises:
        VideoError: the file is missing, empty, not a video, has no video stream, or not one frame decodes.
    """
    with _Player(path, Damage()) as player:
        first = next(iter(player), None)
        if first is None:
            reason = str(player.damage) or f"the {player.codec} stream is empty"
            raise VideoError(f"{path}: no frame can be decoded ({reason})")
        frame, _ = first
        upright = frame.rotation % 180 == 0
        return VideoInfo(
            path=path,
            codec=player.codec,
            height=frame.height if upright else frame.width,
            width=frame.width if upright else frame.height,
            rotation=frame.rotation,
            duration_s=player.header_duration_s,
            average_fps=float(player.stream.average_rate or 0),
            seekable=player.seekable,
            keyframes_s=player.keyframes_s,
        )


def count_frames(path: Path) -> VideoInfo:
    """Decode all of a video: what is really in it.

    Raises:
        VideoError: as `probe_video`.
    """
    info = probe_video(path)
    damage, times_s, keyframes_s = Damage(), [], []
    with _Player(path, damage) as player:
        for frame, time_s in player:
            times_s.append(time_s)
            if frame.key_frame:
                keyframes_s.append(time_s)
    intervals_s = np.diff(times_s)
    period_s = float(np.median(intervals_s)) if len(intervals_s) else 1 / (info.average_fps or 25)
    gaps = np.flatnonzero(intervals_s > GAP_PERIODS * period_s)
    return VideoInfo(
        **{name: getattr(info, name) for name in ("path", "codec", "height", "width", "rotation", "seekable")},
        duration_s=times_s[-1] + period_s,
        average_fps=float(len(intervals_s) / intervals_s.sum()) if len(intervals_s) else info.average_fps,
        keyframes_s=tuple(keyframes_s) if info.seekable else (),
        frames=len(times_s),
        gaps_s=tuple((times_s[at], float(intervals_s[at])) for at in gaps),
        damage=str(damage),
    )


def read_frames(
    path: Path, size: FrameSize, start_s: float = 0.0, damage: Damage | None = None
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield every frame from `start_s` on, in presentation order, with its time.

    Yields:
        (frame uint8 (3, height, width), time in seconds since the first displayed frame).

    Raises:
        VideoError: the file cannot be opened; without `damage`, also what is wrong inside.
    """
    convert = _FrameConverter(size)
    with _Player(path, damage) as player:
        player.skip_to(start_s)
        for frame, time_s in player:
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
        for tick in takewhile(lambda tick: tick <= last, count(first_tick(phase_s, start_s))):
            yield phase_s + tick / fps, (clock, tick)

    wanted = heapq.merge(*(ticks(clock, phase_s) for clock, phase_s in enumerate(phases_s)))
    last_time_s = [-np.inf] * len(phases_s)
    converted: tuple[VideoFrame, np.ndarray] | None = None
    with _Player(path, damage) as player:
        for (tick_s, (clock, tick)), frame, time_s in _nearest(player, wanted, reach_s):
            if abs(time_s - tick_s) > reach_s or time_s == last_time_s[clock]:
                continue
            last_time_s[clock] = time_s
            # Converted only once it is known to be wanted: conversion costs more than decoding.
            if converted is None or converted[0] is not frame:
                converted = frame, convert(frame)
            yield TimedFrame(converted[1], time_s, tick, clock)


def read_frames_at(
    path: Path, size: FrameSize, times_s: Sequence[float] | np.ndarray, damage: Damage | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The frames nearest to given times, decoded in one pass that jumps where that saves work.

    Args:
        path: the video.
        size: (height, width) of the frames.
        times_s: (T,) seconds since the first displayed frame, in any order; before the first frame and after the last,
            those are the nearest.
        damage: where to write down what is wrong inside.

    Returns:
        Frames uint8 (T, 3, height, width) and their own times, float64 (T,), in seconds.

    Raises:
        VideoError: as `read_frames`, or no frame decodes.
    """
    convert = _FrameConverter(size)
    frames = np.empty((len(times_s), 3, *size), np.uint8)
    found_s = np.full(len(times_s), np.nan)
    wanted = ((float(times_s[index]), int(index)) for index in np.argsort(times_s, kind="stable"))
    converted: tuple[VideoFrame, np.ndarray] | None = None
    with _Player(path, damage) as player:
        for (_, index), frame, time_s in _nearest(player, wanted, reach_s=np.inf):
            if converted is None or converted[0] is not frame:
                converted = frame, convert(frame)
            frames[index], found_s[index] = converted[1], time_s
    if np.isnan(found_s).any():
        raise VideoError(f"{path}: no frame can be decoded")
    return frames, found_s


def read_clips(
    path: Path, size: FrameSize, starts_s: Sequence[float] | np.ndarray, length: int, damage: Damage | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Clips of consecutive frames from given times on, decoded in one pass that jumps where that saves work.

    Args:
        path: the video.
        size: (height, width) of the frames.
        starts_s: each clip's first frame is the first that is shown at this time or later; in any order.
        length: frames in a clip.
        damage: where to write down what is wrong inside.

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
    with _Player(path, damage) as player:
        while waiting or filling:
            if not filling:
                player.skip_to(float(starts_s[waiting[0]]))
            following = next(player, None)
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
    return read_clips(video.path, size, starts_s, length, damage)


def _nearest(
    player: "_Player", wanted: Iterator[tuple[float, Label]], reach_s: float
) -> Iterator[tuple[tuple[float, Label], VideoFrame, float]]:
    """For each wanted (time, label), in ascending order, the frame nearest in time and when it is shown.

    Ends at the first time that lies `reach_s` after the last frame.
    """
    pending = next(wanted, None)
    candidate: tuple[VideoFrame, float] | None = None
    while pending is not None:
        # A keyframe at or before the wanted time is nearer to it than any frame before the keyframe.
        if player.skip_to(pending[0]):
            candidate = None
        following = next(player, None)
        if candidate is not None:
            until_s = candidate[1] + 2 * reach_s if following is None else following[1]
            while pending is not None and pending[0] < (candidate[1] + until_s) / 2 - CLOCK_TOLERANCE_S:
                yield pending, *candidate
                pending = next(wanted, None)
        if following is None:
            return
        candidate = following


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


class _Player:
    """An open video that is decoded forward and can skip ahead; iterates over (frame, time in seconds)."""

    def __init__(self, path: Path, damage: Damage | None) -> None:
        self.path, self.damage = path, damage
        self.can_skip = True
        self._open()

    def _open(self) -> None:
        self.container = _open(self.path)
        try:
            self.stream = _video_stream(self.container, self.path)
        except VideoError:
            self.container.close()
            raise
        # Clips are decoded in parallel, one thread each: frame threads would only add latency and memory.
        self.stream.thread_type = "SLICE"
        self.stream.codec_context.thread_count = 1
        self.first_pts = self.stream.start_time if self.seekable else None
        self.begun = False
        self.reached_s = 0.0
        """Time of the last frame that was given, or to be skipped to."""
        self.skipped_to_s: float | None = None
        """Until a frame has been given after a skip."""
        self.frames = self._decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.container.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[VideoFrame, float]:
        frame, time_s = next(self.frames)
        if self.skipped_to_s is not None and time_s > self.skipped_to_s + CLOCK_TOLERANCE_S:
            # The seek led too far: only decoding from the beginning gives the frames between.
            self.container.close()
            self._open()
            self.can_skip = False
            return next(self)
        self.skipped_to_s = None
        self.begun, self.reached_s = True, max(self.reached_s, time_s)
        return frame, time_s

    def skip_to(self, time_s: float) -> bool:
        """Go on from the last keyframe at or before a time, if there is one ahead; whether it was done."""
        if not self.can_skip or self.first_pts is None or time_s <= self.reached_s + WORTH_SKIPPING_S:
            return False
        if self.begun and bisect_right(self.keyframes_s, self.reached_s) == bisect_right(self.keyframes_s, time_s):
            return False
        assert self.stream.time_base is not None
        try:
            self.container.seek(self.first_pts + int(time_s / self.stream.time_base), stream=self.stream)
        except av.FFmpegError:
            return False
        # Not the keyframe's own time: an index may be wrong about that, and the next skip would lead back here.
        self.begun, self.reached_s, self.skipped_to_s = True, time_s, time_s
        self.frames = self._decode()
        return True

    @property
    def codec(self) -> str:
        return self.stream.codec_context.name

    @property
    def seekable(self) -> bool:
        return any(name in self.container.format.name for name in SEEKABLE)

    @property
    def header_duration_s(self) -> float:
        """What the header promises, 0 where it says nothing."""
        if self.stream.duration is not None and self.stream.time_base is not None:
            return float(self.stream.duration * self.stream.time_base)
        written = self.stream.metadata.get("DURATION", "")  # Matroska's, of this stream alone
        if match := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", written):
            hours, minutes, seconds = match.groups()
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        return (self.container.duration or 0) / av.time_base

    @cached_property
    def keyframes_s(self) -> tuple[float, ...]:
        """Times of the keyframes in the container's index; in MP4, of their decoding, shifted to begin at 0."""
        if not self.seekable:
            return ()
        with _open(self.path) as container:
            stream = _video_stream(container, self.path)
            try:
                container.seek(0)  # Matroska's index is read only now
            except av.FFmpegError:
                return ()  # a broken index: decoding goes forward
            found = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]
        time_base = self.stream.time_base or 0
        return tuple(float((timestamp - found[0]) * time_base) for timestamp in found)

    def _decode(self) -> Iterator[tuple[VideoFrame, float]]:
        """Decode forward from where the container stands."""
        time_base = self.stream.time_base
        if time_base is None:
            raise VideoError(f"{self.path}: the stream has no time base, so its frames have no times")
        period_s = 1 / float(self.stream.average_rate or 25)
        is_avi = "avi" in self.container.format.name
        previous_s: float | None = None
        end_s = 0.0
        resumed_pts: int | None = None
        lost = False
        for packet in self._packets():
            if lost and not packet.is_keyframe:
                continue
            if lost:
                self.stream.codec_context.flush_buffers()
                lost, resumed_pts = False, packet.pts
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                self._note(f"decoding failed {_after(previous_s)} ({error.strerror})")
                lost = True
                continue
            for frame in frames:
                # AVI has no presentation times: what PyAV calls so runs backwards around B-frames.
                pts = frame.dts if is_avi else frame.pts
                if resumed_pts is not None and pts is not None and pts < resumed_pts:
                    continue  # shown before the keyframe: it needs frames that were lost
                if pts is None:
                    time_s = 0.0 if previous_s is None else previous_s + period_s
                else:
                    if self.first_pts is None:
                        self.first_pts = pts
                    time_s = float((pts - self.first_pts) * time_base)
                if frame.is_corrupt:
                    if self.skipped_to_s is None or time_s >= self.skipped_to_s:
                        self._note_corrupt(time_s)
                    continue
                previous_s, end_s = time_s, time_s + float(frame.duration * time_base)
                yield frame, time_s
        promised_s = self.header_duration_s
        if end_s < promised_s - EARLY_S - 2 * period_s:
            self._note(f"ends at {end_s:.2f} s, its header promises {promised_s:.2f} s")

    def _packets(self) -> "Iterator[Packet[VideoStream]]":
        """Coded pictures in the order of the file; a file that breaks off ends there."""
        try:
            yield from self.container.demux(self.stream)
        except av.FFmpegError as error:
            self._note(f"reading failed {_after(self.reached_s if self.begun else None)} ({error.strerror})")

    def _note(self, reason: str) -> None:
        if self.damage is None:
            raise VideoError(f"{self.path}: {reason}")
        self.damage.breaks.append(reason)

    def _note_corrupt(self, time_s: float) -> None:
        if self.damage is None:
            raise VideoError(f"{self.path}: the frame at {time_s:.2f} s is corrupt")
        self.damage.corrupt_frames += 1


def _after(time_s: float | None) -> str:
    return "before the first frame" if time_s is None else f"after {time_s:.2f} s"


def _open(path: Path) -> InputContainer:
    if not path.exists():
        raise VideoError(f"{path}: no such file")
    if not path.is_file():
        raise VideoError(f"{path}: not a readable video (it is no file)")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty")
    try:
        return av.open(str(path), metadata_errors="replace")
    except av.FFmpegError as error:
        raise VideoError(f"{path}: not a readable video ({error.strerror})") from error


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise VideoError(f"{path}: there is no video stream in it")
    if stream.disposition & Disposition.attached_pic:
        raise VideoError(f"{path}: there is no video stream in it, only a cover picture")
    return stream
