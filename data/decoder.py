"""Frames of an open video with their exact presentation times, decoded forward, skipping ahead.

Damage is left out, never replaced: after a picture that cannot be decoded, reading goes on at the next keyframe, and
frames that FFmpeg had to guess (`is_corrupt`) are dropped. Where times jump back, another recording was joined to the
one before: it goes on after a gap. A fault of the machine, such as a read error, is an `OSError`, and never damage.
"""

import errno
import math
import re
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from data.errors import VideoError
from data.picture import MOST_PIXELS

SEEKABLE = ("mp4", "matroska")
"""Containers in which a seek was found exact; AVI and MPEG streams lose or misplace frames."""
EXACT = (*SEEKABLE, "mxf", "ogg")
"""Containers whose durations are exact, where the rate is constant; ASF's and FLV's are of a lone stream in order."""
ENDS_EARLY = ("mp4", "flv", "asf")
"""Containers of which FFmpeg reads the first recording alone, where several are joined to one file."""
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
"""What comes before an ASF's account of itself, in which is its size."""
FRAGMENT = b"\0\0\0\x10mfhd"  # what each fragment of an MP4 begins with
NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent
"""Streams of pictures that are none of a video's: covers, previews, tiles."""
NO_RATE = "frames a second, for it says no rate"
RAW_TIME_BASE = Fraction(1, 1_200_000)
"""The unit in which FFmpeg counts the times of streams without a container, which have none."""
WORTH_SKIPPING_S = 0.5  # what lies this near is decoded up to rather than looked up
MARGINS_S = (1.0, 10.0)  # how much earlier is sought if a seek led too far
LONGEST_S = 24 * 3600.0  # a header that promises more is not believed
EARLY_S = 0.5
"""A video that ends this much before its header's time is cut off; a frame, where rate and header are exact."""
BACK_S = 0.5  # times that jump back by more than this are another recording's; by less, a picture is out of order
SEAM_S = 10.0
"""How long after the end of one recording the next one begins that is joined to it: no window reaches across."""
GAP_PERIODS = 5  # an interval of more than this many median ones is a gap

Opened = tuple["CheckedFile", InputContainer, VideoStream]


class _Astray(Exception):
    """A skip has not led to the keyframe that was looked for."""


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
    """Frames and their times in seconds, in presentation order. Reading raises `OSError` where the machine fails."""

    # As in `data.video.VideoInfo`, by the header:
    codec: str
    average_fps: float
    header_duration_s: float
    keyframes_s: tuple[float, ...]
    assumed: str = ""
    at_image_fps: bool = False

    def __init__(self, path: Path, damage: Damage | None) -> None:
        self.path, self.damage = path, damage

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path)

    @abstractmethod
    def skip_to(self, time_s: float) -> bool:
        """Go on from the last keyframe at or before a time, if there is one ahead; whether it was done."""

    def note(self, reason: str) -> None:
        """Write damage down, or raise `VideoError` if there is nothing to write it down in."""
        if self.damage is None:
            raise VideoError(f"{self.name}: {reason}")
        if reason not in self.damage.breaks:  # what is decoded twice is told once
            self.damage.breaks.append(reason)


