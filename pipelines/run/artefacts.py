"""Artefacts: folders with `config.json` and `model.safetensors` that say what they are."""

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from data.files import to_disk, unfinished
from jepa.fingerprint import fingerprint
from pipelines.run.command import UserError, require
from pipelines.run.files import ARTEFACT, read_json, require_artefact_alone, to_json, write_json

LARGEST_HEADER, MOST_PARTS = 1 << 22, 5_000
"""Bytes of a weights file's header and layers of a module at most; the largest models of timm have 1,800."""
Module = TypeVar("Module", bound=nn.Module)


def save_artefact(folder: Path, kind: str, config: Any, module: nn.Module) -> None:
    """Write what `kind` of thing a module is, the configuration it can be built from again, its weights and buffers.

    An older artefact gives way when the new one is whole. Raises `UserError` if something else is in its place.
    """
    require_artefact_alone(folder)
    beside = unfinished(folder.parent)
    beside.mkdir()
    weights = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    owned = {"kind": kind, "config": to_json(config)}
    write_json(beside / "config.json", owned | {"fingerprint": fingerprint(weights, owned["config"])})
    try:
        save_file(weights, beside / "model.safetensors")
    except SafetensorError as error:
        raise OSError(f"{beside}: {error}") from error
    to_disk(beside / "model.safetensors")
    if folder.exists():
        folder.rename(aside := unfinished(folder.parent))
        beside.rename(folder)
        shutil.rmtree(aside)
    else:
        beside.rename(folder)
    to_disk(folder.parent)


def load_module(folder: Path, kind: str, build: Callable[[dict[str, Any]], Module]) -> Module:
    """The module of an artefact in evaluation mode: every weight is there, none is left over, shapes and types agree.

    `build` makes it from its configuration; on the meta device first, where nothing is allocated, so that a hostile
    configuration is found out by the header of the weights. What does not fit is a `UserError`.
    """
    for name in ARTEFACT:
        require((folder / name).is_file(), f"{folder}: there is no {kind} here ({name} is missing)")
    content = read_json(folder / "config.json")
    is_known = {"kind", "config", "fingerprint"} <= content.keys()
    require(is_known, f"{folder}/config.json is not of this version: make it again")
    require(content["kind"] == kind, f"{folder}: this is no {kind}; its config.json says {content['kind']}")
    try:
        have, wanted = _shapes(folder / "model.safetensors"), _wanted(build, content["config"])
        for name in sorted(wanted.keys() | have.keys()):
            want, found = tuple(wanted[name].shape) if name in wanted else "none", have.get(name, "missing")
            require(want == found, f"{folder}: {name} of this {kind} is {found}, its configuration wants {want}")
        module, state = build(content["config"]), load_file(folder / "model.safetensors")
        for name, value in state.items():
            is_sound = value.dtype == wanted[name].dtype and bool(value.isfinite().all())
            require(is_sound, f"{folder}: {name} of this {kind} is not finite, or {value.dtype}: make it again")
        if fingerprint(state, content["config"]) != content["fingerprint"]:
            raise ValueError("it has changed since it was written")
        module.load_state_dict(state)
        return module.eval()
    except UserError:
        raise
    except Exception as error:  # whatever a stranger's configuration leads to, in libraries too
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{folder}: the {kind} here cannot be loaded ({reason}): copy or make it again") from error


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a file, as its header says; safetensors compares that with the file's size."""
    with weights.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > LARGEST_HEADER:
            raise ValueError(f"its header is larger than {LARGEST_HEADER:,} bytes")
    with safe_open(weights, "pt") as content:
        return {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118


def _wanted(build: Callable[[dict[str, Any]], nn.Module], config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a configuration's module on the meta device: of whatever size, they take no memory."""
    parts = count(1)

    def limit(*_: Any) -> None:
        if next(parts) > MOST_PARTS:
            raise ValueError(f"its configuration wants more than {MOST_PARTS:,} layers")

    hook = register_module_module_registration_hook(limit)
    try:
        with torch.device("meta"):
            return build(config).state_dict()
    finally:
        hook.remove()
