"""Frames of what is still being recorded: a file that grows, a camera, or an address that FFmpeg opens."""

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from data.clock import TimedFrame, sample
from data.decoder import EARLY_S, CheckedFile, Damage, Opened, VideoDecoder, open_stream
from data.errors import VideoError
from data.picture import IMAGE_FPS
from data.video import FrameSize

PROTOCOLS = "crypto,http,httpproxy,https,rtmp,rtmps,rtp,rtsp,srt,tcp,tls,udp"
"""Ways to what an address, or a playlist there, may name: none leads to files."""
PAUSE_S = 0.2  # between two looks whether a file has grown, or a stream is back


class GrowingFile(CheckedFile):
    """A file whose end is waited for, until nobody has written to it for a while; read like a pipe, never sought in."""

    def __init__(self, path: Path, patience_s: float) -> None:
        super().__init__(path)
        self.patience_s = patience_s

    def seekable(self) -> bool:
        """FFmpeg would look for what is not there yet."""
        return False

    def read(self, size: int | None = -1) -> bytes:
        while not (content := super().read(size)) and not self.error and not is_over(self.fileno(), self.patience_s):
            time.sleep(PAUSE_S)
        return content


class LiveDecoder(VideoDecoder):
    """A video that is still being recorded, decoded forward as it comes; `say` is told of damage at once."""

    most_holes = 1  # then it is asked for anew
    is_whole = False
    """Whether it has ended where its header says."""

    def __init__(self, source: str, patience_s: float, say: Callable[[str], None]) -> None:
        self.source, self.patience_s, self.say = source, patience_s, say
        super().__init__(Path(source), IMAGE_FPS, Damage())
        self.can_skip = False

    @property
    def name(self) -> str:
        return without_password(self.source)

    def note(self, reason: str) -> None:
        self.say(reason)

    def _open_stream(self, **options: str) -> Opened:
        if self.path.is_file():
            file = GrowingFile(self.path, self.patience_s)
            return open_stream(self.name, file, file, options=options | {"protocol_whitelist": "none"})
        kind = None if "://" in self.source else "v4l2"  # cameras of Linux
        options = {} if kind else {"protocol_whitelist": PROTOCOLS, "rtsp_transport": "tcp"}
        nothing = CheckedFile(os.devnull)
        return open_stream(self.name, nothing, self.source, options=options, kind=kind, timeout_s=self.patience_s)

    def _require_whole(self) -> None:
        self.is_whole = self.is_promise and 0 < self.header_duration_s <= self.run.end_s + EARLY_S


def is_stream(source: str) -> bool:
    """Whether it is an address or a camera, which may come back when it has ended."""
    return "://" in source or Path(source).is_char_device()


def is_over(file: Path | int, patience_s: float) -> bool:
    """Whether nobody has written to a file for so long."""
    return time.time() - os.stat(file).st_mtime > patience_s


def without_password(source: str) -> str:
    """An address as messages show it."""
    return re.sub("//[^/]*@", "//", source)


def open_live(source: str, patience_s: float, say: Callable[[str], None]) -> VideoDecoder:
    """A source, ready to be decoded; a file that has not grown for so long as any other video. Raises `VideoError`."""
    path = Path(source)
    if is_stream(source):
        return LiveDecoder(source, patience_s, say)
    if path.is_file() and not is_over(path, patience_s):
        with suppress(VideoError):
            decoder = LiveDecoder(source, patience_s, say)
            if not decoder.stream.frames:
                return decoder
            decoder.__exit__()  # MP4 knows their number once it is whole
    return VideoDecoder(path, IMAGE_FPS, Damage())


def watch_on_clock(
    source: str, size: FrameSize, *, fps: float, offsets_s: Sequence[float], patience_s: float,
    say: Callable[[str], None],
) -> Iterator[TimedFrame]:  # fmt: skip
    """Frames on clocks as in `data.clock.read_on_clock`, while they come; a stream that broke off is opened again.

    Its times then go on after a gap. `say` is told of breaks and damage. Raises `VideoError` where the source cannot be
    opened at first, or a stream gives nothing for `patience_s`.
    """
    begin, newest, came_s, reason = 0, -1, time.monotonic(), "it ended"
    while True:
        try:
            with open_live(source, patience_s, say) as decoder:
                for frame in sample(decoder, size, fps=fps, offsets_s=offsets_s):
                    yield frame._replace(time_s=frame.time_s + begin / fps, tick=frame.tick + begin)
                    newest, came_s = max(newest, frame.tick + begin), time.monotonic()
                if decoder.damage:
                    say(str(decoder.damage))
                if newest >= 0 and (not is_stream(source) or getattr(decoder, "is_whole", False)):
                    return
        except VideoError as error:
            if newest < 0:
                raise
            reason = str(error)
        if newest < 0 or time.monotonic() - came_s > patience_s:
            raise VideoError(f"{without_password(source)}: nothing has come for {patience_s:g} s ({reason})")
        if begin <= newest:  # once for each break
            say(f"broke off after {newest / fps:.1f} s: trying again")
        time.sleep(PAUSE_S)
        begin = newest + 2 + math.ceil((time.monotonic() - came_s) * fps)
