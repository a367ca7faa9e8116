r"""Reading windows from the embedding cache, against the same embeddings in memory.

  OMP_NUM_THREADS=1 python -m benchmarks.cache --rounds 15

Random windows of 16 embeddings (256 x float16) in batches of 256, page cache warm, one thread, as float32: ratios of
time to `X[rows]` of the same embeddings in memory. Ours are read from one shard, from shards of 64 clips of 1000
embeddings, and from a shard for each clip; a shard ends at 256 MB, so that twice as many clips are two shards.
Contestants take turns in an order drawn anew for each round, medians count, and above 1 is faster. The caches are made
in a temporary folder: half a million rows take 256 MB there for each of the three, and 2 GB of memory with the page
cache.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import write_cache, write_results
from data.cache import EmbeddingCache
from data.windows import Windows
from jepa.config import Bounded, PositiveInt
from pipelines.run.command import require, run_command

DIMENSION, LENGTH, BATCH, BATCHES = 256, 16, 256, 100
CLIP_FRAMES = 1000


@dataclass(frozen=True)
class Options(Bounded):
    """Time the embedding cache against memory."""

    rounds: PositiveInt = 7
    """Turns of each contestant; the median counts."""
    clips: PositiveInt = 500
    """Clips of 1000 embeddings that windows are read from."""
    output_dir: Path = Path("runs/benchmarks/cache")
    """Folder for results.json."""


def main(options: Options) -> None:
    """The story: write the same embeddings three times, read windows of them in turns, print ratios."""
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    rows = options.clips * CLIP_FRAMES
    embeddings = generator.standard_normal((rows, DIMENSION), dtype=np.float32).astype(np.float16)
    # Clips sort in the order they are written in, so rows of one shard are those of the array in memory.
    clips = [
        (f"/videos/{start:09}.mp4", embeddings[start : start + CLIP_FRAMES]) for start in range(0, rows, CLIP_FRAMES)
    ]
    shards = {"one shard": options.clips, "64 clips in a shard": 64, "a shard for each clip": 1}
    with tempfile.TemporaryDirectory() as folder:
        windows = {
            name: Windows(
                EmbeddingCache(write_cache(Path(folder) / name, clips, DIMENSION, clips_per_shard=size)), LENGTH
            )
            for name, size in shards.items()
        }
        batches = [generator.integers(0, len(windows["one shard"]), BATCH) for _ in range(BATCHES)]
        starts = windows["one shard"].rows(np.arange(len(windows["one shard"])))[:, 0]

        def from_memory(batch: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(embeddings[starts[batch][:, None] + np.arange(LENGTH)]).float()

        for name, one in windows.items():
            require(torch.equal(one.take(batches[0]), from_memory(batches[0])), f"{name}: other windows than memory")
            for clip in one.cache.clips:  # every page is mapped before the first turn
                one.cache.take(clip.rows)
        contestants = {"RAM X[rows]": from_memory} | {name: one.take for name, one in windows.items()}
        seconds = take_turns(contestants, batches, options.rounds, generator)
    ratios = {name: seconds["RAM X[rows]"] / value for name, value in seconds.items()}
    print("\n".join(f"{ratio:5.2f}  {name}" for name, ratio in ratios.items()))
    write_results(options.output_dir, ratios)


def take_turns(
    contestants: dict[str, Callable[[np.ndarray], object]],
    batches: list[np.ndarray],
    rounds: int,
    generator: np.random.Generator,
) -> dict[str, float]:
    """Median seconds of each contestant for all batches."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name in generator.permutation(list(contestants)):
            before = time.perf_counter()
            for batch in batches:
                contestants[name](batch)
            seconds[name].append(time.perf_counter() - before)
    return {name: float(np.median(values)) for name, values in seconds.items()}


if __name__ == "__main__":
    run_command(main, Options)
