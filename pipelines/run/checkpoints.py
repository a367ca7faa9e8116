"""Complete training states on disk: renamed when they are whole, checked before they are used, read without pickle."""

import errno
import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from data.files import MOST_VALUES, sweep, whole_file
from pipelines.run.command import UserError
from pipelines.run.devices import on_main, said_by_all
from pipelines.run.files import START_AGAIN, reading

KEPT = 2  # newest training states that stay

State = tuple[int, dict[str, Any], dict[str, Any]]
"""A number of steps, what all ranks share after them, and plain values of this rank's own."""


class Checkpoints:
    """The newest training states in a folder that all ranks see, a file each."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator, self.folder = accelerator, folder

    def load_newest(self, *, is_needed: bool = False) -> State | None:
        """The newest state that is whole; None if none was ever saved. Collective.

        Raises `UserError` where none is whole, though there are some, or one is needed on the main process, or another
        number of processes saved it; `OSError` where it may be whole, but cannot be read now.
        """
        broadcast_object_list(chosen := [on_main(self.accelerator, lambda: self._newest_whole(is_needed))])
        if (newest := chosen[0]) is None:
            return None
        state = torch.load(newest, map_location="cpu", weights_only=True)
        shared, own = state["shared"], state["own"]
        if len(own) != self.accelerator.num_processes:
            raise said_by_all(UserError(
                f"{newest} was saved by {len(own)} processes, and {self.accelerator.num_processes} are running: "
                f"resume with {len(own)}, or add --overwrite to start again"
            ))  # fmt: skip
        with reading(str(newest), RuntimeError, mend=START_AGAIN):
            mine = own[self.accelerator.process_index]
            # The same list many times over, one inside the other, would never come to an end.
            if len(list(islice(json.JSONEncoder().iterencode(mine), MOST_VALUES))) == MOST_VALUES:
                raise ValueError("it holds too much")
            return int(newest.stem.removeprefix("step_")), shared, mine

    def save(self, state: State) -> None:
        """Write a state: it is whole or it is not there, also after a kill or on a full disk. Collective."""
        step, shared, own = state
        content = {"shared": shared, "own": gather_object([own])}
        on_main(self.accelerator, lambda: self._write(f"step_{step:08d}.pt", content))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        try:
            with whole_file(self.folder / name) as file:
                torch.save(content, file)
        except RuntimeError as error:  # where writing failed, torch raises one about its position in the file
            if isinstance(cause := error.__context__, OSError):
                raise OSError(cause.errno, cause.strerror, str(self.folder / name)) from error
            raise
        # The newest before this one is whole: either it was gone on from, or this process has written it.
        names = {path.name for path in self.folder.glob("step_*.pt")}
        for other in names - {*sorted(one for one in names if one <= name)[-KEPT:]}:
            (self.folder / other).unlink()

    def _newest_whole(self, is_needed: bool) -> Path | None:
        """The newest state that is whole, and a warning for each that is passed over."""
        # Not glob, which finds nothing where it may not look.
        names = os.listdir(self.folder) if self.folder.exists() else []
        faults = dict[str, str]()
        for name in sorted((name for name in names if name.startswith("step_")), reverse=True):
            if not (fault := find_fault(self.folder / name)):
                for broken, reason in faults.items():
                    print(f"warning: {self.folder / broken} is not whole ({reason}): passed over", file=sys.stderr)
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
    """What is wrong with a checkpoint; empty if it is whole. What cannot be read now, raises `OSError`."""
    try:
        with ZipFile(checkpoint) as file:  # torch writes zip files, with a checksum of each part
            parts = file.infolist()
            # An entry that a turned bit has made a folder would be read as whatever memory holds; a packed one would
            # take more memory than the file has bytes.
            fits = sum(part.file_size for part in parts) <= checkpoint.stat().st_size
            if not fits or any(part.external_attr or part.compress_type for part in parts) or file.testzip():
                return "it has changed since it was written"
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)  # looks at tensors' places
        return "" if state.keys() == {"shared", "own"} else "it is something else"
    except Exception as error:  # whatever damage leads to; torch's advice to let a file run code is not passed on
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is of a place that damage made up
            raise
        return f"it cannot be read: {type(error).__name__}"
