"""Clips of neighbouring frames for training on videos, shuffled without random seeks; a pair is a clip of two.

Random seeks decode a whole group of pictures for each frame. Here videos are decoded forward in stretches of about a
minute that begin at keyframes; as many stretches, drawn at random, as fit in memory make a block; the clips of a block
are shuffled. While one block is trained on, the next is decoded. A data set that fits in memory is decoded once.

The order is a pure function of (seed, epoch, rank), and the `state` that comes with a batch is all that a resumed run
needs.
"""

import math
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from threading import Event, Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.decoder import Damage, VideoError
from data.manifest import Account
from data.map_ahead import map_ahead
from data.video import FrameSize, VideoInfo, clock_phases_s, read_on_clock

STRETCH_S = 60.0


@dataclass
class ClipsState:
    """Where in the endless sequence of batches the loader stands."""

    epoch: int = 0
    block: int = 0
    batch: int = 0


class Clips(NamedTuple):
    """A batch."""

    frames: Tensor
    """uint8 (B, T, 3, H, W), each one tick after the one before."""
    videos: tuple[Path, ...]
    """Those that the frames are from, each once."""
    state: ClipsState
    """Where the next batch begins: what a run that has used this one has to resume from."""


class Pairs(NamedTuple):
    """A batch of clips of two."""

    frames: Tensor
    """uint8 (B, 3, H, W)."""
    following: Tensor
    """uint8 (B, 3, H, W), one tick later."""
    videos: tuple[Path, ...]
    """As in `Clips`."""
    state: ClipsState
    """As in `Clips`."""
    labels: Tensor | None = None
    """int64 (B,), which class each is of, where that is known; -1 for a single one that is not."""


class Stretch(NamedTuple):
    """A part of a video that is decoded in one go."""

    video: VideoInfo
    start_s: float
    end_s: float
    expected_frames: int


class Decoded(NamedTuple):
    """What a stretch gave."""

    frames: np.ndarray
    """uint8 (N, 3, H, W), each frame once."""
    clips: np.ndarray
    """int64 (C, T), which frames follow each other tick by tick, on any of the clocks."""
    video: Path


