"""The folder of a run: it says whose it is, and nobody else's work is harmed."""

import fcntl
import os
import platform
import re
import subprocess
import weakref
from pathlib import Path
from typing import Any

from pipelines.run.command import Finished, UserError, require
from pipelines.run.files import MARK, differences, discard, nested, read_json, to_json, versions, write_json

FORMAT = "video-jepa run 1"
FIELDS = {"command": str, "finished": bool, "options": dict, "inputs": dict}
"""What stands in the mark of a run that has begun."""
BEFORE = (MARK, "videos.jsonl", "cache")
"""Names of what a start leaves before the run has begun."""
MAY_CHANGE = re.compile(r"resume|overwrite|output_dir|tracker|checkpoint_every|log_every|(.*\.)?learning_rate")
"""Options that a run may be resumed with another value of, beside more steps."""


class RunFolder:
    """The folder of a run, held by one process at a time.

    `run.json` marks it: command, options, inputs, versions, and whether the run is finished. A folder without the mark
    of this command that holds anything else is left alone.

    Options have `output_dir`, `overwrite`, and `resume` if the command can go on with what it began; artefacts are
    names of the files and folders that it leaves beside those of every run.

    Raises:
        UserError: the folder is not this command's, is held by another process, or holds a run and the options do not
            say what is to become of it.
        Finished: a finished run is to be resumed.
    """

    def __init__(self, options: Any, command: str, artefacts: tuple[str, ...]) -> None:
        self.options, self.command, self.path = options, command, Path(options.output_dir)
        self.names = ("metrics.json", "account.json", "curve.jsonl", "training_state", "logs", *artefacts)
        self.resume, mark = getattr(options, "resume", False), self.path / MARK
        require(not (options.overwrite and self.resume), "--overwrite starts again, --resume goes on: give one of them")
        require(self.path.is_dir() or not os.path.lexists(self.path), f"--output-dir {self.path} is no folder")
        self.record: dict[str, Any] = read_json(mark) if mark.exists() else {"format": FORMAT, "finished": False}
        self.has_begun = "inputs" in self.record
        known = [isinstance(self.record.get(name), kind) for name, kind in FIELDS.items() if self.has_begun]
        require(
            all(known) and self.record.get("format") == FORMAT,
            f"{mark} is damaged, or of another version: take another --output-dir",
        )
        names = [path.name for path in self.path.glob("[!.]*") if path.suffix not in (".log", ".out")]
        others = [] if self.has_begun else sorted(set(names) - {*(BEFORE if mark.exists() else ())})
        require(
            not others,
            f"--output-dir {self.path} holds {', '.join(others[:3])}, and no run of {command}: take another one",
        )
        self.path.mkdir(parents=True, exist_ok=True)
        self.release = hold(self.path, self)
        if self.has_begun:
            self._require_consent()
        else:
            self.record["command"] = command
            write_json(mark, self.record)

    def _require_consent(self) -> None:
        """The options say what is to become of the run that was begun here."""
        path, owner, finished = self.path, self.record["command"], self.record["finished"]
        require(owner == self.command, f"{path} holds a run of {owner}: take another --output-dir for {self.command}")
        if self.resume:
            self._require_same_options()
        elif not self.options.overwrite and (finished or hasattr(self.options, "resume")):
            kind, go_on = ("a finished", "") if finished else ("an unfinished", "--resume to go on with it, or ")
            raise UserError(
                f"{path} holds {kind} run: add {go_on}--overwrite to replace it, or take another --output-dir"
            )

    def _require_same_options(self) -> None:
        changed = differences(self.record["options"], to_json(self.options))
        if self.record["finished"] and "steps" not in [name for name, _, _ in changed]:
            raise Finished(f"{self.path} is finished: nothing to do")
        for name, was, now in changed:
            more = name == "steps" and isinstance(was, int) and now > was
            require(
                more or bool(MAY_CHANGE.fullmatch(name)),
                f"{self.path} was started with {name} = {was}, not {now}: resume with the same options (--steps may be "
                "raised), or add --overwrite to start again",
            )
            if more or name.endswith("learning_rate"):
                print(f"resuming with {name} = {now} instead of {was}: the learning rate follows the new schedule")

    def begin(self, inputs: dict[str, Any]) -> None:
        """Record the run, once all inputs have been checked.

        Raises:
            UserError: a run that is resumed began with other inputs.
        """
        if self.has_begun and self.resume:
            for name, was, now in differences(self.record["inputs"], to_json(inputs)):
                raise UserError(
                    f"{self.path} began with {name} = {was}, which is now {now}: resume with the same data, "
                    "or add --overwrite to start again"
                )
        elif self.has_begun:
            for name in self.names:
                for stranger in nested(self.path / name):
                    raise UserError(f"{stranger} is a run or a cache of its own: move it before you --overwrite")
            # A kill must not leave half of the old run under the mark of the new one.
            write_json(self.path / MARK, {**self.record, "finished": False})
            for name in self.names:
                discard(self.path / name)
        (self.path / "metrics.json").unlink(missing_ok=True)
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


def hold(folder: Path, owner: object) -> "weakref.finalize[Any, Any]":
    """Hold a folder while its owner lives, or until what is returned is called. Raises `UserError` if it is held."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder / ".lock", flags, 0o666)
    release = weakref.finalize(owner, os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use: another process is at work on this run") from None
    except OSError:
        pass  # a file system without locks
    return release


def environment() -> dict[str, Any]:
    """What a number must be traced back to beside its options: versions, machine, and the commit of the code."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        code = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        code = "unknown"
    return {"versions": versions(), "machine": platform.platform(), "code": code}
