r"""A cache of 40,000 clips and 8 GB: does it train and evaluate in the memory that a small one takes?

  python -m benchmarks.forty_thousand_clips --folder /somewhere/with/17GB

Writes the embeddings of the largest number of clips directly, as `cache_embeddings` would: the same few waves in every
clip, each with phases and noise of its own. Smaller caches are its first shards. Then trains a predictor on each and
evaluates it on each, and watches the memory of their processes that is their own (RssAnon; the pages of mapped files
do not count). Prints a table in Markdown and leaves `results.json`.
"""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

from benchmarks.common import ROOT, markdown, script, words, write_cache, write_results
from benchmarks.lives import tree
from jepa.config import Bounded, PositiveInt
from pipelines.run.command import require, run_command

CLIPS_PER_SHARD = 64
WAVES = 16
"""Oscillations that the embeddings of all clips are mixed from."""


@dataclass(frozen=True)
class Options(Bounded):
    """Memory of training and evaluation, by the number of clips."""

    clips: tuple[PositiveInt, ...] = (1_000, 10_000, 40_000)
    """Numbers of clips, growing."""
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
    for seed, (cache, clips) in enumerate({largest: options.clips[-1], validation: 100}.items()):
        write_cache(cache, make_clips(clips, options, seed), options.dimension, clips_per_shard=CLIPS_PER_SHARD)
    rows: list[list[object]] = [["clips", "GB", "command", "seconds", "anonymous memory, MB"]]
    for clips in options.clips:
        cache = largest if clips == options.clips[-1] else first_shards(largest, clips)
        trained, judged = (options.folder / f"run_{clips}" / name for name in ("predictor", "evaluation"))
        gigabytes = sum(path.stat().st_size for path in (cache / "shards").glob("*.h5")) / 1e9
        commands: dict[str, dict[str, object]] = {
            "train_predictor": {"train-cache": cache, "validation-cache": validation, "steps": options.steps,
                                "output-dir": trained},
            "evaluate_rollout": {"cache": cache, "predictor": trained, "windows": options.windows,
                                 "output-dir": judged},
        }  # fmt: skip
        for name, given in commands.items():
            seconds, megabytes = run_measured(name, given, "--overwrite")
            rows.append([clips, gigabytes, name, seconds, megabytes])
            print(markdown(rows[-2:]), flush=True)
    write_results(options.folder, rows)
    print(markdown(rows))


def make_clips(clips: int, options: Options, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names and embeddings of clips."""
    mixing = np.random.default_rng(0).normal(size=(WAVES, options.dimension)).astype(np.float32)
    phase = np.linspace(0.1, 1.0, WAVES, dtype=np.float32) * np.arange(options.frames, dtype=np.float32)[:, None]
    for index in tqdm(range(clips), unit="clip", desc="writing clips", leave=False):
        generator = np.random.default_rng([seed, index])
        phases = generator.uniform(0, 2 * np.pi, WAVES).astype(np.float32)
        noise = generator.standard_normal((options.frames, options.dimension), dtype=np.float32)
        yield f"/videos/{seed}/{index:06}.mp4", np.sin(phase + phases) @ mixing + 0.3 * noise


def run_measured(command: str, *given: object) -> tuple[float, float]:
    """Seconds and greatest anonymous memory in MB of a command and all its processes."""
    before, peak = time.monotonic(), 0
    process = subprocess.Popen([*script(command), *words(*given)], cwd=ROOT)
    while process.poll() is None:
        peak = max(peak, sum(map(anonymous_bytes, tree(process.pid))))
        time.sleep(0.05)
    require(process.returncode == 0, f"{command} failed, as it says above")
    return time.monotonic() - before, peak / 1e6


def anonymous_bytes(process: psutil.Process) -> int:
    """Memory of a process that is its own: mapped files do not count."""
    with suppress(psutil.Error):
        memory = process.memory_info()
        return memory.rss - memory.shared
    return 0


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
