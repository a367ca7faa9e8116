"""How a stage computes: which devices, which precision, how much memory, and one line that says so."""

import copy
import datetime
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import joblib
import psutil
import torch
import torch.distributed as distributed
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.stage import require
from pipelines.trackers import find_trackers

LONGEST_WAIT = datetime.timedelta(days=1)
"""For one another. One rank may look at 100,000 videos while the others wait; a dead one is noticed by `Heartbeat`."""
LONGEST_START = datetime.timedelta(minutes=10)
"""Until all processes have met. One that has died before that is noticed by nothing else."""
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of a container's memory."""
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class ComputeConfig:
    """How it is computed."""

    precision: Literal["launched", "fp32", "bf16", "fp16"] = "launched"
    """Of forward and backward passes; weights and statistics stay float32. `launched`: as accelerate was told."""
    tf32: bool = True
    """On a GPU, multiply float32 matrices in TF32."""
    compile: bool = False
    """Compile the networks with torch.compile: a minute at the start, faster steps on a GPU."""
    deterministic: bool = False
    """On a GPU, use deterministic kernels only, so that a resumed run is equal to the bit; slower. A CPU always is."""


def start_accelerator(
    compute: ComputeConfig | None = None, trackers: Sequence[str] = (), logs: Path | None = None
) -> Accelerator:
    """One process or one of many; on a CPU too.

    Without a GPU, `Accelerator()` under torchrun takes every process for the only one, and each of them would train
    and write for itself. It has to be told that several processes on a CPU are meant.

    Raises:
        UserError: the processes that were started are not those that accelerate sees, or a tracker is unknown.
    """
    compute = compute or ComputeConfig(tf32=False)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        cpu=processes > 1 and not torch.cuda.is_available(),
        mixed_precision=PRECISIONS.get(compute.precision),
        log_with=(find_trackers(trackers, logs) or None) if logs else None,
        project_dir=logs,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=LONGEST_START),
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,
                # Looking for unused ones keeps it from rearranging gradients after the first step: three ranks or more
                # would add them up in another order in the first step after each start.
                find_unused_parameters=compute.deterministic or not torch.cuda.is_available(),
            ),
        ],
    )
    require(
        accelerator.num_processes == processes,
        f"{processes} processes were started, but accelerate sees {accelerator.num_processes}: "
        "check the --config_file of accelerate launch",
    )
    if distributed.is_initialized():
        # torch before 2.15 has no other name for it.
        set_timeout = getattr(distributed, "set_timeout", None) or distributed.distributed_c10d._set_pg_timeout
        set_timeout(LONGEST_WAIT)
    require(
        accelerator.mixed_precision != "fp16" or accelerator.device.type == "cuda",
        "precision fp16 needs a GPU: take --compute.precision bf16 or fp32",
    )
    if accelerator.device.type == "cuda":
        # By the older of torch's two interfaces: once the newer is used, its own compiler fails to read the older.
        torch.set_float32_matmul_precision("high" if compute.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = compute.tf32
    elif processes == 1 and not _threads_are_chosen():
        torch.set_num_threads(cores_of_this_process())
    return accelerator


def cores_of_this_process() -> int:
    """How many cores this process may use: those granted to it, shared with the others on its machine.

    A container's quota, the affinity (`taskset`) and `LOKY_MAX_CPU_COUNT` are heeded.
    """
    return max(1, joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _threads_are_chosen() -> bool:
    """Whether somebody said how many threads compute. `accelerate launch` says 1 by itself, of many cores."""
    chosen = os.environ.get("OMP_NUM_THREADS")
    return chosen is not None and not (chosen == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ)


@dataclass(frozen=True)
class MemoryEstimate:
    """What training needs on each device, in bytes; what the libraries themselves need comes on top."""

    fixed: int
    """Weights, gradients and the optimiser's state."""
    per_sample: int
    """What there is of one sample when most is: between forward and backward pass."""
    per_waiting_sample: int = 0
    """What there is of a sample of the batch while others are held: its inputs, and what they are made from."""

    @classmethod
    def of(cls, network: nn.Module, example: Any, samples: int, accelerator: Accelerator) -> "MemoryEstimate":
        """Measured on a copy of the network, on a CPU.

        Args:
            network: not yet prepared, and not yet compiled.
            example: its input, a tensor or a tuple of its inputs.
            samples: how many samples the example holds.
            accelerator: tells the precision.
        """
        inputs = example if isinstance(example, tuple) else (example,)
        network = copy.deepcopy(network)
        weights = _Weights([*network.parameters(), *network.buffers()])
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights.storages:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        with (
            torch.random.fork_rng(devices=[]),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", half, enabled=half is not None),
            weights,
        ):
            network(*inputs)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        everything = sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])
        # What goes in is made from something of the same size. What is largest has a gradient of its size, and another
        # is made from that; without anything to train before it, it still is there with what it becomes.
        given = sum(part.nbytes for part in inputs if isinstance(part, Tensor))
        passing = 2 * given + 2 * max([weights.largest, *kept.values()])
        return cls(everything + 3 * 4 * trained, (sum(kept.values()) + passing) // samples, 3 * given // samples)

    def total(self, held: int, batch: int = 0) -> int:
        """For so many samples at a time, out of a batch of so many."""
        return self.fixed + held * self.per_sample + max(0, batch - held) * self.per_waiting_sample

    def largest_batch(self, capacity: int) -> int:
        """The largest power of 2 of samples that four fifths of the memory hold; at least 1."""
        room = max(0, int(0.8 * capacity) - self.fixed) // max(1, self.per_sample)
        return 1 << (max(1, room).bit_length() - 1)


class _Weights(TorchDispatchMode):
    """Knows the storages of weights, and of their copies in half precision: there is one of each for all samples."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.copies: list[Tensor] = []  # or else their storages would be used again, for something else
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            if func is torch.ops.aten._to_copy.default and args[0].untyped_storage().data_ptr() in self.storages:
                self.storages.add(result.untyped_storage().data_ptr())
                self.copies.append(result)
            elif result.untyped_storage().data_ptr() not in self.storages:
                self.largest = max(self.largest, result.nbytes)
        return result


def memory_capacity(device: torch.device) -> int:
    """Bytes of memory that this process may use on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    limits = [psutil.virtual_memory().total]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        used = psutil.Process().memory_info()
        limits.append(address_space - used.vms + used.rss)
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # ValueError: it says "max"
            limits.append(int(path.read_text()))
    return int(min(limits))


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that tensors held on a GPU so far; all of the process on a CPU."""
    return int(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss)


def describe_devices(accelerator: Accelerator) -> str:
    """Such as `2 x cpu (2 threads)` or `8 x NVIDIA H100`, and the precision."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    return f"{accelerator.num_processes} x {name}, precision {accelerator.mixed_precision.replace('no', 'fp32')}"
