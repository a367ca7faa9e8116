"""Frames of an open video with their exact presentation times, decoded forward, skipping ahead.

Damage is left out, never replaced: after a picture that cannot be decoded, reading goes on at the next keyframe, and
frames that FFmpeg had to guess (`is_corrupt`) are dropped.
"""

import math
import re
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from data.errors import DataError

SEEKABLE = ("mp4", "matroska")
"""Containers in which a seek was found exact; AVI and MPEG streams lose or misplace frames."""
WORTH_SKIPPING_S = 0.5  # what lies this near is decoded up to rather than looked up
MARGINS_S = (1.0, 10.0)  # how much earlier is sought if a seek led too far
LONGEST_S = 30 * 24 * 3600.0  # a header that promises more is not believed
EARLY_S = 0.5
"""A video that ends this much before its header's time is cut off; half a frame, where rate and header are exact."""


class VideoError(DataError):
    """An unusable video; the message names the file and the reason."""


@dataclass
class Damage:
    """Faults found in a video while it was read; filled in by the function that reads."""

    corrupt_frames: int = 0
    """Frames left out because the decoder marked them as guessed, or gave none."""
    breaks: list[str] = field(default_factory=list)
    """Where decoding failed or the video ended early, and why."""

    def add(self, other: "Damage") -> None:
        """Add the faults found in another part of the video."""
        self.corrupt_frames += other.corrupt_frames
        self.breaks += [reason for reason in other.breaks if reason not in self.breaks]

    def __bool__(self) -> bool:
        return bool(self.corrupt_frames or self.breaks)

    def __str__(self) -> str:
        corrupt = [f"{self.corrupt_frames} corrupt frames left out"] if self.corrupt_frames else []
        return "; ".join(corrupt + self.breaks)


class Decoder(Iterator[tuple[VideoFrame, float]], AbstractContextManager["Decoder"]):
    """Frames and their times in seconds, in presentation order."""

    # As in `data.video.VideoInfo`, by the header:
    codec: str
    average_fps: float
    seekable: bool
    header_duration_s: float
    keyframes_s: tuple[float, ...]

    def __init__(self, path: Path, damage: Damage | None) -> None:
        self.path, self.damage = path, damage

    @abstractmethod
    def skip_to(self, time_s: float) -> bool:
        """Go on from the last keyframe at or before a time, if there is one ahead; whether it was done."""

    def note(self, reason: str) -> None:
        """Write damage down, or raise `VideoError` if there is nothing to write it down in."""
        if self.damage is None:
            raise VideoError(f"{self.path}: {reason}")
        if reason not in self.damage.breaks:  # what is decoded twice is told once
            self.damage.breaks.append(reason)


