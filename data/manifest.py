"""Folders of videos as a checked list, what was refused and why; and the account of a run.

A manifest is a file of JSON lines: the first names the format, each other one tells about a file: where it lies, its
size and modification time, and either what is known of the video or why it was refused. Lines are appended as files are
looked at, so that nothing is lost if the process dies; a file that has not changed is not looked at again.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.decoder import Damage, VideoError
from data.image_sequence import FEWEST_IMAGES, is_image
from data.parallel import map_ahead
from data.video import IMAGE_FPS, VideoInfo, probe_video

VIDEO_NAMES = "mp4 mov m4v 3gp mkv webm avi wmv flv ogv gif mjpeg mpg mpeg ts mts m2ts h264 hevc"
VIDEO_SUFFIXES = frozenset(f".{name}" for name in VIDEO_NAMES.split())
MANIFEST_SUFFIX = ".jsonl"
FORMAT = {"format": "video-jepa manifest", "version": 1}
EXAMPLES = 10


class FileState(NamedTuple):
    """A file's absolute path, size and time: if any of this has changed, the file is another one."""

    path: str
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Record:
    """A line of a manifest: a video, or why the file was refused."""

    state: FileState
    video: VideoInfo | None
    refused: str = ""


@dataclass
class Account:
    """Videos read, refused and damaged in a run, by path: said at its end, and left in its folder."""

    read_s: dict[str, float] = field(default_factory=dict)
    """Seconds of video that were read."""
    refused: dict[str, str] = field(default_factory=dict)
    """Reasons why files were not read at all."""
    damaged: dict[str, Damage] = field(default_factory=dict)
    """Faults inside files that were read."""

    def add(self, path: Path | str, seconds: float, damage: Damage) -> None:
        """Add a video that was read, or a part of one."""
        self.read_s[str(path)] = self.read_s.get(str(path), 0.0) + seconds
        if damage:
            self.damaged.setdefault(str(path), Damage()).add(damage)

    def merge(self, others: "Iterable[Account]") -> None:
        """Add what other processes of the same run did."""
        for other in others:
            for path, seconds in other.read_s.items():
                self.add(path, seconds, other.damaged.get(path, Damage()))
            self.refused |= other.refused

    def __str__(self) -> str:
        minutes = sum(self.read_s.values()) / 60
        corrupt = sum(damage.corrupt_frames for damage in self.damaged.values())
        text = (
            f"read {len(self.read_s):,} videos, {minutes:,.1f} minutes; refused {len(self.refused):,}; "
            f"damaged {len(self.damaged):,}, {corrupt:,} corrupt frames left out"
        )
        faults = [f"{path}: {damage}" for path, damage in self.damaged.items()]
        for title, reasons in (("refused", list(self.refused.values())), ("damaged", faults)):
            more = [f"and {len(reasons) - EXAMPLES:,} more"] if len(reasons) > EXAMPLES else []
            text += "".join(f"\n  {title}: {reason}" for reason in reasons[:EXAMPLES] + more)
        return text


def find_videos(paths: Sequence[Path]) -> list[Path]:
    """All videos under `paths`: files as they are named, folders searched recursively; resolved, sorted, each once.

    A folder that holds at least two images and no video file is an image sequence.
    Raises `VideoError` if a path does not exist, or is a folder without videos.
    """
    found: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise VideoError(f"{path}: no such file or folder")
        videos = [video.resolve() for video in (_videos_inside(path) if path.is_dir() else [path])]
        if not videos:
            suffixes = ", ".join(sorted(VIDEO_SUFFIXES))
            raise VideoError(f"{path}: no videos in this folder (looked for {suffixes}, and folders of images)")
        found.update(videos)
    return sorted(found)


def _videos_inside(folder: Path) -> Iterator[Path]:
    visited: set[str] = set()
    closed: list[OSError] = []  # folders that may not be entered: looking into them will say why
    for where, folders, names in os.walk(folder, onerror=closed.append, followlinks=True):
        if os.path.realpath(where) in visited:  # links may lead in circles
            folders.clear()
            continue
        visited.add(os.path.realpath(where))
        videos = [Path(where, name) for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES]
        zips = [Path(where, name) for name in names if name.lower().endswith(".zip")]  # opening them will say: unpack
        yield from filter(Path.is_file, videos + zips)
        if not videos and sum(map(is_image, names)) >= FEWEST_IMAGES:
            yield Path(where)
    yield from (Path(error.filename) for error in closed)


def file_state(path: Path) -> FileState:
    """A video as it lies on disk now, or `OSError`; a change of any of its images changes a folder."""
    status = path.stat()
    images = [image.stat() for image in path.iterdir() if is_image(image.name)] if path.is_dir() else []
    size_bytes = sum(image.st_size for image in images or [status])
    return FileState(str(path.resolve()), size_bytes, max(file.st_mtime_ns for file in (status, *images)))


