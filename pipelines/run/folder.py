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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.run.command import Finished, UserError, require

Module = TypeVar("Module", bound=nn.Module)

MARK = "run.json"
FORMAT = "video-jepa run 1"
WRITTEN = re.compile(r".*\.(jsonl?|csv|safetensors|pt|png|gif)|events\.out\.tfevents\..*")
"""Names of the files that a command may have written into its folder."""
MAY_CHANGE = re.compile(r"resume|overwrite|output_dir|tracker|checkpoint_every|log_every|(.*\.)?learning_rate|steps")
"""Options that an unfinished run may be resumed with another value of."""
LARGEST_JSON = 1 << 28
"""Bytes."""


class RunFolder:
    """The folder of a run, held by one process at a time.

    `run.json` marks it: format, command, options, inputs, versions, and whether the run is finished. A folder that
    holds anything else and no mark of this command is left alone. `metrics.json` is there once the run is finished.

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
        self.path: Path = options.output_dir
        self.options, self.command = options, command
        self.names = ("metrics.json", "account.json", "curve.jsonl", "training_state", "logs", *artefacts)
        self.resumable = hasattr(options, "resume")
        self.resume = getattr(options, "resume", False)
        require(
            not (options.overwrite and self.resume), "--overwrite starts again and --resume goes on: give one of them"
        )
        require(self.path.is_dir() or not os.path.lexists(self.path), f"--output-dir {self.path} is no folder")
        if not (self.path / MARK).exists():
            strangers = sorted(path.name for path in self.path.glob("[!.]*") if path.suffix not in (".log", ".out"))
            require(
                not strangers,
                f"--output-dir {self.path} holds {', '.join(strangers[:3])}, and no run of {command}: take another one",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._hold()
        self.record = self._read_mark()
        if self.record["inputs"] is None:
            write_json(self.path / MARK, self.record)

    @property
    def begun(self) -> bool:
        """Whether a run was begun here that is to be gone on with."""
        return self.resume and self.record["inputs"] is not None

    def _hold(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.path / ".lock", flags, 0o666)
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is in use: another process is at work on this run; wait for it") from None
        except OSError:
            pass  # a file system without locks

    def _read_mark(self) -> dict[str, Any]:
        """The record of the run that is here, once it is clear that this command may go on in this folder."""
        fresh = {"format": FORMAT, "command": self.command, "finished": False, "options": None, "inputs": None}
        if not (self.path / MARK).exists():
            return fresh
        record = read_json(self.path / MARK)
        require(
            record.get("format") == FORMAT and record.keys() >= fresh.keys(),
            f"{self.path / MARK} is not of this version's runs: take another --output-dir",
        )
        if record["inputs"] is None:
            return fresh  # it ended before it had begun
        require(
            record["command"] == self.command,
            f"{self.path} holds a run of {record['command']}: take another --output-dir for {self.command}",
        )
        if self.options.overwrite:
            return record
        if self.resume:
            more = getattr(self.options, "steps", 0) > record["options"].get("steps", 0)
            if record["finished"] and not more:
                raise Finished(f"{self.path} is finished: nothing to do")
            self._require_same_options(record["options"])
        elif record["finished"] or self.resumable:
            state, go_on = (
                ("a finished", "") if record["finished"] else ("an unfinished", "--resume to go on with it, or ")
            )
            raise UserError(
                f"{self.path} holds {state} run: add {go_on}--overwrite to replace it, or take another --output-dir"
            )
        return record

    def _require_same_options(self, before: dict[str, Any]) -> None:
        old, new = flat(before), flat(to_json(self.options))
        for name in sorted(old.keys() | new.keys()):
            was, now = old.get(name), new.get(name)
            if was == now or (MAY_CHANGE.fullmatch(name) and name != "steps"):
                continue
            require(
                name == "steps" and now > was,
                f"{self.path} was started with {name} = {was}, not {now}: resume with the same, "
                + ("or with more, " if name == "steps" else "")
                + "or add --overwrite to start again",
            )

    def begin(self, inputs: dict[str, Any]) -> None:
        """Record the run, once all inputs have been checked.

        Raises:
            UserError: a run that is resumed had begun with other inputs.
        """
        now = to_json(inputs)
        if self.begun:
            _require_same_inputs(self.record["inputs"], now, self.path)
            self._say_what_changed()
        elif self.record["inputs"] is not None:
            # A kill must not leave half of the old run under the mark of the new one.
            write_json(self.path / MARK, {**self.record, "finished": False})
            for name in self.names:
                discard(self.path / name)
        self.record |= {"finished": False, "options": to_json(self.options), "inputs": now, **environment()}
        write_json(self.path / MARK, self.record)

    def _say_what_changed(self) -> None:
        old, new = flat(self.record["options"]), flat(to_json(self.options))
        for name in sorted(new):
            if name == "steps" or name.endswith("learning_rate"):
                why = "; the learning rate follows the schedule for that many" if name == "steps" else ""
                if old.get(name) != new[name]:
                    print(f"resuming with {name} = {new[name]} instead of {old.get(name)}{why}")

    def leave_account(self, account: Any) -> None:
        """Say what was read and what was not, and write it down: a dataclass with a text for people."""
        print(account)
        write_json(self.path / "account.json", account)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics, flat keys and plain values, and mark the run as finished."""
        write_json(self.path / "metrics.json", metrics)
        self.record["finished"] = True
        write_json(self.path / MARK, self.record)
        self.release()


