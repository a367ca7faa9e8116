"""What benchmarks share: the material beside the project, commands as a person runs them, tables over seeds."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.run.command import UserError, require

ROOT = Path(__file__).resolve().parents[1]


def shared(name: str) -> Path:
    """A file or folder of the material beside the project (`$JEPA_SHARED`, by default `../shared`).

    Raises:
        UserError: it is not there.
    """
    path = Path(os.environ.get("JEPA_SHARED", ROOT.parent / "shared")).absolute() / name
    require(path.exists(), f"{path}: the material to measure on is not there; set JEPA_SHARED")
    return path


def words(*given: object) -> list[str]:
    """Words of a command line: paths absolute, mappings as options, sequences one by one.

    `words("--fps", 4, {"predictor.kind": "gru", "resume": True})` is `--fps 4 --predictor.kind gru --resume`.
    """
    found: list[str] = []
    for word in given:
        if isinstance(word, dict):
            for name, value in word.items():
                switch = f"--{'' if value is not False else 'no-'}{name}"
                found += [switch] if isinstance(value, bool) else [switch, *words(value)]
        elif isinstance(word, list | tuple):
            found += words(*word)
        else:
            found.append(str(word.absolute()) if isinstance(word, Path) else str(word))
    return found


def run(command: str, *given: object) -> None:
    """A command of `pipelines/` as a process of its own, its messages on this screen.

    Raises:
        UserError: it stopped with an error, which it has explained itself.
    """
    process = subprocess.Popen([sys.executable, f"pipelines/{command}.py", *words(*given)], cwd=ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # it saves first
        process.wait()
        raise
    if status:
        raise UserError(f"{command} stopped as it says above (exit code {status}): run this again to go on")


def train(command: str, folder: Path, *given: object) -> float | None:
    """A trainer or a measurement, unless it has finished in this folder; seconds, if it ran from its beginning."""
    if finished(folder):
        return None
    fresh, started = not folder.exists(), time.monotonic()
    run(command, *given, "--output-dir", folder, "--resume")
    return time.monotonic() - started if fresh else None


def finished(folder: Path) -> bool:
    """Whether a command has left its metrics, which it does last."""
    return (folder / "metrics.json").exists()


def read_json(path: Path) -> Any:
    """The content of a file of results."""
    return json.loads(path.read_text())


def markdown(rows: Sequence[Sequence[object]]) -> str:
    """A table; the first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in line)} |"
                     for line in lines)  # fmt: skip


def over_seeds(values: Sequence[float]) -> str:
    """A cell: the mean over seeds and their range."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table_by_horizon(runs: Sequence[dict[str, Sequence[float]]], horizons: Sequence[int]) -> str:
    """Figures by name at each horizon, over the runs of several seeds."""
    rows = [[name, *(over_seeds([run[name][at] for run in runs]) for at in range(len(horizons)))] for name in runs[0]]
    return markdown([["steps ahead", *horizons], *rows])


def table_of_measures(runs: dict[str, list[dict[str, float]]]) -> str:
    """Figures by name, a column for each contestant with its runs of several seeds; some may lack one."""
    names = dict.fromkeys(name for of_seeds in runs.values() for figures in of_seeds for name in figures)
    rows: list[list[object]] = [["measure", *runs]]
    for name in names:
        found = [[figures[name] for figures in of_seeds if name in figures] for of_seeds in runs.values()]
        rows.append([name, *(over_seeds(values) if values else "" for values in found)])
    return markdown(rows)