class VideoDecoder(Decoder):
    """A video file, decoded by PyAV. Raises `VideoError` if there is none, or no video stream in it.

    `image_fps` is the rate of a stream that has no container, and does not say its own.
    """

    most_holes = 100  # after which reading goes on

    def __init__(self, path: Path, image_fps: float, damage: Damage | None) -> None:
        super().__init__(path, damage)
        self.image_fps = image_fps
        self.can_skip = True
        self.last_corrupt_s = -math.inf
        """Time of the last corrupt frame that was counted: what is decoded twice is counted once."""
        self._open()

    def _open(self) -> None:
        framerate = str(Fraction(self.image_fps).limit_denominator())
        self.file, self.container, self.stream = self._open_stream(framerate=framerate)
        self.codec = self.stream.codec_context.name
        self.unit = Fraction(self.stream.time_base or 0).as_integer_ratio()  # of times, in seconds
        is_raw = self.stream.time_base == RAW_TIME_BASE or self.container.format.name.endswith("_pipe")
        self.header_fps = float((self.stream.guessed_rate if is_raw else self.stream.average_rate) or 0)
        if is_raw and not self.stream.codec_context.framerate:
            self.assumed, self.at_image_fps = f"{self.header_fps:g} {NO_RATE}", True
        elif (streams := sum(not stream.disposition & NO_VIDEO for stream in self.container.streams.video)) > 1:
            self.assumed = f"stream {self.stream.index} is the video: of its {streams} video streams one is read"
        self.period_s = 1 / (self.header_fps or 25)
        self.header_duration_s, self.is_promise = _header_duration_s(self.container, self.stream)
        self.start_pts = self.stream.start_time  # by the header: reading may find another one
        self.first_pts = self.start_pts if _is(self.container, SEEKABLE) else None
        self.is_unordered = _is(self.container, ("avi", "mxf"))  # what PyAV calls presentation times are none
        self.read_until = 0  # where the last packet ended that was read, in bytes
        self.begin_s = 0.0  # when the recording begins that is read now, of those that are joined to this file
        self.reached_s: float | None = None  # time of the last frame that was given, or to be skipped to
        self.skipped_to_s: float | None = None  # time that was skipped to, until a frame has been given
        self.holes = 0  # how often something was passed over
        self.frames = self._decode()

    def _open_stream(self, **options: str) -> Opened:
        return _open(self.path, **options)

    def _begin_again(self) -> None:
        """Where skipping fails, only decoding from the beginning is sure to find all frames."""
        self.__exit__()
        self._open()
        self.can_skip = False

    def __exit__(self, *error: object) -> None:
        self.container.close()
        self.file.close()

    def __next__(self) -> tuple[VideoFrame, float]:
        try:
            following = next(self.frames)
        except _Astray:
            self._begin_again()
            following = next(self.frames)
        pixels = following[0].format.name
        if not _is_known(pixels):
            raise VideoError(f"{self.name}: its pixel format, {pixels}, cannot be converted: convert the video")
        self.skipped_to_s = None
        self.reached_s = max(self.reached_s or 0.0, following[1])
        return following

    def skip_to(self, time_s: float) -> bool:
        if not self.can_skip or self.first_pts is None or time_s <= (self.reached_s or 0.0) + WORTH_SKIPPING_S:
            return False
        # Where nothing was read yet, the index of a stream that is still being written may know less than a seek finds.
        reached_s = -1.0 if self.reached_s is None else self.reached_s
        if bisect_right(self.keyframes_s, reached_s) == bisect_right(self.keyframes_s, time_s):
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
        shift = max(0, first_pts - self._index.begin)
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
    def _index(self) -> "_Index":
        return _index(self.path, self.stream.index, self.path.stat().st_mtime_ns)

    @property
    def keyframes_s(self) -> tuple[float, ...]:  # type: ignore[override]
        """Times at which decoding can begin, by the container's index; in MP4, those at which it does."""
        return self._index.keyframes_s

    @property
    def average_fps(self) -> float:  # type: ignore[override]
        return self._index.fps or self.header_fps

    def _decode(self, *first: "Packet[VideoStream]") -> Iterator[tuple[VideoFrame, float]]:
        """Decode forward from where the container stands, after a keyframe's packet that was read already."""
        self.run = _Run(first[0].pts if first else None)
        last_dts, is_lost, back, holes = math.inf, False, self._ticks(BACK_S), 0
        for packet in chain(first, self._packets()):
            dts = math.inf if packet.dts is None else packet.dts
            is_back = math.inf > last_dts > dts + back
            is_cut = packet.is_corrupt and not _is(self.container, ("mpegts",))  # which says so of whole ones, too
            is_behind_hole, holes = self.holes > holes, self.holes
            if is_back or ((is_cut or is_behind_hole) and not is_lost):
                nothing: Packet[VideoStream] = Packet()  # type: ignore[assignment]
                nothing.stream = self.stream
                yield from self._shown(nothing)  # what the decoder holds back
                if is_back:
                    self._join()
                elif is_cut:
                    self.note(f"decoding failed {self._after(self.run.previous_s)} (a picture is cut off)")
                is_lost = True  # until the next keyframe
            if is_lost and (is_cut or not packet.is_keyframe):
                continue
            if is_lost:
                self.stream.codec_context.flush_buffers()
                self.run.keyframe_pts, self.run.pictures = packet.pts, _Pictures()
            if self.begin_s and packet.is_discard and packet.pts is not None:  # cut by what was said of the first one
                self._note_corrupt(self._time_s(packet.pts))
            last_dts = dts
            self.read_until = max(self.read_until, (packet.pos or 0) + packet.size)
            is_lost = not (yield from self._shown(packet))
        if self.skipped_to_s is not None:
            raise _Astray
        self._note_misplaced()
        if not is_lost:
            self._note_corrupt(*map(self._time_s, self.run.pictures.lost_before(math.inf)))
            self._require_whole()

    def _shown(self, packet: "Packet[VideoStream]") -> Generator[tuple[VideoFrame, float], None, bool]:
        """Decode a packet: yield the frames that come, and return whether decoding can go on."""
        run = self.run
        if self.codec == "hevc":
            run.pictures.coded(packet)
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if self.skipped_to_s is not None:
                raise _Astray from error
            self._note_error("decoding", run.previous_s, error)
            return False
        for frame in frames:
            # AVI has no presentation times, MXF by FFmpeg neither: what PyAV calls so runs backwards around B-frames.
            pts = frame.dts if self.is_unordered else frame.pts
            if pts is None:
                time_s = self.begin_s if run.previous_s is None else run.previous_s + self.period_s
            elif run.keyframe_pts is not None and pts < run.keyframe_pts:
                continue  # shown before the keyframe: it needs frames that were lost
            elif self.skipped_to_s is not None and (
                frame.is_corrupt or pts > max(run.keyframe_pts or 0, self.first_pts or 0)
            ):
                raise _Astray
            else:
                time_s = self._time_s(pts)
                self._note_corrupt(*map(self._time_s, run.pictures.lost_before(pts)))
            if frame.is_corrupt:
                self._note_corrupt(time_s)
            elif run.previous_s is not None and time_s < run.previous_s:
                run.misplaced += 1
            else:
                self._note_misplaced()
                run.previous_s, run.end_s = time_s, time_s + self._seconds(frame.duration)
                yield frame, time_s
        return True

    def _join(self) -> None:
        """Go on with another recording, whose times begin anew."""
        self._note_misplaced()
        self.note(f"times jump back {self._after(self.run.previous_s)}: another recording, set {SEAM_S:g} s later")
        self.begin_s, self.first_pts, self.can_skip = self.run.end_s + SEAM_S, None, False
        self.run = _Run(previous_s=self.run.previous_s)

    def _packets(self) -> "Iterator[Packet[VideoStream]]":
        """Coded pictures in the order of the file; a file that breaks off ends there."""
        while self.holes < self.most_holes:
            try:
                for packet in self.container.demux(self.stream):  # the last one, which is empty, comes after the end
                    self.file.require_sound()
                    yield packet
                return
            except av.FFmpegError as error:
                self.file.require_sound()
                self._note_error("reading", self.reached_s, error)
                if not isinstance(error, av.BlockingIOError):  # which says that FFmpeg has passed over something
                    return
                self.holes += 1

    def _require_whole(self) -> None:
        """Note if the video ends earlier than its header says, or than its file."""
        if self.begin_s:
            return  # the header tells of the first recording alone
        end_s, promised_s = self.run.end_s, self.header_duration_s
        if self.first_pts is not None and self.start_pts is not None:  # the frames before could not be decoded
            promised_s -= self._seconds(self.first_pts - self.start_pts)
        is_lone = len(self.container.streams) == 1 and not self.stream.codec_context.has_b_frames
        is_exact = _is(self.container, (*EXACT, "asf", "flv") if is_lone else EXACT)
        unsaid = () if _is(self.container, ("asf",)) else (None,)  # ASF says none of a variable rate
        is_exact &= self.stream.average_rate in (self.stream.base_rate, *unsaid)
        tolerance_s = self.period_s + 1e-3 if is_exact else EARLY_S + 2 * self.period_s
        if self.is_promise and end_s < promised_s - tolerance_s:
            self.note(f"ends at {end_s:.2f} s, its header promises {promised_s:.2f} s")
        elif reason := _odd_end(self.path, self.read_until, _is(self.container, ENDS_EARLY)):
            self.note(f"ends at {end_s:.2f} s, {reason}")

    def _note_error(self, what: str, time_s: float | None, error: av.FFmpegError) -> None:
        if error.errno == errno.ENOMEM:  # the machine's fault
            raise OSError(errno.ENOMEM, error.strerror, self.name) from error
        self.note(f"{what} failed {self._after(time_s)} ({error.strerror})")

    def _note_misplaced(self) -> None:
        frames, self.run.misplaced = self.run.misplaced, 0
        if frames:
            where, seconds = self._after(self.run.previous_s), frames * self.period_s
            self.note(f"times run backwards {where}: {frames} frames ({seconds:.2f} s) left out")

    def _note_corrupt(self, *times_s: float) -> None:
        for time_s in times_s:
            if time_s > self.last_corrupt_s:
                if self.damage is None:
                    raise VideoError(f"{self.name}: the frame at {time_s:.2f} s is corrupt")
                self.last_corrupt_s = time_s
                self.damage.corrupt_frames += 1

    def _time_s(self, pts: int) -> float:
        """Seconds since the first displayed frame, which is the first that comes where the header does not say."""
        if self.first_pts is None:
            self.first_pts = pts
        return self.begin_s + self._seconds(pts - self.first_pts)

    def _seconds(self, ticks: int) -> float:
        return ticks * self.unit[0] / self.unit[1]

    def _ticks(self, seconds: float) -> int:
        return int(seconds / (self.stream.time_base or 1) + 1e-6)

    @staticmethod
    def _after(time_s: float | None) -> str:
        return "before the first frame" if time_s is None else f"after {time_s:.2f} s"


