"""Processes and devices: one or many, alike on all."""

import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import joblib
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list, gather_object

from pipelines.run.command import UserError, require
from pipelines.run.files import differences, to_json

Result = TypeVar("Result")

LONGEST_WAIT = datetime.timedelta(hours=2)
"""Time that ranks wait for one another; one of them may look at 100,000 videos meanwhile."""
ACTIVATIONS = 8  # numbers that even a small backbone holds for each pixel and channel, at least
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def start_accelerator(
    precision: str = "launched", execution: str = "eager", *, trackers: Sequence[str] = (), logs: Path | None = None
) -> Accelerator:
    """One process or one of many, with its device; the options are those of `RunOptions`. Raises `UserError`."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    known = [*map(str, get_available_trackers()), "none"]  # accelerate passes silently over what it does not find
    for name in trackers:
        require(name in known, f"--tracker {name} is not installed or does not exist: there are {', '.join(known)}")
    if execution == "deterministic":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        cpu=processes > 1 and not torch.cuda.is_available(),  # or else each would take itself for the only one
        mixed_precision=PRECISIONS.get(precision),
        log_with=[name for name in trackers if name != "none"] or None,
        project_dir=logs,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            # Backbones may have weights that get no gradient. Looking for them also keeps gradients from being
            # rearranged after the first step: ranks would add them up in another order after each start.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=True),
        ],
    )
    on_gpu, half = accelerator.device.type == "cuda", accelerator.mixed_precision == "fp16"
    require(on_gpu or not half, "precision fp16 needs a GPU: take --precision bf16 or fp32")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # and 1 of many cores is what that says by itself
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32, as in convolutions
    elif processes == 1 and os.environ.get("OMP_NUM_THREADS") in (None, "1" if launched else None):
        torch.set_num_threads(cores_of_this_process())
    return accelerator


def cores_of_this_process() -> int:
    """How many cores this process may use: those granted to it, shared with the others on its machine."""
    return max(1, joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def describe_devices(accelerator: Accelerator) -> str:
    """Such as `2 x cpu (2 threads)` or `8 x NVIDIA H100`, and the precision."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    return f"{accelerator.num_processes} x {name}, precision {accelerator.mixed_precision.replace('no', 'fp32')}"


def said_by_all(error: Exception) -> Exception:
    """Mark an error that all ranks raise alike: rank 0 alone says it."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


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
    return result if accelerator.is_main_process else work()  # type: ignore[return-value]


def require_agreement(accelerator: Accelerator, **facts: Any) -> None:
    """Raises `UserError` on all ranks if they were started with other options or see other data. Collective."""
    everyone = gather_object([to_json(facts)])
    for rank, theirs in enumerate(everyone):
        for name, mine, other in differences(everyone[0], theirs):
            same = "start all of them with the same command, code and data"
            raise said_by_all(UserError(f"rank {rank} has {name} = {other}, rank 0 has {mine}: {same}"))
