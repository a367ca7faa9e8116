"""Artefacts: folders with `config.json` and `model.safetensors` that say what they are."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from jepa.errors import ConfigurationError
from pipelines.run.command import UserError, require
from pipelines.run.files import read_json, to_disk, write_json

NAMES = ("config.json", "model.safetensors")
Module = TypeVar("Module", bound=nn.Module)


def save_artefact(folder: Path, kind: str, config: Any, module: nn.Module) -> None:
    """Write what `kind` of thing a module is, the configuration it can be built from again, its weights and buffers.

    An older artefact gives way when the new one is whole. Raises `UserError` if something else is in its place.
    """
    others = sorted(path.name for path in folder.iterdir() if path.name not in NAMES) if folder.is_dir() else []
    require(not others, f"{folder} holds {', '.join(others[:3])}, and is no {kind}: move it, or take another folder")
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
    aside = folder.with_name(f".old.{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    beside.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)
    to_disk(folder.parent)


def load_module(folder: Path, kind: str, build: Callable[[dict[str, Any]], Module]) -> Module:
    """The module of an artefact in evaluation mode: every weight is there, none is left over, all shapes agree.

    `build` makes it from its configuration; on the meta device first, where nothing is allocated, so that a hostile
    configuration is found out by the shapes of the weights. What does not fit is a `UserError`.
    """
    for name in NAMES:
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
            require(bool(state[name].isfinite().all()), f"{folder}: {name} of this {kind} is not finite: make it again")
        module = build(content["config"])
        module.load_state_dict(state)
        return module.eval()
    except (OSError, SafetensorError, ConfigurationError, TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: the {kind} here cannot be loaded ({reason}): copy or make it again") from error
