r"""Frames for encoder training: rate against plain decoding, and memory.

  python -m benchmarks.frames --rounds 5

On the driving clips of `$JEPA_SHARED/driving` (default `../shared/driving`), with so little memory that they are
streamed through it. The rate is CPU time of reading every video once in order, divided by that of an epoch of shuffled
pairs, both on the same clock and by as many threads, taking turns, medians. Memory is the process's, watched over
several epochs.
"""

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import shared
from data.clips import FrameClips
from data.clock import clock_offsets_s, read_on_clock
from data.counting import count_frames
from data.parallel import map_ahead
from data.video import VideoInfo
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json

PAGE = resource.getpagesize()
EPOCHS_TIMED = 3


@dataclass(frozen=True)
class Options:
    """Measure the road from videos to shuffled batches."""

    rounds: int = 5
    """Turns of each contestant; the median counts."""
    size: int = 64
    """Height and width of the frames in pixels."""
    fps: float = 4.0
    """Ticks per second."""
    clocks: int = 1
    """Clocks, shifted against each other."""
    batch_size: int = 64
    """Pairs in a batch."""
    shuffle_megabytes: float = 32
    """Bound on decoded frames; the clips take 51 MB at the default size and rate."""
    epochs: int = 3
    """Over which memory is watched."""
    output_dir: Path = Path("runs/benchmarks/frames")
    """Where results.json is left."""


def main(options: Options) -> None:
    """The story: index the clips, compare rates, watch memory."""
    require(options.rounds > 0, f"--rounds is {options.rounds}: it must be positive")
    paths = sorted(shared("driving").glob("*.mp4"))
    memory = int(1e6 * options.shuffle_megabytes)
    videos = [count_frames(path) for path in paths]

    in_order, shuffled = [], []
    for _ in range(options.rounds):
        before = cpu_seconds()
        frames = sum(map_ahead(lambda video: sum(1 for _ in sequence(video, options)), videos))
        in_order.append(cpu_seconds() - before)
        seconds, pairs = time_shuffled(make_loader(videos, options, memory))
        shuffled.append(seconds)
    decoded = sum(video.frames or 0 for video in videos)
    results = {
        "rate, of reading in order": float(np.median(in_order) / np.median(shuffled)),
        "decoded frames per CPU second, in order": decoded / float(np.median(in_order)),
        "decoded frames per CPU second, shuffled": decoded / float(np.median(shuffled)),
        "pairs, of all there are": pairs / (frames - len(videos) * options.clocks),
    }
    results |= watch_memory(videos, options, memory)
    for name, value in results.items():
        print(f"{name:60} {value:.3g}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)


def sequence(video: VideoInfo, options: Options) -> Iterator[np.ndarray]:
    """All frames of a video on the clocks, in order."""
    size, offsets_s = (options.size, options.size), clock_offsets_s(options.fps, options.clocks)
    return (timed.frame for timed in read_on_clock(video.path, size, fps=options.fps, offsets_s=offsets_s))


def make_loader(videos: list[VideoInfo], options: Options, memory: int) -> FrameClips:
    """As pretrain_encoder makes it."""
    return FrameClips(
        videos, (options.size, options.size), fps=options.fps, batch_size=options.batch_size, clocks=options.clocks,
        memory_bytes=memory, progress=False,
    )  # fmt: skip


def epochs(loader: FrameClips, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """The epoch, and the first frames of all pairs, uint8 (B, 3, H, W), of each batch of some epochs."""
    for batch in loader.batches({}):
        if batch.place["epoch"] >= count:
            break
        yield batch.place["epoch"], batch.frames[:, 0].numpy()


def time_shuffled(loader: FrameClips) -> tuple[float, float]:
    """CPU seconds and pairs of an epoch, from the first batch of one to the first of another.

    Not from the beginning: the next block is always decoded ahead, and would be counted without being used.
    """
    started, pairs = 0.0, 0
    for number, frames in epochs(loader, EPOCHS_TIMED + 1):
        if number > 0:
            started = started or cpu_seconds()
            pairs += len(frames)
    return (cpu_seconds() - started) / EPOCHS_TIMED, pairs / EPOCHS_TIMED


def watch_memory(videos: list[VideoInfo], options: Options, memory: int) -> dict[str, float]:
    """Greatest size of the process in each epoch, above what it was before."""
    loader = make_loader(videos, options, memory)
    before = resident_bytes()
    greatest = [0.0] * options.epochs
    for number, _ in epochs(loader, options.epochs):
        greatest[number] = max(greatest[number], resident_bytes() - before)
    return {"bound on decoded frames in MB": memory / 1e6} | {
        f"process above its size before, epoch {number}, in MB": value / 1e6 for number, value in enumerate(greatest)
    }


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def cpu_seconds() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    run_command(main, Options)
