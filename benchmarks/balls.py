r"""Bouncing balls, several seeds: what the recipe reaches on clips that were never looked at.

  python benchmarks/balls.py --seeds 0 1 2 --output-dir runs/benchmarks/balls

For each seed: the demo with more clips and steps (videos, models and test clips of that seed), then on its test clips
the linear probe of the balls' positions, rollout skill and retrieval; the same probe on a static textured background;
and a run without the variance term, which has to trip the collapse alarm. Prints a table in Markdown and writes
`results.json`.
`benchmarks/surprise.py` goes on from there.
"""

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.embedding_cache import EmbeddingCache
from data.synthetic import STATE_COLUMNS, BallWorld, write_ball_videos
from jepa.bootstrap import Bootstrap
from jepa.probe import fit_probe, measure_agreement
from pipelines.probe_embeddings import label_windows
from pipelines.seed_tables import print_by_horizon
from pipelines.stage import run_python, run_stage, write_json

LONGER = [
    *("--train-clips", 4000, "--encoder-steps", 1500, "--predictor-steps", 4500),
    "--predictor-options=--compute.precision bf16 --rollout-steps 5 --log-every 500",
]
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
    runs = [measure_seed(seed, (options.output_dir / f"seed_{seed}").absolute(), options) for seed in options.seeds]
    write_json(options.output_dir / "results.json", runs)
    print_by_horizon(runs, HORIZONS)


def measure_seed(seed: int, folder: Path, options: Options) -> dict[str, Any]:
    """All figures of one seed: of forecasts at each of `HORIZONS`, and the others."""
    started = time.monotonic()
    fresh = not folder.exists()
    run_python("pipelines/demo.py", "--output-dir", folder, "--seed", seed, *LONGER)
    results: dict[str, float] = {}
    if fresh:
        results["all, from drawing the videos to scoring one: seconds"] = time.monotonic() - started
        made, trained = (folder / "videos" / "test", folder / "predictor" / "metrics.json")
        results["training, from videos to predictor: seconds"] = trained.stat().st_mtime - made.stat().st_mtime
        largest_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of any seed so far
        results["memory of the largest process: GB"] = 1024 * largest_kib / 1e9
    train, test = (EmbeddingCache(folder / "cache" / split) for split in ("train", "test"))

    r2 = probe_positions(train, test)
    results |= {"full: position R2, mean": float(r2.mean()), "full: position R2, worst coordinate": float(r2.min())}
    rollout = json.loads((folder / "evaluation" / "rollout.json").read_text())["predictors"]
    results["retrieval@1 at horizon 1"] = rollout["model"][0]["retrieval_at_1"]
    if options.encoder_checks:
        results |= textured(seed, folder / "textured")
        results |= collapse(seed, folder)
    forecasts = {
        f"{name} of {to.replace('_', '-')}": [rollout[name][h - 1][f"relative_to_{to}"] for h in HORIZONS]
        for to, names in (("copy_last", ("model", "ridge", "linear_extrapolation")), ("ridge", ("model",)),
                          ("mean", ("model",)))
        for name in names
    } | {
        f"position R2 of {name}": [float(np.mean(rollout[name][h - 1]["probe_r2"])) for h in HORIZONS]
        for name in ("model", "ridge", "linear_extrapolation", "copy_last")
    }  # fmt: skip
    found = {"forecasts": forecasts, "measures": results}
    write_json(folder / "results.json", found)
    return found


def probe_positions(train: EmbeddingCache, test: EmbeddingCache) -> np.ndarray:
    """R2 of each coordinate, read linearly off the embeddings of single test frames."""
    learned, judged = (label_windows(cache, STATE_COLUMNS, 1, limit=40_000) for cache in (train, test))
    probe = fit_probe("ridge", learned.inputs[:, 0], learned.states, learned.groups)
    return measure_agreement(probe(judged.inputs[:, 0]), judged.states, Bootstrap(judged.groups)).r2


def textured(seed: int, folder: Path) -> dict[str, float]:
    """Position R2 of an encoder trained in front of static textures."""
    world = BallWorld(background="textured")
    for number, (split, clips) in enumerate({"train": 1000, "test": 100}.items()):
        write_ball_videos(folder / "videos" / split, clips, world, seed=1000 + 2 * seed + number)
    clock = ["--fps", world.fps, "--seed", seed]
    if not (folder / "encoder" / "metrics.json").exists():
        run_python(
            "pipelines/pretrain_encoder.py", "--videos", folder / "videos" / "train", "--output-dir",
            folder / "encoder", "--resume", *clock,
        )  # fmt: skip
    for split in ("train", "test"):
        run_python(
            "pipelines/cache_embeddings.py", "--videos", folder / "videos" / split, "--encoder",
            folder / "encoder" / "encoder", "--output-dir", folder / "cache" / split, *clock,
        )  # fmt: skip
    r2 = probe_positions(EmbeddingCache(folder / "cache" / "train"), EmbeddingCache(folder / "cache" / "test"))
    return {"textured: position R2, mean": float(r2.mean()), "textured: position R2, worst": float(r2.min())}


def collapse(seed: int, folder: Path) -> dict[str, float]:
    """At which step the alarm trips without the variance term, and whether it ever did in the healthy run."""
    run_python(
        "pipelines/pretrain_encoder.py", "--videos", folder / "videos" / "train", "--output-dir", folder / "collapsed",
        "--fps", BallWorld().fps, "--seed", seed, "--steps", 200, "--objective.variance-weight", 0, "--overwrite",
    )  # fmt: skip
    without = json.loads((folder / "collapsed" / "metrics.json").read_text())
    healthy = json.loads((folder / "encoder" / "metrics.json").read_text())
    return {
        "alarm without variance, at step": without["first_collapse_step"] or float("inf"),
        "alarms in the healthy run": float(len(healthy["collapse_alarms"])),
    }


if __name__ == "__main__":
    run_stage(main, Options)
