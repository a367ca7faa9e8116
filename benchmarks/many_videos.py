r"""Many small videos: indexed, embedded and read back, with time and memory for each number of them.

  python benchmarks/many_videos.py --counts 1000 10000

Makes the largest number of videos once (64x64, H.264, each with frames of its own) and runs the stages, as a person
would, on growing folders of them. Seconds for each video and the greatest memory of the process must not grow with the
number. Every second run finds nothing to do.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.embedding_cache import EmbeddingCache
from data.map_ahead import map_ahead
from data.synthetic import write_video
from data.windows import Windows
from jepa.encoder import EncoderConfig, create_encoder
from pipelines.stage import UserError, require, run_stage, write_json

ROOT = Path(__file__).parent.parent
FPS = 10
WINDOW = 4


@dataclass(frozen=True)
class Options:
    """Run the stages on thousands of small videos."""

    counts: tuple[int, ...] = (1000, 10000)
    """Numbers of videos, growing."""
    frames: int = 12
    """Frames in a video."""
    seed: int = 0
    """Of the pictures."""
    output_dir: Path = Path("runs/benchmarks/many_videos")
    """Where results.json is left."""


def main(options: Options) -> None:
    """The story: make the videos, run the stages on more and more of them, print what it took."""
    require(all(count > 0 for count in options.counts), f"--counts is {options.counts}: they must be positive")
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        create_encoder(EncoderConfig(embedding_dimension=32)).eval().save_pretrained(folder / "encoder")
        made = make_videos(folder / "made", max(options.counts), options.frames, options.seed)
        for count in sorted(options.counts):
            videos = folder / f"videos_{count}"
            videos.mkdir()
            for path in made[:count]:
                (videos / path.name).hardlink_to(path)
            results[f"{count} videos"] = found = measure(videos, folder / f"cache_{count}", folder / "encoder", count)
            print(f"{count:,} videos:")
            for name, value in found.items():
                print(f"  {name:55} {value:.4g}", flush=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)


def make_videos(folder: Path, count: int, frames: int, seed: int) -> list[Path]:
    """Small videos of smooth noise."""
    folder.mkdir()

    def make(index: int) -> Path:
        coarse = np.random.default_rng([seed, index]).integers(0, 256, (frames, 8, 8, 3), dtype=np.uint8)
        path = folder / f"{index:06}.mp4"
        write_video(path, coarse.repeat(8, axis=1).repeat(8, axis=2), FPS)
        return path

    return list(tqdm(map_ahead(make, range(count)), total=count, unit="video", desc="making videos", leave=False))


def measure(videos: Path, cache: Path, encoder: Path, count: int) -> dict[str, float]:
    """What each stage took."""
    manifest = videos.with_suffix(".jsonl")
    index = ["pipelines/index_videos.py", "--videos", videos, "--manifest", manifest]
    embed = ["pipelines/cache_embeddings.py", "--videos", manifest, "--encoder", encoder, "--fps", FPS,
             "--output-dir", cache]  # fmt: skip
    found: dict[str, float] = {}
    for name, command in {"index": index, "embed": embed}.items():
        for again in ("", " again"):
            seconds, memory_mb = run(command)
            found[f"{name}{again}: milliseconds a video"] = 1000 * seconds / count
            found[f"{name}{again}: seconds"] = seconds
            found[f"{name}{again}: memory of the process in MB"] = memory_mb
    before = time.monotonic()
    read = EmbeddingCache(cache)
    found["open the cache: seconds"] = time.monotonic() - before
    require(len(read.clips) == count, f"{cache} holds {len(read.clips)} clips, not {count}")
    before = time.monotonic()
    windows = Windows(read, WINDOW)
    found["list its windows: seconds"] = time.monotonic() - before
    before = time.monotonic()
    for step in range(100):
        windows.sample(256, torch.Generator().manual_seed(step))
    found["a batch of 256 windows: milliseconds"] = 10 * (time.monotonic() - before)
    return found


def run(command: list[object]) -> tuple[float, float]:
    """Seconds and greatest memory in MB of a stage."""
    before = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise UserError(f"{command[0]} failed: {said[-500:]}")
    return time.monotonic() - before, usage.ru_maxrss / 1000


if __name__ == "__main__":
    run_stage(main, Options)
