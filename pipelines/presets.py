"""Options from a file: a preset for a machine, over which the command line has the last word."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

Options = TypeVar("Options")


class PresetError(ValueError):
    """A preset that cannot be used; the message names it and the mend."""


def parse_options(options_type: type[Options], description: str | None) -> Options:
    """Options from the command line; `--preset FILE` brings other defaults, from the section named like the script.

    Raises:
        PresetError: there is no such preset, or it holds what the stage does not know.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", type=Path)
    known, rest = parser.parse_known_args()
    help_text = (
        f"{description}\n--preset FILE takes other defaults from a file such as configs/presets/laptop_cpu.yaml."
    )
    if known.preset is None:
        return tyro.cli(options_type, description=help_text, args=rest)
    try:
        sections = yaml.safe_load(known.preset.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PresetError(f"--preset {known.preset} cannot be read: {' '.join(str(error).split())}") from error
    stage = Path(sys.argv[0])
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise PresetError(f"--preset {known.preset} holds no sections of options, named like the stages")
    stages = {path.stem for path in stage.parent.glob("*.py")}
    if unknown := sorted(sections.keys() - stages, key=str):
        hint = _hint(unknown[0], stages)
        raise PresetError(f"--preset {known.preset} has a section '{unknown[0]}', which is no stage: {hint}")
    values = sections.get(stage.stem, {})
    return tyro.cli(options_type, description=help_text, args=rest, default=_filled(options_type, values, known.preset))


def _filled(options: Any, values: dict[str, Any], preset: Path, place: str = "") -> Any:
    """Options with some values replaced.

    Args:
        options: an instance, or a class of which not all fields have defaults: those are left for the command line.
        values: by name, nested as the options are.
        preset: for messages.
        place: where in the preset, for messages.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}
    hints = get_type_hints(options if isinstance(options, type) else type(options))
    filled: dict[str, Any] = {}
    for name, field in fields.items():
        if not isinstance(options, type):
            filled[name] = getattr(options, name)
        elif field.default_factory is not dataclasses.MISSING:
            filled[name] = field.default_factory()
        else:
            filled[name] = tyro.MISSING if field.default is dataclasses.MISSING else field.default
    for name, value in values.items():
        if name not in fields:
            hint = _hint(name, fields)
            raise PresetError(f"--preset {preset} sets '{place}{name}', which is no option of this stage: {hint}")
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            filled[name] = _filled(filled[name], value, preset, f"{place}{name}.")
            continue
        try:
            filled[name] = _converted(value, hints[name])
        except (TypeError, ValueError) as error:
            raise PresetError(f"--preset {preset} sets {place}{name} to {value!r}: it must be {error}") from error
    return options(**filled) if isinstance(options, type) else dataclasses.replace(options, **filled)


def _converted(value: Any, kind: Any) -> Any:
    """A value as the type of its field; an error says what it should have been."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(one for one in get_args(kind) if one is not NoneType)  # Path | None: a path
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ValueError(f"one of {', '.join(map(str, get_args(kind)))}")
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if isinstance(value, list):
            kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
            if len(kinds) == len(value):
                return tuple(map(_converted, value, kinds))
        raise TypeError(f"a list such as [{', '.join(getattr(one, '__name__', '...') for one in kinds)}]")
    if kind is float and type(value) in (int, float, str):
        try:
            return float(value)  # YAML takes 1e-3 for text
        except ValueError:
            raise TypeError("a float") from None
    if kind is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not kind:
        section = dataclasses.is_dataclass(kind)
        raise TypeError("a section of options" if section else f"of type {kind.__name__}")
    return value


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"perhaps you meant {near[0]}" if near else f"known are {', '.join(sorted(known))}"
