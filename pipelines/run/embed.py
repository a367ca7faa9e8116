"""Videos in, embeddings out, decoding and embedding side by side: the one embedder.

Threads decode several videos at once; what an encoder sees of each tick is embedded in batches that mix videos. While a
GPU works on one batch, the next is copied to it and the last one's embeddings are copied back. All batches have one
shape, the last one filled up, because the last bits of an embedding depend on the shape of its batch: so the same video
gives the same embeddings whatever else is embedded, and wherever a run was interrupted.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from data.cache import ClipKey, EmbeddedClip
from data.decoder import Damage, VideoError
from data.parallel import stream_ahead
from data.video import read_on_clock
from jepa.encoder import Encoder
from pipelines.run.devices import cores_of_this_process


@dataclass
class Task:
    """A video to embed, and what has become of it."""

    source: Path
    keys: Sequence[ClipKey]
    """A clip for each clock that is still missing."""
    damage: Damage = field(default_factory=Damage)
    refused: str = ""
    """Why it cannot be read."""
    ticks: list[tuple[int, int, float, int]] = field(default_factory=list)
    """(clock, tick, time in seconds, row in `embeddings`)."""
    rows: int = 0
    """Embeddings; a frame that several clocks share has one, where the encoder sees single frames."""
    embeddings: list[np.ndarray] = field(default_factory=list)
    """float32 (n, *tokens, D) each, together (rows, *tokens, D)."""

    def clips(self) -> list[EmbeddedClip]:
        """Clips for the cache, once all is embedded; clocks that fell on no frame are left out."""
        if not self.ticks:
            return []
        embeddings = np.concatenate(self.embeddings)
        clocks, ticks, times_s, rows = (np.array(column) for column in zip(*self.ticks, strict=True))
        return [
            EmbeddedClip(key, {"embeddings": embeddings[rows[mine]]}, times_s[mine], ticks[mine])
            for clock, key in enumerate(self.keys)
            if (mine := clocks == clock).any()
        ]


Window = tuple[np.ndarray, ...]
"""Frames that an encoder sees of a tick, each uint8 (3, H, W), the last one the tick's own."""


class Chunk(NamedTuple):
    """Windows of some consecutive ticks of a video."""

    task: Task
    windows: list[Window]
    is_last: bool


def embed_videos(
    accelerator: Accelerator,
    encoder: Encoder,
    tasks: Sequence[Task],
    *,
    fps: float,
    image_fps: float,
    batch_size: int,
    strict: bool,
    bar: "tqdm[None]",
) -> Iterator[Task]:
    """Embed the videos, and yield each as it is done, in no particular order.

    Args:
        accelerator: gives the device and the precision.
        encoder: on that device.
        tasks: the videos, and the clocks that are wanted of each.
        fps: rate of the clocks.
        image_fps: rate of image sequences.
        batch_size: windows (single frames, for a frame encoder) that are embedded together.
        strict: damage is an error; otherwise a task says what was wrong.
        bar: counts embeddings.

    Raises:
        VideoError: with `strict`, a video cannot be read or is damaged.
    """
    decode_one = partial(decode, encoder=encoder, fps=fps, image_fps=image_fps, chunk_size=batch_size, strict=strict)
    chunks = stream_ahead(decode_one, tasks, workers=cores_of_this_process())
    yield from embed(accelerator, encoder, chunks, batch_size=batch_size, bar=bar)


def decode(
    task: Task, *, encoder: Encoder, fps: float, image_fps: float, chunk_size: int, strict: bool
) -> Iterator[Chunk]:
    """All windows of a video on its clocks, a chunk at a time, so that a video may be longer than memory.

    The frames of a window are consecutive ticks of one clock. Before the first tick, and before the first one after a
    gap in the recording, that tick's frame is repeated.
    """
    offsets_s = [key.offset_s for key in task.keys]
    histories: list[deque[np.ndarray]] = [deque(maxlen=encoder.window) for _ in offsets_s]
    last_ticks = [-1] * len(offsets_s)
    waiting: list[Window] = []
    last_time_s = -np.inf
    damage = None if strict else task.damage
    try:
        for frame, time_s, tick, clock in read_on_clock(
            task.source, encoder.image_size, fps=fps, offsets_s=offsets_s, damage=damage, image_fps=image_fps
        ):
            if encoder.window > 1 or time_s > last_time_s:
                if len(waiting) == chunk_size:
                    yield Chunk(task, waiting, is_last=False)
                    waiting = []
                history = histories[clock]
                if tick != last_ticks[clock] + 1:
                    history.clear()
                history.append(frame)
                waiting.append((history[0],) * (encoder.window - len(history)) + tuple(history))
                last_ticks[clock], last_time_s = tick, time_s
                task.rows += 1
            task.ticks.append((clock, tick, time_s, task.rows - 1))
    except (VideoError, OSError) as error:
        if strict:
            raise
        task.refused = str(error)
    yield Chunk(task, waiting, is_last=True)


Owners = list[tuple[Task, int, bool]]
"""Owners of a batch's rows: the task, how many, and whether they are its last."""


@torch.inference_mode()
def embed(
    accelerator: Accelerator, encoder: Encoder, chunks: Iterable[Chunk], *, batch_size: int, bar: "tqdm[None]"
) -> Iterator[Task]:
    """Embed the windows of all chunks, and yield each task when its last embedding has come."""
    device = Device(accelerator, encoder)
    shape = (batch_size, encoder.window, 3, *encoder.image_size)
    # One to be filled, the others on their way.
    buffers = deque(torch.zeros(shape, dtype=torch.uint8, pin_memory=device.is_gpu) for _ in range(device.depth + 1))
    in_flight: deque[tuple[Future[Tensor], Owners]] = deque()
    owners: Owners = []
    filled = 0
    with device:
        for task, windows, is_last in chunks:
            taken, is_done = 0, False
            while not is_done:
                part = windows[taken : taken + batch_size - filled]
                for row, window in enumerate(part, start=filled):
                    np.stack(window, out=buffers[0][row].numpy())
                taken, filled = taken + len(part), filled + len(part)
                is_done = taken == len(windows)
                owners.append((task, len(part), is_done and is_last))
                if filled == batch_size:
                    in_flight.append((device.embed(buffers[0]), owners))
                    bar.update(filled)
                    owners, filled = [], 0
                    buffers.rotate(-1)
                    if len(in_flight) > device.depth - 1:
                        yield from hand_out(*in_flight.popleft())
        if owners:
            in_flight.append((device.embed(buffers[0]), owners))
            bar.update(filled)
        while in_flight:
            yield from hand_out(*in_flight.popleft())


def hand_out(embedded: "Future[Tensor]", owners: Owners) -> Iterator[Task]:
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

    def __init__(self, accelerator: Accelerator, encoder: Encoder) -> None:
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
        """Embeddings of uint8 frames (B, window, 3, H, W), as float32 (B, *tokens, D) on the CPU."""
        return self.pool.submit(self._embed, frames)

    @torch.inference_mode()
    def _embed(self, frames: Tensor) -> Tensor:
        with self.accelerator.autocast():
            embeddings = self.encoder.embed(frames.to(self.accelerator.device, non_blocking=True))
        return embeddings.float().cpu()
