"""Videos in, embeddings out, decoding and embedding side by side: the one embedder.

Threads decode several videos at once; what an encoder sees of each tick is embedded in batches that mix videos. While a
GPU works on one batch, the next is copied to it and the last one's embeddings are copied back. All batches have one
shape, the last one filled up, because the last bits of an embedding depend on the shape of its batch: so the same video
gives the same embeddings whatever else is embedded, and wherever a run was interrupted.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor
from tqdm import tqdm

from data.cache import ClipKey
from data.cache_writer import EmbeddedClip
from data.clock import TimedFrame, read_on_clock
from data.content import is_content_of
from data.decoder import Damage
from data.errors import VideoError
from data.parallel import stream_ahead
from jepa.encoder import Encoder
from pipelines.run.devices import ACTIVATIONS, cores_of_this_process
from pipelines.run.memory import require_memory


@dataclass(eq=False)
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
    """Embeddings so far; a frame that several clocks share has one, where the encoder sees single frames."""
    embeddings: list[np.ndarray] = field(default_factory=list)
    """float32 (n, *tokens, D) each, together (rows, *tokens, D)."""

    def clips(self) -> list[EmbeddedClip]:
        """Clips for the cache; clocks that fell on no frame are left out."""
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
"""Frames that the encoder sees of a tick, each uint8 (3, H, W), the last one the tick's own."""
Chunk = tuple[Task, list[Window], bool]
"""Windows of some consecutive ticks of a video, and whether they are its last."""


def embed_videos(
    accelerator: Accelerator, encoder: Encoder, tasks: Sequence[Task], *, fps: float, image_fps: float, batch_size: int,
    strict: bool, bar: "tqdm[None]",
) -> Iterator[Task]:  # fmt: skip
    """Embed videos, `batch_size` windows at a time, and yield each as it is done, in no particular order.

    The encoder is on the accelerator's device. `bar` counts embeddings. Where a video cannot be read or is damaged its
    task says what was wrong, but with `strict` that is a `VideoError`.
    """
    decode_one = partial(decode, encoder=encoder, fps=fps, image_fps=image_fps, chunk_size=batch_size, strict=strict)
    chunks = stream_ahead(decode_one, tasks, workers=cores_of_this_process(), at_once=2)
    is_gpu = accelerator.device.type == "cuda"
    # On a CPU each batch has a thread to itself: threads that share a batch wait for each other in busy loops, and
    # decoding lacks what they waste.
    workers = 2 if is_gpu else torch.get_num_threads()
    shape = (batch_size, encoder.window, 3, *encoder.image_size)
    require_memory(ACTIVATIONS * math.prod(shape), f"--batch-size {batch_size}")
    # One to be filled, the others on their way.
    buffers = deque(torch.zeros(shape, dtype=torch.uint8, pin_memory=is_gpu) for _ in range(workers + 2))
    in_flight: deque[tuple[Future[Tensor] | None, list[Task], list[Task]]] = deque()
    if is_gpu:
        torch.cuda.synchronize()  # the weights were copied on another stream
    with ThreadPoolExecutor(workers, initializer=_prepare_thread, initargs=(accelerator.device,)) as pool:
        for owners, ended in _fill(buffers, chunks):
            embedded = pool.submit(embed_frames, accelerator, encoder, buffers[0]) if owners else None
            in_flight.append((embedded, owners, ended))
            buffers.rotate(-1)
            bar.update(len(owners))
            if len(in_flight) > workers:
                yield from _hand_out(*in_flight.popleft())
        while in_flight:
            yield from _hand_out(*in_flight.popleft())


def decode(
    task: Task, *, encoder: Encoder, fps: float, image_fps: float, chunk_size: int, strict: bool
) -> Iterator[Chunk]:
    """All windows of a video on its clocks, a chunk at a time, so that a video may be longer than memory."""
    offsets_s = [key.offset_s for key in task.keys]
    waiting: list[Window] = []
    last_time_s = -np.inf
    damage = None if strict else task.damage
    try:
        frames = read_on_clock(
            task.source, encoder.image_size, fps=fps, offsets_s=offsets_s, damage=damage, image_fps=image_fps
        )
        for (_, time_s, tick, clock), window in windows_of(frames, encoder.window, clocks=len(offsets_s)):
            if encoder.window > 1 or time_s > last_time_s:
                if len(waiting) == chunk_size:
                    yield task, waiting, False
                    waiting = []
                waiting.append(window)
                last_time_s = time_s
                task.rows += 1
            task.ticks.append((clock, tick, time_s, task.rows - 1))
        if not is_content_of(task.source, task.keys[0].content):  # else another video's embeddings had this one's name
            raise VideoError(f"{task.source}: it has changed since it was looked at")
    except (VideoError, OSError) as error:
        if strict:
            raise
        task.refused = str(error)
    yield task, waiting, True


def windows_of(frames: Iterable[TimedFrame], length: int, *, clocks: int) -> Iterator[tuple[TimedFrame, Window]]:
    """Each tick's frame, and those that the encoder sees of it.

    A window is consecutive ticks of one clock; before the first one, and after a gap, that tick's frame is repeated.
    """
    histories: list[deque[np.ndarray]] = [deque(maxlen=length) for _ in range(clocks)]
    last_ticks = [-1] * clocks
    for timed in frames:
        history = histories[timed.clock]
        if timed.tick != last_ticks[timed.clock] + 1:
            history.clear()
        history.append(timed.frame)
        last_ticks[timed.clock] = timed.tick
        yield timed, (history[0],) * (length - len(history)) + tuple(history)


def _prepare_thread(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # a process alone is given no index
        torch.cuda.set_stream(torch.cuda.Stream())  # one batch is copied while another is computed
    else:
        torch.set_num_threads(1)


@torch.inference_mode()
def embed_frames(accelerator: Accelerator, encoder: Encoder, frames: Tensor) -> Tensor:
    """Embeddings of uint8 frames (B, window, 3, H, W), as float32 (B, *tokens, D) on the CPU."""
    # Two threads would share the weights that autocast has cast, and one stream would not wait for the other's cast.
    with accelerator.autocast(AutocastKwargs(cache_enabled=False)):
        return encoder.embed(frames.to(accelerator.device, non_blocking=True)).float().cpu()


def _fill(buffers: deque[Tensor], chunks: Iterable[Chunk]) -> Iterator[tuple[list[Task], list[Task]]]:
    """Fill the first buffer again and again; yield whose each row is, and which tasks have no more rows to come."""
    owners: list[Task] = []
    ended: list[Task] = []
    for task, windows, is_last in chunks:
        for window in windows:
            np.stack(window, out=buffers[0][len(owners)].numpy())
            owners.append(task)
            if len(owners) == len(buffers[0]):
                yield owners, ended
                owners, ended = [], []
        if is_last:
            ended.append(task)
    yield owners, ended


def _hand_out(embedded: "Future[Tensor] | None", owners: list[Task], ended: list[Task]) -> Iterator[Task]:
    """Give each task its embeddings; yield those that have all of them."""
    start = 0
    for task, rows in groupby(owners):
        end = start + len(list(rows))
        task.embeddings.append(embedded.result()[start:end].numpy().copy())  # type: ignore[union-attr]
        start = end
    yield from ended
