"""What benchmarks share: the material beside the project, commands as a person runs them, tables over seeds."""

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from jepa.encoder import EncoderConfig, FrameEncoder
from pipelines.run.artefacts import save_artefact
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
    """A command as a process of its own, its messages on this screen.

    Args:
        command: its name, or a script and a command that this runs.
        given: its options, see `words`.

    Raises:
        UserError: it stopped with an error, which it has explained itself.
    """
    process = subprocess.Popen([sys.executable, *script(command), *words(*given)], cwd=ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # it saves first
        process.wait()
        raise
    if status:
        raise UserError(f"{command} stopped as it says above (exit code {status}): run this again to go on")


def script(command: str) -> list[str]:
    """The words that start a command."""
    return command.split() if ".py" in command else [f"pipelines/{command}.py"]


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


def descendants(pid: int) -> list[int]:
    """A process and all that it has started; torchrun gives each of its workers a session of its own."""
    children: list[int] = []
    with suppress(OSError):  # it may be gone by now
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return [pid, *(process for child in children for process in descendants(child))]


def run_measured(command: str, *given: object) -> tuple[float, float]:
    """Seconds and greatest anonymous memory in MB of a command and all its processes; mapped files do not count.

    Raises:
        UserError: it failed.
    """
    before, peak_kib = time.monotonic(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *script(command), *words(*given)], cwd=ROOT, stdout=output, stderr=output
        )
        while process.poll() is None:
            peak_kib = max(peak_kib, sum(map(anonymous_kib, descendants(process.pid))))
            time.sleep(0.02)
        seconds = time.monotonic() - before
        output.seek(0)
        require(process.returncode == 0, f"{command} failed: {output.read().decode(errors='replace')[-500:]}")
    return seconds, peak_kib * 1024 / 1e6


def anonymous_kib(pid: int) -> int:
    """Anonymous memory of a process."""
    with suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) if found else 0
    return 0


class Recipe(NamedTuple):
    """How a world model is made of videos: options of the commands, as `words` takes them."""

    fps: float
    encoder: object = ()
    predictor: object = ()
    evaluation: object = ()
    columns: tuple[str, ...] = ()
    """Columns of the tables beside the videos: cached, and read off forecasts."""


def make_model(folder: Path, videos: Mapping[str, object], recipe: Recipe, seed: int) -> dict[str, float]:
    """Encoder, caches, predictor and evaluation of one seed, by the commands, each unless it has finished.

    Args:
        folder: where `encoder`, `cache`, `predictor` and `evaluation` are left.
        videos: of the splits `train`, `val` and `test`.
        recipe: all that is not left at its default.
        seed: of weights, order and noise.

    Returns:
        Seconds of what was trained from its beginning.
    """
    common = {"seed": seed}
    seconds = {"encoder": train("pretrain_encoder", folder / "encoder", {"videos": videos["train"], "fps": recipe.fps},
                                recipe.encoder, common)}  # fmt: skip
    embed(folder, videos, recipe)
    caches = {"train-cache": folder / "cache" / "train", "validation-cache": folder / "cache" / "val"}
    seconds["predictor"] = train("train_predictor", folder / "predictor", caches, recipe.predictor, common)
    probes = {"probe-cache": caches["train-cache"], "probe-columns": recipe.columns} if recipe.columns else {}
    evaluate(folder / "cache", folder / "predictor", [recipe.evaluation, probes])
    return {f"training, {name}: seconds": value for name, value in seconds.items() if value is not None}


def embed(folder: Path, videos: Mapping[str, object], recipe: Recipe) -> None:
    """Cache embeddings by the encoder of a run; what is there already is not embedded again."""
    for split, paths in videos.items():
        columns = {"columns": recipe.columns} if recipe.columns else {}
        run("cache_embeddings", {"videos": paths, "encoder": folder / "encoder" / "encoder", "fps": recipe.fps},
            columns, "--output-dir", folder / "cache" / split)  # fmt: skip


def evaluate(caches: Path, predictor: Path, given: object = (), command: str = "evaluate_rollout") -> None:
    """Evaluate the predictor of a run on `caches/test`, into `evaluation` beside it, unless that has finished."""
    folder = predictor.with_name(predictor.name.replace("predictor", "evaluation"))
    if not finished(folder):
        run(command, {"cache": caches / "test", "predictor": predictor}, given, "--output-dir", folder, "--overwrite")


def forecasts(evaluation: Path, measure: str, horizons: Sequence[int]) -> dict[str, list[float]]:
    """A measure of each predictor at some horizons; several numbers, as of several columns, by their mean."""
    found = read_json(evaluation / "rollout.json")["predictors"]
    return {name: [float(np.mean(records[horizon - 1][measure])) for horizon in horizons]
            for name, records in found.items() if measure in records[0]}  # fmt: skip


def read_scores(path: Path, column: str) -> dict[str, np.ndarray]:
    """Times and a column of `surprise.csv` for each video, (N, 2)."""
    found: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["video"], []).append((float(row["time_s"]), float(row[column])))
    return {video: np.array(scores) for video, scores in found.items()}


def make_encoder(folder: Path, size: int, dimension: int = 32) -> Path:
    """A small untrained encoder on disk, as `pretrain_encoder` leaves one."""
    torch.manual_seed(0)
    config = EncoderConfig(image_size=(size, size), embedding_dimension=dimension)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_artefact(folder, "encoder", asdict(config), FrameEncoder(config).eval())
    return folder
