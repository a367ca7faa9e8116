"""What stops a run before it wastes a night: numbers that are none, too little memory, ranks that disagree or die."""

import ctypes
import hashlib
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as distributed
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from pipelines.compute import MemoryEstimate, memory_capacity, memory_in_use
from pipelines.stage import GO_ON, UserError, flat, is_out_of_memory, readable_bytes, said_by_all, to_json

SHOWN_VIDEOS = 5
SMALLEST_SCALE = 1e-3
"""Of the loss in fp16; healthy runs have thousands."""
BEAT_S = 2.0
SILENCE_S = 30.0
"""After which a rank counts as dead. Its heart beats in a thread of its own, however long a step may take."""
GRACE_S = 5.0
"""For the main thread to say why the others have gone."""


class _Watched(NamedTuple):
    step: int
    videos: Sequence[Path]
    finite: Tensor
    ready: "torch.cuda.Event | None"


class FiniteGuard:
    """Stops when a loss or a gradient is NaN or infinite.

    On a GPU the numbers of a step are looked at one step later, when they have arrived without anybody waiting; a
    checkpoint is written only after all have been looked at, so none holds what came of a bad number.

    Args:
        accelerator: tells the precision and the device.
        states: folder of the checkpoints.
    """

    def __init__(self, accelerator: Accelerator, states: Path) -> None:
        self.states = states
        # With fp16, infinite gradients are ordinary: the scaler skips the step and lowers its scale.
        self.scaler = accelerator.scaler
        self.asynchronous = accelerator.device.type == "cuda"
        self.watched: deque[_Watched] = deque()

    def watch(self, step: int, videos: Sequence[Path], loss: Tensor, gradient_norm: Tensor) -> None:
        """Take note of a step's numbers, and look at those that have arrived.

        Args:
            step: that is under way, from 0.
            videos: of this rank's part of the batch.
            loss: scalar.
            gradient_norm: scalar, of the gradient averaged over ranks.
        """
        values = [loss.detach(), gradient_norm.detach()] if self.scaler is None else [loss.detach()]
        finite = torch.stack([value.float() for value in values]).isfinite().all()
        ready = None
        if self.asynchronous:
            finite = finite.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.watched.append(_Watched(step, videos, finite, ready))
        self.settle(but=1 if self.asynchronous else 0)

    def check_scale(self, step: int) -> None:
        """Raises `UserError` if gradients in fp16 are never finite: the scaler has lowered its scale to nothing."""
        if self.scaler is not None and self.scaler.get_scale() < SMALLEST_SCALE:
            raise UserError(
                f"gradients are not finite in fp16 (step {step}, loss scale {self.scaler.get_scale():g}): "
                "take --compute.precision bf16 or fp32"
            )

    def settle(self, but: int = 0) -> None:
        """Look at all steps' numbers but those of the last few.

        Raises:
            UserError: a loss or a gradient is not finite.
        """
        while len(self.watched) > but:
            step, videos, finite, ready = self.watched.popleft()
            if ready is not None:
                ready.synchronize()
            if not finite:
                names = ", ".join(str(video) for video in videos[:SHOWN_VIDEOS])
                more = f" and {len(videos) - SHOWN_VIDEOS} more" if len(videos) > SHOWN_VIDEOS else ""
                raise UserError(
                    f"the loss or its gradient is not finite in step {step + 1}, with frames of {names}{more}. "
                    f"The newest checkpoint is from before: {max(self.states.glob('step_*'), default='none')}. "
                    "Look at those videos; "
                    "--resume with a lower --optimizer.learning-rate or with --optimizer.clip-norm 1; delete that "
                    "checkpoint if its weights have grown too large already"
                )


