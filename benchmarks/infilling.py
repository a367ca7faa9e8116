r"""Bouncing balls, the middle of a clip missing: what the infiller reaches on clips that were never looked at.

  python benchmarks/infilling.py --seeds 0 1 2 --run runs/benchmarks/balls/seed_0 --output-dir runs/benchmarks/infilling

Needs the caches of a run of benchmarks/balls.py, or of the demo. For each seed: trains an infiller, and reads the
balls' positions off what it and the simple guesses put into the middle of gaps. Prints a table in Markdown and writes
`results.json`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.embedding_cache import EmbeddingCache
from data.groups import group_rows
from data.sidecar import read_states
from data.synthetic import STATE_COLUMNS
from data.windows import Windows
from jepa.bootstrap import Bootstrap
from jepa.infilling import Infiller, middle_gap
from jepa.probe import Probe, fit_probe, measure_agreement
from pipelines.stage import run_python, run_stage, write_json
from pipelines.train_infiller import MEASURED_WINDOWS, VALIDATION_WINDOWS, fill_all, spread

GAPS = (1, 3, 5, 7, 9)


@dataclass(frozen=True)
class Options:
    """Infilling of bouncing balls, several seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights, the windows and the gaps; the embeddings are the same."""
    run: Path = Path("runs/benchmarks/balls/seed_0")
    """Whose caches are used: `cache/train`, `cache/val` and `cache/test` in this folder."""
    output_dir: Path = Path("runs/benchmarks/infilling")
    """Where all infillers and the results are left."""


def main(options: Options) -> None:
    """The story: train each seed, read positions off the gaps, gather, print."""
    train, validation, test = (EmbeddingCache(options.run / "cache" / split) for split in ("train", "val", "test"))
    rows = np.concatenate(train.unbroken_runs())
    states = torch.from_numpy(read_states(train, STATE_COLUMNS)[rows])
    probe = fit_probe("ridge", torch.from_numpy(train.take(rows)), states, group_rows(train)[rows])
    runs = [measure_seed(seed, options, train, validation, test, probe) for seed in options.seeds]
    write_json(options.output_dir / "results.json", runs)
    print("| measure | mean | range |\n| --- | --- | --- |")
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"| {name} | {np.mean(values):.3f} | {min(values):.3f} to {max(values):.3f} |")


def measure_seed(
    seed: int,
    options: Options,
    train: EmbeddingCache,
    validation: EmbeddingCache,
    test: EmbeddingCache,
    probe: Probe,
) -> dict[str, float]:
    """All figures of one seed, flat; positions are the mean over coordinates."""
    folder = (options.output_dir / f"seed_{seed}").absolute()
    if not (folder / "metrics.json").exists():
        caches = [word for name, split in (("train", "train"), ("validation", "val"), ("test", "test"))
                  for word in (f"--{name}-cache", options.run.absolute() / "cache" / split)]  # fmt: skip
        run_python("pipelines/train_infiller.py", *caches, "--output-dir", folder, "--seed", seed, "--resume")
    guesses = json.loads((folder / "infilling.json").read_text())["guesses"]
    results = {"seconds": json.loads((folder / "metrics.json").read_text())["seconds"]}
    for gap in GAPS:
        for name in ("model", "ridge", "copy_last"):
            error = guesses[name][gap - 1]["places"]["relative_to_linear"][(gap - 1) // 2]
            results[f"gap {gap}, middle: error of {name}, of linear interpolation's"] = error

    infiller = Infiller.from_pretrained(folder / "infiller").eval()
    measured, held_out = (
        infiller.standardise(spread(Windows(cache, infiller.config.window), most))
        for cache, most in ((train, MEASURED_WINDOWS), (validation, VALIDATION_WINDOWS))
    )
    windows = Windows(test, infiller.config.window)
    raw = windows.take(np.arange(len(windows)))
    states = read_states(test, STATE_COLUMNS)
    bootstrap = Bootstrap(windows.clips)
    for gap in GAPS:
        hidden = middle_gap(gap, infiller.config)
        middle = int(hidden.nonzero()[(gap - 1) // 2])
        true = torch.from_numpy(states[windows.starts + middle])
        filled = fill_all(infiller, measured, held_out, infiller.standardise(raw), hidden)
        read = {name: value[:, (gap - 1) // 2] * infiller.std + infiller.mean for name, value in filled.items()}
        for name, embeddings in {**read, "true embeddings": raw[:, middle]}.items():
            r2 = measure_agreement(probe(embeddings), true, bootstrap).r2
            results[f"gap {gap}, middle: position R2 of {name}"] = float(r2.mean())
    return results


if __name__ == "__main__":
    run_stage(main, Options)
