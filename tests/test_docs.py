"""What the pages show is so: commands are understood, code runs, links lead somewhere."""

import dataclasses
import importlib
import re
import shlex
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
from PIL import Image

from data.cache import EmbeddingCache
from data.synthetic import write_table, write_video
from jepa.encoder import EncoderConfig, FrameEncoder
from pipelines.cli import COMMANDS
from pipelines.run.artefacts import save_artefact
from pipelines.run.options import parse
from tests.test_commands import call

ROOT = Path(__file__).resolve().parents[1]
OTHER_OPTIONS = {"help", "preset", "cpu", "no_python", "num_processes", "main_process_port"}
"""Those of accelerate, and of all commands."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def shown_commands():
    """Each `video-jepa COMMAND` with options, in a code block or between backticks, as words."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        blocks = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        for line in [*blocks, *re.findall(r"`(video-jepa [^`]+)`", text)]:
            words = shlex.split(line, comments=True)
            if words[:1] == ["video-jepa"] and len(words) > 2:
                yield pytest.param(words[1:], id=f"{page.stem}: {' '.join(words[1:])[:60]}")


@pytest.mark.parametrize("words", [*shown_commands()])
def test_commands_that_pages_show_are_understood(words, monkeypatch):
    module = importlib.import_module(f"pipelines.{COMMANDS[words[0]]}")
    monkeypatch.chdir(ROOT)  # presets lie there
    monkeypatch.setattr(sys, "argv", ["video-jepa", *words[1:]])
    parse(module.Options, COMMANDS[words[0]])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_pages_name_are_there(page):
    named = re.findall(
        r"`((?:jepa|data|pipelines|examples|benchmarks|tests|configs|docs|notebooks)/[\w./-]+)`", page.read_text()
    )
    assert [name for name in named if page.parent.name != "log" and not (ROOT / name).exists()] == []


def option_names(kind, prefix=""):
    """All options of a command, those of every kind in a union included."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield f"{prefix}{field.name}".replace("_", "-")
        for inner in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(inner):
                yield f"{prefix}{field.name}.kind".replace("_", "-")
                yield from option_names(inner, f"{prefix}{field.name}.")


def test_options_that_pages_name_exist():
    modules = [importlib.import_module(f"pipelines.{name}") for name in COMMANDS.values()]
    options = {name for module in modules for name in option_names(module.Options)} | OTHER_OPTIONS
    for page in PAGES:
        named = re.findall(r"`--([a-z][\w.-]+)", page.read_text()) if page.parent.name != "log" else []
        assert [name for name in named if name not in options] == [], page


@pytest.fixture
def workplace(tmp_path, monkeypatch, make_clip, write_cache, save_model):
    """A folder with a cache, a predictor with its calibration, and an encoder, where the pages expect them."""
    monkeypatch.chdir(tmp_path)
    cache = write_cache(tmp_path / "cache" / "test", [make_clip(f"/{index}.mp4", 40, seed=index) for index in range(6)])
    save_model(tmp_path / "runs" / "predictor", EmbeddingCache(cache), horizon=6)
    encoder = FrameEncoder(EncoderConfig(image_size=(32, 32), embedding_dimension=5))
    (tmp_path / "runs" / "encoder").mkdir()
    save_artefact(tmp_path / "runs" / "encoder" / "encoder", "encoder", encoder.config, encoder)
    call("export_cache", f"{cache} --to lance --output-dir exported")
    return tmp_path


def test_the_page_on_python_runs(workplace):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL):
        exec(block, names)  # as it stands there
    assert names["embeddings"].shape == (40, 5)
    assert np.diff(names["times_s"]) == pytest.approx(0.25)
    assert names["believed"].shape == (100, 6, 5)
    assert names["energy"].shape == (100, 6)
    assert names["percentile"].min() >= 0
    assert names["percentile"].max() <= 100
    assert names["vectors"].shape == (4, 5)
    again = EmbeddingCache(workplace / "cache" / "again")
    assert again.provenance == names["cache"].provenance
    assert [clip.key for clip in again.clips] == [clip.key for clip in names["cache"].clips]
    for ours, theirs in zip(again.clips, names["cache"].clips, strict=True):
        assert again.take(ours.rows).tobytes() == names["cache"].take(theirs.rows).tobytes()
        for name in ("times_s", "ticks"):
            assert again.take(ours.rows, name).tobytes() == names["cache"].take(theirs.rows, name).tobytes()


RECIPES = (ROOT / "docs" / "recipes.md").read_text()
SMALLEST = {
    "all": "--encoder-steps 2 --predictor-steps 2 --decoder-steps 2",
    "train": "--steps 2 --predictor.width 16",
    "surprise": "--alarms-per-hour 10000",
}
"""What is added to commands of recipes, so that they take seconds; the later of two options counts."""


@pytest.mark.slow
@pytest.mark.parametrize("title", re.findall(r"^## (.+)", RECIPES, re.MULTILINE))
def test_recipes_run_word_by_word_in_their_smallest_form(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), "weights.safetensors")
    published = "timm:test_resnet --encoder-weights weights.safetensors --image-size 64 64"
    block = re.search(r"```\n(.*?)```", RECIPES.partition(f"## {title}\n")[2], re.DOTALL)[1]
    for line in block.splitlines():
        _, command, *words = shlex.split(line)
        for folder in [words[0]] * (command == "all") + [word for word in words if word.startswith("cctv/")]:
            film(Path(folder))
        given = " ".join(words).replace("timm:vit_small_patch14_dinov2.lvd142m", published).replace("15 22", "2 2")
        call(COMMANDS[command], f"{given.replace('--image-size 224 392', '')} {SMALLEST.get(command, '')}")
        assert any((tmp_path / words[words.index("--output-dir") + 1]).iterdir())


def film(folder):
    """Six recordings of ten seconds in a new folder, with tables; of a microscope forty images each."""
    for number in range(6):
        draws = np.random.default_rng([number, *folder.name.encode()])
        frames = draws.integers(0, 256, (100, 32, 48, 3), dtype=np.uint8)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.name == "microscope":
            (folder / f"well_{number}").mkdir()
            for index, frame in enumerate(frames[:40]):
                Image.fromarray(frame).save(folder / f"well_{number}" / f"{index:04}.png")
        else:
            table = dict(zip(("speed", "action_0", "action_1"), draws.normal(size=(3, 100)), strict=True))
            write_video(folder / f"drive_{number}.mp4", frames, 10)
            write_table(folder / f"drive_{number}.csv", table, 10)
