"""An open video that is decoded forward and can skip ahead: frames with their exact presentation times.

Damage is left out, never replaced: after a picture that cannot be decoded, reading goes on at the next keyframe, and
frames that FFmpeg had to guess (`is_corrupt`) are dropped.
"""

import math
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

SEEKABLE = ("mp4", "matroska")
"""Containers in which a seek was found exact. In all others (AVI and MPEG streams lose or misplace frames) videos are
decoded from the beginning."""
WORTH_SKIPPING_S = 0.5
"""What lies this near is decoded up to rather than looked up."""
EARLY_S = 0.5
"""A video that ends this much before the time in its header is reported as cut off; where the rate is constant and the
header exact, half a frame is enough."""
MARGINS_S = (1.0, 10.0)
"""How much earlier is sought if a seek led too far."""
LONGEST_S = 30 * 24 * 3600.0
"""A header that promises more is not believed."""
CLOCK_TOLERANCE_S = 1e-3
"""Containers round times to a millisecond."""


class VideoError(Exception):
    """A video that cannot be used; the message names the file and the reason."""


@dataclass
class Damage:
    """What was found wrong with a video while it was read; filled in by the function that reads."""

    corrupt_frames: int = 0
    """Frames left out because the decoder marked them as guessed, or gave none."""
    breaks: list[str] = field(default_factory=list)
    """Where decoding failed or the video ended early, and why."""

    def add(self, other: "Damage") -> None:
        """What was found in another part of the video."""
        self.corrupt_frames += other.corrupt_frames
        self.breaks += [reason for reason in other.breaks if reason not in self.breaks]

    def __bool__(self) -> bool:
        return bool(self.corrupt_frames or self.breaks)

    def __str__(self) -> str:
        corrupt = [f"{self.corrupt_frames} corrupt frames left out"] if self.corrupt_frames else []
        return "; ".join(corrupt + self.breaks)


