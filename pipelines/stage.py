"""What every stage shares: options from the command line, errors in one line, and a folder that is never lost."""

import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from data.decoder import VideoError
from data.embedding_cache import CacheError
from data.images import ImageError
from data.manifest import Account
from data.sidecar import SidecarError
from jepa.encoder import ConfigurationError
from pipelines.presets import PresetError, parse_options

Options = TypeVar("Options")

LAUNCH = "accelerate launch --quiet --config_file accelerate_config.yaml"
"""`--quiet` keeps accelerate's own traceback away from our one-line errors."""


class UserError(Exception):
    """A mistake in how a stage was called; the message says what, with which value, and the mend."""


LOST_CONTACT = re.compile(
    r"connection (closed|reset|refused|was likely closed|abort)|broken pipe|caused pair closure|timed out waiting \d+ms"
    r"|connectFullMesh failed|failed to recv|ncclRemoteError|communicator was aborted|collective operation timeout",
    re.IGNORECASE,
)
"""How gloo, NCCL and the store say that another process has gone; mistakes in using them read otherwise."""
NOT_MET = re.compile(r"waiting for clients|timed out after \d+ms while trying to connect")
"""How torch.distributed says that not all processes have come."""
GO_ON = "what was complete before is kept: start all of them again, trainers with --resume"
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED|std::bad_alloc")
"""How a GPU, its libraries and the CPU's allocator say it."""


def said_by_all(error: Exception) -> Exception:
    """Mark an error that all ranks raise alike: one of them is enough to say it."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


class Interrupted(Exception):
    """The stage was asked to stop and has saved its work."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def run_stage(main: Callable[[Options], None], options_type: type[Options]) -> None:
    """Parse the command line and run `main`; a user's mistake ends in one clear line and a non-zero exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        # The docstring of the script is its help: it names the exact command.
        main(parse_options(options_type, sys.modules["__main__"].__doc__))
    except BaseException as error:
        status, line = _explain(error)
        if line:
            print(line, file=sys.stderr)
        _leave_at_once(status)  # not after the hour-long video that a thread may be decoding
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # gloo's threads may outlive the process group and abort the interpreter while it shuts down, after all work
        # is done (pytorch/pytorch#179291).
        _leave_at_once(0)


def _leave_at_once(status: int) -> NoReturn:
    """End the process without waiting for its threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit status and the one line that an error deserves; an error of our own making keeps its traceback."""
    rank = int(os.environ.get("RANK", "0"))
    # A line of its own, also after a progress bar.
    prefix = ("\n" if getattr(tqdm, "_instances", ()) else "") + (f"[rank {rank}] " if rank else "")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if rank and getattr(error, "on_all_ranks", False):
        return 1, ""  # rank 0 says it
    match error:
        case Interrupted():
            return error.exit_code, "" if rank else f"\n{error}"
        case KeyboardInterrupt():
            return (
                128 + signal.SIGINT,
                "" if rank else "\ninterrupted: run the same command again to continue, a trainer with --resume",
            )
        case (
            UserError()
            | VideoError()
            | ImageError()
            | CacheError()
            | SidecarError()
            | ConfigurationError()
            | PresetError()
        ):
            return 1, f"{prefix}error: {error}"
        case OSError():
            # h5py puts the system's reason ("No space left on device") into the text alone.
            reason = error.strerror or (str(error) or repr(error)).splitlines()[0]
            place = error.filename or "writing"
            return 1, f"{prefix}error: {place}: {reason}: what was complete before is kept"
        case MemoryError() | RuntimeError() if is_out_of_memory(error):
            return 1, (
                f"{prefix}error: out of memory ({_first_sentence(error)}): lower what says how much is held at a time, "
                "such as --batch-size; what was complete before is kept"
            )
        case RuntimeError() if several and NOT_MET.search(str(error)):
            return 1, (
                f"{prefix}error: not all processes have met ({_first_sentence(error)}): start as many as each of them "
                "was told, and see whether one has ended already or cannot reach the first machine"
            )
        case RuntimeError() if several and (lost := LOST_CONTACT.search(str(error))):
            return 1, (
                f"{prefix}error: another process has ended ({_first_sentence(error, lost.start())}), its own message "
                f"says why: {GO_ON}"
            )
        case SystemExit():
            raise error
    traceback.print_exception(error)
    return 1, ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; a CPU's allocator has no exception of its own."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def _first_sentence(error: BaseException, start: int = 0) -> str:
    """Of a message that may go on for many lines, from some character on."""
    return re.split(r"\.\s|\n", str(error)[start:] or repr(error))[0].strip().removesuffix(".")


def run_python(*words: object) -> None:
    """Run Python with these words from the repository's root, its messages on this screen; paths become absolute.

    Ctrl-C reaches both: we wait for it to save.

    Raises:
        UserError: it stopped with an error, which it has explained itself.
    """
    arguments = [str(word.absolute()) if isinstance(word, Path) else str(word) for word in words]
    process = subprocess.Popen([sys.executable, *arguments], cwd=Path(__file__).parent.parent)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # after which subprocess.run would kill it
        process.wait()
        raise
    script = next(word for word in arguments if word.endswith(".py"))
    require(status == 0, f"{script} stopped as it says above (exit code {status}): run this again to go on")


def require(condition: bool, message: str) -> None:
    """Raises `UserError` with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)


