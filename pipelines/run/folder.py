"""The folder of a run: it says whose it is, and nobody else's work is harmed."""

import os
import platform
import re
import subprocess
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.files import hold, require_no_links, sweep
from pipelines.run import files
from pipelines.run.command import Finished, UserError, counted, first_few, require
from pipelines.run.files import MARK, differences, to_json, write_json

FORMAT = "video-jepa run 1"
SOURCES = "sources.json"
BEFORE = {MARK, "videos.jsonl", "cache"}  # names of what a start leaves before the run has begun
MORE, OF_A_CALL = {"steps", "episodes"}, {"resume", "overwrite", "output_dir"}
MAY_CHANGE = re.compile(
    r"resume|overwrite|output_dir|tracker|checkpoint_every|log_every|(.*\.)?learning_rate|videos|(train|validation)_cache"
)
"""Options that a run may be resumed with another value of, beside more of `MORE`; what is learned from is compared."""
WRITTEN = re.compile(
    r"(metrics|account|config|rollout|sources|imagined)\.json|report\.(html|rrd)|found\.png|(curve|videos)\.jsonl|film_\d{3}\.mp4"
    r"|(rollout|surprise|peaks|maps|events|found|episodes)\.csv|model\.safetensors|act\.json|episode_\d{5,}\.(mp4|csv)"
    r"|step_\d{8,}\.pt|hparams\.yml|tensors\.tsv|sprite\.png|projector_config\.pbtxt|events\.out\.tfevents\..*"
)
"""Names of the files that commands write."""


