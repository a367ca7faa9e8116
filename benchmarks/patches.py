r"""Forecasting of patches: a robot's arms and a drive, 1, 2 and 3 s ahead, and where in the picture it is good.

  python -m benchmarks.patches --seeds 0 1 2 --output-dir runs/benchmarks/patches

Patches of a published backbone, frozen, on a grid of 4x5 cells; a transformer over places and time, without actions,
beside copying and ridge regression on own past and neighbours, in the same space. The robot is tested on its last
eight episodes, the drive on `b_02`, of which nothing else is known. `results.json` has, by data set, errors of the
believed forecast relative to copying and to ridge at each second, mean over seeds, with intervals by stretches, and
`map`: those relative to copying of each cell.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import SeedOptions, markdown, run, shared, train_on, write_results
from benchmarks.driving import RECORDINGS, cut_recording
from benchmarks.robot import Options as RobotOptions
from benchmarks.robot import divide
from data.cache import EmbeddingCache
from jepa.bootstrap import Bootstrap
from pipelines.run.command import run_command
from pipelines.run.evaluation import Evaluation, group_windows
from pipelines.run.models import in_batches, load_predictor, windows_for

SECONDS, NAMES = (1, 2, 3), ("model", "ridge", "copy_last")
FPS = {"robot": 5.0, "driving": 4.0}
GRID = (4, 5)
ENCODER = {"encoder": "timm:tf_efficientnet_lite0", "tokens": "grid", "grid": GRID, "levels": 3, "image-size": (64, 80),
           "pca": 32}  # fmt: skip
PREDICTOR = {"predictor.kind": "transformer", "predictor.context": 4, "predictor.width": 256, "predictor.depth": 2,
             "rollout-steps": 10, "steps": 400, "batch-size": 512}  # fmt: skip


@dataclass(frozen=True)
class Options(SeedOptions):
    """Forecasting of patches."""

    output_dir: Path = Path("runs/benchmarks/patches")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: embed each data set once, train each seed, compare by second and by cell."""
    found = {}
    for name in FPS:
        folder = options.output_dir / name
        embed(folder, videos_of(name, folder), FPS[name])
        found[name] = compare(folder, options.seeds, FPS[name])
        print(f"\n{name}\n\n{table(found[name])}\n")
    write_results(options.output_dir, found)


def videos_of(name: str, folder: Path) -> dict[str, list[Path]]:
    """Videos to train on, to choose and calibrate by, and to test on."""
    if name == "robot":
        return divide(RobotOptions())
    (folder / "cut").mkdir(parents=True, exist_ok=True)
    recordings = shared("driving")
    cut = [cut_recording(recordings / f"{recording}.mp4", folder / "cut") for recording in RECORDINGS]
    heads, tails = zip(*cut, strict=True)
    return {"train": list(heads), "val": list(tails), "test": [recordings / "b_02.mp4"]}


def embed(folder: Path, videos: dict[str, list[Path]], fps: float) -> None:
    """Caches of all splits; principal components are those of the training videos."""
    encoder: dict[str, object] = ENCODER | {"encoder-weights": shared("weights/tf_efficientnet_lite0.safetensors")}
    for split, clips in videos.items():
        given = {"videos": clips, "fps": fps, "output-dir": folder / "cache" / split}
        run("cache_embeddings", encoder, given, {"clocks": 3 if split == "train" else 1})
        encoder = {"encoder": folder / "cache/train/encoder"}


def compare(folder: Path, seeds: tuple[int, ...], fps: float) -> dict[str, Any]:
    """Errors of the test, mean over seeds, as ratios."""
    cache, errors = EmbeddingCache(folder / "cache/test"), []
    for seed in seeds:
        train_on(folder / "cache", folder / f"predictor_{seed}", PREDICTOR, {"seed": seed})
        predictor, calibration = load_predictor(folder / f"predictor_{seed}")
        windows = windows_for(cache, predictor, predictor.config.context + round(max(SECONDS) * fps))
        errors.append(errors_by_cell(Evaluation(predictor, calibration, windows, seed=seed), fps))
    by_cell = {name: np.mean([one[name] for one in errors], axis=0) for name in NAMES}  # (N, seconds, rows, columns)
    groups, _ = group_windows(windows, np.arange(len(windows)))
    bootstrap, found = Bootstrap(groups), dict[str, Any]()
    for one, other in (("model", "copy_last"), ("ridge", "copy_last"), ("model", "ridge")):
        above, below = (by_cell[name].mean(axis=(2, 3)) for name in (one, other))
        ratio = above.mean(axis=0) / below.mean(axis=0)
        ends = bootstrap.interval(bootstrap.means(above) / bootstrap.means(below))
        found[f"{one}_of_{other}"] = {
            str(second): {"value": float(ratio[place]), "interval": ends[:, place].tolist()}
            for place, second in enumerate(SECONDS)
        }
    skill = by_cell["model"].mean(axis=0) / by_cell["copy_last"].mean(axis=0)
    return found | {"map": dict(zip(map(str, SECONDS), skill.tolist(), strict=True))}


def errors_by_cell(judge: Evaluation, fps: float) -> dict[str, np.ndarray]:
    """Squared errors of each forecast, float32 (N, seconds, rows, columns)."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    ticks = [round(second * fps) - 1 for second in SECONDS]
    for _, taken in in_batches(judge.windows, np.arange(len(judge.windows)), judge.device):
        batch = judge.forecast(taken)
        for name in NAMES:
            error = batch.forecasts[name][:, ticks] - batch.came[:, ticks]
            found[name].append(error.square().mean(dim=-1))
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def table(found: dict[str, Any]) -> str:
    """In Markdown: ratios by second, then the map of the first second."""
    rows: list[list[object]] = [["", *(f"{second} s" for second in SECONDS)]]
    for name, values in found.items():
        if name != "map":
            cells = [f"{one['value']:.3f} ({one['interval'][0]:.3f} to {one['interval'][1]:.3f})"
                     for one in values.values()]  # fmt: skip
            rows.append([name.replace("_", " "), *cells])
    cells = [[f"{cell:.2f}" for cell in row] for row in found["map"]["1"]]
    return f"{markdown(rows)}\n\nof copying, by cell, 1 s ahead\n\n" + "\n".join(" ".join(row) for row in cells)


if __name__ == "__main__":
    run_command(main, Options)
