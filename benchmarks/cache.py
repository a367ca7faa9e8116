r"""The embedding cache: reading windows, writing and opening, against memory and h5py, in one run.

  OMP_NUM_THREADS=1 python -m benchmarks.cache --rounds 7

Random windows of 16 embeddings (256 x float16) in batches of 256, page cache warm, one thread, as float32: ratios of
time to `X[rows]` of the same embeddings in memory. Ours are read from one shard, from shards of 64 clips of 1000
embeddings, and from a shard for each clip. Writing: ratios of time to h5py alone, one dataset in as many files, before
fsync and with it. Opening: seconds for a cache of many clips, at 64 in a shard, and for all its windows.
Contestants take turns in an order drawn anew for each round, medians count, and above 1 is faster than the reference.
The caches are made in a temporary folder: a million rows take 2 GB there, and 5 GB of memory with the page cache.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import h5py
import numpy as np
import torch

from data.cache import ClipKey, Column, EmbeddingCache, Provenance
from data.cache_writer import CacheWriter, EmbeddedClip
from data.windows import Windows
from jepa.config import Bounded, NotNegativeInt, PositiveInt
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json

DIMENSION = 256
LENGTH = 16
BATCH = 256
BATCHES = 100
CLIP_FRAMES = 1000
CLIPS_PER_SHARD = 64

Turn = Callable[[], object]
"""What is timed."""
Seconds = dict[str, float]
"""Median time of each contestant; the first is the reference."""


@dataclass(frozen=True)
class Options(Bounded):
    """Time the embedding cache against memory and h5py."""

    rounds: PositiveInt = 7
    """Turns of each contestant; the median counts."""
    clips: PositiveInt = 1000
    """Clips of 1000 embeddings that windows are read from, and that are written."""
    short_clips: PositiveInt = 100_000
    """Clips in the cache that is opened."""
    output_dir: Path = Path("runs/benchmarks/cache")
    """Folder for results.json."""
    seed: NotNegativeInt = 0
    """Seed of the embeddings, of the windows and of the order of turns."""


def main(options: Options) -> None:
    """The story: make embeddings, read windows of them, write them, open a cache of many clips."""
    torch.set_num_threads(1)
    generator = np.random.default_rng(options.seed)
    rows = options.clips * CLIP_FRAMES
    embeddings = generator.standard_normal((rows, DIMENSION), dtype=np.float32).astype(np.float16)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contests = {
            "windows as float32": read_windows(folder, embeddings, generator),
            "writing, before fsync": write_embeddings(folder, embeddings, is_synced=False),
            "writing, with fsync": write_embeddings(folder, embeddings, is_synced=True),
        }
        for task, contest in contests.items():
            seconds = take_turns(contest, options.rounds, generator, folder / "scratch")
            reference = next(iter(seconds.values()))
            results[task] = {who: reference / value for who, value in seconds.items()}
            print(task + "".join(f"\n  {ratio:5.2f}  {who}" for who, ratio in results[task].items()), flush=True)
        cache = write(folder / "short", np.zeros((options.short_clips * LENGTH, 4), np.float16), LENGTH)
        opened = EmbeddingCache(cache)
        turns = {"EmbeddingCache(folder)": lambda: EmbeddingCache(cache), "all its windows": lambda: Windows(opened, 4)}
        task = f"seconds to open a cache of {options.short_clips:,} clips"
        results[task] = take_turns(turns, options.rounds, generator, folder / "scratch")
        print(task + "".join(f"\n  {value:5.2f}  {who}" for who, value in results[task].items()))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)


def read_windows(folder: Path, embeddings: np.ndarray, generator: np.random.Generator) -> dict[str, Turn]:
    """Random windows, from memory, from caches and with h5py."""
    clips = len(embeddings) // CLIP_FRAMES
    shards = {"one shard": clips, f"{CLIPS_PER_SHARD} clips in a shard": CLIPS_PER_SHARD, "a shard for each clip": 1}
    windows = {
        f"ours, {name}": Windows(EmbeddingCache(write(folder / str(size), embeddings, CLIP_FRAMES, size)), LENGTH)
        for name, size in shards.items()
    }
    one_shard = windows["ours, one shard"]
    # Clips sort in the order they were written in, so in one shard rows are those of the array in memory.
    batches = [generator.integers(0, len(one_shard), BATCH) for _ in range(BATCHES)]
    starts = one_shard.rows(np.arange(len(one_shard)))[:, 0]
    expected = torch.from_numpy(embeddings[one_shard.rows(batches[0])]).float()
    for who, one in windows.items():
        require(torch.equal(one.take(batches[0]), expected), f"{who} gives other windows than memory")
        for clip in one.cache.clips:  # every page is mapped before the first turn
            one.cache.clip_embeddings(clip)

    def over(take: Callable[[np.ndarray], torch.Tensor]) -> Turn:
        return lambda: [take(batch) for batch in batches]

    def from_memory(batch: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(embeddings[starts[batch][:, None] + np.arange(LENGTH)]).float()

    dataset = h5py.File(one_shard.cache.clips[0].shard)["embeddings"]

    def from_h5py(batch: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.stack([dataset[start : start + LENGTH] for start in starts[batch]])).float()

    takes = {"RAM X[rows]": from_memory, "h5py dataset[i:i+16]": from_h5py}
    return {who: over(take) for who, take in (takes | {who: one.take for who, one in windows.items()}).items()}


def write_embeddings(folder: Path, embeddings: np.ndarray, *, is_synced: bool) -> dict[str, Turn]:
    """A cache of all embeddings, and HDF5 files that hold the embeddings and nothing else."""
    scratch = folder / "scratch"

    def by_h5py() -> None:
        scratch.mkdir()
        for start in range(0, len(embeddings), CLIP_FRAMES * CLIPS_PER_SHARD):
            with h5py.File(scratch / f"{start}.h5", "w") as file:
                file["embeddings"] = embeddings[start : start + CLIP_FRAMES * CLIPS_PER_SHARD]
            if is_synced:
                with (scratch / f"{start}.h5").open("rb") as written:
                    os.fsync(written.fileno())

    return {
        "h5py": by_h5py,
        "ours": lambda: write(scratch, embeddings, CLIP_FRAMES, is_synced=is_synced),
    }


def write(
    folder: Path,
    embeddings: np.ndarray,
    frames: int,
    clips_per_shard: int = CLIPS_PER_SHARD,
    *,
    is_synced: bool = False,
) -> Path:
    """Write a cache of clips of so many frames; without fsync it is as good until the machine fails."""
    provenance = Provenance(
        encoder="benchmark",
        encoder_fingerprint="benchmark",
        fps=4.0,
        image_fps=25.0,
        image_size=(64, 64),
        window=1,
        transform="none",
        precision="fp32",
        columns={"embeddings": Column("float16", embeddings.shape[1:])},
        versions={},
    )
    ticks = np.arange(frames)
    unsynced = nullcontext() if is_synced else patch("os.fsync")
    with unsynced, CacheWriter(folder, provenance, clips_per_shard=clips_per_shard) as writer:
        for start in range(0, len(embeddings), frames):
            key = ClipKey(f"/folder/of/videos/{start:09d}.mp4", 1, 1, 0.0)
            writer.add(EmbeddedClip(key, {"embeddings": embeddings[start : start + frames]}, ticks / 4, ticks))
    return folder


def take_turns(contestants: dict[str, Turn], rounds: int, generator: np.random.Generator, scratch: Path) -> Seconds:
    """Median seconds of each contestant; what it left in `scratch` is removed after its turn, untimed."""
    seconds: dict[str, list[float]] = {who: [] for who in contestants}
    for _ in range(rounds):
        for who in generator.permutation(list(contestants)):
            before = time.perf_counter()
            contestants[who]()
            seconds[who].append(time.perf_counter() - before)
            shutil.rmtree(scratch, ignore_errors=True)
    return {who: float(np.median(values)) for who, values in seconds.items()}


if __name__ == "__main__":
    run_command(main, Options)
