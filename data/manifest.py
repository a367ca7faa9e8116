"""Folders of videos as a checked list, what was refused and why; and the account of a run.

A manifest is a file of JSON lines: the first names the format, each other one tells about a file: where it lies, its
size and modification time, and either what is known of the video or why it was refused. Lines are appended as files are
looked at, and a later line of a file replaces an earlier one, so that nothing is lost if the process dies; a file that
has not changed is not looked at again.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.decoder import Damage, VideoError
from data.image_sequence import FEWEST_IMAGES, find_zipped_sequences, is_image, is_image_sequence, split_zip
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

    def add(self, path: Path, seconds: float, damage: Damage) -> None:
        """Add a video that was read, or a part of one."""
        self.merge([Account({str(path): seconds}, damaged={str(path): damage} if damage else {})])

    def refuse(self, path: Path, reason: str) -> None:
        """Add a file that could not be read."""
        self.refused[str(path)] = reason

    def merge(self, others: "Iterable[Account]") -> None:
        """Add what other processes of the same run did."""
        for other in others:
            for path, seconds in other.read_s.items():
                self.read_s[path] = self.read_s.get(path, 0.0) + seconds
            for path, damage in other.damaged.items():
                self.damaged.setdefault(path, Damage()).add(damage)
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


@dataclass(frozen=True)
class VideoList:
    """The videos of a run, and those that cannot be used."""

    videos: list[VideoInfo]
    refused: dict[Path, str] = field(default_factory=dict)
    """Reasons for the other files, by path."""

    def account(self) -> Account:
        """An account of a run that has read none of them yet."""
        return Account(refused={str(path): reason for path, reason in self.refused.items()})


def find_videos(paths: Sequence[Path]) -> list[Path]:
    """All videos under `paths`: files as they are named, folders searched recursively; sorted, without doubles.

    A folder that holds at least two images and no video file is an image sequence, as are such folders inside a zip.
    Raises `VideoError` if a path does not exist, or is a folder without videos.
    """
    by_target: dict[Path, Path] = {}
    for path in paths:
        if not is_there(path):
            raise VideoError(f"{path}: no such file or folder")
        files = _videos_inside(path) if path.is_dir() else [path]
        videos = [video for file in files for video in _sequences_in(file)]
        if not videos and path.is_dir():
            suffixes = ", ".join(sorted(VIDEO_SUFFIXES))
            raise VideoError(f"{path}: no videos in this folder (looked for {suffixes}, and folders of images)")
        for video in videos or [path]:
            by_target.setdefault(video.resolve(), video)
    return sorted(by_target.values())


def _sequences_in(file: Path) -> list[Path]:
    """A video itself; of a zip file the sequences in it, which may be none."""
    if file.suffix.lower() == ".zip" and file.is_file():
        with suppress(VideoError):  # opening it will say why
            return find_zipped_sequences(file)
    return [file]


def _videos_inside(folder: Path) -> Iterator[Path]:
    visited: set[str] = set()
    closed: list[OSError] = []  # folders that may not be entered: looking into them will say why
    for where, folders, names in os.walk(folder, onerror=closed.append, followlinks=True):
        if os.path.realpath(where) in visited:  # links may lead in circles
            folders.clear()
            continue
        visited.add(os.path.realpath(where))
        folders.sort()
        videos = [Path(where, name) for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES | {".zip"}]
        yield from filter(Path.is_file, videos)
        if not videos and sum(map(is_image, names)) >= FEWEST_IMAGES:
            yield Path(where)
    yield from (Path(error.filename) for error in closed)


def is_there(path: Path) -> bool:
    """Whether a video is where it was: a file, a folder of images, or one inside a zip file."""
    return path.exists() or is_image_sequence(path)


def file_state(path: Path) -> FileState:
    """A video as it lies on disk now, or `OSError`; a change of any of its images changes a folder."""
    split = split_zip(path)
    status = (split[0] if split else path).stat()
    images = [image.stat() for image in path.iterdir() if is_image(image.name)] if path.is_dir() else []
    size_bytes = sum(image.st_size for image in images or [status])
    return FileState(str(path.resolve()), size_bytes, max(file.st_mtime_ns for file in (status, *images)))


def read_manifest(path: Path) -> list[Record]:
    """The records of a manifest, of each file the last. Raises `VideoError`."""
    try:
        first, *lines = path.read_text().splitlines() or ["{}"]
        header = json.loads(first)
    except (OSError, ValueError) as error:
        raise VideoError(f"{path}: not a readable manifest ({error})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT["format"]:
        raise VideoError(f"{path}: not a manifest of videos")
    if header != FORMAT:
        version, ours = header.get("version"), FORMAT["version"]
        raise VideoError(f"{path}: a manifest of version {version}, not {ours}: delete it and index again")
    records = {}
    for number, line in enumerate(lines, start=2):
        try:
            record = _from_json(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number <= len(lines):  # or else the process died while it wrote this line
                raise VideoError(f"{path}: line {number} is damaged ({error}): delete it and index again") from error
            break
        records[record.state.path] = record
    return list(records.values())


def index_videos(
    paths: Sequence[Path],
    manifest: Path | None,
    *,
    look: Callable[[Path, float], VideoInfo] = probe_video,
    image_fps: float = IMAGE_FPS,
    progress: bool = True,
) -> tuple[list[Record], list[str]]:
    """Look at all videos under `paths` that the manifest does not know as they are, and bring it up to date.

    `paths` are files, folders, and other manifests. The manifest is made if missing; without one nothing is known or
    written. `look` is `probe_video`, or `count_frames` to decode all of each video; images are shown at `image_fps`.

    Returns:
        The records in order of path, and the paths that the manifest knew and that are not there any more.

    Raises:
        VideoError: a path is missing or holds no video, or the manifest cannot be read, or is being written.
    """
    others = [record for path in paths if path.suffix == MANIFEST_SUFFIX for record in read_manifest(path)]
    files = find_videos([path for path in paths if path.suffix != MANIFEST_SUFFIX])
    records = {record.state.path: _as_it_lies(record) for record in others}
    by_state = {record.state: record for record in others}

    def record_of(path: Path) -> Record:
        try:
            state = file_state(path)
        except OSError as error:
            return Record(FileState(str(path.resolve()), 0, 0), None, f"{path}: {error.strerror}")
        record = by_state.get(state)
        if record and (known := record.video):  # what was refused is tried again
            is_at_rate = known.codec != "images" or known.average_fps == image_fps
            if is_at_rate and (known.frames is not None or look is probe_video):
                return record
        try:
            return Record(state, look(Path(state.path), image_fps))
        except (VideoError, OSError) as error:
            return Record(state, None, str(error))

    with _open_manifest(manifest) as (old_records, append):
        by_state |= {record.state: record for record in old_records}
        looks = map_ahead(record_of, files)
        for record in tqdm(looks, "looking", len(files), unit="video", leave=False, disable=not progress):
            if by_state.get(record.state) != record:
                append(_line(record))
            records[record.state.path] = record
        if manifest is not None:
            _replace(manifest, records.values())
    vanished = {state.path for state in by_state} - records.keys()
    return [records[path] for path in sorted(records)], sorted(vanished)


def check_videos(
    paths: Sequence[Path],
    *,
    fps: float,
    manifest: Path | None = None,
    image_fps: float = IMAGE_FPS,
    strict: bool = False,
    progress: bool = True,
    is_main: bool = True,
) -> VideoList:
    """The videos under `paths` that can be used: those that decode and are not slower than the clock.

    A slower video could not give a frame for each tick. `manifest`, `image_fps` as in `index_videos`. Of several
    processes one is main and looks, the others then read its manifest.

    Raises:
        VideoError: nothing is there, or nothing of it can be used; with `strict`, any file cannot be used.
    """
    if manifest and not is_main:
        paths, manifest, progress = [manifest], None, False
    records, _ = index_videos(paths, manifest, image_fps=image_fps, progress=progress)
    videos, refused = [], {}
    for record in records:
        if record.video is None:
            refused[Path(record.state.path)] = record.refused
        # Average rates are rounded in headers, hence the margin.
        elif 0 < record.video.average_fps < 0.95 * fps:
            path, rate = record.video.path, record.video.average_fps
            refused[path] = f"{path}: its {rate:.4g} fps are fewer than the clock's {fps:g}: lower the clock's rate"
        else:
            videos.append(record.video)
    if refused and (strict or not videos):
        more = f" (and {len(refused) - 1} more files cannot be used)" if len(refused) > 1 else ""
        raise VideoError(next(iter(refused.values())) + more)
    return VideoList(videos, refused)


@contextmanager
def _open_manifest(manifest: Path | None) -> Iterator[tuple[list[Record], Callable[[str], object]]]:
    """Its records and how to append a line, held until done, or until the process dies, however it dies."""
    if manifest is None:
        yield [], str
        return
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with manifest.with_name(f".{manifest.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise VideoError(f"{manifest} is being written by another process: wait for it, or stop it") from error
        records = read_manifest(manifest) if manifest.exists() else []
        _replace(manifest, records)  # without a line that was cut off
        with manifest.open("a", buffering=1) as file:
            yield records, file.write


def _as_it_lies(record: Record) -> Record:
    """A record of another manifest, refused if the file is not what it was."""
    path = Path(record.state.path)
    with suppress(OSError):
        if file_state(path) == record.state:
            return record
    reason = "has changed since it was indexed: index it again" if is_there(path) else "is gone since it was indexed"
    return Record(record.state, None, f"{path}: {reason}")


def _replace(manifest: Path, records: Iterable[Record]) -> None:
    unfinished = manifest.with_name(f".tmp.{manifest.name}")
    with unfinished.open("w") as file:
        file.write(json.dumps(FORMAT) + "\n")
        file.writelines(_line(record) for record in records)
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
