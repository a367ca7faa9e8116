"""How every command begins and ends: its options, and errors that a person reads in one line."""

import ctypes
import inspect
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from data.errors import DataError, printable
from jepa.errors import ConfigurationError
from pipelines.run.options import Options, dashed, parse

SHOWN = 5
SHARED = ("pretrain_encoder", "cache_embeddings", "train_predictor", "train_decoder")
"""Commands whose work several processes can share."""
LOST_CONTACT = re.compile(
    r"connection|broken pipe|pair closure|timed out|timeout|connectFullMesh|failed to recv|ncclRemoteError"
    r"|communicator was aborted|address already in use",
    re.IGNORECASE,
)
"""The words of gloo, NCCL and the store for another process that has gone, or has not come."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|ALLOC_FAILED|std::bad_alloc|size calculation overflowed"
)
"""The words of a GPU, its libraries and the CPU's allocator."""


class UserError(Exception):
    """A mistake in how a command was called; the message says what, with which value, and the mend."""


class Finished(Exception):
    """There is nothing left to do: the command ends with exit code 0."""


class Interrupted(Exception):
    """The command was asked to stop by a signal, the second argument, and has saved its work."""


def require(condition: bool, message: str) -> None:
    """Raises `UserError` with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)


def imported(name: str, message: str) -> Any:
    """A library that need not be installed. Raises `UserError` with `message` where it is not."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(message) from error


def counted(number: int, noun: str) -> str:
    """A number and its noun: 1 clip, 2 clips."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def first_few(names: Sequence[Any]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + more


def run_command(main: Callable[[Options], None], options_type: type[Options]) -> None:
    """Parse the command line and run `main`; a user's mistake ends in one clear line and a non-zero exit code.

    The docstring of the command's module is its help, the module's file name its section in a preset.
    """
    _keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        description, file = sys.modules[main.__module__].__doc__ or "", Path(inspect.getfile(main))
        is_one = file.parent.name == "pipelines" and file.stem not in SHARED
        several = os.environ.get("WORLD_SIZE", "1") != "1"
        require(not (is_one and several), "this command takes one process: start it without a launcher")
        _require_launcher()
        main(parse(options_type, file.stem, description=description))
    except SystemExit:
        raise
    except BaseException as error:
        status, line = explain(error)
        if line:
            print(line, file=sys.stderr)
        _leave_at_once(status)
    if several:
        _leave_at_once(0)  # gloo's threads may abort the interpreter while it shuts down (pytorch/pytorch#179291)


def _require_launcher() -> None:
    """Raises `UserError` where what the environment says of other processes comes from no launcher."""
    usual = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "1", "LOCAL_RANK": "-1", "LOCAL_WORLD_SIZE": "1"}
    given = (os.environ.get(name, value) for name, value in usual.items())
    ranks, rank, port, local, here = (int(one) if re.fullmatch(r"-1|\d{1,5}", one) else -2 for one in given)
    known = 0 <= rank < ranks and 0 <= port < 1 << 16 and local > -2 and here > 0
    is_whole = (ranks == 1 and local < 0) or {"WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    said = " ".join(f"{name}='{os.environ[name]}'" for name in usual if name in os.environ)
    require(known and is_whole, f"{said} in the environment is from no launcher: unset it, or use torchrun")


def _keep_freed_memory() -> None:
    """Use freed memory again: glibc gives large tensors back at once, and their pages cost as much as their numbers."""
    with suppress(AttributeError):  # another allocator
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_ARENA_MAX, 1)  # or threads would not use what others have freed


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the one line that an error deserves; an error of our own making keeps its traceback."""
    rank, several = os.environ.get("RANK", "0").removeprefix("0"), os.environ.get("WORLD_SIZE", "1") != "1"
    said = (str(error) or repr(error)).splitlines()[0].removesuffix(".")
    kept = "what was complete before is kept"
    match error:
        case Finished():
            return 0, "" if rank else said
        case Interrupted(args=(said, number)):
            return 128 + number, "" if rank else f"\n{said}"
        case KeyboardInterrupt():
            said = "interrupted: run the same command again to continue, with --resume where there is one"
            return 128 + signal.SIGINT, "" if rank else f"\n{said}"
        case ConfigurationError():
            line = f"{_option_of(error.field)} {error.message}"
        case UserError() | DataError():
            line = str(error)
        case OSError():
            # h5py puts the system's reason ("No space left on device") into the text alone.
            line = f"{error.filename or 'writing'}: {error.strerror or said}: {kept}"
        case MemoryError() | RuntimeError() if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            line = f"out of memory ({said}): lower how much is held at a time, such as --batch-size; {kept}"
        case RuntimeError() if several and LOST_CONTACT.search(str(error)):
            line = f"another process has ended, as its own message says, or was never reached ({said}): {kept}"
        case _:
            traceback.print_exception(error)
            return 1, ""
    # A line of its own, also after a progress bar.
    prefix = ("\n" if getattr(tqdm, "_instances", ()) else "") + (f"[rank {rank}] " if rank else "")
    return 1, "" if rank and getattr(error, "on_all_ranks", False) else f"{prefix}error: {printable(line)}"


def _option_of(field: str) -> str:
    """The option on the command line that sets a configuration's field, or the field."""
    given = (word.partition("=")[0] for word in sys.argv if word.startswith("--"))
    return next((option for option in given if option[2:].rpartition(".")[2] == dashed(field)), field)


def _leave_at_once(status: int) -> NoReturn:
    """End the process without waiting for its threads: one of them may be decoding an hour-long video."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
