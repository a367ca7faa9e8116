"""What benchmarks share: the material beside the project, commands as a person runs them, tables over seeds."""

import csv
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data.cache import ClipKey, Column, EmbeddingCache, Provenance
from data.cache_writer import CacheWriter, EmbeddedClip
from data.picture import IMAGE_FPS
from data.video import TRANSFORM
from jepa.config import Bounded
from jepa.encoder import EncoderConfig, FrameEncoder
from pipelines.run.artefacts import save_artefact
from pipelines.run.command import UserError, require
from pipelines.run.files import write_json

ROOT = Path(__file__).resolve().parents[1]
FPS = 10.0
HORIZONS = (1, 5, 10, 15, 20)
"""Those that are shown, as far as a forecast goes."""
SIMPLE = ("copy_last", "ridge", "mean")


@dataclass(frozen=True)
class SeedOptions(Bounded):
    """What all benchmarks of several seeds are asked."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, order and noise, and of videos that are made."""
    output_dir: Path = Path("runs/benchmarks")
    """Where all runs and the results are left."""


class Figures(NamedTuple):
    """What a run of one seed has come to."""

    tables: dict[str, dict[str, list[float]]]
    """By measure and forecast, at each of `HORIZONS`."""
    measures: dict[str, float]


# Commands


def shared(name: str) -> Path:
    """A file or folder of the material beside the project. Raises `UserError` if it is not there."""
    path = Path(os.environ.get("JEPA_SHARED", ROOT.parent / "shared")).absolute() / name
    require(path.exists(), f"{path}: the material to measure on is not there; set JEPA_SHARED")
    return path


def words(*given: object) -> list[str]:
    """Words of a command line: paths absolute, mappings as options, sequences one by one.

    `words("--fps", 4, {"predictor.kind": "mlp", "resume": True})` is `--fps 4 --predictor.kind mlp --resume`.
    """
    found: list[str] = []
    for word in given:
        if isinstance(word, dict):
            for name, value in word.items():
                found += [f"--{name}"] if value is True else [f"--{name}", *words(value)]
        elif isinstance(word, list | tuple):
            found += words(*word)
        else:
            found.append(str(word.absolute()) if isinstance(word, Path) else str(word))
    return found


def script(command: str) -> list[str]:
    """The words that start a command, by its name, or a script with the command that this runs."""
    return [sys.executable, *(command.split() if ".py" in command else [f"pipelines/{command}.py"])]


