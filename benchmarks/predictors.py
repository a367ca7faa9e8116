r"""Which predictor for what? Every kind on the same embeddings, trained alike; and what leaps through time are worth.

  python benchmarks/predictors.py --seeds 0 1 2 --run runs/benchmarks/balls/seed_0 --precision bf16

Needs the caches of a run of benchmarks/balls.py, or of the demo. For each seed and each kind of predictor: trains it by
`train_predictor` as it comes (its default sizes and losses), and evaluates its rollouts on the test clips. One more
learns to leap by up to three ticks at once, and is asked for the same moments in steps and in leaps. Prints tables in
Markdown and writes `results.json`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.embedding_cache import EmbeddingCache
from data.synthetic import STATE_COLUMNS
from jepa.networks import NETWORKS
from jepa.skill import imagine
from pipelines.artefacts import load_predictor
from pipelines.evaluate_rollout import lay_out_trials
from pipelines.seed_tables import print_by_contestant
from pipelines.stage import run_python, run_stage, write_json

HORIZONS = (1, 5, 10, 20)
LONGEST_LEAP = 3
CONTESTANTS: dict[str, list[object]] = {kind: ["--predictor.kind", kind] for kind in NETWORKS} | {
    "mlp that leaps": ["--longest-gap", LONGEST_LEAP]
}
"""By name, what tells it from the stage's defaults."""
Figures = dict[str, float]


@dataclass(frozen=True)
class Options:
    """Every kind of predictor on the same embeddings."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights and the windows; the embeddings are the same."""
    run: Path = Path("runs/benchmarks/balls/seed_0")
    """Whose caches are used: `cache/train`, `cache/val` and `cache/test` in this folder."""
    steps: int = 800
    """Optimiser steps of each."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the training."""
    output_dir: Path = Path("runs/benchmarks/predictors")
    """Where all predictors and the results are left."""


def main(options: Options) -> None:
    """The story: train and evaluate each kind with each seed, let one of them leap, print."""
    runs = {
        name: [measure(options, name, seed) for seed in options.seeds] for name in CONTESTANTS
    }  # [contestant][seed]
    leaping = {"mlp that leaps": runs["mlp that leaps"]}
    write_json(options.output_dir / "results.json", runs)
    print_by_contestant(runs, list(runs["mlp"][0]))
    print()
    print_by_contestant(leaping, [name for name in leaping["mlp that leaps"][0] if "leaps of" in name])


def measure(options: Options, name: str, seed: int) -> Figures:
    """What one contestant reaches on the test clips."""
    cache, folder = options.run.absolute() / "cache", options.output_dir.absolute() / f"{name.replace(' ', '_')}_{seed}"
    if not (folder / "metrics.json").exists():
        run_python(
            "pipelines/train_predictor.py", "--train-cache", cache / "train", "--validation-cache", cache / "val",
            "--output-dir", folder, "--steps", options.steps, "--compute.precision", options.precision, "--seed", seed,
            "--resume", *CONTESTANTS[name],
        )  # fmt: skip
    if not (folder / "evaluation" / "metrics.json").exists():
        run_python(
            "pipelines/evaluate_rollout.py", "--cache", cache / "test", "--predictor", folder / "predictor",
            "--output-dir", folder / "evaluation", "--probe-cache", cache / "train", "--probe-columns",
            *STATE_COLUMNS, "--overwrite",
        )  # fmt: skip
    trained = json.loads((folder / "metrics.json").read_text())
    results = json.loads((folder / "evaluation" / "rollout.json").read_text())
    figures: Figures = {"training: seconds": trained["seconds"]}
    for horizon in HORIZONS:
        record = results["predictors"]["model"][horizon - 1]
        figures[f"horizon {horizon}: of copy-last"] = record["relative_to_copy_last"]
        figures[f"horizon {horizon}: position R2"] = float(np.mean(record["probe_r2"]))
    return figures | (measure_leaps(folder / "predictor", cache / "test") if "leaps" in name else {})


def measure_leaps(artefact: Path, test: Path) -> Figures:
    """Errors of copy-last at moments that are reached step by step, and by leaps."""
    predictor, cache = load_predictor(artefact), EmbeddingCache(test)
    ticks = torch.arange(6, max(HORIZONS) + 1, 6)
    trials = lay_out_trials(cache, predictor, int(ticks[-1]))
    past, future = trials.past, trials.future[:, ticks - 1]
    copied = (past[:, -1:] - future).square().mean(dim=(0, 2))
    figures: Figures = {}
    for leap in range(1, LONGEST_LEAP + 1):
        times_s = torch.arange(leap, int(ticks[-1]) + 1, leap) / predictor.fps
        reached = imagine(predictor, past, times_s=times_s)[:, ticks // leap - 1]
        relative = (reached - future).square().mean(dim=(0, 2)) / copied
        for tick, error in zip(ticks.tolist(), relative.tolist(), strict=True):
            figures[f"horizon {tick}, leaps of {leap}: of copy-last"] = error
    return figures


if __name__ == "__main__":
    run_stage(main, Options)