class _Pictures(set[int]):
    """Times of coded pictures whose frames are to come: FFmpeg drops what it cannot decode of HEVC without a word."""

    first_pts = math.inf  # the first keyframe's; what is shown before it may need frames that are not there

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


@dataclass
class _Run:
    """Decoding from one place on, the beginning or a keyframe."""

    keyframe_pts: int | None = None  # time of the keyframe: what is shown before it needs frames that are not there
    previous_s: float | None = None  # time of the last frame that was good
    end_s: float = 0.0  # until when it is shown
    misplaced: int = 0  # how many frames after it had earlier times
    pictures: _Pictures = field(default_factory=_Pictures)


class CheckedFile(FileIO):
    """A file that keeps its first error: FFmpeg takes it for the end of the file, and says nothing."""

    error: OSError | None = None

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size) or b""
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, str(self.name))
            return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return super().seek(offset, whence)
        except (OSError, ValueError):  # before the beginning: damaged files ask for it
            return -1

    def require_sound(self) -> None:
        """Raise the error of the machine that there was."""
        if self.error is not None:
            raise self.error


class _Index(NamedTuple):
    """What a container says of all of a stream."""

    keyframes_s: tuple[float, ...] = ()  # times at which decoding can begin; none where it cannot begin in the middle
    begin: int = 0  # the first picture's time of decoding, in ticks
    fps: float = 0.0  # one over the usual interval; 0 where it does not tell of each picture


