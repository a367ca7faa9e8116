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

from data.cache import EmbeddingCache
from jepa.encoder import EncoderConfig, FrameEncoder
from pipelines.cli import COMMANDS
from pipelines.run.artefacts import save_artefact
from pipelines.run.options import parse

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
