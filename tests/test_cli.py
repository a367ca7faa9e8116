"""The command `video-jepa`, and what happens to it beside other distributions that own packages of our names."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from pipelines import cli
from pipelines.run import installed
from pipelines.run.options import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
OTHER = """
build-system = {requires = ["setuptools>=77"], build-backend = "setuptools.build_meta"}
project = {name = "other-data", version = "1.0"}
tool.setuptools.packages = ["data"]
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Ours and another that owns `data/__init__.py` and `data/loading.py`, built from copies."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in ("jepa", "data", "pipelines"):
        shutil.copytree(ROOT / name, folder / "ours" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "ours")
    (folder / "other" / "data").mkdir(parents=True)
    (folder / "other" / "pyproject.toml").write_text(OTHER)
    for name in ("__init__", "loading"):
        (folder / "other" / "data" / f"{name}.py").write_text('OWNER = "other"\n')
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "ours", folder / "other")
    return {"ours": next(folder.glob("video_jepa*.whl")), "other": next(folder.glob("other_data*.whl"))}


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def environment(tmp_path):
    """An environment with nothing in it; libraries are borrowed from this one, behind its own."""
    venv.create(tmp_path / "venv", symlinks=True)
    own = tmp_path / "venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (own / "borrowed.pth").write_text(str(Path(np.__file__).parents[1]) + "\n")
    return tmp_path / "venv"


def change(environment, *arguments):
    pip("--python", environment / "bin" / "python", *arguments)


def run(environment, *arguments, python_path=""):
    """The command in a folder without anything of ours; the exit code, and both streams."""
    command, variables = [environment / "bin" / "video-jepa", *arguments], {"PYTHONPATH": str(python_path)}
    ended = subprocess.run(command, cwd=environment, capture_output=True, text=True, env=os.environ | variables)
    return ended.returncode, ended.stdout, ended.stderr


def test_an_installed_command_runs_from_an_empty_folder_though_another_is_called_data(wheels, environment):
    change(environment, "install", "--no-deps", wheels["ours"])
    (environment / "data").mkdir()  # a folder of somebody's data is no package
    code, said, complaint = run(environment, "inspect", "--help")
    assert (code, complaint) == (0, "")
    assert "usage: video-jepa inspect" in said


def test_installed_after_another_with_our_name_it_works_and_says_whom_it_broke(wheels, environment):
    for name in ("other", "ours"):
        change(environment, "install", "--no-deps", wheels[name])
    warning = "has overwritten files of other-data 1.0 (data/__init__.py): that may not work any more"
    code, _, complaint = run(environment, "--help")
    assert (code, complaint) == (0, f"warning: video-jepa {warning}\n")

    change(environment, "uninstall", "--yes", "other-data")  # takes our data/__init__.py away
    code, _, complaint = run(environment, "--help")
    assert (code, complaint.count("\n")) == (1, 1)
    assert "data/__init__.py is not the file that video-jepa installed (nor are 0 more)" in complaint
    change(environment, "install", "--no-deps", "--force-reinstall", wheels["ours"])
    assert run(environment, "--help")[2] == ""


def test_overwritten_by_another_with_our_name_it_refuses_and_names_it(wheels, environment):
    for name in ("ours", "other"):
        change(environment, "install", "--no-deps", wheels[name])
    code, _, complaint = run(environment, "--help")
    assert code == 1
    assert "data/__init__.py is not the file that video-jepa installed" in complaint
    assert "overwritten it or taken it away: other-data 1.0 (data/__init__.py); give video-jepa" in complaint


@pytest.mark.parametrize("package", ["jepa", "data"])
def test_a_package_that_python_finds_first_is_named(wheels, environment, package, tmp_path):
    change(environment, "install", "--no-deps", wheels["ours"])
    (tmp_path / "path" / package).mkdir(parents=True)
    (tmp_path / "path" / package / "__init__.py").touch()
    code, _, complaint = run(environment, "--help", python_path=tmp_path / "path")
    assert (code, complaint.count("\n")) == (1, 1)
    assert f"import {package} finds {tmp_path}/path/{package}/__init__.py, not video-jepa's" in complaint


@pytest.mark.parametrize(
    "way", [["pipelines/inspect_folder.py"], ["-m", "pipelines.inspect_folder"], ["-m", "pipelines.cli", "inspect"]]
)
def test_a_clone_has_three_ways_to_a_command(way, tmp_path):
    command = [sys.executable, *way, tmp_path / "nowhere"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, f"error: {tmp_path}/nowhere: no such file or folder\n")


def test_a_clone_is_its_own():
    # Another `data` in site-packages would win over an editable install.
    assert installed.check_packages() is None


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
