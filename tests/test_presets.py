"""Options from files: the shipped ones, and what is wrong with others."""

import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
import yaml

from jepa.encoder import FrameEncoder
from jepa.expander import Expander
from jepa.predictor import Predictor
from pipelines import cache_embeddings, pretrain_encoder, train_predictor
from pipelines.compute import PRECISIONS, MemoryEstimate
from pipelines.presets import PresetError, parse_options
from pipelines.pretrain_encoder import Pretraining
from pipelines.train_predictor import Losses, example_inputs

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yaml"))
MEMORY = {"laptop_cpu": 4e9, "gpu_8gb": 8e9, "gpu_80gb": 80e9, "gpus_8": 80e9}
REQUIRED = {"pretrain_encoder": ["--videos", "DIR"], "cache_embeddings": ["--videos", "DIR"], "train_predictor": []}


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    size: tuple[int, int] = (64, 64)
    kind: Literal["one", "two"] = "one"


@dataclass(frozen=True)
class Options:
    videos: tuple[Path, ...]
    output_dir: Path = Path("runs")
    batch_size: int = 128
    strict: bool = False
    inner: Inner = field(default_factory=lambda: Inner(kind="two"))


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Options that a stage would see, of a preset and a command line."""

    def parse(content, *arguments, stage="pretrain_encoder", options=Options):
        path = tmp_path / "preset.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        monkeypatch.setattr(sys, "argv", [str(ROOT / "pipelines" / f"{stage}.py"), "--preset", str(path), *arguments])
        return parse_options(options, "help")

    return parse


def test_a_preset_brings_other_defaults_and_the_command_line_wins(parse):
    preset = """
    pretrain_encoder: {batch_size: 256, strict: true, inner: {rate: 1e-4, size: [112, 128]}, output_dir: elsewhere}
    train_predictor: {batch_size: 2}
    """
    options = parse(preset, "--videos", "a", "b", "--inner.rate", "3", "--no-strict")
    assert options == Options(
        (Path("a"), Path("b")), Path("elsewhere"), 256, strict=False, inner=Inner(3.0, (112, 128), "two")
    )
    assert parse(preset, "--videos", "a", stage="train_predictor").batch_size == 2
    assert parse(preset, "--videos", "a", stage="demo") == Options((Path("a"),))
    assert parse("pretrain_encoder: {videos: [a, b]}").videos == (Path("a"), Path("b"))
    assert parse(preset, "--videos", "a").inner.rate == 1e-4  # text, to YAML


def test_what_is_required_still_is(parse, capsys):
    with pytest.raises(SystemExit):
        parse("pretrain_encoder: {batch_size: 256}")
    assert "--videos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            {"pretrain_encoder": {"batch_sise": 3}},
            "sets 'batch_sise', which is no option of this stage: perhaps you me",
        ),
        ({"pretrain_encoder": {"inner": {"zzz": 3}}}, r"'inner\.zzz', .*: known are kind, rate, size"),
        ({"pretrain_encoder": {"batch_size": "many"}}, "sets batch_size to 'many': it must be of type int"),
        ({"pretrain_encoder": {"batch_size": 1.5}}, "of type int"),
        ({"pretrain_encoder": {"strict": 1}}, "of type bool"),
        ({"pretrain_encoder": {"inner": {"rate": "fast"}}}, r"sets inner\.rate to 'fast': it must be a float"),
        ({"pretrain_encoder": {"inner": {"rate": True}}}, "of type float"),
        ({"pretrain_encoder": {"inner": {"kind": "three"}}}, "must be one of one, two"),
        ({"pretrain_encoder": {"inner": {"size": [1, 2, 3]}}}, r"must be a list such as \[int, int\]"),
        ({"pretrain_encoder": {"inner": {"size": 64}}}, r"must be a list such as \[int, int\]"),
        ({"pretrain_encoder": {"inner": 3}}, "must be a section of options"),
        ({"pretrain_encodr": {}}, "has a section 'pretrain_encodr', which is no stage: perhaps you meant pretrain_enc"),
        ({"pretrain_encoder": 3}, "holds no sections of options"),
        ("", "holds no sections of options"),
        ("- a", "holds no sections of options"),
        ("a: [", "cannot be read: while parsing"),
    ],
)
def test_mistakes_are_answered_in_one_line(content, complaint, parse):
    with pytest.raises(PresetError, match=complaint) as raised:
        parse(content, "--videos", "a")
    assert "\n" not in str(raised.value)
    assert "preset.yaml" in str(raised.value)


def test_a_missing_or_unreadable_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    for name in ("nowhere.yaml", "binary.yaml", "."):
        monkeypatch.setattr(sys, "argv", ["pipelines/demo.py", "--preset", str(tmp_path / name)])
        with pytest.raises(PresetError, match="cannot be read"):
            parse_options(Options, "help")


def load(preset, stage, monkeypatch):
    module = {"pretrain_encoder": pretrain_encoder, "cache_embeddings": cache_embeddings}.get(stage, train_predictor)
    arguments = [str(ROOT / "pipelines" / f"{stage}.py"), "--preset", str(preset), *REQUIRED[stage]]
    monkeypatch.setattr(sys, "argv", arguments)
    return parse_options(module.Options, "help")


def with_precision(precision):
    return SimpleNamespace(mixed_precision=PRECISIONS[precision])


@functools.cache  # two presets have the same networks, and large ones
def estimate_encoder(encoder, expander, precision):
    network = Pretraining(FrameEncoder(encoder), Expander(FrameEncoder(encoder).embedding_dimension, expander))
    return MemoryEstimate.of(network, torch.zeros(4, 3, *encoder.image_size), 2, with_precision(precision))


def readable(number):
    return f"{number / 1e9:.1f} GB"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_shipped_presets_are_understood_and_fit(preset, monkeypatch):
    """The header of each says the exact command, and how much memory is needed."""
    sections = yaml.safe_load(preset.read_text())
    header = preset.read_text().split("\npretrain_encoder:")[0]
    assert f"--preset configs/presets/{preset.name}" in header
    for stage in sections:
        load(preset, stage, monkeypatch)

    options = load(preset, "pretrain_encoder", monkeypatch)
    options.optimizer.check()
    memory = estimate_encoder(options.encoder, options.expander, options.compute.precision)
    held = options.micro_batch_size or options.batch_size
    needed = memory.total(held, options.batch_size)
    assert f"{readable(needed)} for the encoder" in header
    assert needed < 0.8 * MEMORY[preset.stem]
    if options.micro_batch_size:  # only where the whole batch would not fit
        assert memory.total(options.batch_size) > 0.8 * MEMORY[preset.stem]

    dimension = options.encoder.embedding_dimension
    options = load(preset, "train_predictor", monkeypatch)
    options.optimizer.check()
    predictor = Predictor(options.predictor, dimension, 4.0, "", 1)
    losses, example = (
        Losses(predictor, torch.ones(options.rollout_steps)),
        example_inputs(predictor, options.rollout_steps),
    )
    memory = MemoryEstimate.of(losses, example, 2, with_precision(options.compute.precision))
    assert memory.total(options.batch_size) < 0.8 * MEMORY[preset.stem]


@pytest.mark.parametrize("preset", sorted((ROOT / "configs" / "cifar10").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_of_the_cifar_study_are_understood_and_built(preset, monkeypatch):
    assert f"--preset configs/cifar10/{preset.name}" in preset.read_text()
    options = load(preset, "pretrain_encoder", monkeypatch)
    options.optimizer.check()
    encoder = FrameEncoder(options.encoder).eval()
    outputs = Expander(encoder.embedding_dimension, options.expander).eval()(encoder(torch.zeros(2, 3, 32, 32)))
    sizes = {"laptop": (128, 512), "resnet18": (512, 2048), "vgg16": (50, 100)}
    assert (encoder.embedding_dimension, outputs.shape[1]) == sizes[preset.stem]


def test_every_machine_has_its_preset():
    assert {path.stem for path in PRESETS} == set(MEMORY)
