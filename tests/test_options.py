"""Options: kinds, presets, bounds, and what is said about them."""

import importlib
import sys
from pathlib import Path

import pytest
import yaml

from jepa.errors import ConfigurationError
from pipelines.run.command import explain
from pipelines.run.options import _AsWritten, as_arguments, parse
from pipelines.run.training import OptimizerOptions
from tests.toy_trainer import Deep, Narrow, Options

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yaml"))


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Options of a command line, and of a preset if one is given."""

    def read(*arguments, preset=None):
        if preset is not None:
            (tmp_path / "preset.yaml").write_text(preset if isinstance(preset, str) else yaml.safe_dump(preset))
            arguments = ("--preset", str(tmp_path / "preset.yaml"), *arguments)
        monkeypatch.setattr(sys, "argv", ["toy_trainer.py", *arguments])
        return parse(Options, "toy_trainer", description="Toy.")

    return read


def test_a_kind_brings_exactly_its_options(read, capsys):
    assert read().network == Narrow()
    assert read("--network.kind", "deep", "--network.layers", "3").network == Deep(layers=3)
    assert read("--network.kind=deep").network == Deep()
    assert read("--network.kind", "narrow", "--network.width", "5").network == Narrow(5)
    for arguments, said in (
        (("--network.layers", "3"), "--network.layers"),  # the narrow one has none
        (("--network.kind", "dep"), "invalid choice: 'dep' (choose from 'narrow', 'deep')"),
        (("--network.kind",), "expected one argument"),
    ):
        with pytest.raises(SystemExit):
            read(*arguments)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--steps", "0"), "error: --steps is 0: it must be at least 1, and below 2^32"),
        (("--noise", "nan"), "error: --noise is nan: it must be above 0, and finite"),
        (("--network.width", "0"), "error: --network.width is 0: it must be at least 1, and below 2^32"),
    ],
)
def test_what_lies_outside_its_bounds_is_said_with_its_option(arguments, line, read):
    with pytest.raises(ConfigurationError) as raised:
        read(*arguments)
    assert explain(raised.value)[1].removeprefix("\n") == line  # after a progress bar of another test


def test_a_preset_brings_other_defaults_and_the_command_line_wins(read):
    preset = {
        "toy_trainer": {
            "steps": 30, "size": [32, 48], "videos": ["a", "b"], "noise": "1e-3", "tracker": ["none"],
            "network": {"kind": "deep", "layers": 4}, "optimizer": {"weight_decay": 0},
        },
        "train_predictor": {"steps": 1},
    }  # fmt: skip
    options = read("--steps", "7", "--network.layers", "5", preset=preset)
    assert (options.steps, options.size, options.noise) == (7, (32, 48), 1e-3)
    assert options.videos == (Path("a"), Path("b"))
    assert options.network == Deep(layers=5)
    assert options.optimizer == OptimizerOptions(1e-2, 0.0)
    assert read(preset={"train_predictor": {"steps": 1}}).steps == 12  # what is for another command
    assert read(preset="toy_trainer: {steps: 010}").steps == 10  # eight to YAML 1.1
    written = yaml.load("{infill: True, sound: off, word: 'true', encoder: null, at: 1:30, rate: 1e-3}", _AsWritten)
    said = "--infill --no-sound --word=true --encoder=None --at=1:30 --rate=1e-3"
    assert [*as_arguments(written)] == said.split()


@pytest.mark.parametrize(
    ("preset", "complaint"),
    [
        ("toy_trainr: {}", "a section 'toy_trainr', and commands are act, all_stages"),
        ("steps: 3", "holds no sections of options"),
        ("a: [", "cannot be read: while parsing"),
        ("a: !!python/object/apply:os.system [ls]", "cannot be read: it has aliases or tags"),
        ("toy_trainer: {steps: 3, noise: 0, steps: 4}", "cannot be read: steps stands in one section more than once"),
        ("toy_trainer: {log-every: 3, log_every: 4}", "cannot be read: log_every stands in one section"),
        ("toy_trainer: {network: {layers: 3, layers: 3}}", "cannot be read: layers stands in one section"),
        ("toy_trainer: {}\ntoy_trainer: {steps: 4}", "cannot be read: toy_trainer stands in one section"),
        ("toy_trainer: {? [steps] : 4}", "cannot be read: while constructing"),
        ("1: {}", "a section '1'"),
        ("toy_trainer: {network: {width: 0}}", "is 0: it must be at least 1, and below 2^32"),
    ],
)
def test_a_preset_that_cannot_be_used_is_one_line(preset, complaint, read):
    with pytest.raises(ConfigurationError) as raised:
        read(preset=preset)
    line = explain(raised.value)[1].removeprefix("\n")
    assert complaint in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("preset", "complaint"),
    [
        ({"stps": 3}, "--stps=3"),
        ({"network": {"layers": 3}}, "--network.layers=3"),
        ({"steps": "many"}, "--steps"),
        ({"precision": "fp64"}, "--precision"),
        ("toy_trainer: {steps: 1:30}", "--steps"),
    ],
)
def test_a_presets_mistakes_are_those_of_the_command_line(preset, complaint, read, capsys):
    with pytest.raises(SystemExit):
        read(preset=preset if isinstance(preset, str) else {"toy_trainer": preset})
    assert complaint in capsys.readouterr().err


def test_a_missing_preset_is_named(read, tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml cannot be read"):
        read("--preset", str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_shipped_presets_are_understood(preset, monkeypatch):
    assert f"--preset configs/presets/{preset.name}" in preset.read_text()  # its header says the exact command
    for command in yaml.safe_load(preset.read_text()):
        module = importlib.import_module(f"pipelines.{command}")
        required = ["--videos", "DIR"] if "videos" in module.Options.__dataclass_fields__ else []
        monkeypatch.setattr(sys, "argv", [f"{command}.py", "--preset", str(preset), *required])
        parse(module.Options, command)
