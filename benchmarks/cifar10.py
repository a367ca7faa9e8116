r"""CIFAR-10 without labels: how good do embeddings get, and does the alarm tell what collapses from what does not?

  python benchmarks/cifar10.py --seeds 0 1 2 --output-dir runs/benchmarks/cifar10

Needs `cifar10.zip` in `$JEPA_SHARED/images` (default `../shared/images`). For each seed: trains by `--preset`, and
probes test images by the nearest training images, beside the untrained encoder and principal components of the pixels;
and trains each of `--objectives` for `--alarm-steps` to see which of them the alarm for collapse reports. Prints tables
in Markdown and writes `results.json`, in a folder named after the preset. What a killed run had finished is not done
again: for other options take another --output-dir.

On a GPU, public benchmarks' setting with linear evaluation (`--resume` is given, so it may be cut at any time):

  python benchmarks/cifar10.py --seeds 0 --preset configs/cifar10/resnet18.yaml --epochs 100 --objectives

State that has to travel in pieces: `tar c FOLDER | split -b 16M - piece_` and `cat piece_* | tar x`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.stage import require, run_python, run_stage, write_json

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Options:
    """CIFAR-10, several seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights, the order and the views."""
    preset: Path = Path("configs/cifar10/laptop.yaml")
    """How to train."""
    encoder_options: str = ""
    """More options of pretrain_encoder."""
    epochs: int = 0
    """Of linear evaluation; 0 for none."""
    fraction: float = 1.0
    """Share of the images that is probed."""
    objectives: tuple[str, ...] = ("vicreg", "sigreg", "infonce", "invariance")
    """Which to train for a moment, to see what the alarm says of them."""
    alarm_steps: int = 300
    """How long that is."""
    output_dir: Path = Path("runs/benchmarks/cifar10")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: train and probe each seed, provoke the alarm, print."""
    images = Path(os.environ.get("JEPA_SHARED", ROOT.parent / "shared")).absolute() / "images" / "cifar10.zip"
    require(images.is_file(), f"{images}: the images are not there; set JEPA_SHARED")
    require(bool(options.seeds), "--seeds is empty: give one or more")
    folder = options.output_dir.absolute() / options.preset.stem
    folder.mkdir(parents=True, exist_ok=True)
    runs = [measure_seed(seed, folder / f"seed_{seed}", images, options) for seed in options.seeds]
    alarms = {
        kind: [provoke(kind, seed, folder / f"seed_{seed}", images, options) for seed in options.seeds]
        for kind in options.objectives
    }
    write_json(folder / "results.json", {"accuracy": runs, "alarms": alarms})
    print("| representation | probe | accuracy, per cent | range |\n| --- | --- | --- | --- |")
    for name, row in runs[0]["accuracy"].items():
        for kind in row:
            values = [100 * run["accuracy"][name][kind] for run in runs]
            print(f"| {name} | {kind} | {np.mean(values):.2f} | {min(values):.2f} to {max(values):.2f} |")
    print("\ntraining: seconds", *(round(run["seconds"]) for run in runs))
    if alarms:
        print("\n| objective | collapsed, of seeds | first alarm at step |\n| --- | --- | --- |")
    for kind, found in alarms.items():
        steps = [str(run["first_collapse_step"]) for run in found if run["collapsed"]]
        print(f"| {kind} | {len(steps)} of {len(found)} | {', '.join(steps)} |")


def measure_seed(seed: int, folder: Path, images: Path, options: Options) -> dict[str, Any]:
    """Accuracies of one seed, and how long training took."""
    trained = folder / "encoder" / "metrics.json"
    if not trained.exists():
        pretrain(images, options, folder / "encoder", seed)
    if not (folder / "probes" / "metrics.json").exists():
        run_python(
            "pipelines/probe_encoder.py", "--images", images, "--encoder", folder / "encoder" / "encoder", "--epochs",
            options.epochs, "--fraction", options.fraction, "--seed", seed, "--output-dir", folder / "probes",
            "--overwrite",
        )  # fmt: skip
    found: dict[str, Any] = json.loads((folder / "probes" / "probes.json").read_text())
    return found | {"seconds": json.loads(trained.read_text())["seconds"]}


def provoke(kind: str, seed: int, folder: Path, images: Path, options: Options) -> dict[str, Any]:
    """What the alarm says of a short training by one objective."""
    output = folder / f"alarm_{kind}"
    if not (output / "metrics.json").exists():
        pretrain(images, options, output, seed, "--objective.kind", kind, "--steps", options.alarm_steps,
                 "--log-every", 50)  # fmt: skip
    found: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return found


def pretrain(images: Path, options: Options, output: Path, seed: int, *more: object) -> None:
    """Train by the preset, or go on."""
    run_python(
        "pipelines/pretrain_encoder.py", "--preset", options.preset.absolute(), "--images", images, "--output-dir",
        output, "--seed", seed, "--tracker", "csv", "--resume", *options.encoder_options.split(), *more,
    )  # fmt: skip


if __name__ == "__main__":
    run_stage(main, Options)
