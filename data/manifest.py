"""A folder of videos -> a checked list: what can be used, and what was refused and why."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data.video import VIDEO_SUFFIXES, VideoError, VideoInfo, probe_video


@dataclass(frozen=True)
class VideoList:
    """The videos of a run, and an account of those that cannot be used."""

    videos: list[VideoInfo]
    refused: dict[Path, str] = field(default_factory=dict)
    """Why each of the other files was refused, by path."""

    def account(self) -> str:
        """One line for the person who started the run, and one for each refused file."""
        seconds = sum(video.duration_s for video in self.videos)
        lines = [f"{len(self.videos)} videos, {seconds / 60:.1f} minutes; {len(self.refused)} refused"]
        return "\n".join(lines + [f"  refused: {reason}" for reason in self.refused.values()])


def find_videos(paths: Sequence[Path]) -> list[Path]:
    """All video files under `paths`: files as they are named, folders searched recursively; sorted, without doubles.

    Raises:
        VideoError: a path does not exist, cannot be read, or is a folder without videos.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise VideoError(f"{path}: no such file or folder")
        if path.is_file():
            found.setdefault(path.resolve(), path)
            continue
        inside = [file for file in path.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file()]
        if not inside:
            raise VideoError(f"{path}: no videos in this folder (looked for {', '.join(sorted(VIDEO_SUFFIXES))})")
        for file in sorted(inside):
            found.setdefault(file.resolve(), file)
    return sorted(found.values())


def check_videos(paths: Sequence[Path], fps: float, progress: bool = True) -> VideoList:
    """Find the videos under `paths`, and refuse what does not decode or is slower than the clock.

    Args:
        paths: files and folders.
        fps: the clock that the videos will be sampled on; a slower video could not give a frame for each tick.
        progress: show a progress bar.

    Raises:
        VideoError: nothing is there, or nothing of it can be used.
    """
    files = find_videos(paths)

    def check(path: Path) -> VideoInfo | str:
        try:
            info = probe_video(path)
        except (VideoError, OSError) as error:
            return str(error)
        # Average rates are rounded in headers, hence the margin.
        if 0 < info.average_fps < 0.95 * fps:
            return f"{path}: its {info.average_fps:.4g} fps are fewer than the clock's {fps:g}: lower --fps"
        return info

    with ThreadPoolExecutor() as pool:
        bar = tqdm(
            pool.map(check, files),
            total=len(files),
            unit="video",
            desc="checking videos",
            leave=False,
            disable=not progress,
        )
        results = list(bar)
    videos = [result for result in results if isinstance(result, VideoInfo)]
    refused = {path: result for path, result in zip(files, results, strict=True) if isinstance(result, str)}
    if not videos:
        reasons = list(refused.values())
        more = f" (and {len(reasons) - 1} more files, none of them usable)" if len(reasons) > 1 else ""
        raise VideoError(reasons[0] + more)
    return VideoList(videos, refused)
