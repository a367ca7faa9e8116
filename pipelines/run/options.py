"""Options: those that trainers share, and how a command's are read from its command line and from a YAML file."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from jepa.config import Bounded, NotNegative, NotNegativeInt, Positive, PositiveInt
from jepa.errors import ConfigurationError

Options = TypeVar("Options")

COMMANDS = (
    "pretrain_encoder", "cache_embeddings", "train_predictor", "calibrate", "evaluate_rollout", "score_surprise",
    "inspect_folder", "demo",
)  # fmt: skip
"""Names that a preset may have sections for."""
NOT_IN_PRESETS = ("output_dir", "overwrite", "resume")
"""Options that decide what is kept and what is replaced: a stranger's file must not set them."""
LARGEST_PRESET = 1 << 16
"""Bytes."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(Bounded):
    """Options of every trainer."""

    output_dir: Path
    """Folder for everything that the run leaves."""
    steps: PositiveInt
    """Optimiser steps. A run may be resumed with more of them."""
    log_every: PositiveInt = 100
    """Steps between two entries in the log, each with a check for collapse."""
    checkpoint_every: PositiveInt = 500
    """Steps between two saved training states; one is saved every 10 minutes, too."""
    seed: NotNegativeInt = 0
    """Seed of the weights, of the order of the data, and of all noise."""
    tracker: tuple[str, ...] = ("tensorboard",)
    """Trackers of the curves beside curve.jsonl: tensorboard, wandb, mlflow, ...; or none."""
    precision: Literal["launched", "fp32", "bf16", "fp16"] = "launched"
    """Precision of forward and backward passes; weights and statistics stay float32. launched: as accelerate says."""
    execution: Literal["eager", "compiled", "deterministic"] = "eager"
    """compiled: by torch.compile, a minute at the start for faster steps. deterministic: equal to the bit on a GPU."""
    resume: bool = False
    """Go on with the run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""


@dataclass(frozen=True)
class OptimizerOptions(Bounded):
    """AdamW: a tenth of the steps warms up, then a cosine leads to 0."""

    learning_rate: Positive = 2e-3
    """Peak learning rate."""
    weight_decay: NotNegative = 1e-4
    """Decay of weights; biases and normalisation layers have none."""


def parse(options_type: type[Options], command: str, *, description: str = "") -> Options:
    """Options from the command line, over those from the section `command` of `--preset FILE`, over the defaults.

    `--FIELD.kind NAME` chooses the class of a field whose type is a union of kinds; exactly its options then exist.

    Raises:
        ConfigurationError: a value lies outside its bounds, there is no such kind, or the preset holds what is unknown.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", type=Path)
    known, rest = parser.parse_known_args()
    values = {} if known.preset is None else _read_preset(known.preset, command)
    unions = {path: kinds for path, kinds in _tree(options_type) if any(hasattr(kind, "kind") for kind in kinds)}
    rest = _take_kinds(rest, unions, values)
    source = "" if known.preset is None else f"{known.preset} sets "
    _common_first(options_type)
    default = _filled(options_type, values, source)
    lines = [f"--{path.replace('_', '-')}.kind: {' | '.join(kind.kind for kind in unions[path])}" for path in unions]
    text = "\n".join([description, *lines, "--preset FILE: other defaults, such as configs/presets/laptop_cpu.yaml"])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(tyro.conf.AvoidSubcommands[options_type], description=text, args=rest, default=default)  # type: ignore[valid-type]
    except SystemExit as leaving:
        cause: BaseException | None = leaving
        while cause is not None and not isinstance(cause, ConfigurationError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(said.getvalue())
        raise


def name_option(field: str, options_type: type) -> str:
    """The option that sets a configuration's field: of several, those that the command line names."""
    paths = [path for path, _ in _tree(options_type) if field in (path, path.rpartition(".")[2])]
    names = [f"--{path.replace('_', '-')}" for path in dict.fromkeys(paths)]
    given = {argument.partition("=")[0].replace("_", "-") for argument in sys.argv}
    dotted = f"--{field.replace('_', '-')}"
    return " or ".join([name for name in names if name in given] or names) or dotted


