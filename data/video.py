"""Videos: what is known of them, and their frames with exact presentation times, resized.

A frame is a planar RGB `uint8` array of shape (3, height, width); a time is in seconds since the first displayed frame.
The whole picture is stretched to the requested size, with swscale's bilinear filter, which widens with the reduction
and so does not alias. A display matrix (phone videos) is applied, mirrored ones too, at the nearest quarter turn.
Streams that do not tag their colour space are read as BT.601 of limited range, as every other decoder does; nothing is
done about high dynamic range, and alpha is ignored. Of several video streams FFmpeg's best is read.

Damage is left out (see `data.decoder`), and each function takes a `Damage` to write it down in. Without one, damage
raises `VideoError` after the good frames before it: nothing is lost in silence.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from data.decoder import Damage, Decoder, VideoDecoder
from data.errors import VideoError
from data.image_sequence import ImageSequenceDecoder
from data.picture import IMAGE_FPS

FrameSize = tuple[int, int]
"""(height, width) in pixels."""

TRANSFORM = "stretched, swscale bilinear (antialiased), upright, bt601 where untagged"
"""What happens to each picture; recorded beside embeddings."""


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video: from its header (`probe_video`), or from all of its frames (`count_frames`)."""

    path: Path
    codec: str
    height: int
    """Height of the upright picture, in pixels."""
    width: int
    duration_s: float
    """Duration in seconds; 0 where the header has none and nobody has counted."""
    average_fps: float
    """Frame rate without pauses: one over the usual interval; 0 where the header has none and nobody has counted."""
    seekable: bool
    """Whether decoding can begin in the middle and give the same frames."""
    keyframes_s: tuple[float, ...]
    """Times at which decoding can begin, as far as they are known."""
    assumed: str = ""
    """What is not known of the video, and was taken for granted."""
    at_image_fps: bool = False  # its times are of the rate that was given for what says none
    frames: int | None = None
    """Frames that decode; None: nobody has counted. Headers lie about it."""
    gaps_s: tuple[tuple[float, float], ...] = ()
    """(begin, length) of the gaps in presentation times, in seconds; only after counting."""
    damage: str = ""
    """Faults found by counting."""
    content: str = ""
    """What tells the video from all others, wherever it lies (`data.content.content_of`)."""
    whole: str = ""
    """The same of all of it, where others were alike."""


def open_video(path: Path, damage: Damage | None, image_fps: float = IMAGE_FPS) -> Decoder:
    """A video file, or a folder of images, ready to be decoded. Raises `VideoError`."""
    return (ImageSequenceDecoder if path.is_dir() else VideoDecoder)(path, image_fps, damage)


def probe_video(path: Path, image_fps: float = IMAGE_FPS) -> VideoInfo:
    """Read the header and decode one frame, so that what is accepted can really be decoded. Raises `VideoError`."""
    with open_video(path, Damage(), image_fps) as decoder:
        return look_at(decoder)[0]


def look_at(decoder: Decoder) -> tuple[VideoInfo, tuple[VideoFrame, float]]:
    """What the header of an opened video says, and its first frame. Raises `VideoError` where none decodes."""
    first = next(decoder, None)
    if first is None:
        reason = str(decoder.damage) or f"the {decoder.codec} stream is empty"
        raise VideoError(f"{decoder.path}: no frame can be decoded ({reason})")
    frame, keyframes_s = first[0], decoder.keyframes_s
    height, width = (frame.width, frame.height) if _orientation(frame)[0] else (frame.height, frame.width)
    info = VideoInfo(
        path=decoder.path, codec=decoder.codec, height=height, width=width, duration_s=decoder.header_duration_s,
        average_fps=decoder.average_fps, seekable=bool(keyframes_s), keyframes_s=keyframes_s,
        assumed=decoder.assumed, at_image_fps=decoder.at_image_fps,
    )  # fmt: skip
    return info, first


def tolerance_s(interval_s: float) -> float:
    """By how much times may be off, at an interval between frames: containers round them to a millisecond."""
    return min(1e-3, interval_s / 4)