class RunFolder:
    """The folder that a stage leaves its results in.

    `config.json` (all options, versions, commit, inputs) is written when the run starts, `metrics.json` when it
    ends: its presence marks a finished run.
    """

    def __init__(self, path: Path, artefacts: tuple[str, ...]) -> None:
        self.path = path
        self.artefacts = ("metrics.json", "config.json", "account.json", *artefacts)

    @property
    def finished(self) -> bool:
        """Whether a run has ended here."""
        return (self.path / "metrics.json").exists()

    def require_unfinished(self, overwrite: bool = False) -> None:
        """Raises `UserError` if a finished run would be lost."""
        require(
            overwrite or not self.finished,
            f"{self.path} already holds a finished run: add --overwrite to replace it, or choose another --output-dir",
        )

    def prepare(
        self, options: Any, overwrite: bool, resume: bool = False, inputs: dict[str, Any] | None = None
    ) -> None:
        """Make the folder and record the run; called on one rank, after all inputs have been checked.

        Raises:
            UserError: both `overwrite` and `resume` are given; the folder holds a run, and neither says what to do with
                it; or the run to be resumed was started with other options.
        """
        require(not (overwrite and resume), "--overwrite starts again and --resume goes on: give one of them")
        record = {"options": to_json(options), "inputs": inputs or {}, **environment()}
        recorded = self.path / "config.json"
        if overwrite:
            for name in self.artefacts:
                target = self.path / name
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
        self.require_unfinished()
        if recorded.exists() and not resume:
            raise UserError(
                f"{self.path} already holds an unfinished run: add --resume to go on with it, "
                "or --overwrite to start again"
            )
        if recorded.exists():
            _require_same_options(json.loads(recorded.read_text())["options"], record["options"], self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(recorded, record)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the final metrics: flat keys, plain values."""
        write_json(self.path / "metrics.json", metrics)


MAY_CHANGE = re.compile(
    r"(resume|overwrite|output_dir|tracker|micro_batch_size|checkpoints\..*"
    r"|optimizer\.(learning_rate|scaling|warmup_steps|clip_norm))"
)
"""What an unfinished run may be resumed with another value of: where things go, and what stopped it."""


def _require_same_options(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    old, new = flat(before), flat(now)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        if not MAY_CHANGE.fullmatch(name):
            raise UserError(
                f"{path} was started with {name} = {old.get(name)}, not {new.get(name)}: "
                "resume with the same options, or add --overwrite to start again"
            )
        if name.startswith(("optimizer", "micro_batch_size")):
            print(f"resuming with {name} = {new.get(name)} instead of {old.get(name)}")


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    if not isinstance(values, dict):
        return {name: values}
    return {key: value for part, inner in values.items()
            for key, value in flat(inner, f"{name}.{part}".removeprefix(".")).items()}  # fmt: skip


def leave_account(account: Account, folder: Path, add: bool = False) -> None:
    """Say what was read and what was not, and leave it in the run's folder as account.json.

    Args:
        account: of this run.
        folder: of the run.
        add: what earlier runs read still counts; what they refused was tried again.
    """
    print(account)
    path = folder / "account.json"
    earlier = json.loads(path.read_text()) if add and path.exists() else {}
    now = to_json(account)
    write_json(path, {name: now[name] if name == "refused" else earlier.get(name, {}) | now[name] for name in now})


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, whole."""
    unfinished = path.with_name(f".tmp.{path.name}")
    unfinished.write_text(json.dumps(to_json(value), indent=2) + "\n")
    unfinished.replace(path)


def parse_bytes(text: str, option: str) -> int:
    """An amount of memory such as 2GB or 500 MB, in bytes.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kMGT]?)B?", text.strip())
    require(match is not None, f"{option} is {text}: give an amount of memory such as 2GB or 500MB")
    assert match is not None
    amount = int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))
    require(amount > 0, f"{option} is {text}: it must be positive")
    return amount


def readable_bytes(number: int) -> str:
    """Such as 27 MB or 1.3 GB."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def counted(number: int, noun: str) -> str:
    """A number and what it counts: 1 clip, 2 clips."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def to_json(value: Any) -> Any:
    """Dataclasses, paths, tuples and numbers of NumPy and torch as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.generic | torch.Tensor):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def versions() -> dict[str, str]:
    """Of the libraries that results depend on."""
    names = ("torch", "torchvision", "av", "timm", "accelerate", "h5py", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def environment() -> dict[str, Any]:
    """What a number must be traced back to beside its options: versions, machine, and the commit of the code."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        code = commit + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        code = "unknown"
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "machine": platform.platform(),
        "code": code,
    }