class RunFolder:
    """The folder of a run, held by one process at a time, and marked by `run.json`.

    Options have `output_dir`, `overwrite`, and `resume` if the command can go on with what it began; artefacts are
    names of the files and folders that it leaves beside those of every run. Raises `UserError` where the folder is not
    this command's, is held by another process, or holds a run and the options do not say what is to become of it;
    `Finished` where a finished run is to be resumed.
    """

    def __init__(self, options: Any, command: str, artefacts: tuple[str, ...]) -> None:
        self.options, self.command, self.path = options, command, Path(options.output_dir)
        self.names = ("metrics.json", "account.json", SOURCES, "curve.jsonl", "training_state", "logs", *artefacts)
        self.resume = getattr(options, "resume", False)
        require(not (options.overwrite and self.resume), "--overwrite starts again, --resume goes on: give one of them")
        require(self.path.is_dir() or not os.path.lexists(self.path), f"--output-dir {self.path} is no folder")
        self.record, self.replaced = read_mark(self.path), self.path / ".replaced"
        self.has_begun = "inputs" in self.record  # a start that failed protects nothing
        names = {path.name for path in self.path.glob("[!.]*") if path.suffix not in (".log", ".out")}
        others = [] if self.has_begun else sorted(names - BEFORE)
        said = f"--output-dir {self.path} holds {', '.join(others[:3])}, and no run of {command}: take another one"
        require(not others, said)
        self.path.mkdir(parents=True, exist_ok=True)
        require_no_links(self.path, (*self.names, self.replaced.name))
        for model in self.path.glob("*/model.safetensors"):
            files.require_artefact_alone(model.parent)
        self.release = weakref.finalize(self, hold(self.path).close)
        if self.has_begun:
            self._require_consent()
        sweep(self.path)

    def _require_consent(self) -> None:
        """The options say what is to become of the run that was begun here."""
        path, owner, finished = self.path, self.record["command"], self.record["finished"]
        require(owner == self.command, f"{path} holds a run of {owner}: take another --output-dir for {self.command}")
        if self.resume:
            self._require_same_options()
        elif not self.options.overwrite and (finished or hasattr(self.options, "resume")):
            kind, go_on = ("a finished", "") if finished else ("an unfinished", "--resume to go on with it, or ")
            raise UserError(f"{path} holds {kind} run: add {go_on}--overwrite to replace it, or take another folder")

    def _require_same_options(self) -> None:
        changed, finished = differences(self.record["options"], to_json(self.options)), self.record["finished"]
        for name, was, now in changed:
            more = name in MORE and now > was
            raised = "".join(f" (--{option} may be raised)" for option in MORE if hasattr(self.options, option))
            mend = f"resume with the same options{raised}, or add --overwrite to start again"
            said = f"{self.path} was started with {name} = {was}, not {now}: {mend}"
            require(more or bool(MAY_CHANGE.fullmatch(name)), said)
        if finished and not MORE & {name for name, _, _ in changed}:
            other = [f"{name} = {was}, not {now}" for name, was, now in changed if name not in OF_A_CALL]
            raise Finished(f"{', with '.join([f'{self.path} is finished', *other])}: nothing to do")
        for name, was, now in changed:
            if name.endswith("learning_rate") or name == "steps":
                print(f"resuming with {name} = {now} instead of {was}: the learning rate follows the new schedule")

    def begin(self, inputs: dict[str, Any], sources: dict[str, str] | None = None) -> None:
        """Record the run and what it learns from, paths by content, once all inputs have been checked.

        Raises `UserError` if a resumed run began with others.
        """
        if self.has_begun and self.resume:
            for name, was, now in differences(self.record["inputs"], to_json(inputs)):
                said = f"{self.path} began with {name} = {was}, which is now {now}{self._others(sources or {})}"
                raise UserError(f"{said}: resume with the same data, or add --overwrite to start again")
        elif self.has_begun:
            # A kill must not leave half of the old run under the mark of the new one.
            write_json(self.path / MARK, {**self.record, "finished": False})
            self._set_aside()
        (self.path / "metrics.json").unlink(missing_ok=True)
        self.record |= {"command": self.command, "finished": False, "options": self.options, "inputs": inputs}
        if sources is not None:
            write_json(self.path / SOURCES, sources)
        write_json(self.path / MARK, self.record | environment())

    def _others(self, sources: dict[str, str]) -> str:
        """Which videos are not those that the run began with."""
        before = files.read_json(self.path / SOURCES) if (self.path / SOURCES).exists() else sources
        gone = {str(path) for content, path in before.items() if content not in sources}
        come = {path for content, path in sources.items() if content not in before}
        kinds = {"changed": gone & come, "missing": gone - come, "new": come - gone}
        return "".join(f"; {kind}: {first_few(sorted(paths))}" for kind, paths in kinds.items() if paths)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics, flat keys and plain values, and mark the run as finished."""
        write_json(self.path / "metrics.json", metrics)
        write_json(self.path / MARK, self.record | environment() | {"finished": True})
        if old := list(written(self.replaced)):
            for file in old:
                file.unlink()
            print(f"removed {counted(len(old), 'file')} of the run that this one has replaced in {self.path}")
        remove_empty(self.replaced)
        self.release()

    def _set_aside(self) -> None:
        """Move what the run here wrote out of the way; it is removed once the one that replaces it has finished."""
        old = [file for name in self.names for file in written(self.path / name)]
        for file in old:
            place = self.replaced / file.relative_to(self.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        for name in self.names:
            remove_empty(self.path / name)
        if old:
            print(f"replacing the run {self.path}: its {counted(len(old), 'file')} stay in {self.replaced} until then")


def read_mark(folder: Path) -> dict[str, Any]:
    """The record of the run in a folder, without `inputs` where none has begun. Raises `UserError` if it is damaged."""
    record = files.read_json(folder / MARK) if (folder / MARK).exists() else {"format": FORMAT}
    types = {"command": str, "finished": bool, "options": dict, "inputs": dict} if "inputs" in record else {}
    known = record.get("format") == FORMAT and all(isinstance(record.get(name), kind) for name, kind in types.items())
    require(known, f"{folder / MARK} is damaged, or of another version: take another folder")
    return record


def written(path: Path) -> Iterator[Path]:
    """Files at a path or in that folder that a command wrote, but for those of runs and caches inside."""
    if path.is_dir() and not path.is_symlink():
        if not any((path / name).exists() for name in (MARK, "cache.json")):
            for inner in path.iterdir():
                yield from written(inner)
    elif path.is_file() and WRITTEN.fullmatch(path.name):
        yield path


def remove_empty(folder: Path) -> None:
    """Remove a folder and those in it as far as they hold nothing."""
    for path in sorted([folder, *folder.rglob("*/")], reverse=True):
        with suppress(OSError):
            path.rmdir()


def environment() -> dict[str, Any]:
    """What a number must be traced back to beside its options: versions, machine, and the commit of the code."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    code = "unknown"
    with suppress(OSError, subprocess.CalledProcessError):
        code = subprocess.check_output(git, text=True, stderr=subprocess.DEVNULL).strip()
    return {"versions": files.versions(), "machine": platform.platform(), "code": code}
