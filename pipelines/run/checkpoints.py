"""Complete training states on disk: sealed with checksums, renamed when they are whole, read without pickle."""

import json
import os
import shutil
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from pipelines.run.command import UserError, said_by_all
from pipelines.run.devices import on_main
from pipelines.run.files import read_json, to_disk, write_json

SEAL, KEPT = "complete.json", 2
"""What is written last into a checkpoint: processes, size and checksum of each file. The newest ones are kept."""


class State(NamedTuple):
    """A training state after so many steps: what all ranks share, and plain values of this rank's own."""

    step: int
    shared: dict[str, Any]
    own: dict[str, Any]


class Checkpoints:
    """The newest training states under a folder that all ranks see."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator, self.folder = accelerator, folder

    def load_newest(self, *, is_needed: bool = False) -> State | None:
        """The newest state that is whole; None if none was ever saved. Collective.

        Raises:
            UserError: none is whole, though there are some, or one is needed on the main process; or it was saved by
                another number of processes, or does not hold a state.
            OSError: it may be whole, but this process cannot read it.
        """
        broadcast_object_list(chosen := [on_main(self.accelerator, lambda: self._newest_whole(is_needed))])
        if (newest := chosen[0]) is None:
            return None
        saved, running = read_json(newest / SEAL)["processes"], self.accelerator.num_processes
        if saved != running:
            raise said_by_all(UserError(
                f"{newest} was saved by {saved} processes, and {running} are running: "
                f"resume with {saved}, or add --overwrite to start again"
            ))  # fmt: skip
        try:
            with warnings.catch_warnings(action="ignore"):  # about what is refused with an error of our own
                state = torch.load(newest / "state.pt", map_location="cpu", weights_only=True)
            own = state["own"][self.accelerator.process_index]
            return State(int(newest.name.removeprefix("step_")), state["shared"], own)
        except OSError:
            raise
        except Exception as error:  # torch raises whatever a damaged or hostile file leads to
            reason = (str(error) or repr(error)).splitlines()[0]
            if "weights_only" in reason:  # and advice to let the file run what it likes
                reason = "it holds something else than tensors and plain values"
            message = f"{newest}/state.pt cannot be read ({reason}): delete {newest} to go on from an older one"
            raise said_by_all(UserError(message)) from error

    def save(self, state: State) -> None:
        """Write a state: it is whole or it is not there, also after a kill or on a full disk. Collective."""
        content = {"shared": state.shared, "own": gather_object([state.own])}
        on_main(self.accelerator, lambda: self._write(f"step_{state.step:08d}", content))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        finished, unfinished = self.folder / name, self.folder / f".tmp.{name}"
        for half in self.folder.glob(".tmp.step_*"):  # of an earlier life
            shutil.rmtree(half, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _save(content, unfinished / "state.pt")
        files = {"state.pt": _size_and_checksum(unfinished / "state.pt")}
        write_json(unfinished / SEAL, {"processes": self.accelerator.num_processes, "files": files})
        to_disk(unfinished)
        if finished.exists():  # passed over as broken, like all later ones
            shutil.rmtree(finished)
        unfinished.rename(finished)
        to_disk(self.folder)
        # The newest before this one is whole: either it was gone on from, or this process has written it.
        names = {path.name for path in self.folder.glob("step_*")}
        for other in names - {*sorted(one for one in names if one <= name)[-KEPT:]}:
            shutil.rmtree(self.folder / other)

    def _newest_whole(self, is_needed: bool) -> Path | None:
        """The newest state that is whole, and a warning for each that is passed over."""
        # Not glob, which finds nothing where it may not look.
        names = os.listdir(self.folder) if self.folder.exists() else []
        faults = dict[str, str]()
        for name in sorted((name for name in names if name.startswith("step_")), reverse=True):
            if not (fault := find_fault(self.folder / name)):
                for broken, reason in faults.items():
                    print(f"warning: {self.folder / broken} is not complete ({reason}): passed over", file=sys.stderr)
                return self.folder / name
            faults[name] = fault
        if faults or is_needed:
            reason = ", ".join(f"{name}: {fault}" for name, fault in faults.items()) or "there is none"
            raise UserError(
                f"{self.folder} holds no whole training state to go on from ({reason}): restore it, "
                "or add --overwrite to start again"
            )
        return None


def find_fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty if it is complete. What cannot be read now, raises `OSError`."""
    try:
        seal = json.loads((checkpoint / SEAL).read_text())
        int(seal["processes"])
        for name, recorded in seal["files"].items():
            if _size_and_checksum(checkpoint / name) != recorded:
                return f"{name} has changed since it was written"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{SEAL} cannot be read: {error}"
    return ""


def _save(content: dict[str, Any], path: Path) -> None:
    """Write with torch, up to the disk."""
    try:
        with path.open("xb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # where writing failed, torch raises one about its position in the file
        if isinstance(cause := error.__context__, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    to_disk(path)


def _size_and_checksum(path: Path) -> list[int]:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            checksum = zlib.crc32(part, checksum)
    return [path.stat().st_size, checksum]
