"""Clips of neighbouring frames for training on videos, shuffled without random seeks; a pair is a clip of two.

Videos are decoded forward in segments of about a minute that begin at keyframes; as many segments, drawn at random, as
fit in memory make a block; the clips of a block are shuffled. While one block is trained on, the next is decoded. A
data set that fits in memory is decoded once. The order is a pure function of (seed, epoch, rank).
"""

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.account import Account
from data.clock import read_on_clock
from data.decoder import LONGEST_S, Damage
from data.errors import VideoError
from data.parallel import map_ahead, stream_ahead
from data.video import FrameSize, VideoInfo

SEGMENT_S = 60.0
LONGEST_GROUP_S = 3600.0  # where keyframes are days apart, what follows one by more than this is a gap


class Clips(NamedTuple):
    """A batch."""

    frames: Tensor
    """uint8 (B, T, 3, H, W), each one tick after the one before."""
    videos: tuple[Path, ...]
    """Videos that the frames are from, each once."""
    place: dict[str, int]
    """Where the next batch begins: what a run that has used this one has to resume from."""


class Segment(NamedTuple):
    """A part of a video, decoded in one go."""

    video: VideoInfo
    start_s: float
    end_s: float
    expected_frames: int


@dataclass
class Part:
    """What a segment gave."""

    segment: Segment
    clips: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    """Frames of each clip, uint8 (3, H, W); clips that overlap share them."""
    seconds: float = 0.0
    damage: Damage = field(default_factory=Damage)