@lru_cache
def _is_known(pixel_format: str) -> bool:
    """Whether pictures of a format can be made RGB."""
    try:
        VideoFrame(16, 16, pixel_format).reformat(format="gbrp")
    except av.FFmpegError:
        return False
    return True


def usual_interval(intervals: np.ndarray) -> float:
    """The mean interval between frames, without gaps: a pause makes no video slower."""
    return float(intervals[intervals <= GAP_PERIODS * np.median(intervals)].mean())


@lru_cache(maxsize=1024)  # a video is opened for each minute of it
def _index(path: Path, number: int, modified_ns: int) -> _Index:
    """The index of a stream of a file that was changed at a time; of keyframes that are none a skip finds out."""
    file, container, _ = _open(path, probesize="32")
    with file, container:
        if not _is(container, SEEKABLE):
            return _Index()
        stream = container.streams[number]  # FFmpeg's best, by so little of the file, may be another one
        try:
            container.seek(0)  # Matroska's index is read only now
        except av.FFmpegError:
            return _Index()  # a broken index: decoding goes forward
        entries = [(entry.timestamp, entry.is_keyframe, entry.is_discard) for entry in stream.index_entries]
        table = np.array(entries, dtype=np.int64).reshape(-1, 3)
        times, begin = table[:, 0], int(table[table[:, 2] == 0, 0].min(initial=table[:, 0].max(initial=0)))
        steps = np.diff(times)
        if (steps < 0).any():  # several recordings, joined: each begins anew
            return _Index()
        scale, unit = Fraction(stream.time_base or 0).as_integer_ratio()
        is_of_all = _is(container, ("mp4",)) and len(steps) and np.median(steps) > 0
        fps = unit / (usual_interval(steps) * scale) if is_of_all else 0.0
        keyframes = times[table[:, 1] == 1]
        file.require_sound()
        return _Index(tuple((np.maximum(keyframes - begin, 0) * scale / unit).tolist()), begin, fps)


