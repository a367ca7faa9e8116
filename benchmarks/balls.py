r"""Bouncing balls, several seeds: what the recipe reaches on clips that were never looked at.

  python benchmarks/balls.py --seeds 0 1 2 --output-dir runs/benchmarks/balls

For each seed: the demo (videos, models and test clips of that seed), then on its test clips the linear probe of the
balls' positions, rollout skill, retrieval, and the detection of mid-air reversals; the same probe on a static
textured background; and a run without the variance term, which has to trip the collapse alarm. Prints a table in
Markdown and writes `results.json`.
"""

import csv
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from data.embedding_cache import EmbeddingCache
from data.synthetic import STATE_COLUMNS, VELOCITY_COLUMNS, BallWorld, write_ball_videos
from jepa.energy import UsualErrors, measure_usual_errors, prediction_errors
from jepa.predictor import Predictor
from jepa.probe import fit_linear_probe, r_squared
from pipelines.artefacts import load_predictor
from pipelines.evaluate_rollout import states
from pipelines.stage import run_stage, write_json

ROOT = Path(__file__).parent.parent
NEAR_BOUNCE = 2
"""A moment is mid-air if no ball bounces within this many frames of it."""


@dataclass(frozen=True)
class Options:
    """Bouncing balls, several seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each makes its own videos and models."""
    output_dir: Path = Path("runs/benchmarks/balls")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: run each seed, gather, print."""
    runs = [measure_seed(seed, (options.output_dir / f"seed_{seed}").absolute()) for seed in options.seeds]
    write_json(options.output_dir / "results.json", runs)
    print("| measure | mean | range |\n| --- | --- | --- |")
    for name in dict.fromkeys(name for run in runs for name in run):
        # The demo is timed where it ran from the beginning, alone.
        values = [float(run[name]) for run in runs if name in run]
        print(f"| {name} | {np.mean(values):.3f} | {min(values):.3f} to {max(values):.3f} |")


def measure_seed(seed: int, folder: Path) -> dict[str, Any]:
    """All figures of one seed, flat."""
    started = time.monotonic()
    fresh = not folder.exists()
    call("pipelines/demo.py", "--output-dir", folder, "--seed", seed)
    results: dict[str, Any] = {}
    if fresh:
        results["demo: seconds"] = time.monotonic() - started
        largest_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        results["demo: memory of its largest process, GB"] = largest_kb / 1e6
    train, test = (EmbeddingCache(folder / "cache" / split) for split in ("train", "test"))
    validation = EmbeddingCache(folder / "cache" / "val")
    predictor = load_predictor(folder / "predictor" / "predictor")

    r2 = probe_positions(train, test)
    results |= {"full: position R2, mean": float(r2.mean()), "full: position R2, worst coordinate": float(r2.min())}
    rollout = json.loads((folder / "evaluation" / "rollout.json").read_text())["predictors"]
    for horizon in (1, 5, 10, 20):
        for name in ("model", "ridge", "linear_extrapolation"):
            record = rollout[name][horizon - 1]
            results[f"horizon {horizon}: {name} of copy-last"] = record["relative_to_copy_last"]
        for to in ("ridge", "mean"):
            results[f"horizon {horizon}: model of {to}"] = rollout["model"][horizon - 1][f"relative_to_{to}"]
        for name in ("model", "ridge", "copy_last"):
            results[f"horizon {horizon}: position R2 of {name}"] = float(
                np.mean(rollout[name][horizon - 1]["probe_r2"])
            )
    results["retrieval@1 at horizon 1"] = rollout["model"][0]["retrieval_at_1"]
    results |= {f"reversal AUROC: {name}": value for name, value in reversal(predictor, validation, test).items()}
    results |= textured(seed, folder / "textured")
    results |= collapse(seed, folder)
    write_json(folder / "results.json", results)
    return results


def call(*words: object) -> None:
    """Run a stage with this Python, from the root."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)


def probe_positions(train: EmbeddingCache, test: EmbeddingCache) -> Tensor:
    """R2 of each coordinate, read linearly off the embeddings of single test frames."""
    probe = fit_linear_probe(*states(train, STATE_COLUMNS))
    embeddings, positions = states(test, STATE_COLUMNS)
    return r_squared(probe(embeddings), positions)


