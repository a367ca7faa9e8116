"""Folders of videos as a checked list, what was refused and why.

A manifest is a file of JSON lines: the first names the format, each other one tells about a file: where it lies, its
size and times of change, and either what is known of the video or why it was refused. Lines are appended as files are
looked at, so that nothing is lost if the process dies; what is known is not looked at again, wherever it was moved.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.account import Account
from data.content import content_of
from data.errors import VideoError
from data.files import write_whole
from data.folders import ARCHIVE, find_videos
from data.parallel import map_ahead
from data.picture import IMAGE_FPS, is_image
from data.video import VideoInfo, probe_video

MANIFEST_SUFFIX = ".jsonl"
FORMAT = {"format": "video-jepa manifest", "version": 4}
LARGEST_NUMBER = 1e9  # no video has a size, a rate, or a time in seconds beyond


class FileState(NamedTuple):
    """Where a file lies, its size and the time of its last change: if any of this is another, its content may be."""

    path: str
    size_bytes: int
    changed_ns: int
    """Whichever is later: its time of modification, or that of the system, which nobody can set back."""


@dataclass(frozen=True)
class Record:
    """A line of a manifest: a video, or why the file was refused."""

    state: FileState
    video: VideoInfo | None
    refused: str = ""


def file_state(path: Path) -> FileState:
    """A video as it lies on disk now, or `OSError`; a change of any of its images changes a folder."""
    files = [path.stat()]
    for image in path.iterdir() if path.is_dir() else ():
        with suppress(OSError):  # a dead link
            files += [image.stat()] if is_image(image.name) else []
    changed_ns = max(max(file.st_mtime_ns, file.st_ctime_ns) for file in files)
    return FileState(str(path), sum(file.st_size for file in files[1:] or files), changed_ns)


def read_manifest(path: Path) -> list[Record]:
    """The records of a manifest, but for a line that was cut off. Raises `VideoError`."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        header, *lines, last = path.read_text().split("\n")
        with suppress(ValueError):  # an editor may have left out the end of the last line
            lines += [last] * isinstance(json.loads(last), dict)
        if json.loads(header) != FORMAT:
            raise ValueError(f"it does not begin with {json.dumps(FORMAT)}")
        return [_from_json(json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VideoError(f"{path}: not a manifest of videos, or damaged ({error}): make it anew") from error


def index_videos(
    paths: Sequence[Path], manifest: Path | None, *, look: Callable[[Path, float], VideoInfo] = probe_video,
    image_fps: float = IMAGE_FPS,
) -> tuple[list[Record], Counter[str]]:  # fmt: skip
    """Look at all videos under `paths` that no manifest knows, in order of path, and count files as `find_videos`.

    `paths` are files, folders, and manifests. `manifest` is made, or brought up to date; None: nothing is written.
    `look` is `probe_video`, or `count_frames` to decode all of each video; images are shown at `image_fps`. Raises
    `VideoError` if a path is missing or holds no video, or a manifest cannot be read.
    """
    others = [record for path in paths if path.suffix == MANIFEST_SUFFIX for record in read_manifest(path)]
    videos, found = find_videos([path for path in paths if path.suffix != MANIFEST_SUFFIX])
    listed_only = {Path(record.state.path) for record in others}.difference(videos)
    files = sorted([*videos, *listed_only])
    found["looked at"] += len(listed_only)
    earlier = read_manifest(manifest) if manifest and manifest.exists() else []
    # What was refused is tried again.
    known = {record.state: record.video for record in (*earlier, *others) if record.video}
    moved = {video.content: video for video in known.values()}

    def record_of(path: Path, whole: str = "") -> Record:
        state = FileState(str(path), 0, 0)
        try:
            state = file_state(path)
            if ARCHIVE.fullmatch(path.name):
                raise VideoError(f"{path}: an archive: unpack it")
            if not path.is_dir() and not path.is_file():  # a pipe would be waited for
                raise VideoError(f"{path}: neither a file nor a folder")
            video = known.get(state)
            content = whole or (video.content if video else content_of(path))
            if video is None or video.content != content:
                video = replace(moved[content], whole=whole) if content in moved else None
            is_at_rate = video and (not video.at_image_fps or video.average_fps == image_fps)
            if video is None or not is_at_rate or (video.frames is None and look is not probe_video):
                video = look(path, image_fps)
            return Record(state, replace(video, path=path, content=content, whole=whole or video.whole))
        except VideoError as error:
            return Record(state, None, str(error))
        except OSError as error:
            is_dead = os.path.islink(path) and not os.path.exists(path)
            why = f"a dead link, to {path.readlink()}" if is_dead else (error.strerror or str(error)).lower()
            return Record(state, None, f"{error.filename or path}: {why}")

    if manifest is not None:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        _write(manifest, earlier)  # without a line that was cut off
    records = []
    with Path(manifest or os.devnull).open("a", buffering=1) as file:
        looks = map_ahead(record_of, files)
        for record in tqdm(looks, "looking", len(files), unit="video", leave=False):
            if record.video is None or known.get(record.state) != record.video:
                file.write(_line(record))
            records.append(record)
    for at, video in _others_alike(records):
        records[at] = record_of(video.path, video.whole)
    if manifest is not None:
        _write(manifest, records)
    return records, found


def _others_alike(records: list[Record]) -> list[tuple[int, VideoInfo]]:
    """Videos that differ from others of the same content, and their places, once all of each has been hashed."""
    contents = Counter(record.video.content for record in records if record.video)
    alike = {at: one.video for at, one in enumerate(records) if one.video and contents[one.video.content] > 1}
    new = {at: video for at, video in alike.items() if not video.whole}

    def whole(video: VideoInfo) -> str:
        with suppress(OSError):  # who reads it will say so
            return content_of(video.path, of_all=True)
        return ""

    bar = tqdm(map_ahead(whole, new.values()), "comparing", len(new), unit="video", leave=False)
    for (at, video), one in zip(new.items(), bar, strict=True):
        alike[at] = replace(video, whole=one)
        records[at] = replace(records[at], video=alike[at])
    kinds = Counter(content for content, _ in {(video.content, video.whole) for video in alike.values()})
    return [(at, video) for at, video in alike.items() if kinds[video.content] > 1]


def check_videos(
    paths: Sequence[Path], *, fps: float, manifest: Path | None = None, image_fps: float = IMAGE_FPS,
    strict: bool = False, is_main: bool = True,
) -> tuple[list[VideoInfo], Account]:  # fmt: skip
    """The videos under `paths` that decode and are not slower than the clock, and an account that refuses the others.

    A slower video could not give a frame for each tick. `manifest`, `image_fps` as in `index_videos`. Of several
    processes one is main and looks, the others then read its manifest. Raises `VideoError` if nothing is there, or
    nothing of it can be used; with `strict`, if any file cannot be used.
    """
    if manifest and not is_main:
        records, found = read_manifest(manifest), Counter[str]()
    else:
        records, found = index_videos(paths, manifest, image_fps=image_fps)
    videos, account = sort_out(records, found, fps=fps)
    refused = account.refused
    if refused and (strict or not videos):
        reasons = f": {manifest} says why" if manifest else ""
        more = f" (and {len(refused) - 1} more{reasons})" if len(refused) > 1 else ""
        raise VideoError(next(iter(refused.values())) + more)
    return videos, account


def sort_out(records: list[Record], found: Counter[str], *, fps: float = 0.0) -> tuple[list[VideoInfo], Account]:
    """The videos that can be used on a clock, each content once, and an account that says what is with the others."""
    usable, account = list[VideoInfo](), Account(found)
    for record in records:
        path, video = record.state.path, record.video
        if video is None:
            account.refused[path] = record.refused
        elif 0 < (rate := video.average_fps) < 0.95 * fps:  # average rates are rounded in headers, hence the margin
            slow = f"its {rate:.4g} fps are fewer than the clock's {fps:g}: lower the clock's rate"
            account.refused[path] = f"{path}: {slow} ({video.duration_s:.1f} s left out)"
        else:
            usable.append(video)
    firsts: dict[str, VideoInfo] = {}
    for video in sorted(usable, key=lambda video: len(str(video.path))):  # "a.mp4" rather than "a (1).mp4"
        if (first := firsts.setdefault(video.content, video)) is not video:
            account.doubles[str(video.path)] = str(first.path)
        elif video.assumed:
            account.assumed[str(video.path)] = video.assumed
    return sorted(firsts.values(), key=lambda video: video.path), account


def record_videos(manifest: Path, videos: Iterable[VideoInfo]) -> None:
    """Write a manifest of videos as they lie on disk now, or `OSError`."""
    manifest.parent.mkdir(parents=True, exist_ok=True)
    _write(manifest, (Record(file_state(video.path), video) for video in videos))


def _write(manifest: Path, records: Iterable[Record]) -> None:
    write_whole(manifest, (json.dumps(FORMAT) + "\n" + "".join(map(_line, records))).encode())


def _line(record: Record) -> str:
    facts = asdict(record.video) if record.video else {"refused": record.refused}
    return json.dumps({**facts, **record.state._asdict()}) + "\n"


def _from_json(fields: dict[str, Any]) -> Record:
    state = FileState(*(fields.pop(name) for name in FileState._fields))
    are_known = [*map(type, state)] == [str, int, int] and isinstance(fields.get("refused", ""), str)
    if are_known and "refused" in fields:
        return Record(state, None, fields["refused"])
    fields["keyframes_s"] = tuple(fields["keyframes_s"])
    fields["gaps_s"] = tuple((begin, length) for begin, length in fields["gaps_s"])
    video = VideoInfo(path=Path(state.path), **fields)
    numbers = [video.height, video.width, video.duration_s, video.average_fps, video.frames or 0]
    numbers += [*video.keyframes_s, *(number for gap in video.gaps_s for number in gap)]
    are_numbers = all(type(number) in (int, float) and abs(number) < LARGEST_NUMBER for number in numbers)
    texts = (video.codec, video.assumed, video.damage, video.content, video.whole)
    if not (are_known and are_numbers) or min(numbers[:5]) < 0 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"what it says of {state.path} cannot be")
    return Record(state, video)