def run(command: str, *given: object) -> None:
    """A command as a process of its own, its messages on this screen; for its options see `words`.

    Raises:
        UserError: it stopped with an error, which it has explained itself.
    """
    process = subprocess.Popen([*script(command), *words(*given)], cwd=ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # it saves first
        process.wait()
        raise
    if status:
        raise UserError(f"{command} stopped as it says above (exit code {status}): run this again to go on")


def run_once(command: str, folder: Path, *given: object) -> None:
    """A command that begins anew, unless it has finished in this folder: it leaves its metrics last."""
    if not (folder / "metrics.json").exists():
        run(command, *given, "--output-dir", folder, "--overwrite")


def train(command: str, folder: Path, *given: object) -> None:
    """A trainer, from where it stopped in this folder."""
    if not (folder / "metrics.json").exists():
        run(command, *given, "--output-dir", folder, "--resume")


def cpu_seconds_of(folder: Path, work: Callable[[], object]) -> float:
    """CPU-seconds of the commands in some work, of the first time: what is done already takes none when run again."""
    spent, before = folder / "cpu_seconds.json", _of_children()
    work()
    if not spent.exists():
        write_json(spent, {"training": _of_children() - before})
    return float(read_json(spent)["training"])


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# Models


class Recipe(NamedTuple):
    """How a world model is made of videos: options of the commands, as `words` takes them."""

    fps: float
    encoder: object = ()
    predictor: object = ()
    evaluation: object = ()
    columns: tuple[str, ...] = ()
    """Columns of the tables beside the videos: cached, and read off forecasts."""


def make_model(folder: Path, videos: Mapping[str, object], recipe: Recipe, seed: int) -> Path:
    """Encoder, caches, predictor and evaluation of one seed, by the commands, each unless it has finished.

    Args:
        folder: where `encoder`, `cache`, `predictor` and `evaluation` are left.
        videos: of the splits `train`, `val` and `test`.
        recipe: all that is not left at its default.
        seed: of weights, order and noise.

    Returns:
        The folder of the evaluation.
    """
    encoder, caches, predictor = folder / "encoder", folder / "cache", folder / "predictor"
    train("pretrain_encoder", encoder, {"videos": videos["train"], "fps": recipe.fps}, recipe.encoder, {"seed": seed})
    embed(caches, videos, encoder, recipe)
    train_on(caches, predictor, recipe.predictor, {"seed": seed})
    read_off = {"probe-cache": caches / "train", "probe-columns": recipe.columns} if recipe.columns else {}
    return evaluate(caches, predictor, recipe.evaluation, read_off)


def embed(caches: Path, videos: Mapping[str, object], encoder: Path, recipe: Recipe) -> None:
    """Cache embeddings by the encoder of a run, a folder for each split; what is there is not embedded again."""
    columns = {"columns": recipe.columns} if recipe.columns else {}
    for split, paths in videos.items():
        given = {"videos": paths, "encoder": encoder / "encoder", "fps": recipe.fps, "output-dir": caches / split}
        run("cache_embeddings", given, columns)


def train_on(caches: Path, folder: Path, *given: object, command: str = "train_predictor") -> None:
    """Train a predictor on `train` and `val` of some caches."""
    train(command, folder, {"train-cache": caches / "train", "validation-cache": caches / "val"}, *given)


def evaluate(caches: Path, predictor: Path, *given: object, command: str = "evaluate_rollout") -> Path:
    """Evaluate the predictor of a run on `caches/test`, into `evaluation` beside it."""
    folder = predictor.with_name(predictor.name.replace("predictor", "evaluation"))
    run_once(command, folder, {"cache": caches / "test", "predictor": predictor}, *given)
    return folder


def make_encoder(folder: Path, size: int, dimension: int = 32) -> Path:
    """A small untrained encoder on disk, as `pretrain_encoder` leaves one."""
    torch.manual_seed(0)
    config = EncoderConfig(image_size=(size, size), embedding_dimension=dimension)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_artefact(folder, "encoder", asdict(config), FrameEncoder(config).eval())
    return folder


def write_cache(folder: Path, clips: Iterable[tuple[str, np.ndarray]], dimension: int, **fields: Any) -> Path:
    """Write what is not there yet of a cache: embeddings float (T, dimension), each of a video of that name."""
    there = {clip.key.source for clip in EmbeddingCache(folder).clips} if (folder / "cache.json").exists() else set()
    provenance = Provenance(
        encoder="benchmark", encoder_fingerprint="benchmark", fps=FPS, image_fps=IMAGE_FPS, image_size=(64, 64),
        window=1, transform=TRANSFORM, precision="fp32", versions={},
        columns={"embeddings": Column("float16", (dimension,))},
    )  # fmt: skip
    with CacheWriter(folder, provenance, **fields) as writer:
        for source, embeddings in clips:
            ticks = np.arange(len(embeddings))
            if source not in there:
                writer.add(EmbeddedClip(ClipKey(source, source, 0.0), {"embeddings": embeddings}, ticks / FPS, ticks))
    return folder


# Results


def read_json(path: Path) -> Any:
    """The content of a file of results."""
    return json.loads(path.read_text())


def curves(evaluation: Path, measure: str) -> dict[str, list[float]]:
    """A measure of each forecast, and of the `truth` where it has one, at every horizon."""
    found = read_json(evaluation / "rollout.json")
    records = {**found["predictors"], "truth": found["truth"]}
    return {name: [row[measure] for row in rows] for name, rows in records.items() if measure in rows[0]}


def at_horizons(curve: Sequence[float]) -> list[float]:
    """What a curve is at each of `HORIZONS` that it has."""
    return [float(curve[horizon - 1]) for horizon in HORIZONS if horizon <= len(curve)]


def forecasts(evaluation: Path, measure: str) -> dict[str, list[float]]:
    """A measure of each forecast at each of `HORIZONS`."""
    return {name: at_horizons(curve) for name, curve in curves(evaluation, measure).items()}


def figures(evaluation: Path, *measures: str) -> Figures:
    """Some measures of an evaluation, and how the forecast compares with the best simple guess and with ridge."""
    found = curves(evaluation, "relative_to_copy_last")
    model, ridge = np.array(found["model"]), np.array(found["ridge"])
    of_best = model / np.min([found[name] for name in SIMPLE], axis=0)
    compared = {"of the best simple guess, worst horizon": float(of_best.max())}
    for horizon, value in zip(HORIZONS, at_horizons(of_best), strict=False):
        compared[f"of the best simple guess, {horizon} ahead"] = value
    compared["of ridge, mean over horizons"] = float((model / ridge).mean())
    return Figures({name: forecasts(evaluation, name) for name in ("relative_to_copy_last", *measures)}, compared)


def read_scores(path: Path, column: str) -> dict[str, np.ndarray]:
    """A column of `surprise.csv` for each video, (N,)."""
    found: dict[str, list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["video"], []).append(float(row[column]))
    return {video: np.array(scores) for video, scores in found.items()}


def measure_seeds(options: SeedOptions, measure: Callable[[int, Path], Figures]) -> None:
    """Measure each seed in a folder of its own, print tables over seeds in Markdown, leave `results.json`."""
    runs = []
    for seed in options.seeds:
        folder = options.output_dir / f"seed_{seed}"
        is_new, started = not folder.exists(), time.monotonic()
        found = measure(seed, folder)
        if is_new:
            found.measures["everything: seconds"] = time.monotonic() - started
        runs.append(found)
    write_results(options.output_dir, [found._asdict() for found in runs])
    for name in runs[0].tables:
        print(f"\n{name.replace('_', ' ')}\n\n{table_by_horizon([found.tables[name] for found in runs])}")
    print(f"\n{table_of_measures({'': [found.measures for found in runs]})}")


def write_results(folder: Path, results: object) -> None:
    """Leave `results.json` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)


def markdown(rows: Sequence[Sequence[object]]) -> str:
    """A table; the first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in line)} |"
                     for line in lines)  # fmt: skip


def over_seeds(values: Sequence[float]) -> str:
    """A cell: the mean over seeds and their range."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table_by_horizon(runs: Sequence[dict[str, list[float]]]) -> str:
    """Figures by name at each of `HORIZONS`, over the runs of several seeds."""
    rows = [[name, *map(over_seeds, zip(*(run[name] for run in runs), strict=True))] for name in runs[0]]
    return markdown([["steps ahead", *HORIZONS[: len(rows[0]) - 1]], *rows])


def table_of_measures(runs: dict[str, list[dict[str, float]]]) -> str:
    """Figures by name, a column for each contestant with its runs of several seeds; some may lack one."""
    rows: list[list[object]] = [["measure", *runs]]
    for name in dict.fromkeys(name for of_seeds in runs.values() for figures in of_seeds for name in figures):
        found = [[figures[name] for figures in of_seeds if name in figures] for of_seeds in runs.values()]
        rows.append([name, *(over_seeds(values) if values else "" for values in found)])
    return markdown(rows)