def _require_same_inputs(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    old, new = flat(before), flat(now)
    for name in [*old, *new]:
        require(
            old.get(name) == new.get(name),
            f"{path} began with {name} = {old.get(name)}, now it is {new.get(name)}: resume with the same data, "
            "or add --overwrite to start again",
        )


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
        config: all that is needed to build the module again; what JSON knows.
        module: whose weights and buffers are kept.
    """
    beside = folder.with_name(f".tmp.{folder.name}")
    if beside.is_dir():
        shutil.rmtree(beside)  # of an earlier life
    beside.mkdir()
    write_json(beside / "config.json", {"kind": kind, "config": config})
    weights = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    try:
        save_file(weights, beside / "model.safetensors")
    except SafetensorError as error:
        raise OSError(f"{beside}: {error}") from error
    to_disk(beside / "model.safetensors")
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".old.{folder.name}.", dir=folder.parent))
        folder.rename(old / folder.name)
        beside.rename(folder)
        discard(old)
    else:
        beside.rename(folder)
    to_disk(folder.parent)


def load_artefact(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the weights of an artefact; `load_module` also builds and checks it.

    Raises:
        UserError: it is missing, damaged, or of another kind.
    """
    config = _read_config(folder, kind)
    try:
        return config, load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/model.safetensors cannot be read ({error}): copy it again") from error


def load_module(folder: Path, kind: str, build: Callable[[dict[str, Any]], Module]) -> Module:
    """The module of an artefact in evaluation mode: every weight is there, none is left over, all shapes agree.

    Args:
        folder: of the artefact.
        kind: what it must be.
        build: makes the module from its configuration; called on the meta device first, where nothing is allocated,
            so that a hostile configuration is found out by the header of the weights.

    Raises:
        UserError: it is missing, damaged, of another kind, or its weights are not those of its configuration.
    """
    config = _read_config(folder, kind)
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        with torch.device("meta"):
            wanted = {name: tuple(value.shape) for name, value in build(config).state_dict().items()}
        for name in sorted(wanted.keys() | there.keys()):
            if (want := wanted.get(name)) != (have := there.get(name)):
                raise ValueError(f"{name} is {have or 'missing'}, its configuration wants {want or 'none'}")
        module = build(config)
        module.load_state_dict(load_file(folder / "model.safetensors"))
        return module.eval()
    except (OSError, SafetensorError, TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: the {kind} here cannot be loaded ({reason}): copy or make it again") from error


def load_weights(module: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Load weights strictly. Raises `UserError` if they are not exactly those of the module."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} cannot be loaded ({reason}): copy or make it again") from error


def _read_config(folder: Path, kind: str) -> dict[str, Any]:
    for name in ("config.json", "model.safetensors"):
        require((folder / name).is_file(), f"{folder}: there is no {kind} here ({name} is missing)")
    content = read_json(folder / "config.json")
    said = content.get("kind")
    require(isinstance(content.get("config"), dict), f"{folder}/config.json is not of this version: make it again")
    require(said == kind, f"{folder}: this is no {kind}; its config.json says {said}")
    return content["config"]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, whole; NaN and infinity become null."""
    write_text(path, json.dumps(to_json(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is either the old one or the new one, whole and on the disk."""
    unfinished = path.with_name(f".tmp.{path.name}")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("x", errors="surrogateescape") as file:  # made anew: links are not followed
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` if the file holds none."""
    try:
        require(path.stat().st_size <= LARGEST_JSON, f"{path} is too large for what it should be")
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
    return {key: value for part, inner in values.items()
            for key, value in flat(inner, f"{name}.{part}".removeprefix(".")).items()}  # fmt: skip


def environment() -> dict[str, Any]:
    """What a number must be traced back to beside its options: versions, machine, and the commit of the code."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        code = commit + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        code = "unknown"
    names = ("torch", "torchvision", "av", "timm", "accelerate", "h5py", "numpy")
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
    return {"versions": versions, "machine": platform.platform(), "code": code}


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
