r"""VICReg's covariance from moments (D, D) and from the Gram matrix (N, N): where is the crossover?

  python -m benchmarks.objectives --rounds 5

Wall-clock seconds of forward and backward pass over two views, taking turns, medians; in one process, and in two that
share the batch over gloo, with one thread each. N is that of all ranks together. Printed is the time from moments
divided by the time from the Gram matrix: above 1 the Gram matrix is faster. `jepa.objectives.VICReg` changes over at
N = D.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from tqdm import tqdm

from jepa.objectives import off_diagonal_by_gram, off_diagonal_by_moments
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json


@dataclass(frozen=True)
class Options:
    """Time the two ways to the covariance."""

    samples: tuple[int, ...] = (64, 256, 512, 1024, 2048)
    """N, of all ranks together."""
    features: tuple[int, ...] = (128, 256, 512, 1024, 2048, 8192)
    """D."""
    ranks: tuple[int, ...] = (1, 2)
    """Numbers of processes."""
    largest: float = 3e10
    """Shapes that take more multiplications than this, in one forward pass of one view by either way, are left out."""
    rounds: int = 5
    """Turns of each contestant; the median counts."""
    output_dir: Path = Path("runs/benchmarks/objectives")
    """Where results.json is left."""


Shape = tuple[int, int]
Seconds = dict[str, float]


def main(options: Options) -> None:
    """The story: time both in each number of processes, print the ratios."""
    require(options.rounds > 0, f"--rounds is {options.rounds}: it must be positive")
    for ranks in options.ranks:
        require(all(samples % ranks == 0 for samples in options.samples), f"--samples must be multiples of {ranks}")
    shapes = [(n, d) for n in options.samples for d in options.features if n * d * max(n, d) <= options.largest]
    results: dict[str, dict[str, Seconds]] = {}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "seconds.pt"
            multiprocessing.start_processes(
                work, (ranks, shapes, options.rounds, file), nprocs=ranks, start_method="spawn"
            )
            seconds: dict[Shape, Seconds] = torch.load(file)
        print(f"{ranks} x 1 thread" + "".join(f"{f'D = {d}':>12}" for d in options.features))
        for n in options.samples:
            ratios = [
                f"{seconds[n, d]['moments'] / seconds[n, d]['gram']:12.2f}" if (n, d) in seconds else f"{'-':>12}"
                for d in options.features
            ]
            print(f"N = {n:<8}" + "".join(ratios))
        results[f"{ranks} ranks"] = {f"N = {n}, D = {d}": one for (n, d), one in seconds.items()}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)


def work(rank: int, ranks: int, shapes: list[Shape], rounds: int, file: Path) -> None:
    """Time all shapes on one of the ranks; the first leaves the seconds in a file."""
    torch.set_num_threads(1)
    if ranks > 1:
        distributed.init_process_group("gloo", f"file://{file}.rendezvous", rank=rank, world_size=ranks)
    seconds = {shape: time_shape(shape, ranks, rounds) for shape in tqdm(shapes, disable=rank > 0, leave=False)}
    if rank == 0:
        torch.save(seconds, file)
    if ranks > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def time_shape(shape: Shape, ranks: int, rounds: int) -> Seconds:
    """Median seconds of both, which must agree."""
    samples, features = shape
    torch.manual_seed(0)
    whole = torch.randn(2, samples, features)
    whole -= whole.mean(dim=1, keepdim=True)
    rows = [samples // ranks] * ranks
    rank = distributed.get_rank() if ranks > 1 else 0
    centred = whole.split(rows, dim=1)[rank].clone().requires_grad_()
    variance = whole.square().sum(dim=1) / (samples - 1)
    contestants: dict[str, Callable[[], torch.Tensor]] = {
        "moments": lambda: off_diagonal_by_moments(centred, samples),
        "gram": lambda: off_diagonal_by_gram(centred, variance, rows),
    }
    turns: dict[str, list[float]] = {who: [] for who in contestants}
    values = {}
    for turn in range(rounds + 1):
        for who, compute in contestants.items():
            if ranks > 1:
                distributed.barrier()
            started = time.perf_counter()
            value = compute()
            value.backward()
            if turn:  # the first warms up
                turns[who].append(time.perf_counter() - started)
            values[who] = value.item()
    require(abs(values["gram"] / values["moments"] - 1) < 1e-3, f"N = {samples}, D = {features}: {values} disagree")
    return {who: statistics.median(times) for who, times in turns.items()}


if __name__ == "__main__":
    run_command(main, Options)
