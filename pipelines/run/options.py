"""Options: those that trainers share, and how a command's are read from its command line and from a preset."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_type_hints

import tyro
import yaml

from jepa.config import Bounded, NotNegative, NotNegativeInt, Positive, PositiveInt
from jepa.errors import ConfigurationError

Options = TypeVar("Options")

COMMANDS = [path.stem for path in sorted(Path(__file__).parents[1].glob("[!_]*.py")) if path.stem != "cli"]
"""Names that a preset may have sections for, beside that of the command that reads it."""
NOT_IN_PRESETS = {"output-dir", "overwrite", "resume", "preset"}
"""Options that decide what is kept and what is replaced: a stranger's file must not set them."""
LARGEST_PRESET = 1 << 16
"""Bytes."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(Bounded):
    """Options of every trainer, beside `output_dir` and `steps`, for which each has a default of its own."""

    if TYPE_CHECKING:
        output_dir: Path
        steps: PositiveInt
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
        ConfigurationError: a value lies outside its bounds, there is no such kind, or the preset cannot be used.
    """
    unions = {path: kinds for path, kinds in _tree(options_type) if hasattr(kinds[-1], "kind")}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", type=Path)
    for path in unions:
        parser.add_argument(f"--{dashed(path)}.kind", nargs="?", const="")
    known, arguments = parser.parse_known_args()
    if known.preset is not None:
        known, arguments = parser.parse_known_args([*_as_arguments(_read_preset(known.preset, command)), *sys.argv[1:]])
    default = _unchecked_defaults(options_type)
    for path, kinds in unions.items():
        name, named = getattr(known, f"{path}.kind"), {kind.kind: kind for kind in kinds}
        if name not in (None, *named):
            raise ConfigurationError(f"{path}.kind", f"is {name}: {_hint(name, named)}")
        if name is not None and not isinstance(getattr(default, path), named[name]):
            object.__setattr__(default, path, named[name]())
    lines = [f"--{dashed(path)}.kind: {' | '.join(kind.kind for kind in kinds)}" for path, kinds in unions.items()]
    text = "\n".join([description, *lines, "--preset FILE: other defaults, such as configs/presets/laptop_cpu.yaml"])
    said, plain = io.StringIO(), (tyro.conf.AvoidSubcommands,)
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(options_type, description=text, args=arguments, default=default, config=plain)
    except SystemExit as leaving:
        cause: BaseException | None = leaving
        while cause is not None and not isinstance(cause, ConfigurationError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        if known.preset is not None and leaving.code:
            sys.stderr.write(f"(read as if the options in {known.preset} had been given, too)\n")
        sys.stderr.write(said.getvalue())
        raise


def name_option(field: str, options_type: type) -> str:
    """The option that sets a configuration's field: of several, those that the command line names."""
    paths = dict.fromkeys(path for path, _ in _tree(options_type) if field in (path, path.rpartition(".")[2]))
    names = [f"--{dashed(path)}" for path in paths]
    given = {dashed(argument.partition("=")[0]) for argument in sys.argv}
    return " or ".join([name for name in names if name in given] or names) or f"--{dashed(field)}"


def dashed(name: str) -> str:
    """A field's name as its option is written."""
    return name.replace("_", "-")


def _tree(options_type: type, prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The dotted path of each option, and the classes of configurations that it can hold, or its type."""
    hints = get_type_hints(options_type)
    for field in dataclasses.fields(options_type):  # type: ignore[arg-type]
        hint = hints[field.name]
        kinds = tuple(kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind))
        yield f"{prefix}{field.name}", kinds or (hint,)
        for kind in kinds:
            yield from _tree(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]


def _unchecked_defaults(options_type: type[Options]) -> Options:
    """An instance whose options without a default are missing; help shows a command's own before those of trainers."""
    default, fields = object.__new__(options_type), options_type.__dataclass_fields__  # type: ignore[attr-defined]
    for name, field in sorted(fields.items(), key=lambda item: item[0] in RunOptions.__dataclass_fields__):
        fields[name] = fields.pop(name)
        value = tyro.MISSING if field.default is dataclasses.MISSING else field.default
        made = field.default_factory is not dataclasses.MISSING
        object.__setattr__(default, name, field.default_factory() if made else value)
    return default


def _read_preset(path: Path, command: str) -> dict[str, Any]:
    """The section of a command."""
    if not path.is_file() or path.stat().st_size > LARGEST_PRESET:
        raise ConfigurationError("preset", f"is {path}: this is no file of at most {LARGEST_PRESET // 1024} kB")
    try:
        text = path.read_text()
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the other one takes minutes for brackets in brackets
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
            raise ValueError("it has aliases, a few of which can stand for more than fits in memory")
        sections = yaml.load(text, loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError("preset", f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise ConfigurationError("preset", f"{path} holds no sections of options, named like the commands")
    known = dict.fromkeys((*COMMANDS, command))
    for name in sections.keys() - known:
        raise ConfigurationError("preset", f"{path} has a section '{name}', which is no command: {_hint(name, known)}")
    section: dict[str, Any] = sections.get(command, {})
    for name in section:
        if dashed(str(name)) in NOT_IN_PRESETS:
            raise ConfigurationError("preset", f"{path} sets '{name}', which only the command line can")
    return section


def _as_arguments(values: dict[str, Any], prefix: str = "--") -> Iterator[str]:
    """Options of a preset as they would be given; no value can pass for an option."""
    for name, value in values.items():
        option = f"{prefix}{dashed(str(name))}"
        if isinstance(value, dict):
            yield from _as_arguments(value, f"{option}.")
        elif isinstance(value, bool):
            yield option if value else f"{prefix}no-{dashed(str(name))}"
        elif isinstance(value, list):
            if dash := [item for item in value if str(item).startswith("--")]:
                raise ConfigurationError("preset", f"sets {option} to {dash[0]}: no value begins with dashes")
            yield from (option, *map(str, value))
        else:
            yield f"{option}={value}"


def _hint(name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), known := list(known), n=1)
    return f"perhaps you meant {near[0]}" if near else f"known are {', '.join(known)}"
