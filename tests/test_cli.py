"""The command `video-jepa`, from a clone and installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.run.options import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("package", ["jepa", "data"])
def test_a_package_that_python_finds_first_is_named(package, tmp_path):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    start = [
        sys.executable,
        "-c",
        "import sys; sys.path.append(sys.argv.pop(1)); from pipelines.cli import main; main()",
    ]
    command = [*start, ROOT, "--help"]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert f"error: import {package} finds {tmp_path}/{package}/__init__.py, not {ROOT}/{package}" in ended.stderr


@pytest.mark.parametrize(
    "way", [["pipelines/inspect_folder.py"], ["-m", "pipelines.inspect_folder"], ["-m", "pipelines.cli", "inspect"]]
)
def test_a_clone_has_three_ways_to_a_command(way, tmp_path):
    command = [sys.executable, *way, tmp_path / "nowhere"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, f"error: {tmp_path}/nowhere: no such file or folder\n")


def test_all_commands_are_told_with_one_line_each(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["video-jepa"])
    cli.main()
    told = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [words[0] for words in told] == list(cli.COMMANDS)
    assert all(len(words) > 2 for words in told)
    assert set(cli.COMMANDS.values()) == set(COMMANDS)


def test_an_unknown_command_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["video-jepa", "tran"])
    with pytest.raises(SystemExit, match="error: there is no command tran\nusage: video-jepa COMMAND"):
        cli.main()
