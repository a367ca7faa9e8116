"""Videos in, embeddings out, decoding and embedding side by side: what is behind stage 2.

Threads decode several videos at once; their frames are embedded in batches that mix videos. While a GPU works on one
batch, the next is copied to it and the last one's embeddings are copied back. All batches have one shape, the last one
filled up, because the last bits of an embedding depend on the shape of its batch: so the same video gives the same
embeddings whatever else is embedded, and wherever a run was interrupted.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from data.decoder import Damage, VideoError
from data.embedding_cache import ClipKey, EmbeddedClip
from data.map_ahead import stream_ahead
from data.video import FrameSize, read_on_clock
from jepa.encoder import FrameEncoder
from pipelines.compute import cores_of_this_process


@dataclass
class Task:
    """A video on its way: what is wanted of it, and what has become of it."""

    source: Path
    keys: Sequence[ClipKey]
    """A clip for each clock that is still missing."""
    damage: Damage = field(default_factory=Damage)
    refused: str = ""
    """Why it cannot be read."""
    ticks: list[tuple[int, int, float, int]] = field(default_factory=list)
    """(clock, tick, time in seconds, row in `embeddings`)."""
    frames: int = 0
    """Frames decoded; a frame that several clocks ask for is one."""
    embeddings: list[np.ndarray] = field(default_factory=list)
    """float32 (n, D) each, together (frames, D)."""

    def clips(self) -> list[EmbeddedClip]:
        """What the cache wants, once all frames are embedded; clocks that fell on no frame are left out."""
        if not self.ticks:
            return []
        embeddings = np.concatenate(self.embeddings)
        clocks, ticks, times_s, rows = (np.array(column) for column in zip(*self.ticks, strict=True))
        return [
            EmbeddedClip(key, embeddings[rows[mine]], times_s[mine], ticks[mine])
            for clock, key in enumerate(self.keys)
            if (mine := clocks == clock).any()
        ]


class Chunk(NamedTuple):
    """Some consecutive frames of a video."""

    task: Task
    frames: np.ndarray
    """uint8 (n, 3, H, W)."""
    is_last: bool


def embed_videos(
    accelerator: Accelerator,
    encoder: FrameEncoder,
    tasks: Sequence[Task],
    fps: float,
    image_fps: float,
    batch_size: int,
    strict: bool,
    bar: "tqdm[None]",
) -> Iterator[Task]:
    """Embed the videos, and yield each as it is done, in no particular order.

    Raises:
        VideoError: with `strict`, a video cannot be read or is damaged.
    """
    size = encoder.config.image_size
    decoders = cores_of_this_process()

    def decode_one(task: Task) -> Iterator[Chunk]:
        return decode(task, size, fps, image_fps, batch_size, strict)

    yield from embed(accelerator, encoder, stream_ahead(decode_one, tasks, decoders), batch_size, bar)


def decode(task: Task, size: FrameSize, fps: float, image_fps: float, chunk_size: int, strict: bool) -> Iterator[Chunk]:
    """All frames of a video on its clocks, each once, a chunk at a time, so that a video may be longer than memory."""
    empty = np.empty((0, 3, *size), np.uint8)
    waiting: list[np.ndarray] = []
    last_time_s = -np.inf
    try:
        for timed in read_on_clock(
            task.source, size, fps, [key.phase_s for key in task.keys],
            damage=None if strict else task.damage, image_fps=image_fps,
        ):  # fmt: skip
            if timed.time_s > last_time_s:
                if len(waiting) == chunk_size:
                    yield Chunk(task, np.stack(waiting), is_last=False)
                    waiting = []
                waiting.append(timed.frame)
                last_time_s = timed.time_s
                task.frames += 1
            task.ticks.append((timed.clock, timed.tick, timed.time_s, task.frames - 1))
    except (VideoError, OSError) as error:
        if strict:
            raise
        task.refused = str(error)
    yield Chunk(task, np.stack(waiting) if waiting else empty, is_last=True)


Owners = list[tuple[Task, int, bool]]
"""Whose rows a batch holds: the task, how many of its frames, and whether they are its last."""


@torch.inference_mode()
def embed(
    accelerator: Accelerator, encoder: FrameEncoder, chunks: Iterable[Chunk], batch_size: int, bar: "tqdm[None]"
) -> Iterator[Task]:
    """Embed the frames of all chunks, and yield each task when its last embedding has come."""
    device = Device(accelerator, encoder)
    height, width = encoder.config.image_size
    # One to be filled, the others on their way.
    buffers = deque(
        torch.zeros(batch_size, 3, height, width, dtype=torch.uint8, pin_memory=device.is_gpu)
        for _ in range(device.depth + 1)
    )
    in_flight: deque[tuple[Future[Tensor], Owners]] = deque()
    owners: Owners = []
    filled = 0
    with device:
        for chunk in chunks:
            taken, is_done = 0, False
            while not is_done:
                count = min(len(chunk.frames) - taken, batch_size - filled)
                buffers[0][filled : filled + count] = torch.from_numpy(chunk.frames[taken : taken + count])
                taken, filled = taken + count, filled + count
                is_done = taken == len(chunk.frames)
                owners.append((chunk.task, count, is_done and chunk.is_last))
                if filled == batch_size:
                    in_flight.append((device.embed(buffers[0]), owners))
                    bar.update(filled)
                    owners, filled = [], 0
                    buffers.rotate(-1)
                    if len(in_flight) > device.depth - 1:
                        yield from give(*in_flight.popleft())
        if owners:
            in_flight.append((device.embed(buffers[0]), owners))
            bar.update(filled)
        while in_flight:
            yield from give(*in_flight.popleft())


def give(embedded: "Future[Tensor]", owners: Owners) -> Iterator[Task]:
    """Give each task its embeddings; yield those that have all of them."""
    embeddings = embedded.result().numpy()
    start = 0
    for task, count, is_last in owners:
        task.embeddings.append(embeddings[start : start + count].copy())
        start += count
        if is_last:
            yield task


class Device:
    """Embeds batches, several at a time.

    On a GPU two threads take turns, each with a stream of its own: while one batch is computed, the next is copied. On
    a CPU each batch has one thread to itself: threads that share a batch wait for each other in busy loops, and
    decoding lacks what they waste.
    """

    def __init__(self, accelerator: Accelerator, encoder: FrameEncoder) -> None:
        self.accelerator, self.encoder = accelerator, encoder
        self.is_gpu = accelerator.device.type == "cuda"
        workers = 2 if self.is_gpu else torch.get_num_threads()
        self.depth = workers + 1
        """Batches that are worked on or wait."""
        self.pool = ThreadPoolExecutor(workers, initializer=self._prepare_thread)

    def _prepare_thread(self) -> None:
        if self.is_gpu:
            torch.cuda.set_device(self.accelerator.device)
            torch.cuda.set_stream(torch.cuda.Stream())
        else:
            torch.set_num_threads(1)

    def __enter__(self) -> Self:
        if self.is_gpu:
            torch.cuda.synchronize()  # the weights were copied on another stream
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def embed(self, frames: Tensor) -> "Future[Tensor]":
        """Embeddings of uint8 frames (B, 3, H, W), as float32 (B, D) on the CPU."""
        return self.pool.submit(self._embed, frames)

    @torch.inference_mode()
    def _embed(self, frames: Tensor) -> Tensor:
        with self.accelerator.autocast():
            embeddings: Tensor = self.encoder(frames.to(self.accelerator.device, non_blocking=True))
        return embeddings.float().cpu()