@dataclass(eq=False)
class FrameClips:
    """Endless batches of clips of neighbouring frames; clips overlap, one begins at each frame.

    Iteration raises `VideoError` if the videos hold fewer clips than one batch, or, with `strict`, one is damaged, gone
    or changed.
    """

    videos: list[VideoInfo]
    size: FrameSize
    _: KW_ONLY
    fps: float
    """The clock's rate; neighbours are one tick apart."""
    batch_size: int
    """Clips in a batch, on this rank."""
    length: int = 2
    """Frames in a clip."""
    seed: int = 0
    rank: int = 0
    """This process; each reads its own share of the segments (all of them, if there are too few)."""
    ranks: int = 1
    memory_bytes: float = 2e9
    """Bound on the decoded frames held at any time, as far as durations are known."""
    strict: bool = False
    """Damage inside a video is an error."""
    workers: int | None = None
    """Threads that decode, one a core by default."""
    progress: bool = True
    """Show a progress bar while the first block is decoded."""

    def __post_init__(self) -> None:
        self.memory_frames = self.memory_bytes / (3 * self.size[0] * self.size[1])
        self.segments = [segment for video in self.videos for segment in self._segments(video)]
        self.account = Account()  # what batches were taken from so far, each segment counted once
        self._counted: set[tuple[Path, float]] = set()
        self._states = {video.path: _state(video.path) for video in self.videos}

    def batches(self, place: dict[str, int]) -> Iterator[Clips]:
        """Batches from the place on that came with an earlier one, or `{}` for the beginning."""
        first_batch, unwanted = place.get("batch", 0), Event()
        idle_blocks = idle_clips = 0
        plan = self._plan(place.get("epoch", 0), place.get("block", 0))
        decoded = stream_ahead(partial(self._decoded, unwanted), [plan], workers=1)
        try:
            for epoch, block, blocks, parts in decoded:
                for part in parts:
                    name = part.segment.video.path, part.segment.start_s
                    if name not in self._counted:
                        self._counted.add(name)
                        self.account.add(part.segment.video.path, part.seconds, part.damage)
                clips = [(part.segment.video.path, clip) for part in parts for clip in part.clips]
                order = np.random.default_rng([self.seed, epoch, block, self.rank]).permutation(len(clips))
                for batch in range(first_batch, len(clips) // self.batch_size):
                    chosen = [clips[at] for at in order[batch * self.batch_size :][: self.batch_size]]
                    frames = torch.from_numpy(np.stack([frame for _, clip in chosen for frame in clip]))
                    frames = frames.unflatten(0, (self.batch_size, self.length))  # (B, T, 3, H, W)
                    videos = tuple(sorted({video for video, _ in chosen}))
                    yield Clips(frames, videos, {"epoch": epoch, "block": block, "batch": batch + 1})
                first_batch = 0
                is_idle = len(clips) < self.batch_size
                idle_blocks, idle_clips = (idle_blocks + 1, idle_clips + len(clips)) if is_idle else (0, 0)
                if idle_blocks >= blocks:
                    raise VideoError(
                        f"the videos hold {idle_clips} clips of {self.length} neighbouring frames at {self.fps:g} fps, "
                        f"fewer than a batch of {self.batch_size}: make batches smaller, or bring more videos"
                    )
        finally:
            unwanted.set()  # nobody waits for what is being decoded

    def _plan(self, epoch: int, block: int) -> Iterator[tuple[int, int, int, list[Segment]]]:
        """(epoch, block, how many blocks, what is to be in it), without end."""
        while True:
            blocks = self._blocks(epoch)
            yield from ((epoch, index, len(blocks), blocks[index]) for index in range(block, len(blocks)))
            epoch, block = epoch + 1, 0

    def _blocks(self, epoch: int) -> list[list[Segment]]:
        """This rank's segments of an epoch, in random order, cut to what fits in memory."""
        share = self.segments[self.rank :: self.ranks] if len(self.segments) >= self.ranks else self.segments
        if sum(segment.expected_frames for segment in share) <= self.memory_frames:
            return [share]
        blocks: list[list[Segment]] = []
        frames = math.inf
        for index in np.random.default_rng([self.seed, epoch, self.rank]).permutation(len(share)):
            # Half of the memory: the next block is decoded while this one is in use.
            if frames + share[index].expected_frames > self.memory_frames / 2:
                blocks.append([])
                frames = 0
            blocks[-1].append(share[index])
            frames += share[index].expected_frames
        return blocks

    def _decoded(
        self, unwanted: Event, plan: Iterator[tuple[int, int, int, list[Segment]]]
    ) -> Iterator[tuple[int, int, int, list[Part]]]:
        """(epoch, block, how many blocks, what is in it); what fits in memory is decoded once."""
        held: list[Segment] = []
        for epoch, block, blocks, segments in plan:
            if segments != held:
                reads = map_ahead(partial(self._read, unwanted), segments, workers=self.workers)
                show = self.progress and not held
                bar = tqdm(reads, "decoding videos", len(segments), unit="segment", leave=False, disable=not show)
                held, parts = segments, list(bar)
            yield epoch, block, blocks, parts

    def _read(self, unwanted: Event, segment: Segment) -> Part:
        part = Part(segment)
        try:
            self._fill(part, unwanted)
        except (VideoError, OSError) as error:  # one video never costs the others
            if self.strict:
                raise
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            part.damage.breaks.append(reason.removeprefix(f"{segment.video.path}: "))
        return part

    def _fill(self, part: Part, unwanted: Event) -> None:
        segment, video = part.segment, part.segment.video
        if _state(video.path) != self._states[video.path]:
            raise VideoError(f"{video.path}: it is gone, or has changed since the run began")
        timed_frames = read_on_clock(
            video.path, self.size, fps=self.fps, start_s=segment.start_s,
            end_s=segment.end_s + (self.length - 1) / self.fps,  # so that no clip is lost between two segments
            damage=None if self.strict else part.damage, image_fps=video.average_fps,
        )  # fmt: skip
        neighbours: deque[np.ndarray] = deque(maxlen=self.length)
        last_tick = -1
        for frame, time_s, tick, _ in timed_frames:
            if unwanted.is_set():
                break
            if tick != last_tick + 1:
                neighbours.clear()
            neighbours.append(frame)
            last_tick, part.seconds = tick, max(0.0, min(time_s, segment.end_s) - segment.start_s)
            if len(neighbours) == self.length:
                part.clips.append(tuple(neighbours))

    def _segments(self, video: VideoInfo) -> Iterator[Segment]:
        """A video in parts of about a minute that begin at keyframes and are no longer than what memory allows."""
        # An eighth: several segments share a block, and the block shares the memory with the next one.
        longest_s = self.memory_frames / 8 / self.fps
        # What cannot be sought in is decoded from its beginning for each part: as few of them as memory allows.
        wanted_s = min(SEGMENT_S if video.seekable else math.inf, longest_s)
        latest_s = 2 * min(SEGMENT_S, longest_s)  # rather a little long than decoded from the keyframe before
        keyframes_s, rate = video.keyframes_s, min(self.fps, video.average_fps or self.fps)
        last_s = max(video.duration_s, *keyframes_s[-1:], 0.0)
        gaps = [(begin_s, begin_s + length_s) for begin_s, length_s in video.gaps_s]
        gaps = gaps or [(one + LONGEST_GROUP_S, two) for one, two in pairwise(keyframes_s) if two - one > LONGEST_S]
        start_s = 0.0
        while start_s < math.inf:
            middle_s = start_s + wanted_s
            first = bisect_left(keyframes_s, start_s + wanted_s / 2)
            last = bisect_right(keyframes_s, start_s + latest_s)
            end_s = min(keyframes_s[first:last], key=lambda one: abs(one - middle_s), default=middle_s)
            # A duration that is not known is taken for a minute when memory is planned.
            frames = math.ceil((min(end_s, last_s or SEGMENT_S) - start_s) * rate) + self.length
            at = bisect_left(gaps, (end_s,))
            end_s = max(end_s, gaps[at - 1][1] if at else 0.0)  # a gap of days is not gone through by the minute
            # The last goes on to the end, wherever that is: headers understate durations.
            end_s = end_s if end_s < last_s else math.inf
            yield Segment(video, start_s, end_s, frames)
            start_s = end_s


def _state(path: Path) -> tuple[int, int] | None:
    """What tells that a file has changed; None if it is gone."""
    with suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return None


def read_sequences(videos: list[VideoInfo], size: FrameSize, *, fps: float, clips: int, length: int) -> Tensor:
    """Frames that follow each other, from as many videos as there are, for diagnostics over time.

    Returns uint8 (C, length, 3, H, W) with C at most `clips`; videos that are too short give nothing.
    """
    sequences: list[np.ndarray] = []
    for video in videos[:: max(1, len(videos) // clips)]:
        # From the middle: the first seconds of a recording are often black, or still.
        start_s = max(0.0, (video.duration_s - length / fps) / 2)
        timed_frames = read_on_clock(video.path, size, fps=fps, start_s=start_s, image_fps=video.average_fps)
        with suppress(VideoError, OSError):
            frames = [timed.frame for timed in islice(timed_frames, length)]
            sequences += [np.stack(frames)] if len(frames) == length else []
        if len(sequences) == clips:
            break
    return torch.from_numpy(np.stack(sequences)) if sequences else torch.empty(0, length, 3, *size, dtype=torch.uint8)