def _tree(options_type: type, prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The dotted path of each option, and the classes of configurations that it can hold."""
    hints = get_type_hints(options_type)
    for field in dataclasses.fields(options_type):  # type: ignore[arg-type]
        kinds = _kinds(hints[field.name])
        yield f"{prefix}{field.name}", kinds
        for kind in kinds:
            yield from _tree(kind, f"{prefix}{field.name}.")


def _kinds(hint: Any) -> tuple[Any, ...]:
    return tuple(kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind))


def _common_first(options_type: type) -> None:
    """In `--help` a command's own options stand before those of all trainers."""
    fields = options_type.__dataclass_fields__  # type: ignore[attr-defined]
    shared = {name: fields.pop(name) for name in list(fields) if name in RunOptions.__dataclass_fields__}
    fields.update(shared)


def _take_kinds(arguments: list[str], unions: dict[str, tuple[Any, ...]], values: dict[str, Any]) -> list[str]:
    """Move `--FIELD.kind NAME` from the arguments into the values."""
    rest, waiting = [], iter(arguments)
    for argument in waiting:
        option, _, value = argument.partition("=")
        path = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or path.removesuffix(".kind") not in unions or not path.endswith(".kind"):
            rest.append(argument)
            continue
        section = values
        for part in path.split(".")[:-1]:
            section = section.setdefault(part, {})
        if "kind" in section and section["kind"] != (value or ""):
            section.clear()  # the preset's options are those of another kind
        section["kind"] = value or next(waiting, "")
    return rest


def _read_preset(path: Path, command: str) -> dict[str, Any]:
    """The section of a command."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_PRESET:
            raise ConfigurationError("preset", f"is {path}: this is no file of at most {LARGEST_PRESET // 1024} kB")
        sections = yaml.load(path.read_text(), _PlainLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError("preset", f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise ConfigurationError("preset", f"{path} holds no sections of options, named like the commands")
    for name in sections:
        if name not in (*COMMANDS, command):
            hint = _hint(name, (*COMMANDS, command))
            raise ConfigurationError("preset", f"{path} has a section '{name}', which is no command: {hint}")
    section: dict[str, Any] = sections.get(command, {})
    if fixed := sorted(section.keys() & set(NOT_IN_PRESETS)):
        raise ConfigurationError("preset", f"{path} sets '{fixed[0]}', which only the command line can")
    return section


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few hundred bytes of them can stand for more than fits in memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name), which are not read")
        return super().compose_node(parent, index)


def _filled(options: Any, values: dict[str, Any], source: str, place: str = "") -> Any:
    """An instance with other values: unchecked, as options without a default are still missing.

    Args:
        options: an instance, or a class, whose defaults are taken.
        values: by name, nested as the options are.
        source: beginning of a message: who sets them.
        place: beginning of their dotted names.
    """
    options_type = options if isinstance(options, type) else type(options)
    hints, filled = get_type_hints(options_type), {}
    for field in dataclasses.fields(options_type):
        if options is not options_type:
            filled[field.name] = getattr(options, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            filled[field.name] = field.default_factory()
        else:
            filled[field.name] = tyro.MISSING if field.default is dataclasses.MISSING else field.default
    for name, value in values.items():
        if name not in filled:
            known = _hint(name, filled)
            raise ConfigurationError("preset", f"{source}'{place}{name}', which is no option here: {known}")
        if (kinds := _kinds(hints[name])) and isinstance(value, dict):
            inner = dict(value)
            chosen = _chosen(f"{place}{name}.kind", inner.pop("kind", None), filled[name], kinds=kinds)
            filled[name] = _filled(chosen, inner, source, f"{place}{name}.")
            continue
        try:
            filled[name] = _converted(value, hints[name])
        except (TypeError, ValueError) as error:
            raise ConfigurationError("preset", f"{source}{place}{name} to {value!r}: it must be {error}") from error
    instance = object.__new__(options_type)
    for name, value in filled.items():
        object.__setattr__(instance, name, value)
    return instance


def _chosen(option: str, name: str | None, default: Any, *, kinds: tuple[Any, ...]) -> Any:
    """The class of a kind, or the default where it is of that kind already."""
    if name == getattr(default, "kind", None) and dataclasses.is_dataclass(default):
        return default
    named = {getattr(kind, "kind", None): kind for kind in kinds}
    if name not in named:
        raise ConfigurationError(option, f"is {name}: {_hint(str(name), map(str, named))}")
    return named[name]


def _converted(value: Any, hint: Any) -> Any:
    """A value as the type of its field; an error says what it should have been."""
    hint = next((one for one in get_args(hint) if one is not NoneType), hint) if NoneType in get_args(hint) else hint
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ValueError(f"one of {', '.join(map(str, get_args(hint)))}")
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if isinstance(value, list):
            inner = inner[:1] * len(value) if inner[-1] is ... else inner
            if len(inner) == len(value):
                return tuple(map(_converted, value, inner))
        raise TypeError(f"a list such as [{', '.join(getattr(one, '__name__', '...') for one in inner)}]")
    if hint is float and type(value) in (int, float, str):
        try:
            return float(value)  # YAML takes 1e-3 for text
        except ValueError:
            raise TypeError("a float") from None
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not hint:
        section = dataclasses.is_dataclass(hint) or bool(_kinds(hint))
        raise TypeError("a section of options" if section else f"of type {hint.__name__}")
    return value


def _hint(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"perhaps you meant {near[0]}" if near else f"known are {', '.join(known)}"
