"""Files that are whole or not there, folders that one process holds, JSON of which little is believed.

Nothing is written through a link: who sends a folder cannot aim it at files of somebody else.
"""

import errno
import fcntl
import fnmatch
import json
import math
import os
import re
import shutil
import sys
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any

from data.errors import DataError

MOST_BYTES, MOST_VALUES, MOST_LEVELS = 1 << 26, 2_000_000, 30
"""Largest JSON file that is read, the most values in it, each of which may take a hundred bytes, and levels."""
UNFINISHED = re.compile(r"\.tmp\.([0-9a-f]{32}|\w{8})")


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that one, or a pattern such as `action_*`, stands for."""
    return [pattern] if pattern in names else fnmatch.filter(names, pattern)


def apart(names: Sequence[str], ours: Collection[str]) -> dict[str, str]:
    """Names of a user's columns by what they are called beside ours, which none may replace: such as `own_video`."""
    found = {}
    for name in names:
        taken = {*ours, *names} if name in ours else ()
        found[next(one for times in count() if (one := "own_" * times + name) not in taken)] = name
    return found


def unfinished(folder: Path) -> Path:
    """A path in a folder for what has no name yet."""
    return folder / f".tmp.{uuid.uuid4().hex}"


def sweep(folder: Path) -> None:
    """Clear away what a process that died has left unfinished; for who holds the folder."""
    for path in [path for path in folder.iterdir() if UNFINISHED.fullmatch(path.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file to write into, which takes the name once it is whole and on the disk; the older one stays until then.

    A link of that name is replaced, not followed.
    """
    beside = unfinished(path.parent)
    try:
        with beside.open("xb") as file:
            yield file
        to_disk(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    to_disk(path.parent)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is either the old one or the new one, whole and on the disk."""
    with whole_file(path) as file:
        file.write(content)


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk, where the file system knows how."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # those of CIFS, FUSE and others say EINVAL, ENOSYS, EOPNOTSUPP, EBADF, EACCES
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)


def hold(folder: Path) -> IO[bytes]:
    """Hold a folder until what is returned is closed, or the process dies, however it dies.

    Raises `DataError` if another process holds it. A file system without locks is said, and nothing is held.
    """
    lock = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise DataError(f"{folder} is in use by another process: wait for it, or stop it") from None
    except OSError as error:
        said = f"warning: {folder} lies on a file system without locks ({error.strerror})"
        print(f"{said}: see to it that one process alone writes there", file=sys.stderr)
    return lock


def require_no_links(folder: Path, names: tuple[str, ...]) -> None:
    """Raises `DataError` where something of these names in a folder is a link, and writing would go somewhere else."""
    for path in (folder / name for name in names):
        if path.is_symlink():
            raise DataError(f"{path} is a link, and nothing is written through one: remove it")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `OSError`; `ValueError` if it holds another thing, or more than is believed."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")  # of a pipe one would wait for the end
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES or sum(map(content.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"it is larger than {MOST_BYTES:,} bytes or {MOST_VALUES:,} values")
    try:
        value = json.loads(content, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    _require_shallow(value, MOST_LEVELS)
    return value


def _require_shallow(value: Any, levels: int) -> None:
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            if levels == 0:
                raise ValueError("it is nested too deeply")
            _require_shallow(inner, levels - 1)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number of JSON")
    return value
