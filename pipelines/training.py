"""What both trainers share: the schedule, randomness from (seed, step), checkpoints, and stopping without loss."""

import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from data.manifest import VideoList, check_videos
from pipelines.stage import Interrupted, require

KEPT_CHECKPOINTS = 2

Result = TypeVar("Result")


def start_accelerator(tracker: str = "none", logs: Path | None = None) -> Accelerator:
    """One process or one of many; on a CPU too.

    Without a GPU, `Accelerator()` under torchrun takes every process for the only one, and each of them would train
    and write for itself. It has to be told that several processes on a CPU are meant.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        cpu=processes > 1 and not torch.cuda.is_available(),
        log_with=None if tracker == "none" else tracker,
        project_dir=logs,
    )
    require(
        accelerator.num_processes == processes,
        f"{processes} processes were started, but accelerate sees {accelerator.num_processes}: "
        "check the --config_file of accelerate launch",
    )
    if processes == 1 and accelerator.device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # `accelerate launch` sets OMP_NUM_THREADS to 1 where it expects a GPU: half a laptop would stand idle.
        torch.set_num_threads(os.cpu_count() or 1)
    return accelerator


def main_first(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Do something on the main process and then on the others; what fails on the main process fails on all alike."""
    failure: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            result = work()
        except Exception as error:
            failure = [error]
    broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]
    return result if accelerator.is_main_process else work()


def find_usable_videos(
    accelerator: Accelerator, paths: Sequence[Path], fps: float, folder: Path, image_fps: float, strict: bool
) -> VideoList:
    """The videos of a stage; the main process looks at them, the others read what it left in the run's folder."""
    manifest = folder / "videos.jsonl"

    def check() -> VideoList:
        if accelerator.is_main_process:
            return check_videos(paths, fps, manifest, image_fps, strict)
        return check_videos([manifest], fps, strict=strict, progress=False)

    return main_first(accelerator, check)


def lr_at(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Learning rate at a step: linear warm-up to `peak`, then a cosine to 0.

    A pure function, because a prepared scheduler would step once for each process.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def step_generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """The randomness of one step on one rank: the same however often a run was interrupted."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


class Checkpoints:
    """Complete training states under `folder`, the newest few of them.

    A state is written under a temporary name and renamed when whole; one without its name does not exist.
    """

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator, self.folder = accelerator, folder

    def save(self, step: int) -> None:
        """Write the state after `step` steps. Collective."""
        unfinished, finished = self.folder / f".tmp.step_{step:08d}", self.folder / f"step_{step:08d}"
        if finished.exists():
            return
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            unfinished.rename(finished)
            for old in self._all()[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load_newest(self) -> int:
        """Load the newest state and return its number of steps; 0 if there is none. Collective."""
        checkpoints = self._all()
        if not checkpoints:
            return 0
        self.accelerator.load_state(str(checkpoints[-1]))
        return int(checkpoints[-1].name.removeprefix("step_"))

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))


class Interruption:
    """Turns SIGINT and SIGTERM into a checkpoint and a clean exit; a second Ctrl-C stops at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = 0
        signal.signal(signal.SIGINT, self._receive)
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, signal_number: int, frame: FrameType | None) -> None:
        if self.received and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal_number
        if self.accelerator.is_main_process:
            print("\nsaving after this step; Ctrl-C again to stop at once", file=sys.stderr)

    def save_and_stop(self, checkpoints: Checkpoints, step: int) -> None:
        """After each step: if any rank was asked to stop, save and raise `Interrupted` on all. Collective."""
        received = self.received
        if self.accelerator.num_processes > 1:
            # The signal reaches the ranks at different steps; they must agree, or one waits for ever.
            flag = torch.tensor([float(received)], device=self.accelerator.device)
            received = int(self.accelerator.gather(flag).max())
        if received:
            checkpoints.save(step)
            self.accelerator.end_training()
            raise Interrupted(f"stopped and saved after step {step}: add --resume to go on", received)


def save_artefact(module: torch.nn.Module, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`, replacing an older artefact in one move."""
    unfinished = folder.with_name(f".tmp.{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    module.save_pretrained(unfinished)  # type: ignore[operator]
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