def read_manifest(path: Path) -> list[Record]:
    """The records of a manifest, but for a line that was cut off. Raises `VideoError`."""
    try:
        header, *lines, _ = path.read_text().split("\n")
        if json.loads(header) != FORMAT:
            raise ValueError(f"it does not begin with {json.dumps(FORMAT)}")
        return [_from_json(json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VideoError(f"{path}: not a manifest of videos, or damaged ({error}): make it anew") from error


def index_videos(
    paths: Sequence[Path],
    manifest: Path | None,
    *,
    look: Callable[[Path, float], VideoInfo] = probe_video,
    image_fps: float = IMAGE_FPS,
    progress: bool = True,
) -> list[Record]:
    """Look at all videos under `paths` that no manifest knows as they are, in order of path.

    `paths` are files, folders, and manifests. `manifest` is made, or brought up to date; None: nothing is written.
    `look` is `probe_video`, or `count_frames` to decode all of each video; images are shown at `image_fps`. Raises
    `VideoError` if a path is missing or holds no video, or a manifest cannot be read.
    """
    others = [record for path in paths if path.suffix == MANIFEST_SUFFIX for record in read_manifest(path)]
    files = find_videos([path for path in paths if path.suffix != MANIFEST_SUFFIX])
    files = sorted({*files, *(Path(record.state.path) for record in others)})
    earlier = read_manifest(manifest) if manifest and manifest.exists() else []
    known = {record.state: record for record in (*earlier, *others)}

    def record_of(path: Path) -> Record:
        state = FileState(str(path), 0, 0)
        try:
            state = file_state(path)
            record = known.get(state)
            if record and (video := record.video):  # what was refused is tried again
                is_at_rate = video.codec != "images" or video.average_fps == image_fps
                if is_at_rate and (video.frames is not None or look is probe_video):
                    return record
            return Record(state, look(path, image_fps))
        except (VideoError, OSError) as error:
            return Record(state, None, str(error))

    if manifest is not None:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        _write(manifest, earlier)  # without a line that was cut off
    records = []
    with Path(manifest or os.devnull).open("a", buffering=1) as file:
        looks = map_ahead(record_of, files)
        for record in tqdm(looks, "looking", len(files), unit="video", leave=False, disable=not progress):
            if known.get(record.state) != record:
                file.write(_line(record))
            records.append(record)
    if manifest is not None:
        _write(manifest, records)
    return records


def check_videos(
    paths: Sequence[Path],
    *,
    fps: float,
    manifest: Path | None = None,
    image_fps: float = IMAGE_FPS,
    strict: bool = False,
    progress: bool = True,
    is_main: bool = True,
) -> tuple[list[VideoInfo], Account]:
    """The videos under `paths` that decode and are not slower than the clock, and an account that refuses the others.

    A slower video could not give a frame for each tick. `manifest`, `image_fps` as in `index_videos`. Of several
    processes one is main and looks, the others then read its manifest. Raises `VideoError` if nothing is there, or
    nothing of it can be used; with `strict`, if any file cannot be used.
    """
    if manifest and not is_main:
        records = read_manifest(manifest)
    else:
        records = index_videos(paths, manifest, image_fps=image_fps, progress=progress)
    videos, refused = [], {}
    for record in records:
        path, video = record.state.path, record.video
        if video is None:
            refused[path] = record.refused
        elif 0 < video.average_fps < 0.95 * fps:  # average rates are rounded in headers, hence the margin
            rate = video.average_fps
            refused[path] = f"{path}: its {rate:.4g} fps are fewer than the clock's {fps:g}: lower the clock's rate"
        else:
            videos.append(video)
    if refused and (strict or not videos):
        reasons = f": {manifest} says why" if manifest else ""
        more = f" (and {len(refused) - 1} more{reasons})" if len(refused) > 1 else ""
        raise VideoError(next(iter(refused.values())) + more)
    return videos, Account(refused=refused)


def _write(manifest: Path, records: Iterable[Record]) -> None:
    unfinished = manifest.with_name(f".tmp.{manifest.name}")
    unfinished.write_text(json.dumps(FORMAT) + "\n" + "".join(map(_line, records)))
    unfinished.replace(manifest)


def _line(record: Record) -> str:
    facts = asdict(record.video) if record.video else {"refused": record.refused}
    return json.dumps({**facts, **record.state._asdict()}) + "\n"


def _from_json(fields: dict[str, Any]) -> Record:
    state = FileState(*(fields.pop(name) for name in FileState._fields))
    if "refused" in fields:
        return Record(state, None, fields["refused"])
    fields["keyframes_s"] = tuple(fields["keyframes_s"])
    fields["gaps_s"] = tuple((begin, length) for begin, length in fields["gaps_s"])
    return Record(state, VideoInfo(path=Path(state.path), **fields))