class Decoder(ABC):
    """Iterates over (frame, time in seconds) in presentation order; a context manager."""

    codec: str
    average_fps: float
    """0 where the header has none."""
    seekable: bool
    """Whether decoding can begin in the middle and give the same frames."""
    header_duration_s: float
    """What the header promises, 0 where it says nothing."""

    def __init__(self, path: Path, damage: Damage | None) -> None:
        self.path, self.damage = path, damage

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    @property
    @abstractmethod
    def keyframes_s(self) -> tuple[float, ...]:
        """Times at which decoding can begin, as far as the container knows them."""

    @abstractmethod
    def __next__(self) -> tuple[VideoFrame, float]:
        """The next frame and its time."""

    @abstractmethod
    def skip_to(self, time_s: float) -> bool:
        """Go on from the last keyframe at or before a time, if there is one ahead; whether it was done."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def note(self, reason: str) -> None:
        """Write damage down, or raise `VideoError` if there is nothing to write it down in."""
        if self.damage is None:
            raise VideoError(f"{self.path}: {reason}")
        if reason not in self.damage.breaks:  # what is decoded twice is told once
            self.damage.breaks.append(reason)


class VideoDecoder(Decoder):
    """A video file, decoded by PyAV.

    Raises:
        VideoError: the file is missing, empty, not a video or has no video stream.
    """

    def __init__(self, path: Path, damage: Damage | None) -> None:
        super().__init__(path, damage)
        self.can_skip = True
        self.judged_s = -math.inf
        """Time of the last corrupt frame that was counted: what is decoded twice is counted once."""
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
        self.codec = self.stream.codec_context.name
        self.average_fps = float(self.stream.average_rate or 0)
        self.seekable = any(name in self.container.format.name for name in SEEKABLE)
        self.header_duration_s, self.is_promise = _header_duration_s(self.container, self.stream)
        self.first_pts = self.stream.start_time if self.seekable else None
        self.begun = False
        self.reached_s = 0.0
        """Time of the last frame that was given, or to be skipped to."""
        self.skipped_to_s: float | None = None
        """Until a frame has been given after a skip."""
        self.frames = self._decode()

    def close(self) -> None:
        """Let go of the file."""
        self.container.close()

    def __next__(self) -> tuple[VideoFrame, float]:
        following = next(self.frames, None)
        if following is None and self.skipped_to_s is not None:
            self._begin_again()  # nothing decodes there: the last frame is before
            following = next(self.frames, None)
        if following is None:
            raise StopIteration
        frame, time_s = following
        self.skipped_to_s = None
        self.begun, self.reached_s = True, max(self.reached_s, time_s)
        return frame, time_s

    def skip_to(self, time_s: float) -> bool:
        """Go on from the last keyframe at or before a time, if there is one ahead; whether it was done."""
        if not self.can_skip or self.first_pts is None or time_s <= self.reached_s + WORTH_SKIPPING_S:
            return False
        if self.begun and bisect_right(self.keyframes_s, self.reached_s) == bisect_right(self.keyframes_s, time_s):
            return False
        packet = self._seek(self.first_pts, time_s)
        if packet is None:
            self._begin_again()
            return True
        # Not the keyframe's own time: an index may be wrong about that, and the next skip would lead back here.
        self.begun, self.reached_s, self.skipped_to_s = True, time_s, time_s
        self.frames = self._decode(packet)
        return True

    def _begin_again(self) -> None:
        """Where skipping fails, only decoding from the beginning is sure to find all frames."""
        self.close()
        self._open()
        self.can_skip = False

    def _seek(self, first_pts: int, time_s: float) -> "Packet[VideoStream] | None":
        """Stand at the last keyframe at or before a time, and return it; None if that cannot be done."""
        assert self.stream.time_base is not None
        target = first_pts + int(time_s / self.stream.time_base + 1e-6)
        # MP4 is sought by decoding times, which run ahead of presentation times by as much as pictures are reordered:
        # without the shift one arrives a whole group of pictures early, with it now and then a little late. At variable
        # rates decoding times run ahead unevenly: hence the tries with a margin.
        index = self.stream.index_entries
        shift = max(0, first_pts - index[0].timestamp) if len(index) else 0
        margins = [int(margin_s / self.stream.time_base) for margin_s in MARGINS_S]
        for aimed in (target + shift, target, *(target - margin for margin in margins)):
            try:
                self.container.seek(aimed, stream=self.stream)
                packet = next(self.container.demux(self.stream))
            except (av.FFmpegError, StopIteration):
                return None
            if packet.is_keyframe and packet.pts is not None and packet.pts <= target:
                return packet
        return None

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

    def _decode(self, *first: "Packet[VideoStream]") -> Iterator[tuple[VideoFrame, float]]:
        """Decode forward from where the container stands, after a packet that was read already."""
        time_base = self.stream.time_base
        if time_base is None:
            raise VideoError(f"{self.path}: the stream has no time base, so its frames have no times")
        period_s = 1 / (self.average_fps or 25)
        is_avi = "avi" in self.container.format.name
        previous_s: float | None = None
        end_s = 0.0
        keyframe_pts = first[0].pts if first else None
        is_lost = is_backward = False
        pictures = _Pictures()
        for packet in chain(first, self._packets()):
            if is_lost:
                if not packet.is_keyframe:
                    continue
                self.stream.codec_context.flush_buffers()
                is_lost, keyframe_pts, pictures = False, packet.pts, _Pictures()
            if self.codec == "hevc":
                pictures.coded(packet)
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                self.note(f"decoding failed {self._after(previous_s)} ({error.strerror})")
                is_lost = True
                continue
            for frame in frames:
                # AVI has no presentation times: what PyAV calls so runs backwards around B-frames.
                pts = frame.dts if is_avi else frame.pts
                if keyframe_pts is not None and pts is not None and pts < keyframe_pts:
                    continue  # shown before the keyframe: it needs frames that were lost
                if pts is None:
                    time_s = 0.0 if previous_s is None else previous_s + period_s
                else:
                    if self.first_pts is None:
                        self.first_pts = pts
                    time_s = float((pts - self.first_pts) * time_base)
                    for lost_pts in pictures.lost_before(pts):
                        self._note_corrupt(float((lost_pts - self.first_pts) * time_base))
                if frame.is_corrupt:
                    self._note_corrupt(time_s)
                    continue
                if previous_s is not None and time_s < previous_s:
                    if not is_backward:
                        self.note(f"times run backwards {self._after(previous_s)}")
                    is_backward = True
                    continue
                is_backward = False
                previous_s, end_s = time_s, time_s + float(frame.duration * time_base)
                yield frame, time_s
        if is_lost:
            return
        for lost_pts in pictures.lost_before(math.inf):
            self._note_corrupt(float((lost_pts - (self.first_pts or 0)) * time_base))
        self._require_promised(end_s)

    def _require_promised(self, end_s: float) -> None:
        """Note if the video ends earlier than its header says."""
        promised_s, period_s = self.header_duration_s, 1 / (self.average_fps or 25)
        if self.first_pts is not None and self.stream.start_time is not None:  # the frames before could not be decoded
            promised_s -= float((self.first_pts - self.stream.start_time) * (self.stream.time_base or 0))
        is_constant = self.seekable and self.stream.average_rate == self.stream.base_rate
        tolerance_s = 0.5 * period_s if is_constant else EARLY_S + 2 * period_s
        if self.is_promise and end_s < promised_s - tolerance_s:
            self.note(f"ends at {end_s:.2f} s, its header promises {promised_s:.2f} s")
        elif _is_cut_off(self.path):
            self.note(f"ends at {end_s:.2f} s, the file is cut off there")

    def _packets(self) -> "Iterator[Packet[VideoStream]]":
        """Coded pictures in the order of the file; a file that breaks off ends there."""
        try:
            while True:
                try:
                    yield from self.container.demux(self.stream)
                    return
                except IndexError:  # PyAV does not know streams that begin later; their packets are not wanted
                    continue
        except av.FFmpegError as error:
            self.note(f"reading failed {self._after(self.reached_s if self.begun else None)} ({error.strerror})")

    def _note_corrupt(self, time_s: float) -> None:
        if time_s < (self.skipped_to_s or 0) or time_s <= self.judged_s:
            return
        if self.damage is None:
            raise VideoError(f"{self.path}: the frame at {time_s:.2f} s is corrupt")
        self.judged_s = time_s
        self.damage.corrupt_frames += 1

    def _after(self, time_s: float | None) -> str:
        time_s = self.skipped_to_s if time_s is None else time_s
        return "before the first frame" if time_s is None else f"after {time_s:.2f} s"


class _Pictures:
    """Coded pictures that have not come out as frames: FFmpeg drops what it cannot decode of HEVC without a word."""

    def __init__(self) -> None:
        self.first_pts: int | None = None
        """Of the first keyframe: what is shown before it may need frames that are not there."""
        self.awaited: set[int] = set()

    def coded(self, packet: "Packet[VideoStream]") -> None:
        if packet.pts is None or packet.is_discard:
            return
        if self.first_pts is None and packet.is_keyframe:
            self.first_pts = packet.pts
        if self.first_pts is not None and packet.pts >= self.first_pts:
            self.awaited.add(packet.pts)

    def lost_before(self, pts: float) -> list[int]:
        """Those that should have come out before the frame that now comes out."""
        lost = sorted(one for one in self.awaited if one < pts)
        self.awaited = {one for one in self.awaited if one > pts}
        return lost


def _header_duration_s(container: InputContainer, stream: VideoStream) -> tuple[float, bool]:
    """How long the video should be by its header, and whether that is said of this very stream."""
    written = stream.metadata.get("DURATION", "")  # Matroska's, of this stream alone
    own = stream.duration is not None or len(container.streams) == 1
    if stream.duration is not None:
        end_s = float(stream.duration * (stream.time_base or 0))
    elif match := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", written):
        hours, minutes, seconds = match.groups()
        own, end_s = True, int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    else:
        end_s = (container.duration or 0) / av.time_base
    if any(name in container.format.name for name in ("matroska", "asf")):
        # They count from zero, whenever the first frame is shown.
        end_s -= float((stream.start_time or 0) * (stream.time_base or 0))
    return (end_s, own) if 0 <= end_s <= LONGEST_S else (0.0, False)


def _is_cut_off(path: Path) -> bool:
    """Whether an AVI or a GIF is shorter than it says: FFmpeg takes their durations from what is there."""
    with path.open("rb") as file:
        begin = file.read(8)
        file.seek(max(0, path.stat().st_size - 64))
        end = file.read().rstrip(b"\0")
    if begin.startswith(b"RIFF"):
        return int.from_bytes(begin[4:], "little") > path.stat().st_size
    return begin.startswith(b"GIF8") and not end.endswith(b";")


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
    if stream.codec_context is None:
        raise VideoError(f"{path}: the codec of its video stream is unknown")
    return stream
