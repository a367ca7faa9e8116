"""Pairs of neighbouring frames for encoder training, shuffled without random seeks.

Random seeks decode a whole group of pictures for each frame. Here videos are decoded forward in stretches of a
minute; as many stretches, drawn at random, as fit in memory make a block; the pairs of a block are shuffled. While
one block is trained on, the next is decoded. A data set that fits in memory is decoded once.

The order is a pure function of (seed, epoch, rank), and `state` is all that a resumed run needs.
"""

import math
import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.video import FrameSize, VideoError, VideoInfo, read_on_clock

STRETCH_S = 60.0


class Pairs(NamedTuple):
    """Frames and those one tick later, uint8 (B, 3, H, W) each."""

    frames: Tensor
    following: Tensor


class Stretch(NamedTuple):
    """A part of a video that is decoded in one go."""

    path: Path
    start_s: float
    end_s: float
    phase_s: float
    expected_frames: int


@dataclass
class PairsState:
    """Where in the endless sequence of batches the loader stands."""

    epoch: int = 0
    block: int = 0
    batch: int = 0


class FramePairs:
    """Endless batches of neighbouring frames.

    Args:
        videos: the checked videos.
        size: (height, width).
        fps: the clock; neighbours are one tick apart.
        batch_size: pairs in a batch, on this rank.
        seed: of the order.
        rank: this process; each rank reads its own share of the stretches (all of them, if there are too few).
        ranks: number of processes.
        memory_bytes: bound on the decoded frames held at any time.
        progress: show a progress bar while the first block is decoded.
        phases: sample each video on this many clocks, shifted against each other.

    Raises:
        VideoError: from iteration, if the videos hold fewer pairs than one batch.
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
    ) -> None:
        self.size, self.fps, self.batch_size, self.seed = size, fps, batch_size, seed
        self.rank, self.ranks, self.memory_bytes, self.progress = rank, ranks, memory_bytes, progress
        self.stretches = [
            stretch for video in videos for phase in range(phases) for stretch in _stretches(video, fps, phase / phases)
        ]
        self.state = PairsState()
        self.failures: dict[Path, str] = {}
        """Videos whose decoding broke off, and why; the frames before the failure are used."""

    def __iter__(self) -> Iterator[Pairs]:
        with ThreadPoolExecutor(max_workers=1) as ahead:
            blocks = self._blocks(self.state.epoch)
            decoded = self._decode(blocks[self.state.block], show=self.progress)
            idle_blocks, pairs_seen = 0, 0
            while True:
                last = self.state.block == len(blocks) - 1
                following_blocks = self._blocks(self.state.epoch + 1) if last else blocks
                following_block = following_blocks[0 if last else self.state.block + 1]
                # What fits in memory is decoded once: the next block holds the same frames.
                only_one = len(blocks) == len(following_blocks) == 1
                upcoming = None if only_one else ahead.submit(self._decode, following_block, False)
                pairs = yield from self._batches(decoded)
                enough = pairs >= self.batch_size
                idle_blocks, pairs_seen = (0, 0) if enough else (idle_blocks + 1, pairs_seen + pairs)
                if idle_blocks >= len(blocks):
                    raise VideoError(
                        f"the videos hold {pairs_seen} pairs of neighbouring frames at {self.fps:g} fps, "
                        f"fewer than --batch-size {self.batch_size}: lower it, or bring more videos"
                    )
                self.state = (
                    PairsState(self.state.epoch + 1) if last else PairsState(self.state.epoch, self.state.block + 1)
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

    def _decode(self, block: list[Stretch], show: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """Frames (T, 3, H, W) and ticks (T,) of each stretch."""

        def decode(stretch: Stretch) -> tuple[np.ndarray, np.ndarray]:
            frames, ticks = [], []
            try:
                for timed in read_on_clock(
                    stretch.path, self.size, self.fps, stretch.phase_s, stretch.start_s, stretch.end_s
                ):
                    frames.append(timed.frame)
                    ticks.append(timed.tick)
            except VideoError as error:
                self.failures[stretch.path] = str(error)
            empty = np.empty((0, 3, *self.size), dtype=np.uint8)
            return np.stack(frames) if frames else empty, np.array(ticks, dtype=np.int64)

        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // self.ranks)) as pool:
            bar = tqdm(
                pool.map(decode, block),
                total=len(block),
                unit="stretch",
                desc="decoding videos",
                leave=False,
                disable=not show,
            )
            return list(bar)

    def _batches(self, decoded: list[tuple[np.ndarray, np.ndarray]]) -> Generator[Pairs, None, int]:
        """Shuffled full batches of a block, from where the state says."""
        pairs = np.array(
            [(index, at) for index, (_, ticks) in enumerate(decoded) for at in np.flatnonzero(np.diff(ticks) == 1)]
        ).reshape(-1, 2)
        generator = np.random.default_rng([self.seed, self.state.epoch, self.state.block, self.rank])
        pairs = pairs[generator.permutation(len(pairs))]
        batches = len(pairs) // self.batch_size
        while self.state.batch < batches:
            chosen = pairs[self.state.batch * self.batch_size :][: self.batch_size]
            frames = np.stack([decoded[index][0][at] for index, at in chosen])
            following = np.stack([decoded[index][0][at + 1] for index, at in chosen])
            self.state.batch += 1
            yield Pairs(torch.from_numpy(frames), torch.from_numpy(following))
        return len(pairs)


def read_sequences(videos: list[VideoInfo], size: FrameSize, fps: float, clips: int, length: int) -> Tensor:
    """Frames that follow each other, from as many videos as there are, for diagnostics over time.

    Returns:
        uint8 (C, length, 3, H, W) with C at most `clips`; videos that are too short give nothing.
    """
    sequences = []
    # From the middle: the first seconds of a recording are often black, or still.
    for video in videos[:: max(1, len(videos) // clips)]:
        start_s = max(0.0, (video.duration_s - length / fps) / 2)
        try:
            frames = [
                timed.frame
                for timed, _ in zip(read_on_clock(video.path, size, fps, start_s=start_s), range(length), strict=False)
            ]
        except VideoError:
            continue
        if len(frames) == length:
            sequences.append(np.stack(frames))
        if len(sequences) == clips:
            break
    if not sequences:
        return torch.empty(0, length, 3, *size, dtype=torch.uint8)
    return torch.from_numpy(np.stack(sequences))


def _stretches(video: VideoInfo, fps: float, phase: float) -> list[Stretch]:
    phase_s = phase / fps
    if video.duration_s == 0:
        # Unknown until it is decoded: taken in one piece, and for a minute when memory is planned.
        return [Stretch(video.path, 0.0, math.inf, phase_s, int(STRETCH_S * fps))]
    count = max(1, math.ceil(video.duration_s / STRETCH_S)) if video.seekable else 1
    edges = [index * STRETCH_S for index in range(count)] + [math.inf]
    return [
        Stretch(video.path, start_s, end_s, phase_s, math.ceil((min(end_s, video.duration_s) - start_s) * fps) + 1)
        for start_s, end_s in pairwise(edges)
    ]
