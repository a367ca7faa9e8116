r"""A cache of 40,000 clips and 8 GB: does it train and evaluate in the memory that a small one takes?

  python -m benchmarks.forty_thousand_clips --folder /somewhere/with/17GB

Writes the embeddings of the largest number of clips directly, as `cache_embeddings` would: the same few waves in every
clip, each with phases and noise of its own. Smaller caches are its first shards. Then trains a predictor on each and
evaluates it on each, and watches the memory of their processes that is their own (RssAnon; the pages of mapped files
do not count). Prints a table in Markdown and writes `results.json`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.common import markdown, run_measured
from data.cache import ClipKey, Column, EmbeddingCache, Provenance
from data.cache_writer import CacheWriter, EmbeddedClip
from jepa.config import Bounded, PositiveInt
from pipelines.run.command import run_command
from pipelines.run.files import write_json

FPS = 10.0
CLIPS_PER_SHARD = 64
WAVES = 16
"""Oscillations that the embeddings of all clips are mixed from."""


@dataclass(frozen=True)
class Options(Bounded):
    """Memory of training and evaluation, by the number of clips."""

    clips: tuple[PositiveInt, ...] = (400, 4_000, 40_000)
    """Numbers of clips."""
    frames: PositiveInt = 400
    """Embeddings of a clip: 40,000 clips of 400 embeddings of 256 numbers in float16 are 8.2 GB."""
    dimension: PositiveInt = 256
    """Numbers of an embedding."""
    steps: PositiveInt = 200
    """Steps of training."""
    windows: PositiveInt = 20_000
    """Windows that are evaluated; at fewer clips, as many as there are."""
    folder: Path = Path("runs/benchmarks/forty_thousand_clips")
    """Where caches, predictors and results are left."""


def main(options: Options) -> None:
    """The story: write the caches, train and evaluate on each, print."""
    largest, validation = options.folder / "cache", options.folder / "validation"
    write_cache(largest, max(options.clips), options, seed=0)
    write_cache(validation, 100, options, seed=1)
    results, rows = [], [["clips", "GB", "command", "seconds", "anonymous memory, MB"]]
    for clips in sorted(options.clips):
        cache = largest if clips == max(options.clips) else first_shards(largest, clips)
        folder = options.folder / f"run_{clips}"
        gigabytes = sum(path.stat().st_size for path in (cache / "shards").glob("*.h5")) / 1e9
        commands: dict[str, list[object]] = {
            "train_predictor": ["--train-cache", cache, "--validation-cache", validation, "--steps", options.steps],
            "evaluate_rollout": ["--cache", cache, "--predictor", folder / "train_predictor" / "predictor",
                                 "--windows", options.windows],
        }  # fmt: skip
        for name, given in commands.items():
            seconds, megabytes = run_measured(name, *given, "--output-dir", folder / name, "--overwrite")
            results.append({"clips": clips, "command": name, "seconds": seconds, "anonymous_mb": megabytes})
            rows.append([f"{clips:,}", f"{gigabytes:.2f}", name, f"{seconds:.0f}", f"{megabytes:.0f}"])
            print(f"{clips:,} clips: {name} took {seconds:.0f} s and {megabytes:.0f} MB", flush=True)
    write_json(options.folder / "results.json", results)
    print(markdown(rows))


def write_cache(folder: Path, clips: int, options: Options, *, seed: int) -> None:
    """Write what is not there yet of a cache."""
    column = Column("float16", (options.dimension,))
    provenance = Provenance(
        encoder="benchmark", encoder_fingerprint="benchmark", fps=FPS, image_fps=25.0, image_size=(64, 64), window=1,
        transform="none", precision="fp32", columns={"embeddings": column}, versions={},
    )  # fmt: skip
    there = {clip.key.source for clip in EmbeddingCache(folder).clips} if (folder / "cache.json").exists() else set()
    mixing = np.random.default_rng(0).normal(size=(WAVES, options.dimension)).astype(np.float32)
    rate = np.linspace(0.1, 1.0, WAVES, dtype=np.float32)
    ticks = np.arange(options.frames)
    with CacheWriter(folder, provenance, clips_per_shard=CLIPS_PER_SHARD) as writer:
        for index in tqdm(range(clips), unit="clip", desc=f"writing {folder.name}", leave=False):
            source = f"/videos/{seed}/{index:06}.mp4"
            if source in there:
                continue
            generator = np.random.default_rng([seed, index])
            phases = generator.uniform(0, 2 * np.pi, WAVES).astype(np.float32)
            noise = generator.standard_normal((options.frames, options.dimension), dtype=np.float32)
            waves = np.sin(rate * ticks[:, None].astype(np.float32) + phases) @ mixing + 0.3 * noise
            writer.add(EmbeddedClip(ClipKey(source, 1, 1, 0.0), {"embeddings": waves}, ticks / FPS, ticks))


def first_shards(cache: Path, clips: int) -> Path:
    """A cache of about so many clips that shares its files with a larger one."""
    folder = cache.with_name(f"{cache.name}_{clips}")
    if not folder.exists():
        (folder / "shards").mkdir(parents=True)
        os.link(cache / "cache.json", folder / "cache.json")
        for manifest in sorted((cache / "shards").glob("*.json"))[: max(1, clips // CLIPS_PER_SHARD)]:
            for path in (manifest, manifest.with_suffix(".h5")):
                os.link(path, folder / "shards" / path.name)
    return folder


if __name__ == "__main__":
    run_command(main, Options)