class VideoDecoder(Decoder):
    """A video file, decoded by PyAV. Raises `VideoError` if there is none, or no video stream in it."""

    def __init__(self, path: Path, damage: Damage | None) -> None:
        super().__init__(path, damage)
        self.can_skip = True
        self.last_corrupt_s = -math.inf
        """Time of the last corrupt frame that was counted: what is decoded twice is counted once."""
        self._open()

    def _open(self) -> None:
        self.container, self.stream = _open(self.path)
        # Clips are decoded in parallel, one thread each: frame threads would only add latency and memory.
        self.stream.thread_type = "SLICE"
        self.stream.codec_context.thread_count = 1
        self.codec = self.stream.codec_context.name
        self.average_fps = float(self.stream.average_rate or 0)
        self.period_s = 1 / (self.average_fps or 25)
        self.seekable = any(name in self.container.format.name for name in SEEKABLE)
        self.header_duration_s, self.is_promise = _header_duration_s(self.container, self.stream)
        self.first_pts = self.stream.start_time if self.seekable else None
        self.reached_s: float | None = None
        """Time of the last frame that was given, or to be skipped to."""
        self.skipped_to_s: float | None = None
        """Time that was skipped to, until a frame has been given."""
        self.frames = self._decode()

    def _begin_again(self) -> None:
        """Where skipping fails, only decoding from the beginning is sure to find all frames."""
        self.container.close()
        self._open()
        self.can_skip = False

    def __exit__(self, *error: object) -> None:
        self.container.close()

    def __next__(self) -> tuple[VideoFrame, float]:
        following = next(self.frames, None)
        if following is None and self.skipped_to_s is not None:
            self._begin_again()  # nothing decodes there: the last frame is before
        following = following or next(self.frames)
        self.skipped_to_s = None
        self.reached_s = max(self.reached_s or 0.0, following[1])
        return following

    def skip_to(self, time_s: float) -> bool:
        if not self.can_skip or self.first_pts is None or time_s <= (self.reached_s or 0.0) + WORTH_SKIPPING_S:
            return False
        if self.reached_s is not None:
            reached, wanted = (bisect_right(self.keyframes_s, moment_s) for moment_s in (self.reached_s, time_s))
            if reached == wanted:
                return False
        packet = self._seek(self.first_pts, time_s)
        if packet is None:
            self._begin_again()
            return True
        # Not the keyframe's own time: an index may be wrong about that, and the next skip would lead back here.
        self.reached_s = self.skipped_to_s = time_s
        self.frames = self._decode(packet)
        return True

    def _seek(self, first_pts: int, time_s: float) -> "Packet[VideoStream] | None":
        """Stand at the last keyframe at or before a time, and return it; None if that cannot be done."""
        target = first_pts + self._ticks(time_s)
        # MP4 is sought by decoding times, which run ahead of presentation times by as much as pictures are reordered:
        # without the shift one arrives a whole group of pictures early, with it now and then a little late. At variable
        # rates decoding times run ahead unevenly: hence the tries with a margin.
        index = self.stream.index_entries
        shift = max(0, first_pts - index[0].timestamp) if len(index) else 0
        for aimed in (target + shift, target, *(target - self._ticks(margin_s) for margin_s in MARGINS_S)):
            try:
                self.container.seek(aimed, stream=self.stream)
                packet = next(self.container.demux(self.stream))
            except (av.FFmpegError, StopIteration):
                return None
            if packet.is_keyframe and packet.pts is not None and packet.pts <= target:
                return packet
        return None

    @cached_property
    def keyframes_s(self) -> tuple[float, ...]:  # type: ignore[override]
        """Times of the keyframes in the container's index; in MP4, of their decoding, shifted to begin at 0."""
        if not self.seekable:
            return ()
        container, stream = _open(self.path)
        with container:
            try:
                container.seek(0)  # Matroska's index is read only now
            except av.FFmpegError:
                return ()  # a broken index: decoding goes forward
            timestamps = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]
        return tuple(self._seconds(timestamp - timestamps[0]) for timestamp in timestamps)

    def _decode(self, *first: "Packet[VideoStream]") -> Iterator[tuple[VideoFrame, float]]:
        """Decode forward from where the container stands, after a packet that was read already."""
        previous_s: float | None = None
        end_s = 0.0
        keyframe_pts = first[0].pts if first else None
        is_lost = False
        pictures = _Pictures()
        for packet in chain(first, self._packets()):
            if is_lost and not packet.is_keyframe:
                continue
            if is_lost:
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
                pts = frame.dts if "avi" in self.container.format.name else frame.pts
                if pts is None:
                    time_s = 0.0 if previous_s is None else previous_s + self.period_s
                elif keyframe_pts is not None and pts < keyframe_pts:
                    continue  # shown before the keyframe: it needs frames that were lost
                else:
                    time_s = self._time_s(pts)
                    self._note_corrupt(*map(self._time_s, pictures.lost_before(pts)))
                if frame.is_corrupt:
                    self._note_corrupt(time_s)
                elif previous_s is not None and time_s < previous_s:
                    self.note(f"times run backwards {self._after(previous_s)}")
                else:
                    previous_s, end_s = time_s, time_s + self._seconds(frame.duration)
                    yield frame, time_s
        if not is_lost:
            self._note_corrupt(*map(self._time_s, pictures.lost_before(math.inf)))
            self._require_promised(end_s)

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
            self.note(f"reading failed {self._after(self.reached_s)} ({error.strerror})")

    def _require_promised(self, end_s: float) -> None:
        """Note if the video ends earlier than its header says."""
        promised_s = self.header_duration_s
        if self.first_pts is not None and self.stream.start_time is not None:  # the frames before could not be decoded
            promised_s -= self._seconds(self.first_pts - self.stream.start_time)
        is_constant = self.seekable and self.stream.average_rate == self.stream.base_rate
        tolerance_s = 0.5 * self.period_s if is_constant else EARLY_S + 2 * self.period_s
        if self.is_promise and end_s < promised_s - tolerance_s:
            self.note(f"ends at {end_s:.2f} s, its header promises {promised_s:.2f} s")
        elif _is_cut_off(self.path):
            self.note(f"ends at {end_s:.2f} s, the file is cut off there")

    def _note_corrupt(self, *times_s: float) -> None:
        for time_s in times_s:
            if time_s >= (self.skipped_to_s or 0) and time_s > self.last_corrupt_s:
                if self.damage is None:
                    raise VideoError(f"{self.path}: the frame at {time_s:.2f} s is corrupt")
                self.last_corrupt_s = time_s
                self.damage.corrupt_frames += 1

    def _time_s(self, pts: int) -> float:
        """Seconds since the first displayed frame, which is the first that comes where the header does not say."""
        if self.first_pts is None:
            self.first_pts = pts
        return self._seconds(pts - self.first_pts)

    def _seconds(self, ticks: int) -> float:
        return float(ticks * (self.stream.time_base or 0))

    def _ticks(self, seconds: float) -> int:
        return int(seconds / (self.stream.time_base or 1) + 1e-6)

    def _after(self, time_s: float | None) -> str:
        time_s = self.skipped_to_s if time_s is None else time_s
        return "before the first frame" if time_s is None else f"after {time_s:.2f} s"


