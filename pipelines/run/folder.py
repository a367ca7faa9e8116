"""The folder of a run: it says whose it is, and nobody else's work is harmed."""

import fcntl
import platform
import re
import subprocess
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pipelines.run.command import Finished, UserError, require
from pipelines.run.files import MARK, differences, discard, read_json, to_json, versions, write_json

FORMAT = "video-jepa run 1"
BEFORE = {MARK, "videos.jsonl", "cache"}
"""Names of what a start leaves before the run has begun."""
MAY_CHANGE = re.compile(
    r"resume|overwrite|output_dir|tracker|checkpoint_every|log_every|(.*\.)?learning_rate|videos|(train|validation)_cache"
)
"""Options that a run may be resumed with another value of, beside more steps; what is learned from is compared."""


class RunFolder:
    """The folder of a run, held by one process at a time, and marked by `run.json`.

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
        require(self.path.is_dir() or not self.path.exists(), f"--output-dir {self.path} is no folder")
        self.record: dict[str, Any] = read_json(mark) if mark.exists() else {"format": FORMAT}
        known = self.record.get("format") == FORMAT
        require(known, f"{mark} is damaged, or of another version: take another --output-dir")
        self.has_begun = "inputs" in self.record  # a start that failed protects nothing
        names = {path.name for path in self.path.glob("[!.]*") if path.suffix not in (".log", ".out")}
        others = [] if self.has_begun else sorted(names - BEFORE)
        require(
            not others,
            f"--output-dir {self.path} holds {', '.join(others[:3])}, and no run of {command}: take another one",
        )
        self.path.mkdir(parents=True, exist_ok=True)
        self.release = weakref.finalize(self, hold(self.path).close)
        if self.has_begun:
            self._require_consent()

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
            more = name == "steps" and now > was
            require(
                more or bool(MAY_CHANGE.fullmatch(name)),
                f"{self.path} was started with {name} = {was}, not {now}: resume with the same options (--steps may be "
                "raised), or add --overwrite to start again",
            )
            if more or name.endswith("learning_rate"):
                print(f"resuming with {name} = {now} instead of {was}: the learning rate follows the new schedule")

    def begin(self, inputs: dict[str, Any]) -> None:
        """Record the run, once all inputs have been checked. Raises `UserError` if a resumed run began with others."""
        if self.has_begun and self.resume:
            for name, was, now in differences(self.record["inputs"], to_json(inputs)):
                raise UserError(
                    f"{self.path} began with {name} = {was}, which is now {now}: resume with the same data, "
                    "or add --overwrite to start again"
                )
        elif self.has_begun:
            # A kill must not leave half of the old run under the mark of the new one.
            write_json(self.path / MARK, {**self.record, "finished": False})
            for name in self.names:
                discard(self.path / name)
        (self.path / "metrics.json").unlink(missing_ok=True)
        self.record |= {"command": self.command, "finished": False, "options": self.options, "inputs": inputs}
        write_json(self.path / MARK, self.record | environment())

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics, flat keys and plain values, and mark the run as finished."""
        write_json(self.path / "metrics.json", metrics)
        write_json(self.path / MARK, self.record | environment() | {"finished": True})
        self.release()


def hold(folder: Path) -> IO[str]:
    """Hold a folder until what is returned is closed. Raises `UserError` if another process holds it."""
    lock = (folder / ".lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"{folder} is in use: another process is at work on this run") from None
    except OSError:
        pass  # a file system without locks
    return lock


def environment() -> dict[str, Any]:
    """What a number must be traced back to beside its options: versions, machine, and the commit of the code."""
    git, code = ["git", "-C", str(Path(__file__).parent), "describe"], "unknown"
    with suppress(OSError, subprocess.CalledProcessError):
        code = subprocess.check_output(
            [*git, "--always", "--abbrev=40", "--dirty", "--exclude=*"], text=True, stderr=subprocess.DEVNULL
        ).strip()
    return {"versions": versions(), "machine": platform.platform(), "code": code}
