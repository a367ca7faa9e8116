"""Complete training states on disk: sealed with checksums, renamed when they are whole, read without pickle."""

import json
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipelines.run.command import UserError, said_by_all
from pipelines.run.folder import to_disk, write_json

COMPLETE = "complete.json"
"""Written last into a checkpoint: its steps, the number of processes, and size and checksum of each file."""
KEPT = 2
"""The newest checkpoints that are kept."""


class State(NamedTuple):
    """A training state."""

    step: int
    """Steps done."""
    shared: dict[str, Any]
    """Tensors and plain values, alike on all ranks."""
    own: dict[str, Any]
    """This rank's part: what JSON knows."""


class Checkpoints:
    """The newest few training states under a folder.

    A state without its name, its seal or with a broken file is not used.

    Args:
        accelerator: of the ranks, which all see the folder.
        folder: of the states.
    """

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator, self.folder = accelerator, folder
        self.broken: list[Path] = []

    def load_newest(self) -> State | None:
        """The newest complete state; None if there is none. Collective.

        Raises:
            UserError: it was saved by another number of processes, or cannot be read.
        """
        chosen: list[Path | None] = [self._choose() if self.accelerator.is_main_process else None]
        broadcast_object_list(chosen)
        if (newest := chosen[0]) is None:
            return None
        saved, running = json.loads((newest / COMPLETE).read_text())["processes"], self.accelerator.num_processes
        if saved != running:
            raise said_by_all(UserError(
                f"{newest} was saved by {saved} processes, and {running} are running: "
                f"resume with {saved}, or add --overwrite to start again"
            ))  # fmt: skip
        try:
            shared = torch.load(newest / "state.pt", map_location="cpu", weights_only=True)
            own = json.loads((newest / f"rank_{self.accelerator.process_index}.json").read_text())
        except Exception as error:  # torch raises whatever a damaged or hostile file leads to
            reason = (str(error) or repr(error)).splitlines()[0]
            raise said_by_all(UserError(
                f"{newest} cannot be read ({reason}): delete it to go on from an older one"
            )) from error  # fmt: skip
        return State(int(newest.name.removeprefix("step_")), shared, own)

    def save(self, state: State) -> None:
        """Write a state. Collective."""
        unfinished, finished = self.folder / f".tmp.step_{state.step:08d}", self.folder / f"step_{state.step:08d}"
        if self.accelerator.is_main_process:
            for half in self.folder.glob(".tmp.step_*"):  # of an earlier life
                shutil.rmtree(half, ignore_errors=True)
            unfinished.mkdir(parents=True)
            torch.save(state.shared, unfinished / "state.pt")
        self.accelerator.wait_for_everyone()
        write_json(unfinished / f"rank_{self.accelerator.process_index}.json", state.own)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            seal(unfinished, {"step": state.step, "processes": self.accelerator.num_processes})
            # Broken ones, of later steps perhaps, would count among the newest, and this one would not be kept.
            for replaced in {*self.broken, finished}:
                shutil.rmtree(replaced, ignore_errors=True)
            self.broken.clear()
            unfinished.rename(finished)
            to_disk(self.folder)
            for old in self._all()[:-KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _choose(self) -> Path | None:
        for checkpoint in reversed(self._all()):
            fault = find_fault(checkpoint)
            if not fault:
                return checkpoint
            print(f"warning: {checkpoint} is not complete ({fault}): looking for an older one", file=sys.stderr)
            self.broken.append(checkpoint)
        return None

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))


def seal(folder: Path, facts: dict[str, int]) -> None:
    """Bring all files of a checkpoint to the disk, and leave their sizes and checksums beside them."""
    files = {}
    for path in sorted(folder.iterdir()):
        to_disk(path)
        files[path.name] = _size_and_checksum(path)
    write_json(folder / COMPLETE, {**facts, "files": files})
    to_disk(folder)


def find_fault(folder: Path) -> str:
    """What is wrong with a checkpoint; empty if it is complete."""
    try:
        facts = json.loads((folder / COMPLETE).read_text())
        int(facts["processes"])
        for name, recorded in facts["files"].items():
            if _size_and_checksum(folder / name) != recorded:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{COMPLETE} cannot be read: {error}"
    return ""


def _size_and_checksum(path: Path) -> list[int]:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            checksum = zlib.crc32(part, checksum)
    return [path.stat().st_size, checksum]