def reversal(predictor: Predictor, validation: EmbeddingCache, test: EmbeddingCache) -> dict[str, float]:
    """How well does energy tell a ball that turns round in mid-air from one that flies on?

    At each mid-air moment t of each test clip, the frame after t is the true one, or the one before t once more:
    the same frames, in an order that no ball can follow. For every predictor both the plain squared error and the
    energy (whitened by its own usual errors on validation clips) are measured.
    """
    context = predictor.config.context
    ordinary, reversed_ = [], []
    for clip in test.clips:
        with Path(clip.key.source).with_suffix(".csv").open(newline="") as file:
            velocity = np.array([[float(row[name]) for name in VELOCITY_COLUMNS] for row in csv.DictReader(file)])
        embeddings = predictor.standardise(torch.from_numpy(test.clip_embeddings(clip)))
        for t in range(context - 1, len(embeddings) - NEAR_BOUNCE):
            around = velocity[t - NEAR_BOUNCE : t + NEAR_BOUNCE + 1]
            if np.ptp(around, axis=0).max() < 1e-3:  # the CSV has four decimals
                past = embeddings[t - context + 1 : t + 1]
                ordinary.append(torch.cat([past, embeddings[t + 1 : t + 2]]))
                reversed_.append(torch.cat([past, embeddings[t - 1 : t]]))
    moments = torch.stack(ordinary + reversed_)
    labels = np.repeat([0, 1], len(ordinary))
    usual_sequences = torch.cat(
        [predictor.standardise(torch.from_numpy(validation.clip_embeddings(clip)))[None] for clip in validation.clips]
    )

    @torch.no_grad()
    def auroc(one: nn.Module) -> tuple[float, float]:
        usual: UsualErrors = measure_usual_errors(prediction_errors(one, usual_sequences, context).flatten(0, 1))
        errors = prediction_errors(one, moments, context)[:, 0]
        plain, whitened = errors.square().mean(dim=1), usual.energy(errors)
        return float(roc_auc_score(labels, plain)), float(roc_auc_score(labels, whitened))

    found = {name: auroc(one) for name, one in {"model": predictor, **predictor.baselines()}.items()}
    return {
        f"{name}, {kind}": value
        for name, both in found.items()
        for kind, value in zip(("plain error", "energy"), both, strict=True)
    }


def textured(seed: int, folder: Path) -> dict[str, float]:
    """Position R2 of an encoder trained in front of static textures."""
    world = BallWorld(background="textured")
    for number, (split, clips) in enumerate({"train": 1000, "test": 100}.items()):
        write_ball_videos(folder / "videos" / split, clips, world, seed=1000 + 2 * seed + number)
    clock = ["--fps", world.fps, "--seed", seed]
    if not (folder / "encoder" / "metrics.json").exists():
        call("pipelines/pretrain_encoder.py", "--videos", folder / "videos" / "train", "--output-dir",
             folder / "encoder", "--resume", *clock)  # fmt: skip
    for split in ("train", "test"):
        call("pipelines/cache_embeddings.py", "--videos", folder / "videos" / split, "--encoder",
             folder / "encoder" / "encoder", "--output-dir", folder / "cache" / split, *clock)  # fmt: skip
    r2 = probe_positions(EmbeddingCache(folder / "cache" / "train"), EmbeddingCache(folder / "cache" / "test"))
    return {"textured: position R2, mean": float(r2.mean()), "textured: position R2, worst": float(r2.min())}


def collapse(seed: int, folder: Path) -> dict[str, float]:
    """At which step the alarm trips without the variance term, and whether it ever did in the healthy run."""
    call("pipelines/pretrain_encoder.py", "--videos", folder / "videos" / "train", "--output-dir", folder / "collapsed",
         "--fps", BallWorld().fps, "--seed", seed, "--steps", 200, "--objective.variance-weight", 0,
         "--overwrite")  # fmt: skip
    without = json.loads((folder / "collapsed" / "metrics.json").read_text())
    healthy = json.loads((folder / "encoder" / "metrics.json").read_text())
    return {
        "alarm without variance, at step": without["first_collapse_step"] or float("inf"),
        "alarms in the healthy run": float(len(healthy["collapse_alarms"])),
    }


if __name__ == "__main__":
    run_stage(main, Options)