@contextmanager
def memory_advice(
    estimate: MemoryEstimate, samples: int, option: str, mend: str, device: torch.device
) -> Iterator[None]:
    """Turn running out of memory into a line that says which option to lower, and by how much.

    Args:
        estimate: what training needs.
        samples: that are held at a time now.
        option: that says how many, such as `--batch-size`.
        mend: what to do, with `{samples}` where the advised number belongs.
        device: that it runs on.

    Raises:
        UserError: memory ran out inside.
    """
    # On a GPU nothing else is there; on a CPU, what is there before a step is no batch.
    elsewhere = memory_in_use(device) if device.type == "cpu" else 0
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        capacity = memory_capacity(device)
        waiting = samples * estimate.per_waiting_sample
        fits = max(1, min(estimate.largest_batch(capacity - elsewhere - waiting), samples // 2))
        raise UserError(
            f"out of memory on {device} ({readable_bytes(capacity)}) with {option} {samples}, which "
            f"needs about {readable_bytes(estimate.total(samples))}: {mend.format(samples=fits)}"
        ) from error


def require_agreement(accelerator: Accelerator, **facts: Any) -> None:
    """Make sure that all ranks were started with the same options and see the same data. Collective.

    Raises:
        UserError: on all ranks alike, naming the first rank and fact that differ.
    """
    everyone = gather_object([{name: to_json(value) for name, value in facts.items()}])
    for rank, theirs in enumerate(everyone):
        mine, other = flat(everyone[0]), flat(theirs)
        for name in [*mine, *other]:
            if name not in mine or name not in other or mine[name] != other[name]:
                raise said_by_all(UserError(
                    f"rank {rank} has {name} = {other.get(name)}, rank 0 has {mine.get(name)}: "
                    "start all of them with the same command, code and data"
                ))  # fmt: skip


def summary(names: Sequence[Any]) -> str:
    """A long list in short: ranks that agree on it agree on the list."""
    return f"{len(names):,}, fingerprint {hashlib.sha256(repr(names).encode()).hexdigest()[:12]}"


class Heartbeat:
    """Ends this rank when another has died, whatever it is waiting in.

    A collective that waits for a dead machine may wait for ever: no socket notices a link that is cut, and NCCL
    notices after its timeout only. Each rank counts up in the store that the ranks met at, in a thread of its own,
    and watches the others count.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.stopped = threading.Event()
        self.answers = 0
        if self.ranks > 1:
            _hush()
            # A connection of its own: the main thread may wait in the other one.
            store = distributed.distributed_c10d._get_default_store().clone()
            self.store = distributed.PrefixStore("heartbeat", store)  # type: ignore[attr-defined]
            for work in (self._beat, self._watch):
                threading.Thread(target=work, daemon=True).start()

    def stop(self) -> None:
        """From now on ranks may go. Collective, so that none goes while another still watches it."""
        self.accelerator.wait_for_everyone()
        self.stopped.set()

    def _beat(self) -> None:
        """Count up, and see whether the others do."""
        heard = {str(rank): (b"", 0) for rank in range(self.ranks)}  # how far they had come, and when, in own beats
        beats = 0
        while not self.stopped.is_set():
            beats += 1
            try:
                self.store.set(str(self.rank), str(beats))
                present = [name for name, (count, _) in heard.items() if count or self.store.check([name])]
                counts = self.store.multi_get(present)
            except RuntimeError as error:
                self.stopped.wait(GRACE_S)  # the main thread may know more, or be about to leave
                self._die(f"contact with the first machine is lost ({str(error).splitlines()[0]})")
                return
            self.answers += 1
            for name, count in zip(present, counts, strict=True):
                if count != heard[name][0]:
                    heard[name] = (count, beats)
            for name, (_, when) in heard.items():
                if beats - when > SILENCE_S / BEAT_S:
                    self._die(f"rank {name} has not been heard of for {SILENCE_S:.0f} s")
            self.stopped.wait(BEAT_S)

    def _watch(self) -> None:
        """See whether the store still answers: where a link is cut, asking it takes for ever."""
        answers, silent = -1, 0
        while not self.stopped.wait(BEAT_S):
            # Counted, not timed: a process that was stopped (Ctrl-Z) must not take its own sleep for the others'.
            silent = silent + 1 if self.answers == answers else 0
            answers = self.answers
            if silent > SILENCE_S / BEAT_S:
                self._die(f"the first machine has not answered for {SILENCE_S:.0f} s")

    def _die(self, reason: str) -> None:
        if not self.stopped.is_set():
            message = f"{reason}: stopped; {GO_ON}"
            print(f"\n[rank {self.rank}] error: {message}", file=sys.stderr, flush=True)
            os._exit(1)


def _hush() -> None:
    """Keep torch's C++ code from showing a backtrace where a line of ours follows, unless a log was asked for.

    Its environment variable is read when torch is imported, and Python has no other way to it.
    """
    if "TORCH_CPP_LOG_LEVEL" not in os.environ:
        with suppress(OSError, ValueError):
            library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
            ctypes.c_int.in_dll(library, "FLAGS_caffe2_log_level").value = 2  # errors and worse
