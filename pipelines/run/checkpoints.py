"""Complete training states on disk: sealed with checksums, renamed when they are whole, read without pickle."""

import json
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from pipelines.run.command import UserError, said_by_all
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

    def load_newest(self) -> State | None:
        """The newest state that is whole; None if there is none. Collective.

        Raises:
            UserError: it was saved by another number of processes, or cannot be read.
        """
        broadcast_object_list(chosen := [self._newest_whole() if self.accelerator.is_main_process else None])
        if (newest := chosen[0]) is None:
            return None
        saved, running = read_json(newest / SEAL)["processes"], self.accelerator.num_processes
        if saved != running:
            raise said_by_all(UserError(
                f"{newest} was saved by {saved} processes, and {running} are running: "
                f"resume with {saved}, or add --overwrite to start again"
            ))  # fmt: skip
        try:
            state = torch.load(newest / "state.pt", map_location="cpu", weights_only=True)
            own = state["own"][self.accelerator.process_index]
            return State(int(newest.name.removeprefix("step_")), state["shared"], own)
        except Exception as error:  # torch raises whatever a damaged or hostile file leads to
            reason = (str(error) or repr(error)).splitlines()[0]
            message = f"{newest}/state.pt cannot be read ({reason}): delete {newest} to go on from an older one"
            raise said_by_all(UserError(message)) from error

    def save(self, state: State) -> None:
        """Write a state: it is whole or it is not there, also after a kill or on a full disk. Collective."""
        finished = self.folder / f"step_{state.step:08d}"
        unfinished = self.folder / f".tmp.{finished.name}"
        everyones = gather_object([state.own])
        if self.accelerator.is_main_process:
            for half in self.folder.glob(".tmp.step_*"):  # of an earlier life
                shutil.rmtree(half, ignore_errors=True)
            unfinished.mkdir(parents=True)
            with (unfinished / "state.pt").open("xb") as file:
                torch.save({"shared": state.shared, "own": everyones}, file)
            to_disk(unfinished / "state.pt")
            files = {"state.pt": _size_and_checksum(unfinished / "state.pt")}
            write_json(unfinished / SEAL, {"processes": self.accelerator.num_processes, "files": files})
            to_disk(unfinished)
            for later in [path for path in self.folder.glob("step_*") if path.name >= finished.name]:
                shutil.rmtree(later)  # passed over as broken
            unfinished.rename(finished)
            to_disk(self.folder)
            for old in sorted(self.folder.glob("step_*"))[:-KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _newest_whole(self) -> Path | None:
        for checkpoint in sorted(self.folder.glob("step_*"), reverse=True):
            if not (fault := find_fault(checkpoint)):
                return checkpoint
            print(f"warning: {checkpoint} is not complete ({fault}): looking for an older one", file=sys.stderr)
        return None


def find_fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty if it is complete."""
    try:
        seal = json.loads((checkpoint / SEAL).read_text())
        int(seal["processes"])
        for name, recorded in seal["files"].items():
            if _size_and_checksum(checkpoint / name) != recorded:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{SEAL} cannot be read: {error}"
    return ""


def _size_and_checksum(path: Path) -> list[int]:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            checksum = zlib.crc32(part, checksum)
    return [path.stat().st_size, checksum]
