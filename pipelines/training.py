"""What trainers share: the videos they use, randomness from (seed, step), how fast they are, what they leave."""

import copy
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from data.manifest import VideoList, check_videos
from jepa.predictor import Predictor
from pipelines.compute import memory_in_use
from pipelines.stage import require, said_by_all

Result = TypeVar("Result")
Batch = TypeVar("Batch", bound=tuple[Any, ...])

DIAGNOSTIC_CLIPS, DIAGNOSTIC_FRAMES = 16, 16
SHARED = 2**32 - 1
"""A rank that there is not, for the random numbers that all of them share."""
FIRST_ALARM_STEP = 50
"""Before, nothing has had time to spread out, and batch normalisation has seen too little: every run would alarm."""


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result | None:
    """Do something on the main process only; what fails there fails on all alike. Collective."""
    result: Result | None = None
    failure: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            result = work()
        except Exception as error:
            failure = [error]
    broadcast_object_list(failure)
    if failure[0] is not None:
        raise said_by_all(failure[0])
    return result


def main_first(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Do something on the main process and then on the others; what fails there fails on all alike. Collective."""
    result = on_main(accelerator, work)
    return work() if result is None else result


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


def require_all_steps_trained(predictor: Predictor, rollout_steps: int) -> None:
    """Who forecasts several steps at once has weights for each of them. Raises `UserError`."""
    require(
        rollout_steps >= predictor.steps_at_once,
        f"--rollout-steps is {rollout_steps}, but the predictor forecasts {predictor.steps_at_once} steps at once, the "
        "last of which would not be trained: raise it, or lower --predictor.horizon",
    )


def step_generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """The randomness of one step on one rank: the same however often a run was interrupted."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


def feed(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with their tensors on a device; for a thread ahead, which waits for the copies so that nobody else does.

    Args:
        batches: named tuples, of tensors and other things.
        device: on a GPU, copies go through pinned memory and a stream of their own.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(value: Any) -> Any:
        if stream is None or not isinstance(value, torch.Tensor) or value.device.type == device.type:
            return value
        with torch.cuda.stream(stream):
            copied = value.pin_memory().to(device, non_blocking=True)
        copied.record_stream(torch.cuda.default_stream(device))  # its memory is not reused before that is done with it
        return copied

    # Of this thread and those that it starts. Two pools of threads on the same cores wait for each other in busy loops:
    # training from a cache ran at .69 of what it does with one.
    torch.set_num_threads(1)
    for batch in batches:
        copied = type(batch)(*map(copy, batch))
        if stream is not None:
            stream.synchronize()
        yield copied


@dataclass
class Progress:
    """What must survive an interruption on each rank beside weights: its place in the data, and what was found out."""

    place: dict[str, int] = field(default_factory=dict)
    """In the data."""
    seconds: float = 0.0
    """That the run has lived, up to the last entry in the log: training, validation and the start of each life."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last entry in the log."""
    alarms: list[str] = field(default_factory=list)
    """The first ones."""
    first_alarm_step: int | None = None
    collapsed: bool = False
    """At the last entry in the log."""
    sums: dict[str, Any] = field(default_factory=dict)
    """Of the loss and its terms over the steps since the last entry in the log, on the device."""
    summed_steps: int = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """A step's loss and its terms."""
        self.sums = {name: self.sums.get(name, 0.0) + value.detach() for name, value in values.items()}
        self.summed_steps += 1

    def take_means(self, accelerator: Accelerator) -> dict[str, float]:
        """Of what has been added since the last time, over steps and ranks. Collective."""
        sums = torch.stack(list(self.sums.values())) / self.summed_steps
        means = dict(zip(self.sums, accelerator.reduce(sums, "mean").tolist(), strict=True))
        self.sums, self.summed_steps = {}, 0
        return means

    def report(self, metrics: dict[str, float], alarms: list[str], step: int, bar: "tqdm[None]") -> None:
        """Keep the newest findings; say loudly, once, that the run has collapsed."""
        self.metrics, self.collapsed = metrics, bool(alarms)
        if alarms and self.first_alarm_step is None:
            self.first_alarm_step, self.alarms = step, alarms
            if not bar.disable:
                bar.write(f"COLLAPSE at step {step}: {'; '.join(alarms)}")

    def verdict(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "collapsed": self.collapsed,
            "collapse_alarms": self.alarms,
            "first_collapse_step": self.first_alarm_step,
            "seconds": self.seconds,
        }


class Rates:
    """How fast training is and how long it waits for data; validation and logging do not count."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lived = time.monotonic()
        self.start()

    def start(self) -> None:
        """Begin to count anew."""
        self.samples, self.waited_s, self.since = 0, 0.0, time.monotonic()

    def wait_for(self, batches: Iterator[Result], samples: int) -> Result:
        """The next batch, of so many samples on all ranks. Raises StopIteration if there is none."""
        began = time.monotonic()
        batch = next(batches)
        self.waited_s += time.monotonic() - began
        self.samples += samples
        return batch

    def report(self, progress: Progress) -> dict[str, float]:
        """Rates since the count began, for a tracker; `progress` learns how long the run has lived."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # steps that are still under way count
        now = time.monotonic()
        progress.seconds += now - self.lived
        self.lived = now
        return {
            "samples_per_second": self.samples / (now - self.since),
            "data_wait_fraction": self.waited_s / (now - self.since),
            "memory_gigabytes": memory_in_use(self.device) / 1e9,
        }


class Best:
    """The weights with the lowest validation error so far; those before the first step included.

    Args:
        module: whose weights, registered for checkpointing by the caller.
        judged_by: the metric that is lowest for the best.
    """

    def __init__(self, module: torch.nn.Module, judged_by: str) -> None:
        self.module, self.judged_by = module, judged_by
        self.step, self.metrics, self.weights = 0, dict[str, float](), dict[str, torch.Tensor]()
        self.collapsed = False

    def consider(self, step: int, metrics: dict[str, float], alarms: Sequence[str] = ()) -> None:
        """Keep the present weights if they are the best."""
        if not self.metrics or metrics[self.judged_by] < self.metrics[self.judged_by]:
            self.step, self.metrics, self.collapsed = step, metrics, bool(alarms)
            self.weights = copy.deepcopy(self.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {name: getattr(self, name) for name in ("step", "metrics", "weights", "collapsed")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        vars(self).update(state)


def save_artefact(module: torch.nn.Module, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`; an older artefact gives way when the new one is whole."""
    unfinished = folder.with_name(f".tmp.{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    module.save_pretrained(unfinished)  # type: ignore[operator]
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
