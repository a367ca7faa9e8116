"""How the options of a command are read from its command line and from a preset."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

import tyro
import yaml

from jepa.errors import ConfigurationError

Options = TypeVar("Options")

COMMANDS = [path.stem for path in sorted(Path(__file__).parents[1].glob("[!_]*.py")) if path.stem != "cli"]
"""Names that a preset may have sections for, beside that of the command that reads it."""
MOST_PRESET_BYTES = 1 << 15
NOT_IN_PRESETS = ("output_dir", "manifest", "overwrite", "resume", "preset")
"""What to write, and over what, is for the command line alone."""


class _AsWritten(yaml.SafeLoader):  # type: ignore[misc]
    """Numbers as they are written (YAML: 010 is eight, 1:30 is ninety); a name that stands twice is an error."""

    yaml_implicit_resolvers: ClassVar = {
        first: [rule for rule in rules if rule[0].endswith((":bool", ":null"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [str(key.value).replace("-", "_") for key, _ in node.value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{', '.join(sorted(twice))} stands in one section more than once")
        return super().construct_mapping(node, deep)


def parse(options_type: type[Options], command: str, *, description: str = "") -> Options:
    """Options from the command line, over those from the section `command` of `--preset FILE`, over the defaults.

    `--FIELD.kind NAME` chooses the class of a field whose type is a union of kinds; exactly its options then exist. A
    value outside its bounds, or a preset that cannot be used, is a `ConfigurationError`.
    """
    hints, own = get_type_hints(options_type), vars(options_type).get("__annotations__", {})
    unions = {name: {one.kind: one for one in get_args(hint) if hasattr(one, "kind")} for name, hint in hints.items()}
    unions = {name: kinds for name, kinds in unions.items() if kinds}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", type=Path)
    for name, kinds in unions.items():
        parser.add_argument(f"--{dashed(name)}.kind", dest=name, choices=kinds)
    known, arguments = parser.parse_known_args()
    if known.preset is not None:
        known, arguments = parser.parse_known_args([*_read_preset(known.preset, command), *sys.argv[1:]])
    chosen = [(name, kinds[getattr(known, name)]) for name, kinds in unions.items() if getattr(known, name)]
    fields = [(name, kind, field(default_factory=kind)) for name, kind in chosen]
    shown: Any = make_dataclass(options_type.__name__, fields, bases=(options_type,), frozen=True)
    for name in [name for name in hints if name in shown.__dataclass_fields__ and name not in own]:
        shown.__dataclass_fields__[name] = shown.__dataclass_fields__.pop(name)  # help shows a command's own first
    lines = [f"--{dashed(name)}.kind: {' | '.join(kinds)}" for name, kinds in unions.items()]
    text = "\n".join([description, *lines, "--preset FILE: other defaults, such as configs/presets/laptop_cpu.yaml"])
    parsed: Options = tyro.cli(shown, description=text, args=arguments, config=(tyro.conf.AvoidSubcommands,))
    return parsed


def dashed(name: str) -> str:
    """A field's name as its option is written."""
    return name.replace("_", "-")


def _read_preset(path: Path, command: str) -> list[str]:
    """The section of a command, as arguments. A preset may be a stranger's: it decides neither where nor over what."""
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= MOST_PRESET_BYTES):
            raise ValueError(f"it is no file of at most {MOST_PRESET_BYTES:,} bytes")
        text = path.read_text()
        if any(isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) for event in yaml.parse(text)):
            raise ValueError("it has aliases or tags, which are no values: write the values out")
        sections = yaml.load(text, _AsWritten)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigurationError("preset", f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise ConfigurationError("preset", f"{path} holds no sections of options, named like the commands")
    for name in sections.keys() - {*COMMANDS, command}:
        raise ConfigurationError("preset", f"{path} has a section '{name}', and commands are {', '.join(COMMANDS)}")
    arguments = list(as_arguments(sections.get(command, {})))
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name in NOT_IN_PRESETS:
            raise ConfigurationError("preset", f"{path} asks for {argument}: give that on the command line")
    return arguments


def as_arguments(values: dict[str, Any], prefix: str = "--") -> Iterator[str]:
    """Options of a preset as they would be given."""
    for name, value in values.items():
        option = f"{prefix}{dashed(str(name))}"
        if isinstance(value, dict):
            yield from as_arguments(value, f"{option}.")
        elif isinstance(value, bool):
            yield option if value else f"{prefix}no-{dashed(str(name))}"
        elif isinstance(value, list):
            yield from (option, *map(str, value))
        else:
            yield f"{option}={value}"
