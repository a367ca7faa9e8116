"""Nothing is lost: complete training states on disk, and a stop that saves before it leaves."""

import json
import os
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as distributed
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipelines.compute import LONGEST_WAIT
from pipelines.stage import Interrupted, UserError, require, said_by_all, write_json

COMPLETE = "complete.json"
"""Written last into a checkpoint: its steps, the number of processes, and size and checksum of each file."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When training states are saved."""

    every_steps: int = 500
    """Save after so many steps."""
    every_minutes: float = 10.0
    """Save after so many minutes, whichever comes first."""
    keep: int = 2
    """The newest so many are kept."""

    def check(self) -> None:
        """Raises `UserError` for values that make no sense."""
        for name in ("every_steps", "every_minutes", "keep"):
            value = getattr(self, name)
            require(value > 0, f"--checkpoints.{name.replace('_', '-')} is {value}: it must be positive")


class Checkpoints:
    """Complete training states under a folder, the newest few of them, and stopping without loss.

    A state is written under a temporary name, sealed with the checksums of its files, and renamed when it is on the
    disk; one without its name or with a broken file is not used. SIGINT and SIGTERM are taken note of from the first
    step on, and obeyed after the step under way; a second Ctrl-C stops at once.

    Args:
        accelerator: whose prepared and registered objects make up the state.
        folder: shared by all ranks.
        config: when to save, and how many to keep.
        progress: a dataclass of what JSON knows, each rank's own: it is written from and read into this object.
        settle: called before a state is written; it may raise, if the state is not worth it.
        leave: called when all have saved and are about to go.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, config: CheckpointConfig, progress: Any,
        settle: Callable[[], None], leave: Callable[[], None],
    ) -> None:  # fmt: skip
        self.accelerator, self.folder, self.config = accelerator, folder, config
        self.progress, self.settle, self.leave = progress, settle, leave
        self.received = 0
        self.broken: list[Path] = []
        self.saved_step, self.saved_at = -1, time.monotonic()
        # Agreed upon through the CPU: nobody has to wait for the GPU's queue of work to run empty.
        several_gpus = accelerator.num_processes > 1 and accelerator.device.type == "cuda"
        self.group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT) if several_gpus else None

    def load_newest(self) -> int | None:
        """Load the newest complete state and return its number of steps; None if there is none. Collective.

        Raises:
            UserError: it was saved by another number of processes.
        """
        chosen: list[Path | None] = [None]
        if self.accelerator.is_main_process:
            for checkpoint in reversed(self._all()):
                fault = find_fault(checkpoint)
                if not fault:
                    chosen = [checkpoint]
                    break
                print(f"warning: {checkpoint} is not complete ({fault}): looking for an older one", file=sys.stderr)
                self.broken.append(checkpoint)
        broadcast_object_list(chosen)
        if (newest := chosen[0]) is None:
            return None
        processes = json.loads((newest / COMPLETE).read_text())["processes"]
        if processes != (running := self.accelerator.num_processes):
            error = UserError(
                f"{newest} was saved by {processes} processes, and {running} are running: "
                f"resume with {processes}, or add --overwrite to start again"
            )
            raise said_by_all(error)
        self.accelerator.load_state(str(newest))
        vars(self.progress).update(json.loads((newest / self._progress_file()).read_text()))
        self.saved_step = int(newest.name.removeprefix("step_"))
        return self.saved_step

    def save(self, step: int) -> None:
        """Write the state after `step` steps, unless that has been done. Collective."""
        if step == self.saved_step:
            return
        self.settle()
        unfinished, finished = self.folder / f".tmp.step_{step:08d}", self.folder / f"step_{step:08d}"
        if self.accelerator.is_main_process:
            for half in self.folder.glob(".tmp.step_*"):  # of an earlier life
                shutil.rmtree(half, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        # Accelerate keeps registered objects of the main process only, and ranks stand at different places in the data.
        write_json(unfinished / self._progress_file(), self.progress)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            seal(unfinished, {"step": step, "processes": self.accelerator.num_processes})
            # Broken ones, of later steps perhaps, would count among the newest, and this one would not be kept.
            for replaced in {*self.broken, finished}:
                shutil.rmtree(replaced, ignore_errors=True)
            self.broken.clear()
            unfinished.rename(finished)
            _to_disk(self.folder)
            for old in self._all()[: -self.config.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        self.saved_step, self.saved_at = step, time.monotonic()

    def listen(self) -> None:
        """From now on, SIGINT and SIGTERM wait for the step under way."""
        signal.signal(signal.SIGINT, self._receive)
        signal.signal(signal.SIGTERM, self._receive)

    def after_step(self, step: int) -> None:
        """Save if it is time to; if any rank was asked to stop, save and raise `Interrupted` on all. Collective."""
        received, due = self.received, time.monotonic() - self.saved_at >= 60 * self.config.every_minutes
        if self.accelerator.num_processes > 1:
            # Signals reach ranks at different steps, and clocks differ: they must agree, or one waits for ever.
            device = "cpu" if self.group else self.accelerator.device
            wishes = torch.tensor([received, int(due)], device=device)
            distributed.all_reduce(wishes, distributed.ReduceOp.MAX, self.group)  # type: ignore[arg-type]
            received, due = (int(wish) for wish in wishes)  # type: ignore[assignment]
        if received or due or step % self.config.every_steps == 0:
            self.save(step)
        if received:
            self.leave()
            self.accelerator.end_training()
            raise Interrupted(f"stopped and saved after step {step}: add --resume to go on", received)

    def _progress_file(self) -> str:
        return f"progress_{self.accelerator.process_index}.json"

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))

    def _receive(self, signal_number: int, frame: FrameType | None) -> None:
        if self.received and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal_number
        if self.accelerator.is_main_process:
            # Not by print: the progress bar may be writing at this moment, and streams refuse to be entered twice.
            os.write(2, b"\nsaving after this step; Ctrl-C again to stop at once\n")


def seal(folder: Path, facts: dict[str, int]) -> None:
    """Bring all files of a checkpoint to the disk, and leave their sizes and checksums beside them."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _to_disk(path)
        files[str(path.relative_to(folder))] = _size_and_checksum(path)
    write_json(folder / COMPLETE, {**facts, "files": files})
    _to_disk(folder / COMPLETE)
    _to_disk(folder)


def find_fault(folder: Path) -> str:
    """What is wrong with a checkpoint; empty if it is complete."""
    try:
        facts = json.loads((folder / COMPLETE).read_text())
        int(facts["processes"])
        for name, recorded in facts["files"].items():
            if _size_and_checksum(folder / name) != recorded:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{COMPLETE} cannot be read: {error}"
    return ""


def _size_and_checksum(path: Path) -> list[int]:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            checksum = zlib.crc32(part, checksum)
    return [path.stat().st_size, checksum]


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
