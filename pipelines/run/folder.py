"""What a command leaves behind: a folder that says whose it is, JSON, and artefacts that say what they are."""

import dataclasses
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.run.command import Finished, UserError, require

Module = TypeVar("Module", bound=nn.Module)

MARK, FORMAT = "run.json", "video-jepa run 1"
WRITTEN = re.compile(r".*\.(jsonl?|csv|safetensors|pt|png|gif)|events\.out\.tfevents\..*")
"""Names of the files that commands write."""
MAY_CHANGE = re.compile(r"resume|overwrite|output_dir|tracker|checkpoint_every|log_every|(.*\.)?learning_rate")
"""Options that a run may be resumed with another value of, beside more steps."""
LARGEST_JSON = 1 << 28
"""Bytes."""


class RunFolder:
    """The folder of a run, held by one process at a time.

    `run.json` marks it: command, options, inputs, versions, and whether the run is finished. A folder without the mark
    of this command that holds anything else is left alone.

    Args:
        options: with `output_dir`, `overwrite`, and `resume` if the command can go on with what it began.
        command: name.
        artefacts: names of the files and folders that it leaves beside those of every run.

    Raises:
        UserError: the folder is not this command's, is held by another process, or holds a run and the options do not
            say what is to become of it.
        Finished: a finished run is to be resumed.
    """

    def __init__(self, options: Any, command: str, artefacts: tuple[str, ...]) -> None:
        self.options, self.command, self.path = options, command, Path(options.output_dir)
        self.names = ("metrics.json", "account.json", "curve.jsonl", "training_state", "logs", *artefacts)
        self.resume = getattr(options, "resume", False)
        require(not (options.overwrite and self.resume), "--overwrite starts again, --resume goes on: give one of them")
        self._require_no_strangers()
        self.path.mkdir(parents=True, exist_ok=True)
        self._hold()
        mark = self.path / MARK
        self.record: dict[str, Any] = read_json(mark) if mark.exists() else {"format": FORMAT, "finished": False}
        fields = {"command": str, "finished": bool, "options": dict, "inputs": dict} if "inputs" in self.record else {}
        known = all(isinstance(self.record.get(name), kind) for name, kind in fields.items())
        require(
            known and self.record.get("format") == FORMAT,
            f"{mark} is damaged, or of another version: take another --output-dir",
        )
        if fields:
            self._require_consent()
        else:  # nothing has begun here
            self.record["command"] = command
            write_json(mark, self.record)

    def _require_no_strangers(self) -> None:
        require(self.path.is_dir() or not os.path.lexists(self.path), f"--output-dir {self.path} is no folder")
        others = [path.name for path in self.path.glob("[!.]*") if path.suffix not in (".log", ".out")]
        require(
            not others or (self.path / MARK).exists(),
            f"--output-dir {self.path} holds {', '.join(sorted(others)[:3])}, and no run of {self.command}: "
            "take another one",
        )

    def _hold(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.path / ".lock", flags, 0o666)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is in use: another process is at work on this run") from None
        except OSError:
            pass  # a file system without locks

    def _require_consent(self) -> None:
        """The options say what is to become of the run that was begun here."""
        path, before, finished = self.path, self.record["options"], self.record["finished"]
        require(
            self.record["command"] == self.command,
            f"{path} holds a run of {self.record['command']}: take another --output-dir for {self.command}",
        )
        if self.options.overwrite:
            return
        if not self.resume:
            go_on = "" if finished else "--resume to go on with it, or "
            require(
                not finished and not hasattr(self.options, "resume"),
                f"{path} holds {'a finished' if finished else 'an unfinished'} run: add {go_on}--overwrite to replace "
                "it, or take another --output-dir",
            )
            return
        changed = differences(before, to_json(self.options))
        if finished and "steps" not in [name for name, _, _ in changed]:
            raise Finished(f"{path} is finished: nothing to do")
        for name, was, now in changed:
            more = name == "steps" and isinstance(was, int) and now > was
            require(
                more or bool(MAY_CHANGE.fullmatch(name)),
                f"{path} was started with {name} = {was}, not {now}: resume with the same options (--steps may be "
                "raised), or add --overwrite to start again",
            )
            if more or name.endswith("learning_rate"):
                print(f"resuming with {name} = {now} instead of {was}: the learning rate follows the new schedule")

    def begin(self, inputs: dict[str, Any]) -> None:
        """Record the run, once all inputs have been checked.

        Raises:
            UserError: a run that is resumed began with other inputs.
        """
        (self.path / "metrics.json").unlink(missing_ok=True)
        if "inputs" in self.record and self.resume:
            for name, was, now in differences(self.record["inputs"], to_json(inputs)):
                raise UserError(
                    f"{self.path} began with {name} = {was}, which is now {now}: resume with the same data, "
                    "or add --overwrite to start again"
                )
        elif "inputs" in self.record:
            # A kill must not leave half of the old run under the mark of the new one.
            write_json(self.path / MARK, {**self.record, "finished": False})
            for name in self.names:
                discard(self.path / name)
        self.record |= {"command": self.command, "finished": False, "options": self.options, "inputs": inputs}
        write_json(self.path / MARK, self.record | environment())

    def leave_account(self, account: Any) -> None:
        """Say what was read and what was not, and write it down: a dataclass with a text for people."""
        print(account)
        write_json(self.path / "account.json", account)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics, flat keys and plain values, and mark the run as finished."""
        write_json(self.path / "metrics.json", metrics)
        write_json(self.path / MARK, self.record | environment() | {"finished": True})
        self.release()


def discard(path: Path) -> None:
    """Remove a file or folder as far as a command wrote it: whatever else somebody put there stays."""
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            discard(inner)
        with suppress(OSError):
            path.rmdir()
    elif WRITTEN.fullmatch(path.name):
        path.unlink(missing_ok=True)


def save_artefact(folder: Path, kind: str, config: Any, module: nn.Module) -> None:
    """Write `config.json` and `model.safetensors`; an older artefact gives way when the new one is whole.

    Args:
        folder: of the artefact.
        kind: what it is: encoder, expander, predictor, calibration, ...
        config: what the module can be built from again; what JSON knows.
        module: whose weights and buffers are kept.
    """
    beside = folder.with_name(f".tmp.{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)  # of an earlier life
    beside.mkdir()
    write_json(beside / "config.json", {"kind": kind, "config": config})
    weights = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    try:
        save_file(weights, beside / "model.safetensors")
    except SafetensorError as error:
        raise OSError(f"{beside}: {error}") from error
    to_disk(beside / "model.safetensors")
    aside = Path(tempfile.mkdtemp(prefix=f".old.{folder.name}.", dir=folder.parent))
    if folder.exists():
        folder.rename(aside / folder.name)
    beside.rename(folder)
    discard(aside)
    to_disk(folder.parent)


def load_module(folder: Path, kind: str, build: Callable[[dict[str, Any]], Module]) -> Module:
    """The module of an artefact in evaluation mode: every weight is there, none is left over, all shapes agree.

    Args:
        folder: of the artefact.
        kind: what it must be.
        build: makes the module from its configuration; called on the meta device first, where nothing is allocated,
            so that a hostile configuration is found out by the shapes of the weights.

    Raises:
        UserError: it is missing, damaged, of another kind, or its weights are not those of its configuration.
    """
    for name in ("config.json", "model.safetensors"):
        require((folder / name).is_file(), f"{folder}: there is no {kind} here ({name} is missing)")
    content = read_json(folder / "config.json")
    require("kind" in content and "config" in content, f"{folder}/config.json is not of this version: make it again")
    require(content["kind"] == kind, f"{folder}: this is no {kind}; its config.json says {content['kind']}")
    try:
        state = load_file(folder / "model.safetensors")
        with torch.device("meta"):
            wanted = {name: tuple(value.shape) for name, value in build(content["config"]).state_dict().items()}
        for name in wanted.keys() | state.keys():
            want, have = wanted.get(name, "none"), tuple(state[name].shape) if name in state else "missing"
            require(want == have, f"{folder}: {name} of this {kind} is {have}, its configuration wants {want}")
        module = build(content["config"])
        module.load_state_dict(state)
        return module.eval()
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: the {kind} here cannot be loaded ({reason}): copy or make it again") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, whole; NaN and infinity become null."""
    write_text(path, json.dumps(to_json(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is either the old one or the new one, whole and on the disk."""
    unfinished = path.with_name(f".tmp.{path.name}")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("x") as file:  # made anew: links are not followed
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` if the file holds none."""
    try:
        require(path.stat().st_size <= LARGEST_JSON, f"{path} is larger than any file of its kind")
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or make it again") from error
    require(isinstance(value, dict), f"{path} holds no JSON object: restore it, or make it again")
    return value


def to_json(value: Any) -> Any:
    """Dataclasses, paths, tuples and numbers of NumPy and torch as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}  # of a union
        return kind | {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return to_json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    if not isinstance(values, dict):
        return {name: values}
    inner = [flat(value, f"{name}.{part}".removeprefix(".")) for part, value in values.items()]
    return {key: value for part in inner for key, value in part.items()}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted names whose values differ between two nested dictionaries, with both values."""
    old, new = flat(before), flat(now)
    return [(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)]


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    names = ("torch", "torchvision", "av", "timm", "accelerate", "h5py", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def environment() -> dict[str, Any]:
    """What a number must be traced back to beside its options: versions, machine, and the commit of the code."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        code = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        code = "unknown"
    return {"versions": versions(), "machine": platform.platform(), "code": code}


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
