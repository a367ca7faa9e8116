"""Files that are whole or not there: JSON, and what is known about values in it."""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from torch import Tensor

from data import files
from data.files import write_whole
from pipelines.run.command import UserError, require

MARK = "run.json"  # the file that says whose a folder is
ARTEFACT = ("config.json", "model.safetensors")  # the files of an artefact
START_AGAIN = "add --overwrite to start again"


def require_artefact_alone(folder: Path) -> None:
    """Raises `UserError` if a folder holds more than an artefact, which would be lost when that is replaced."""
    others = sorted(path.name for path in folder.iterdir() if path.name not in ARTEFACT) if folder.is_dir() else []
    require(not others, f"{folder} holds {', '.join(others[:3])}, and is no model: move it, or take another folder")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, whole; NaN and infinity become null."""
    write_whole(path, (json.dumps(to_json(value), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` if the file holds none."""
    try:
        return files.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or make it again") from error


@contextmanager
def reading(run: str, kind: type[Exception] = OSError, *, mend: str = "restore it, or run it again") -> Iterator[None]:
    """Damage to what a run has left, of which errors of a kind tell beside the usual ones, is one line."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, kind) as error:
        said = shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
        raise UserError(f"{run} is not as its run left it ({said}): {mend}") from error


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
    inner = [flat(value, f"{name}.{part}".removeprefix(".")) for part, value in values.items()]
    return {key: value for part in inner for key, value in part.items()}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted names whose values differ between two nested dictionaries, with both values."""
    old, new = flat(before), flat(now)
    return [(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)]


def summary(names: Sequence[Any]) -> str:
    """A long list in short: whoever agrees on it agrees on the list."""
    return f"{len(names):,}, fingerprint {hashlib.sha256(repr(names).encode()).hexdigest()[:12]}"


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    names = ("torch", "torchvision", "av", "timm", "accelerate", "h5py", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
