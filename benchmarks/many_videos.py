r"""Many small videos: checked, embedded and read back, with time and memory for each number of them.

  python -m benchmarks.many_videos --counts 1000 10000

Makes the largest number of videos once (64x64, H.264, each with frames of its own) and runs the commands, as a person
would, on growing folders of them. Seconds for each video and the greatest memory of the process must not grow with the
number. Every second run finds nothing to do.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common import make_encoder, run_measured
from data.cache import EmbeddingCache
from data.parallel import map_ahead
from data.synthetic import write_video
from data.windows import Windows
from jepa.config import Bounded, PositiveInt
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json

FPS = 10
WINDOW = 4


@dataclass(frozen=True)
class Options(Bounded):
    """Run the commands on thousands of small videos."""

    counts: tuple[PositiveInt, ...] = (1000, 10000)
    """Numbers of videos, growing."""
    frames: PositiveInt = 12
    """Frames in a video."""
    output_dir: Path = Path("runs/benchmarks/many_videos")
    """Where results.json is left."""


def main(options: Options) -> None:
    """The story: make the videos, run the commands on more and more of them, print what it took."""
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        encoder = make_encoder(folder / "encoder", size=64)
        made = make_videos(folder / "made", max(options.counts), options.frames)
        for count in sorted(options.counts):
            videos = folder / f"videos_{count}"
            videos.mkdir()
            for path in made[:count]:
                (videos / path.name).hardlink_to(path)
            results[f"{count} videos"] = found = measure(videos, folder / f"cache_{count}", encoder, count)
            print(f"{count:,} videos:")
            for name, value in found.items():
                print(f"  {name:55} {value:.4g}", flush=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)


def make_videos(folder: Path, count: int, frames: int) -> list[Path]:
    """Small videos of smooth noise."""
    folder.mkdir()

    def make(index: int) -> Path:
        coarse = np.random.default_rng(index).integers(0, 256, (frames, 8, 8, 3), dtype=np.uint8)
        path = folder / f"{index:06}.mp4"
        write_video(path, coarse.repeat(8, axis=1).repeat(8, axis=2), FPS)
        return path

    return list(tqdm(map_ahead(make, range(count)), total=count, unit="video", desc="making videos", leave=False))


def measure(videos: Path, cache: Path, encoder: Path, count: int) -> dict[str, float]:
    """Seconds and memory of each command, and of reading the cache."""
    manifest = videos.with_suffix(".jsonl")
    commands = {
        "inspect_folder": [videos, "--count", "--manifest", manifest],
        "cache_embeddings": ["--videos", manifest, "--encoder", encoder, "--fps", FPS, "--output-dir", cache],
    }
    found: dict[str, float] = {}
    for name, given in commands.items():
        for again in ("", " again"):
            seconds, memory_mb = run_measured(name, *given)
            found[f"{name}{again}: milliseconds a video"] = 1000 * seconds / count
            found[f"{name}{again}: seconds"] = seconds
            found[f"{name}{again}: anonymous memory in MB"] = memory_mb
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


if __name__ == "__main__":
    run_command(main, Options)
