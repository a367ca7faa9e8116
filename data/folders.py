"""What lies in folders: the videos in them, and a count of everything else.

A video is told by its suffix; a folder with at least two images and no video file in it is one video. Whatever cannot
be entered or looked at is among the videos, too: whoever looks at it will find out why not.
"""

import os
import re
import stat
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data.account import listed
from data.errors import VideoError
from data.image_sequence import FEWEST_IMAGES
from data.picture import is_image

VIDEO_NAMES = """
    mp4 m4v mov qt 3gp 3gpp 3g2 mj2 f4v ismv psp mkv webm mk3d avi divx xvid wmv asf dvr-ms wtv flv kux ogv ogm gif
    apng mjpeg mjpg mpg mpeg mpe mpv mp2v m2p m1v m2v vob vro evo mod tod ts mts m2ts m2t trp tp ty h261 h263 h264 264
    avc h265 265 hevc h266 266 vvc vc1 obu ivf mxf gxf nut y4m dv dif rm rmvb ivr amv nsv nuv pva viv dav mxg insv lrv
    360 fli flc roq smk bik cine ser r3d
"""
VIDEO_SUFFIXES = frozenset(f".{name}" for name in VIDEO_NAMES.split())
ARCHIVE = re.compile(r".*\.(zip|tar|tgz|tbz2|txz|7z|rar)(\.(gz|bz2|xz|zst|\d{3}))?", re.I | re.S)
HIDDEN = re.compile(
    r"\.[^/]*|[@#~](eaDir|tmp|Recycle|(Recently-)?Snapshots?)|\$RECYCLE\.BIN|RECYCLE[RD]|Trash|__MACOSX"
    r"|lost\+found|System Volume Information|FOUND\.\d{3}",
    re.I,
)
"""Names that begin with a dot, and those of folders that systems and storage devices make for themselves."""
MARKS = {"run.json": b'"video-jepa run', "cache.json": b'"encoder_fingerprint"'}
"""Files that say that this product wrote a folder, and what stands near their beginning."""


def find_videos(paths: Sequence[Path]) -> tuple[list[Path], Counter[str]]:
    """All videos under `paths`, each once: files as they are named, folders searched recursively; and what there is.

    Names are absolute, with links as they were given. Links are followed after everything that is none: what has
    several names goes by its own. Raises `VideoError` if a path does not exist, or is a folder without videos.

    The count is of files of each kind: "looked at" (the images of a folder are several), and all others by suffix, or
    as "hidden", "ours" or "double".
    """
    videos, found, known = list[Path](), Counter[str](), set[str]()
    for path in paths:
        if not path.exists():
            raise VideoError(f"{path}: no such file or folder")
        new = _search(_named(path), videos, known)
        if not new["looked at"] and not new["double"]:
            there = listed(new) or "nothing"
            raise VideoError(f"{path}: no videos in this folder, and no folder of images; there is {there}")
        found += new
    return sorted(videos), found


def _search(root: Path, videos: list[Path], known: set[str]) -> Counter[str]:
    """Add the videos under a path, but for those whose real path is known, and count its files."""
    found = Counter[str]()
    todo = deque([(str(root), "")])  # paths, and why nothing below is taken
    while todo:
        path, reason = todo.popleft()
        if not reason and (real := os.path.realpath(path)) in known and os.path.exists(path):  # links lead in circles
            found["double"] += 1
            continue
        if not reason:
            known.add(real)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:  # a file, or a folder that may not be entered
            found[reason or "looked at"] += 1
            videos += [] if reason else [Path(path)]
            continue
        reason = reason or ("ours" if any(map(_is_mark, entries)) else "")
        images, has_video = list[str](), False
        for entry in entries:
            why = reason or ("hidden" if HIDDEN.fullmatch(entry.name) else "")
            kind, mode = os.path.splitext(entry.name)[1].lower(), 0
            with suppress(OSError):
                mode = entry.stat(follow_symlinks=not why).st_mode
            is_folder = stat.S_ISDIR(mode)
            has_video |= not why and not is_folder and kind in VIDEO_SUFFIXES
            # What is called a video, or must be said to be none; the mode is 0 where the system gives none.
            is_odd = not mode or (is_image(entry.name) and not stat.S_ISREG(mode)) or ARCHIVE.fullmatch(entry.name)
            if is_folder or (not why and (kind in VIDEO_SUFFIXES or is_odd)):
                (todo.append if entry.is_symlink() else todo.appendleft)((entry.path, why))
            elif not why and is_image(entry.name):
                images.append(kind)
            else:
                found[why or kind or "without suffix"] += 1
        if not has_video and len(images) >= FEWEST_IMAGES:
            found["looked at"] += len(images)
            videos.append(Path(path))
        else:
            found.update(images)
    return found


def _is_mark(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):
        if entry.name in MARKS and entry.is_file():
            with open(entry.path, "rb") as file:
                return MARKS[entry.name] in file.read(4096)
    return False


def _named(path: Path) -> Path:
    """An absolute path without "..", unless that would lead elsewhere because of a link."""
    plain = Path(os.path.abspath(path))
    return plain if os.path.realpath(plain) == os.path.realpath(path) else path.absolute()