class _Pictures(set[int]):
    """Times of coded pictures whose frames are to come: FFmpeg drops what it cannot decode of HEVC without a word."""

    first_pts = math.inf
    """The first keyframe's; what is shown before it may need frames that are not there."""

    def coded(self, packet: "Packet[VideoStream]") -> None:
        if packet.pts is not None and not packet.is_discard:
            if packet.is_keyframe:
                self.first_pts = min(self.first_pts, packet.pts)
            if packet.pts >= self.first_pts:
                self.add(packet.pts)

    def lost_before(self, pts: float) -> list[int]:
        """Pictures that should have come out before the frame that now comes out."""
        earlier = sorted(picture for picture in self if picture < pts)
        self.difference_update(earlier, [pts])
        return earlier


def _header_duration_s(container: InputContainer, stream: VideoStream) -> tuple[float, bool]:
    """How long the video should be by its header, and whether that is said of this very stream."""
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # Matroska's, of this stream
    time_base, is_own = stream.time_base or 0, True
    if stream.duration is not None:
        end_s = float(stream.duration * time_base)
    elif tag:
        end_s = sum(float(part) * unit for part, unit in zip(tag.groups(), (3600, 60, 1), strict=True))
    else:
        end_s, is_own = (container.duration or 0) / av.time_base, len(container.streams) == 1
    if any(name in container.format.name for name in ("matroska", "asf")):
        end_s -= float((stream.start_time or 0) * time_base)  # they count from zero, whenever the first frame is shown
    return (end_s, is_own) if 0 <= end_s <= LONGEST_S else (0.0, False)


def _is_cut_off(path: Path) -> bool:
    """Whether an AVI or a GIF is shorter than it says: FFmpeg takes their durations from what is there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(8)
        file.seek(max(0, size - 64))
        end = file.read().rstrip(b"\0")
    if begin.startswith(b"RIFF"):
        return int.from_bytes(begin[4:], "little") > size
    return begin.startswith(b"GIF8") and not end.endswith(b";")


def _open(path: Path) -> tuple[InputContainer, VideoStream]:
    if not path.is_file():  # a pipe would be waited for
        raise VideoError(f"{path}: {'not a readable video' if path.exists() else 'no such file'}")
    try:
        container = av.open(str(path), metadata_errors="replace")
    except av.FFmpegError as error:
        raise VideoError(f"{path}: not a readable video ({error.strerror})") from error
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        reason = "there is no video stream in it; a cover picture is none"
    elif stream.codec_context is None or stream.time_base is None:
        reason = "the codec of its video stream is unknown, or its times are"
    else:
        return container, stream
    container.close()
    raise VideoError(f"{path}: {reason}")
