"""Are planted duplicates found? Encoded anew, cut at their beginning, and cropped by 5 %.

  python -m benchmarks.duplicates --videos ../shared/robot --encoder timm:tf_efficientnet_lite0 --encoder-weights FILE

Of each third video such a copy is planted beside all of them; `video-jepa search duplicates` looks for the pairs.
The bar: recall .95 at a precision of .95.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import run
from data.clock import read_on_clock
from data.folders import find_videos
from data.synthetic import write_video
from data.video import probe_video
from jepa.config import Positive
from pipelines.run.command import run_command
from pipelines.run.encoders import PublishedOptions

EVERY, CUT_S, CROPPED = 3, 0.7, 0.05


@dataclass(frozen=True, kw_only=True)
class Options(PublishedOptions):
    """Look for planted duplicates."""

    videos: Path
    """Folder of videos that differ."""
    encoder: str
    """Encoder of the embeddings."""
    fps: Positive = 4.0
    """Rate of the clock."""
    output_dir: Path = Path("runs/benchmarks/duplicates")
    """Where copies, cache and list are left."""


def main(options: Options) -> None:
    """Plant, embed, search, count."""
    videos, folder = find_videos([options.videos.absolute()])[0], options.output_dir.absolute()
    (folder / "copies").mkdir(parents=True, exist_ok=True)
    planted = {frozenset((str(video), str(plant(video, folder / "copies")))) for video in videos[::EVERY]}
    weights = {"encoder-weights": options.encoder_weights.absolute()} if options.encoder_weights else {}
    given = {"videos": [options.videos, folder / "copies"], "encoder": options.encoder, "fps": options.fps, **weights}
    run("cache_embeddings", given | {"output-dir": folder / "cache"})
    run("search_cache", "duplicates", {"cache": folder / "cache", "output-dir": folder / "found", "overwrite": True})
    with (folder / "found" / "found.csv").open(newline="") as file:
        found = {frozenset((row["video"], row["other_video"])) for row in csv.DictReader(file)}
    right = len(planted & found)
    print(f"{len(planted)} planted, {len(found)} found: recall {right / len(planted):.3f}, precision", end=" ")
    print(f"{right / max(1, len(found)):.3f}; not planted: {[sorted(pair) for pair in found - planted][:5]}")


def plant(video: Path, folder: Path) -> Path:
    """A copy of a video without its beginning and its borders, encoded anew."""
    copy, info = folder / f"copy_of_{video.stem}.mp4", probe_video(video)
    if not copy.exists():
        frames = [timed.frame for timed in read_on_clock(video, (info.height, info.width), fps=10.0, start_s=CUT_S)]
        rows, columns = (round(side * CROPPED / 2) for side in (info.height, info.width))
        kept = np.stack(frames)[:, :, rows : info.height - rows, columns : info.width - columns]
        kept = kept[:, :, : kept.shape[2] // 2 * 2, : kept.shape[3] // 2 * 2].transpose(0, 2, 3, 1)
        write_video(copy, np.ascontiguousarray(kept), 10.0)
    return copy


if __name__ == "__main__":
    run_command(main, Options)
