r"""Bouncing balls, several seeds: what the recipe reaches on clips that were never looked at.

  python -m benchmarks.balls --seeds 0 1 2

For each seed: what the demo does with more clips and steps (videos, models and test clips of that seed), then on its
test clips the linear probe of the balls' positions, and skill; the same probe on a static textured
background; and a run without the variance term, which has to trip the collapse alarm. Prints tables in Markdown and
writes `results.json`. Other benchmarks go on from there.
"""

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import (
    Recipe,
    embed,
    finished,
    forecasts,
    make_model,
    read_json,
    run,
    table_by_horizon,
    table_of_measures,
    train,
)  # fmt: skip
from benchmarks.robot import compare_with_the_best
from data.cache import EmbeddingCache
from data.synthetic import STATE_COLUMNS, BallWorld, write_ball_videos
from jepa.bootstrap import r2, reading_moments
from jepa.probe import fit_probe
from pipelines.run.command import run_command
from pipelines.run.files import write_json

CLIPS = {"train": 4000, "val": 100, "test": 100}
RECIPE = Recipe(
    fps=BallWorld().fps,
    encoder={"steps": 1500},
    predictor={"steps": 4500, "precision": "bf16", "rollout-steps": 5, "log-every": 500},
    columns=STATE_COLUMNS,
)
"""What ten minutes of training on 2 cores allow; the demo has less time."""
HORIZONS = (1, 5, 10, 20)


@dataclass(frozen=True)
class Options:
    """Bouncing balls, several seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each makes its own videos and models."""
    output_dir: Path = Path("runs/benchmarks/balls")
    """Where all runs and the results are left."""
    encoder_checks: bool = True
    """Also train encoders in front of a static texture, and without the variance term."""


def main(options: Options) -> None:
    """The story: run each seed, gather, print."""
    results = [measure_seed(seed, options.output_dir / f"seed_{seed}", options) for seed in options.seeds]
    write_json(options.output_dir / "results.json", results)
    for name in ("of_copy_last", "of_ridge", "of_mean", "position_r2"):
        print(f"\n{name.replace('_', ' ')}\n\n{table_by_horizon([result[name] for result in results], HORIZONS)}")
    print(f"\n{table_of_measures({'': [result['measures'] for result in results]})}")


def measure_seed(seed: int, folder: Path, options: Options) -> dict[str, Any]:
    """All figures of one seed: of forecasts at each of `HORIZONS`, and the others."""
    started, fresh = time.monotonic(), not folder.exists()
    videos = {split: folder / "videos" / split for split in CLIPS}
    for number, (split, clips) in enumerate(CLIPS.items()):
        write_ball_videos(videos[split], clips, BallWorld(), seed=3 * seed + number)
    measures = make_model(folder, videos, RECIPE, seed)
    if fresh:
        measures["all, from drawing the videos to the evaluation: seconds"] = time.monotonic() - started
        largest_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of any seed so far
        measures["memory of the largest process: GB"] = 1024 * largest_kib / 1e9
    evaluation = folder / "evaluation"
    measures |= probe_positions(folder / "cache", "full")
    measures |= compare_with_the_best(evaluation)
    if options.encoder_checks:
        measures |= textured(seed, folder / "textured") | collapse(seed, folder)
    tables = {f"of_{rival}": forecasts(evaluation, f"relative_to_{rival}", HORIZONS)
              for rival in ("copy_last", "ridge", "mean")}  # fmt: skip
    return tables | {"position_r2": forecasts(evaluation, "probe_r2", HORIZONS), "measures": measures}


def textured(seed: int, folder: Path) -> dict[str, float]:
    """Position R2 of an encoder trained in front of static textures."""
    world = BallWorld(background="textured")
    videos = {"train": folder / "videos" / "train", "test": folder / "videos" / "test"}
    for number, (split, clips) in enumerate({"train": 1000, "test": 100}.items()):
        write_ball_videos(videos[split], clips, world, seed=1000 + 2 * seed + number)
    train("pretrain_encoder", folder / "encoder", {"videos": videos["train"], "fps": world.fps, "seed": seed})
    embed(folder, videos, Recipe(world.fps, columns=STATE_COLUMNS))
    return probe_positions(folder / "cache", "textured")


def probe_positions(caches: Path, name: str) -> dict[str, float]:
    """R2 of the balls' positions, read linearly off the embeddings of single test frames."""
    (embeddings, true, groups), (asked, expected, _) = (read_labelled(caches / split) for split in ("train", "test"))
    probe = fit_probe([(embeddings, true, groups)], embeddings.shape[1:])
    mean, _ = probe.columns
    found = r2(reading_moments(probe(asked) - mean, expected - mean).sum(dim=0).numpy())
    return {
        f"{name}: position R2, mean": float(found.mean()),
        f"{name}: position R2, worst coordinate": float(found.min()),
    }


def read_labelled(folder: Path, most: int = 40_000) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, positions and clips of at most so many frames of a cache."""
    cache = EmbeddingCache(folder)
    clips = np.repeat(np.arange(len(cache.clips)), [clip.frames for clip in cache.clips])
    rows = np.concatenate([clip.start + np.arange(clip.frames) for clip in cache.clips])
    chosen = np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)
    columns = np.stack([cache.take(rows[chosen], column) for column in STATE_COLUMNS], axis=1)
    return torch.from_numpy(cache.take(rows[chosen])), torch.from_numpy(columns), torch.from_numpy(clips[chosen])


def collapse(seed: int, folder: Path) -> dict[str, float]:
    """At which step the alarm trips without the variance term, and whether it ever did in the healthy run."""
    if not finished(folder / "collapsed"):
        data = {"videos": folder / "videos" / "train", "fps": BallWorld().fps, "seed": seed}
        run("pretrain_encoder", data, {"steps": 200, "objective.variance-weight": 0},
            "--output-dir", folder / "collapsed", "--overwrite")  # fmt: skip
    without, healthy = (read_json(folder / name / "metrics.json") for name in ("collapsed", "encoder"))
    return {
        "alarm without variance, at step": without["first_collapse_step"] or np.inf,
        "alarms in the healthy run": float(len(healthy["collapse_alarms"])),
    }


if __name__ == "__main__":
    run_command(main, Options)
