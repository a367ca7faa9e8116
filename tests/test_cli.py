"""The command `video-jepa`, from a clone, and installed beside another distribution with a package of our names."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from pipelines import cli, score_surprise, train_predictor
from pipelines.run import command
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


def run(environment, *arguments):
    """The command in a folder without anything of ours; the exit code and what it complains of."""
    variables = os.environ | {"PYTHONPATH": ""}
    command = [environment / "bin" / "video-jepa", *arguments]
    ended = subprocess.run(command, cwd=environment, capture_output=True, text=True, env=variables)
    return ended.returncode, ended.stderr


def test_installed_after_another_with_our_name_it_works_and_says_whom_it_broke(wheels, environment):
    (environment / "data").mkdir()  # a folder of somebody's data is no package
    change(environment, "install", "--no-deps", wheels["ours"])
    assert run(environment, "inspect", "--help") == (0, "")
    change(environment, "uninstall", "--yes", "video-jepa")
    for name in ("other", "ours"):
        change(environment, "install", "--no-deps", wheels[name])
    code, complaint = run(environment, "--help")
    assert (code, complaint.count("\n")) == (0, 1)
    assert "warning: video-jepa has overwritten files of other-data, which may not work any more" in complaint

    change(environment, "uninstall", "--yes", "other-data")  # takes our data/__init__.py away
    code, complaint = run(environment, "--help")
    assert code == 1
    assert complaint.count("\n") == 1


def test_overwritten_by_another_with_our_name_it_refuses_and_names_it(wheels, environment):
    for name in ("ours", "other"):
        change(environment, "install", "--no-deps", wheels[name])
    code, complaint = run(environment, "--help")
    assert code == 1
    assert "error: other-data has overwritten" in complaint
    assert "data/__init__.py or taken it away: give video-jepa an environment of its own" in complaint


@pytest.mark.parametrize("package", ["jepa", "data"])
def test_a_package_that_python_finds_first_is_named(package, tmp_path):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    start = [sys.executable, "-c", "import sys; sys.path += [sys.argv.pop(1)]; from pipelines.cli import main; main()"]
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


@pytest.mark.parametrize("module", cli.COMMANDS.values())
def test_every_command_is_a_script_too(module):
    last = (ROOT / f"pipelines/{module}.py").read_text().splitlines()[-2:]
    assert last == ['if __name__ == "__main__":', "    run_command(main, Options)"]


def test_a_command_that_is_one_process_says_so(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(command, "_leave_at_once", ended.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    command.run_command(score_surprise.main, score_surprise.Options)
    assert "error: this command takes one process: start it without a launcher" in capsys.readouterr().err
    assert ended[0] == 1


@pytest.mark.parametrize(
    "given",
    [
        "WORLD_SIZE='two'", "WORLD_SIZE='0'", "WORLD_SIZE=''", "WORLD_SIZE='2'", "WORLD_SIZE='2' RANK='2'", "RANK='x'",
        "RANK='-1'", "MASTER_PORT='two'", "MASTER_PORT='99999'", "LOCAL_RANK='x'", "LOCAL_RANK='0'",
        "LOCAL_WORLD_SIZE='0'",
    ],
)  # fmt: skip
def test_variables_that_no_launcher_sets_are_one_line(given, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(command, "_leave_at_once", ended.append)
    for one in given.split():
        monkeypatch.setenv(one.split("=")[0], one.split("'")[1])
    command.run_command(train_predictor.main, train_predictor.Options)
    line = capsys.readouterr().err
    assert (ended[0], line.count("\n")) == (1, 1)
    assert f"error: {given} in the environment is from no launcher: unset it, or use torchrun\n" in line


def test_an_unknown_command_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["video-jepa", "tran"])
    with pytest.raises(SystemExit, match="error: there is no command tran\nusage: video-jepa COMMAND"):
        cli.main()