class NearestFrames:
    """A cursor on a video that moves forward to the frames nearest to ascending times."""

    def __init__(self, decoder: Decoder, reach_s: float) -> None:
        self.decoder, self.reach_s = decoder, reach_s
        self.frame: VideoFrame | None = None
        self.time_s = 0.0
        self.following: tuple[VideoFrame, float] | None = None
        self.is_over = False

    def at(self, time_s: float) -> tuple[VideoFrame | None, float, float]:
        """The nearest frame, when it is shown, and until when; None if the last frame is out of reach."""
        while self.frame is None or time_s >= self._middle_s():
            if self.is_over:
                return None, self.time_s, self.time_s
            self.frame, self.time_s = self.following or (None, 0.0)
            # A keyframe at or before the wanted time is nearer to it than any frame before the keyframe.
            if self.decoder.skip_to(time_s):
                self.frame = None
            self.following = next(self.decoder, None)
            self.is_over = self.following is None
        return self.frame, self.time_s, self._until_s()

    def _middle_s(self) -> float:
        """From when on the following frame is nearer than this one, or as near."""
        interval_s = self._until_s() - self.time_s
        return self.time_s + interval_s / 2 - tolerance_s(interval_s)

    def _until_s(self) -> float:
        return self.time_s + 2 * self.reach_s if self.following is None else self.following[1]


class FrameConverter:
    """A scaler to planar RGB for a whole stream: resizes, converts and rotates.

    A new scaler for each frame costs up to four times as much, and packed RGB loses accuracy in swscale. A frame that
    several clocks ask for, one after the other, is converted once.
    """

    def __init__(self, size: FrameSize) -> None:
        self.size = size
        self.reformatter = VideoReformatter()
        self.last: tuple[VideoFrame, np.ndarray] | None = None
        self.rotation: int | None = None
        self.orientation = (False, 1, 1)

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        if self.last is None or self.last[0] is not frame:
            self.last = frame, self._convert(frame)
        return self.last[1]

    def _convert(self, frame: VideoFrame) -> np.ndarray:
        if frame.rotation != self.rotation:  # asked of each frame, the matrix would keep it in memory: a cycle in PyAV
            self.rotation, self.orientation = frame.rotation, _orientation(frame)
        is_turned, down, right = self.orientation
        height, width = self.size[::-1] if is_turned else self.size
        interpolation = Interpolation.BILINEAR
        if (frame.height, frame.width) == (height, width):
            # Without resizing swscale takes a short cut that is 1.1 levels too bright.
            interpolation |= Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        planar = self.reformatter.reformat(
            frame, width=width, height=height, format="gbrp", interpolation=interpolation, threads=1
        )
        output = np.empty((3, height, width), dtype=np.uint8)
        for channel, plane in enumerate((planar.planes[2], planar.planes[0], planar.planes[1])):
            rows = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)
            output[channel] = rows[:height, :width]
        upright = output.swapaxes(1, 2) if is_turned else output
        return np.ascontiguousarray(upright[:, ::down, ::right])


def _orientation(frame: VideoFrame) -> tuple[bool, int, int]:
    """How a frame is shown upright: whether rows become columns, and the steps, 1 or -1, of rows and columns then.

    Of the eight ways the one that is nearest to the display matrix.
    """
    try:
        matrix = np.frombuffer(frame.side_data[Type.DISPLAYMATRIX], dtype=np.int32)  # type: ignore[typeddict-item]
    except KeyError:
        return False, 1, 1
    except ValueError:  # there is what PyAV does not know, as Exif; then it hides the matrix
        return ((False, 1, 1), (True, -1, 1), (False, -1, -1), (True, 1, -1))[round(frame.rotation / 90) % 4]
    x_by_x, y_by_x, x_by_y, y_by_y = (int(matrix[at]) for at in (0, 1, 3, 4))
    is_turned = abs(x_by_x) + abs(y_by_y) < abs(y_by_x) + abs(x_by_y)
    x, y = (x_by_y, y_by_x) if is_turned else (x_by_x, y_by_y)
    return is_turned, -1 if y < 0 else 1, -1 if x < 0 else 1