class FrameClips:
    """Endless batches of clips of neighbouring frames; clips overlap, one begins at each frame.

    Args:
        videos: the checked videos.
        size: (height, width).
        fps: the clock; neighbours are one tick apart.
        batch_size: clips in a batch, on this rank.
        seed: of the order.
        rank: this process; each rank reads its own share of the stretches (all of them, if there are too few).
        ranks: number of processes.
        memory_bytes: bound on the decoded frames held at any time, as far as durations are known.
        progress: show a progress bar while the first block is decoded.
        phases: sample each video on this many clocks, shifted against each other.
        strict: damage inside a video is an error.
        workers: threads that decode, one a core by default.
        length: frames in a clip.

    Raises:
        VideoError: from iteration, if the videos hold fewer clips than one batch, or, with `strict`, are damaged.
    """

    def __init__(
        self,
        videos: list[VideoInfo],
        size: FrameSize,
        fps: float,
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        memory_bytes: float = 2e9,
        progress: bool = True,
        phases: int = 1,
        strict: bool = False,
        workers: int | None = None,
        length: int = 2,
    ) -> None:
        self.workers = workers
        self.size, self.fps, self.batch_size, self.seed, self.length = size, fps, batch_size, seed, length
        self.rank, self.ranks, self.memory_bytes, self.progress = rank, ranks, memory_bytes, progress
        self.phases_s = clock_phases_s(fps, phases)
        self.strict = strict
        # An eighth: several stretches share a block, and the block shares the memory with the next one.
        longest_s = memory_bytes / 8 / (3 * size[0] * size[1]) / (fps * phases)
        self.stretches = [stretch for video in videos for stretch in _stretches(video, fps * phases, longest_s, length)]
        self.state = ClipsState()
        self.account = Account()
        """What has been read so far, each stretch counted once."""
        self._accounted: set[Stretch] = set()
        self._closed, self._closing = Event(), Lock()

    def close(self) -> None:
        """Let threads that are decoding come to an end: no further batch is wanted, and the account is complete."""
        with self._closing:
            self._closed.set()

    def __iter__(self) -> Iterator[Clips]:
        with ThreadPoolExecutor(max_workers=1) as ahead:
            blocks = self._blocks(self.state.epoch)
            decoded = self._decode(blocks[self.state.block], show=self.progress)
            idle_blocks, clips_seen = 0, 0
            while True:
                last = self.state.block == len(blocks) - 1
                following_blocks = self._blocks(self.state.epoch + 1) if last else blocks
                following_block = following_blocks[0 if last else self.state.block + 1]
                # What fits in memory is decoded once: the next block holds the same frames.
                only_one = len(blocks) == len(following_blocks) == 1
                upcoming = None if only_one else ahead.submit(self._decode, following_block, False)
                clips = yield from self._batches(decoded)
                enough = clips >= self.batch_size
                idle_blocks, clips_seen = (0, 0) if enough else (idle_blocks + 1, clips_seen + clips)
                if idle_blocks >= len(blocks):
                    raise VideoError(
                        f"the videos hold {clips_seen} clips of {self.length} neighbouring frames at {self.fps:g} fps, "
                        f"fewer than --batch-size {self.batch_size}: lower it, or bring more videos"
                    )
                self.state = (
                    ClipsState(self.state.epoch + 1) if last else ClipsState(self.state.epoch, self.state.block + 1)
                )
                blocks = following_blocks
                if upcoming is not None:
                    del decoded
                    decoded = upcoming.result()

    def _blocks(self, epoch: int) -> list[list[Stretch]]:
        """This rank's stretches of an epoch, in random order, cut to what fits in memory."""
        share = self.stretches[self.rank :: self.ranks] if len(self.stretches) >= self.ranks else self.stretches
        bytes_per_frame = 3 * self.size[0] * self.size[1]
        if sum(stretch.expected_frames for stretch in share) * bytes_per_frame <= self.memory_bytes:
            return [share]
        blocks: list[list[Stretch]] = [[]]
        held = 0.0
        for index in np.random.default_rng([self.seed, epoch, self.rank]).permutation(len(share)):
            cost = share[index].expected_frames * bytes_per_frame
            # Half of the memory: the next block is decoded while this one is in use.
            if blocks[-1] and held + cost > self.memory_bytes / 2:
                blocks.append([])
                held = 0.0
            blocks[-1].append(share[index])
            held += cost
        return blocks

    def _decode(self, block: list[Stretch], show: bool) -> list[Decoded]:
        """Frames and clips of each stretch."""
        bar = tqdm(total=len(block), unit="stretch", desc="decoding videos", leave=False, disable=not show)
        decoded = []
        for stretch, (part, seconds, damage) in zip(block, map_ahead(self._read, block, self.workers), strict=True):
            with self._closing:  # after which nobody touches the account
                if self._closed.is_set():
                    break
                decoded.append(part)
                if stretch not in self._accounted:
                    self._accounted.add(stretch)
                    self.account.add(stretch.video.path, seconds, damage)
            bar.update()
        bar.close()
        return decoded

    def _read(self, stretch: Stretch) -> tuple[Decoded, float, Damage]:
        """A stretch, how many seconds of video it has, and what was wrong."""
        video, damage = stretch.video, Damage()
        # Some ticks more than the stretch, so that no clip is lost between two stretches.
        end_s = stretch.end_s + (self.length - 1) / self.fps
        timed_frames = read_on_clock(
            video.path, self.size, self.fps, self.phases_s, stretch.start_s, end_s,
            None if self.strict else damage, video.average_fps,
        )  # fmt: skip
        frames = np.empty((stretch.expected_frames, 3, *self.size), np.uint8)
        clips: list[tuple[int, ...]] = []
        newest = [deque[int](maxlen=self.length) for _ in self.phases_s]  # rows on each clock, without a gap
        last_ticks = [-1] * len(self.phases_s)
        rows, last_time_s = 0, -math.inf
        for timed in timed_frames:
            if self._closed.is_set():
                break
            if timed.time_s > last_time_s:
                if rows == len(frames):
                    frames = np.concatenate([frames, np.empty_like(frames[: 1 + rows // 4])])
                frames[rows] = timed.frame
                rows, last_time_s = rows + 1, timed.time_s
            clip = newest[timed.clock]
            if timed.tick != last_ticks[timed.clock] + 1:
                clip.clear()
            clip.append(rows - 1)
            last_ticks[timed.clock] = timed.tick
            if len(clip) == self.length:
                clips.append(tuple(clip))
        seconds = max(0.0, min(last_time_s, stretch.end_s) - stretch.start_s)
        part = Decoded(frames[:rows], np.array(clips, dtype=np.int64).reshape(-1, self.length), video.path)
        return part, seconds, damage

    def _batches(self, decoded: list[Decoded]) -> Generator[Clips, None, int]:
        """Shuffled full batches of a block, from where the state says."""
        clips = np.concatenate(
            [np.empty((0, 1 + self.length), np.int64)]
            + [np.insert(part.clips, 0, index, axis=1) for index, part in enumerate(decoded)]
        )  # (C, 1 + T): stretch, frames
        generator = np.random.default_rng([self.seed, self.state.epoch, self.state.block, self.rank])
        clips = clips[generator.permutation(len(clips))]
        batches = len(clips) // self.batch_size
        while self.state.batch < batches:
            chosen = clips[self.state.batch * self.batch_size :][: self.batch_size]
            frames = np.stack([decoded[index].frames[rows] for index, *rows in chosen])  # (B, T, 3, H, W)
            videos = tuple(sorted({decoded[index].video for index in np.unique(chosen[:, 0])}))
            self.state.batch += 1
            yield Clips(torch.from_numpy(frames), videos, replace(self.state))
        return len(clips)


class FramePairs(FrameClips):
    """Endless batches of pairs of neighbouring frames: clips of two, taken apart."""

    def __iter__(self) -> Iterator[Pairs]:  # type: ignore[override]  # the same batches, by other names
        for clips in super().__iter__():
            frames, following = clips.frames.unbind(dim=1)
            yield Pairs(frames, following, clips.videos, clips.state)


def read_sequences(videos: list[VideoInfo], size: FrameSize, fps: float, clips: int, length: int) -> Tensor:
    """Frames that follow each other, from as many videos as there are, for diagnostics over time.

    Returns:
        uint8 (C, length, 3, H, W) with C at most `clips`; videos that are too short give nothing.
    """
    sequences = []
    # From the middle: the first seconds of a recording are often black, or still.
    for video in videos[:: max(1, len(videos) // clips)]:
        start_s = max(0.0, (video.duration_s - length / fps) / 2)
        timed_frames = read_on_clock(video.path, size, fps, start_s=start_s, image_fps=video.average_fps)
        try:
            frames = [timed.frame for timed in islice(timed_frames, length)]
        except VideoError:
            continue
        if len(frames) == length:
            sequences.append(np.stack(frames))
        if len(sequences) == clips:
            break
    if not sequences:
        return torch.empty(0, length, 3, *size, dtype=torch.uint8)
    return torch.from_numpy(np.stack(sequences))


def _stretches(video: VideoInfo, ticks_per_second: float, longest_s: float, length: int) -> list[Stretch]:
    """A video in parts of about a minute that begin at keyframes and are no longer than what memory allows."""
    frames_per_second = video.sampled_fps(ticks_per_second)  # each frame is held once
    duration_s = video.duration_s or STRETCH_S  # unknown: taken in one piece, and for a minute when memory is planned
    edges_s = [0.0]
    while edges_s[-1] < video.duration_s:
        # What cannot be sought in is decoded from its beginning for each part: as few of them as memory allows.
        wanted_s = min(STRETCH_S if video.seekable else math.inf, longest_s)
        latest_s = min(2 * STRETCH_S, 2 * longest_s)  # rather a little long than decoded from the keyframe before
        lengths_s = [keyframe_s - edges_s[-1] for keyframe_s in video.keyframes_s]
        suitable_s = [length_s for length_s in lengths_s if wanted_s / 2 <= length_s <= latest_s]
        edges_s.append(edges_s[-1] + min(suitable_s, key=lambda length_s: abs(length_s - wanted_s), default=wanted_s))
    # The last part goes on to the end, wherever that is: headers understate durations.
    edges_s = [*edges_s[:-1], math.inf] if len(edges_s) > 1 else [0.0, math.inf]
    return [
        Stretch(video, start_s, end_s, math.ceil((min(end_s, duration_s) - start_s) * frames_per_second) + length)
        for start_s, end_s in pairwise(edges_s)
    ]
