r"""The embedding cache: reading windows, writing and opening, against memory and a raw file, in one run.

  OMP_NUM_THREADS=1 python benchmarks/cache.py --rounds 7

Random windows of 16 embeddings (256 x float16) in batches of 256, page cache warm, one thread, as stored and converted
to float32: ratios of time to `X[starts[:, None] + np.arange(16)]` of the same embeddings in memory. Ours are read from
shards of 64 clips of 1000 embeddings, and from a shard for each clip. Writing: ratios of time to `X.tofile` of the same
embeddings in as many files, before fsync and with it. Opening: seconds for a cache of many clips, at 64 in a shard.
Contestants take turns in an order drawn anew for each round, medians count, and above 1 is faster than the reference;
two contestants compare by the quotient of their ratios.
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

from data.embedding_cache import CacheWriter, ClipKey, EmbeddedClip, EmbeddingCache, Provenance
from data.windows import Windows
from pipelines.stage import require, run_stage, write_json

DIMENSION = 256
LENGTH = 16
BATCH = 256
BATCHES = 100
CLIP_FRAMES = 1000
CLIPS_PER_SHARD = 64

Turn = Callable[[], object]
"""What is timed."""
Gather = Callable[[np.ndarray], object]
"""Windows by their numbers, (N,) -> (N, LENGTH, DIMENSION)."""
Seconds = dict[str, float]
"""Median time of each contestant; the first is the reference."""


@dataclass(frozen=True)
class Options:
    """Time the embedding cache against memory and a raw file."""

    rounds: int = 7
    """Turns of each contestant; the median counts."""
    rows: int = 1_000_000
    """Embeddings that windows are read from, and that are written."""
    clips: int = 100_000
    """Clips in the cache that is opened."""
    output_dir: Path = Path("runs/benchmarks/cache")
    """Where results.json is left."""
    seed: int = 0
    """Of the embeddings, of the windows and of the order of turns."""


def main(options: Options) -> None:
    """The story: make embeddings, read windows of them, write them, open a cache of many clips."""
    require(options.rounds > 0, f"--rounds is {options.rounds}: it must be positive")
    require(options.rows >= LENGTH, f"--rows is {options.rows}: a window takes {LENGTH}")
    require(options.clips > 0, f"--clips is {options.clips}: it must be positive")
    torch.set_num_threads(1)
    generator = np.random.default_rng(options.seed)
    embeddings = generator.standard_normal((options.rows, DIMENSION), dtype=np.float32)
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for measure in (read_windows, write_embeddings):
            for task, seconds in measure(folder, embeddings, options.rounds, generator).items():
                reference = next(iter(seconds.values()))
                results[task] = {who: reference / value for who, value in seconds.items()}
                print(task + "".join(f"\n  {ratio:5.2f}  {who}" for who, ratio in results[task].items()), flush=True)
        task = f"opening a cache of {options.clips:,} clips"
        results[task] = open_cache(folder, options.clips, options.rounds, generator)
        print(task + "".join(f"\n  {value:5.2f} s  {who}" for who, value in results[task].items()))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)


def read_windows(
    folder: Path, embeddings: np.ndarray, rounds: int, generator: np.random.Generator
) -> dict[str, Seconds]:
    """Random windows, from memory, from caches and with h5py."""
    memory = embeddings.astype(np.float16)
    tensor = torch.from_numpy(memory)
    clips = cut(memory, CLIP_FRAMES)
    caches = {
        f"ours, {CLIPS_PER_SHARD} clips in a shard": write(folder / "many", clips, CLIPS_PER_SHARD),
        "ours, a shard for each clip": write(folder / "one", clips, 1),
    }
    windows = {who: Windows(EmbeddingCache(cache), LENGTH) for who, cache in caches.items()}
    # Clips sort in the order they were written in, so windows have the same number in all of them as in memory.
    starts = next(iter(windows.values())).starts
    batches = [generator.integers(0, len(starts), BATCH) for _ in range(BATCHES)]
    with h5py.File(folder / "all.h5", "w") as file:
        file["embeddings"] = memory
        dataset = file["embeddings"]

        def rows(batch: np.ndarray) -> np.ndarray:
            return starts[batch][:, None] + np.arange(LENGTH)

        gathers = {
            "RAM X[rows]": lambda batch: memory[rows(batch)],
            "RAM np.take": lambda batch: np.take(memory, rows(batch), axis=0),
            "RAM torch X[rows]": lambda batch: tensor[torch.from_numpy(rows(batch))].numpy(),
            "h5py dataset[i:i+16]": lambda batch: np.stack([dataset[i : i + LENGTH] for i in starts[batch]]),
            **{who: gather_from(one) for who, one in windows.items()},
        }
        converted = {
            "RAM X[rows]": lambda batch: torch.from_numpy(memory[rows(batch)]).float(),
            "RAM np.take": lambda batch: torch.from_numpy(np.take(memory, rows(batch), axis=0)).float(),
            **{who: one.take for who, one in windows.items()},
        }
        for who, gather in gathers.items():
            same = np.array_equal(gather(batches[0]), memory[rows(batches[0])])
            require(same, f"{who} gives other windows than memory")
        for one in windows.values():  # every page is mapped before the first turn
            for clip in one.cache.clips:
                one.cache.clip_embeddings(clip)
        return {
            task: take_turns({who: over(batches, gather) for who, gather in contest.items()}, rounds, generator)
            for task, contest in {"windows as stored": gathers, "windows as float32": converted}.items()
        }


def gather_from(windows: Windows) -> Gather:
    """Windows of a cache by their numbers, as stored."""
    return lambda batch: windows.cache.windows(windows.starts[batch], LENGTH)


def over(batches: list[np.ndarray], gather: Gather) -> Turn:
    """All batches, one after the other."""

    def turn() -> None:
        for batch in batches:
            gather(batch)

    return turn


def write_embeddings(
    folder: Path, embeddings: np.ndarray, rounds: int, generator: np.random.Generator
) -> dict[str, Seconds]:
    """A cache of all embeddings, and files that hold the embeddings and nothing else."""
    memory = embeddings.astype(np.float16)
    given = {"ours, given float16": cut(memory, CLIP_FRAMES), "ours, given float32": cut(embeddings, CLIP_FRAMES)}
    scratch = folder / "scratch"

    def raw(synced: bool) -> None:
        scratch.mkdir()
        for start in range(0, len(memory), CLIP_FRAMES * CLIPS_PER_SHARD):
            with (scratch / str(start)).open("wb") as file:
                memory[start : start + CLIP_FRAMES * CLIPS_PER_SHARD].tofile(file)
                if synced:
                    os.fsync(file.fileno())

    def contest(synced: bool) -> dict[str, Turn]:
        ours = {who: lambda clips=clips: write(scratch, clips, CLIPS_PER_SHARD, synced) for who, clips in given.items()}
        return {"X.tofile": lambda: raw(synced), **ours}

    return {
        "writing, before fsync": take_turns(contest(False), rounds, generator, scratch),
        "writing, with fsync": take_turns(contest(True), rounds, generator, scratch),
    }


def open_cache(folder: Path, clips: int, rounds: int, generator: np.random.Generator) -> Seconds:
    """A cache of many short clips."""
    cache = write(folder / "short", cut(np.zeros((clips * LENGTH, 4), np.float16), LENGTH), CLIPS_PER_SHARD)
    return take_turns(
        {
            "EmbeddingCache(folder)": lambda: EmbeddingCache(cache),
            "and all its ticks": lambda: EmbeddingCache(cache).ticks,
        },
        rounds,
        generator,
    )


def cut(embeddings: np.ndarray, frames: int) -> list[EmbeddedClip]:
    """Clips of so many embeddings; their names sort in the order of their rows."""
    clips = []
    for start in range(0, len(embeddings), frames):
        part = embeddings[start : start + frames]
        ticks = np.arange(len(part))
        clips.append(EmbeddedClip(ClipKey(f"/folder/of/videos/{start:09d}.mp4", 1, 1, 0.0), part, ticks / 4, ticks))
    return clips


def write(folder: Path, clips: list[EmbeddedClip], clips_per_shard: int, synced: bool = False) -> Path:
    """Write a cache; without fsync it is as good until the machine fails."""
    provenance = Provenance(
        encoder_fingerprint="benchmark",
        embedding_dimension=clips[0].embeddings.shape[1],
        fps=4.0,
        image_fps=25.0,
        image_size=(64, 64),
        transform="none",
        dtype="float16",
        versions={},
    )
    with nullcontext() if synced else patch("os.fsync"), CacheWriter(folder, provenance, clips_per_shard) as writer:
        for clip in clips:
            writer.add(clip)
    return folder


def take_turns(
    contestants: dict[str, Turn], rounds: int, generator: np.random.Generator, scratch: Path | None = None
) -> Seconds:
    """Median seconds of each contestant; what it left in `scratch` is removed after its turn, untimed."""
    seconds: dict[str, list[float]] = {who: [] for who in contestants}
    for _ in range(rounds):
        for who in generator.permutation(list(contestants)):
            before = time.perf_counter()
            contestants[who]()
            seconds[who].append(time.perf_counter() - before)
            if scratch is not None:
                shutil.rmtree(scratch)
    return {who: float(np.median(values)) for who, values in seconds.items()}


if __name__ == "__main__":
    run_stage(main, Options)
