r"""Before the stages, if you like: look into every video once, and keep what was found.

  python pipelines/index_videos.py --videos DIR --manifest videos.jsonl

Decodes all of each video and writes down what is really in it: frames, rate, keyframes, gaps, damage, and for what
cannot be used the reason. Every stage takes the manifest in place of the folder. Run the same command again after
adding videos, or after an interruption: unchanged files are only looked up.
"""

from dataclasses import dataclass
from pathlib import Path

from data.decoder import VideoError
from data.manifest import MANIFEST_SUFFIX, Record, index_videos
from data.video import IMAGE_FPS
from pipelines.stage import LAUNCH, counted, require, run_stage

SHOWN = 10


@dataclass(frozen=True)
class Options:
    """Count what decodes in a folder of videos."""

    videos: tuple[Path, ...]
    """Folders (searched recursively), video files, folders of images, zips of them, and manifests."""
    manifest: Path = Path("videos.jsonl")
    """The list of videos to write or to bring up to date."""
    image_fps: float = IMAGE_FPS
    """Rate of folders of images, which have no times of their own."""
    strict: bool = False
    """A file that cannot be used or is damaged is an error."""


def main(options: Options) -> None:
    """The story: look at what is new, say what was found."""
    require(options.image_fps > 0, f"--image-fps is {options.image_fps:g}: it must be positive")
    require(
        options.manifest.suffix == MANIFEST_SUFFIX, f"--manifest is {options.manifest}: its name must end in .jsonl"
    )
    records, vanished = index_videos(options.videos, options.manifest, count=True, image_fps=options.image_fps)
    print(describe(records))
    for line in first_few("no longer there, or not under --videos any more", vanished):
        print(line)
    faulty = [record for record in records if record.video is None or record.video.damage]
    print(f"wrote {options.manifest}")
    if faulty and options.strict:
        raise VideoError(f"{faulty[0].state.path}: refused or damaged, and so are {len(faulty) - 1} more (--strict)")
    require(any(record.video for record in records), f"not one of {len(records)} files can be used")
    print(f"Next:\n  {LAUNCH} pipelines/pretrain_encoder.py --videos {options.manifest} --output-dir runs/encoder")


def describe(records: list[Record]) -> str:
    """What there is, a line each; of what is wrong the first few."""
    videos = [record.video for record in records if record.video]
    refused = [record.refused for record in records if not record.video]
    damaged = [f"{video.path}: {video.damage}" for video in videos if video.damage]
    gaps = [
        f"{video.path}: {counted(len(video.gaps_s), 'gap')}, the first of {video.gaps_s[0][1]:.2f} s "
        f"at {video.gaps_s[0][0]:.2f} s"
        for video in videos
        if video.gaps_s
    ]
    hours = sum(video.duration_s for video in videos) / 3600
    frames = sum(video.frames or 0 for video in videos)
    lines = [
        f"{counted(len(videos), 'video')}, {hours:.2f} h, {frames:,} frames; refused {len(refused):,}; "
        f"damaged {len(damaged):,}; with gaps in time {len(gaps):,}"
    ]
    for title, found in (("refused", refused), ("damaged", damaged), ("gap", gaps)):
        lines += first_few(title, found)
    return "\n".join(lines)


def first_few(title: str, found: list[str]) -> list[str]:
    """A line for each of the first, and one for the others."""
    lines = [f"  {title}: {one}" for one in found[:SHOWN]]
    return lines if len(found) <= SHOWN else [*lines, f"  {title}: {len(found) - SHOWN:,} more"]


if __name__ == "__main__":
    run_stage(main, Options)