def _is(container: InputContainer, formats: tuple[str, ...]) -> bool:
    return any(name in container.format.name for name in formats)


def _header_duration_s(container: InputContainer, stream: VideoStream) -> tuple[float, bool]:
    """How long the video should be by its header, and whether that is said of this very stream."""
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # Matroska's, of this stream
    time_base, is_own = stream.time_base or 0, True
    if stream.duration is not None:
        # Of an AVI cut short it is a guess from what is there; the number of frames is the header's own.
        end_s = float(max(stream.duration, stream.frames if _is(container, ("avi",)) else 0) * time_base)
    elif tag:
        end_s = sum(float(part) * unit for part, unit in zip(tag.groups(), (3600, 60, 1), strict=True))
    else:
        end_s, is_own = (container.duration or 0) / av.time_base, len(container.streams) == 1
    is_fragmented = _is(container, ("mp4",)) and len(stream.index_entries) != stream.frames
    if is_fragmented or _is(container, ("matroska", "asf", "nut")):
        end_s -= float((stream.start_time or 0) * time_base)  # they count from zero, whenever the first frame is shown
    return (end_s, is_own) if 0 <= end_s <= LONGEST_S else (0.0, False)


def _odd_end(path: Path, read_until: int, ends_early: bool) -> str:
    """What a file's end tells, where FFmpeg says nothing: it takes the duration of a GIF from what is there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(max(0, min(read_until if ends_early else size, size - 64)))
        rest = file.read(1 << 26)
    begin, properties = head[:8], head.partition(ASF_PROPERTIES)[2]
    promised = begin[4:] if begin.startswith(b"RIFF") else properties[24:32]
    is_cut = begin.startswith(b"GIF8") and not rest.rstrip(b"\0").endswith(b";")
    is_cut |= begin.startswith(b"\xff\xd8\xff") and b"\xff\xd9" not in rest  # a JPEG's begin and end
    if int.from_bytes(promised, "little") > size or is_cut:
        return "the file is cut off there"
    if ends_early and (fragments := rest.count(FRAGMENT)) > 2:  # the last ones may be of sound alone
        return f"{fragments} fragments after it cannot be read"
    _, again, others = rest.partition(begin)
    left_out = f"another recording begins there: its {len(again + others):,} bytes are left out"
    return left_out if again and ends_early else ""


def _open(path: Path, **options: str) -> Opened:
    if not path.is_file():  # a pipe would be waited for
        raise VideoError(f"{path}: {'not a readable video' if path.exists() else 'no such file'}")
    file = CheckedFile(path)
    return open_stream(str(path), file, file, options=options | {"protocol_whitelist": "none"})  # no playlist's files


def open_stream(
    name: str, file: CheckedFile, source: CheckedFile | str, *, options: dict[str, str], kind: str | None = None,
    timeout_s: float | None = None,
) -> Opened:  # fmt: skip
    """The video stream in a file, or in what FFmpeg opens by itself; messages call it `name`. Raises `VideoError`."""
    limit = {"max_pixels": str(MOST_PIXELS)}
    with ExitStack() as stack:
        stack.enter_context(file)
        try:
            container = av.open(
                source, format=kind, timeout=timeout_s, metadata_errors="replace", options=options | limit
            )
        except av.FFmpegError as error:
            file.require_sound()
            raise VideoError(f"{name}: not a readable video ({error.strerror})") from error
        stack.enter_context(container)
        file.require_sound()
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
            raise VideoError(f"{name}: there is no video stream in it; a cover picture is none")
        if stream.codec_context is None or stream.time_base is None:
            raise VideoError(f"{name}: the codec of its video stream is unknown, or its times are")
        if stream.width * stream.height > MOST_PIXELS:
            size = f"{stream.width} x {stream.height} pixels"
            raise VideoError(f"{name}: {size} are more than {MOST_PIXELS:,}: make it smaller")
        stream.codec_context.options = limit
        # Clips are decoded in parallel, one thread each: frame threads would only add latency and memory.
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        stack.pop_all()
        return file, container, stream  # type: ignore[return-value]
