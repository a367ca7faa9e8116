r"""Moving MNIST: how long do imagined digits stay where the true ones are?

  python benchmarks/moving_mnist.py --seeds 0 1 2 --output-dir runs/benchmarks/moving_mnist

Needs `mnist.npz` in `$JEPA_SHARED/images` (default `../shared/images`). For each seed: makes videos of digits that no
other split has, trains by the stages, and trains a detection head on embeddings of true frames. From the first two
frames of each test clip the model imagines the rest; the head's average precision (AP) on it is measured at each
horizon, beside that on the embeddings of the true frames, the ceiling. Prints tables in Markdown and writes
`results.json`. Settings are chosen with other seeds and `--split val`; larger ones go in as
`--encoder-options="--encoder.backbone resnet18 --steps 5000"`, with the equals sign.

The measure is that of eb_jepa's video example, which publishes a mean AP (mAP) of .607 over horizons 1 to 7 after
training on a GPU. What differs here: the digits of the test are in no training clip (there, the 10,000 published
sequences are split, not their digits); frames go through H.264; cells are those of the true centres (there, of the
boxes around what is connected and bright, so one for digits that touch); rollouts start from the first two frames of
a clip (there, from any two), and AP is that of all clips (there, a mean over batches of 64); an embedding is a vector
(there, a map), and the encoder learns before the predictor (there, together).
Horizons up to 18, as long as a clip of the original is, are shown too.
"""

import os
import resource
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from data.embedding_cache import EmbeddingCache
from data.moving_mnist import STATE_COLUMNS, DigitWorld, read_digits, write_digit_videos
from data.sidecar import read_states
from jepa.bootstrap import Bootstrap, interval
from jepa.detection import DetectionHead, average_precision, fit_detection_head, occupied_cells
from jepa.predictor import Predictor
from pipelines.artefacts import load_predictor
from pipelines.evaluate_rollout import imagine_all, lay_out_trials
from pipelines.seed_tables import over_seeds
from pipelines.stage import require, run_python, run_stage, write_json

ROOT = Path(__file__).parent.parent
CONTEXT = 2
HORIZON = 18
PEER_HORIZON = 7
"""The last horizon of the mean that eb_jepa publishes."""
SHOWN_HORIZONS = (1, 2, 3, 5, 7, 10, 14, 18)
SHOWN = ("model", "copy_last", "ridge", "mean")
TRUE = "true frames"
RESAMPLES = 200
WORLD = DigitWorld(frames=CONTEXT + HORIZON)


@dataclass(frozen=True)
class Options:
    """Moving MNIST, several seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each makes its own videos and models."""
    output_dir: Path = Path("runs/benchmarks/moving_mnist")
    """Where all runs and the results are left."""
    split: Literal["val", "test"] = "test"
    """Clips to report on: `val` while settings are chosen."""
    train_clips: int = 6000
    """Clips to train on."""
    held_out_clips: int = 500
    """Clips for validation, and as many for the test."""
    encoder_options: str = (
        "--steps 800 --encoder.embedding-dimension 128 --views.light-amplitude 0 --views.pixel-noise 0"
    )
    """Options of pretrain_encoder. On black, there is no background to make useless by changing light."""
    predictor_options: str = "--steps 5000 --rollout-steps 7 --compute.precision bf16"
    """Options of train_predictor."""


def main(options: Options) -> None:
    """The story: run each seed, gather, print."""
    archive = Path(os.environ.get("JEPA_SHARED", ROOT.parent / "shared")) / "images" / "mnist.npz"
    require(archive.is_file(), f"{archive}: the handwritten digits are not there; set JEPA_SHARED")
    digits = read_digits(archive)
    runs = [measure_seed(seed, (options.output_dir / f"seed_{seed}").absolute(), digits, options)
            for seed in options.seeds]  # fmt: skip
    write_json(options.output_dir / "results.json", runs)
    print(tables(runs))


def measure_seed(seed: int, folder: Path, digits: dict[str, np.ndarray], options: Options) -> dict[str, Any]:
    """Average precision of all predictors of one seed, and what they cost."""
    cost = train(seed, folder, digits, options)
    predictor = load_predictor(folder / "predictor" / "predictor")
    caches = {split: EmbeddingCache(folder / "cache" / split) for split in ("train", "val", options.split)}
    started = cpu_s(resource.RUSAGE_SELF)
    head = fit_detection_head(*labelled(caches["train"], predictor), *labelled(caches["val"], predictor), seed=seed)
    if cost:
        cost["head"] = cpu_s(resource.RUSAGE_SELF) - started
    results = {"seed": seed, "split": options.split, "cpu_s": cost, **measure(caches[options.split], predictor, head)}
    write_json(folder / f"{options.split}.json", results)
    return results


def train(seed: int, folder: Path, digits: dict[str, np.ndarray], options: Options) -> dict[str, float]:
    """From digits to a predictor; CPU seconds of the two trainers, where they ran from beginning to end."""
    for number, (split, images) in enumerate(digits.items()):
        clips = options.train_clips if split == "train" else options.held_out_clips
        write_digit_videos(folder / "videos" / split, clips, images, WORLD, seed=3 * seed + number)
    common = ["--seed", seed, "--resume"]
    cost = {}

    def stage(name: str, done: Path, *words: object) -> None:
        if not (done / "metrics.json").exists():
            fresh, started = not done.exists(), cpu_s(resource.RUSAGE_CHILDREN)
            run_python(f"pipelines/{name}.py", *words, "--output-dir", done, *common)
            if fresh:
                cost[done.name] = cpu_s(resource.RUSAGE_CHILDREN) - started

    stage("pretrain_encoder", folder / "encoder", "--videos", folder / "videos" / "train", "--fps", WORLD.fps,
          *shlex.split(options.encoder_options))  # fmt: skip
    for split in digits:
        run_python(
            "pipelines/cache_embeddings.py", "--videos", folder / "videos" / split, "--encoder",
            folder / "encoder" / "encoder", "--fps", WORLD.fps, "--output-dir", folder / "cache" / split,
        )  # fmt: skip
    stage("train_predictor", folder / "predictor", "--train-cache", folder / "cache" / "train", "--validation-cache",
          folder / "cache" / "val", "--predictor.context", CONTEXT, "--validation-horizon", HORIZON,
          *shlex.split(options.predictor_options))  # fmt: skip
    return cost


def cpu_s(who: int) -> float:
    """Seconds that this process or its children have kept cores busy."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def labelled(cache: EmbeddingCache, predictor: Predictor) -> tuple[Tensor, Tensor]:
    """All embeddings of a cache, standardised (frames, D), and the cells that digits are in (frames, cells^2)."""
    rows = np.concatenate(cache.unbroken_runs())
    return predictor.standardise(torch.from_numpy(cache.take(rows))), cells_of_digits(cache)[rows]


def cells_of_digits(cache: EmbeddingCache) -> Tensor:
    """The cells that digits are in, for each row of a cache, (rows, cells^2)."""
    positions = torch.from_numpy(read_states(cache, STATE_COLUMNS)).nan_to_num()
    return occupied_cells(rearrange(positions, "rows (digits xy) -> rows digits xy", xy=2), WORLD.size)


@torch.no_grad()
def measure(cache: EmbeddingCache, predictor: Predictor, head: DetectionHead) -> dict[str, Any]:
    """Average precision at each horizon, its means over horizons with intervals by clip, and both of the ceiling."""
    trials = lay_out_trials(cache, predictor, HORIZON)
    imagined = imagine_all(predictor, trials)
    logits = {TRUE: head(trials.future), **{name: head(imagined[name]) for name in SHOWN}}  # (N, HORIZON, cells^2)
    occupied = cells_of_digits(cache)[trials.future_rows]
    # One rollout a clip: a clip that is drawn so many times counts so many times.
    draws = Bootstrap(trials.windows.clips, RESAMPLES).draws

    def by_horizon(name: str, horizon: int, weights: np.ndarray | None = None) -> list[float]:
        return [average_precision(logits[name][:, step], occupied[:, step], weights) for step in range(horizon)]

    precision = {name: np.array(by_horizon(name, HORIZON)) for name in logits}
    means = {name: np.array([np.mean(by_horizon(name, PEER_HORIZON, draw)) for draw in draws]) for name in logits}
    results: dict[str, Any] = {"clips": len(occupied), "predictors": {}}
    for name, value in precision.items():
        record: dict[str, Any] = {"average_precision": value.tolist()}
        for last in (PEER_HORIZON, HORIZON):
            record[f"mean_to_{last}"] = value[:last].mean()
            record[f"of_ceiling_to_{last}"] = value[:last].mean() / precision[TRUE][:last].mean()
        record[f"mean_to_{PEER_HORIZON}_interval"] = interval(means[name]).tolist()
        record[f"of_ceiling_to_{PEER_HORIZON}_interval"] = interval(means[name] / means[TRUE]).tolist()
        results["predictors"][name] = record
    return results


def tables(runs: list[dict[str, Any]]) -> str:
    """Means over seeds, with the range of the summaries."""
    summaries = [f"{kind}_to_{last}" for last in (PEER_HORIZON, HORIZON) for kind in ("mean", "of_ceiling")]
    heads = [f"AP at {horizon}" for horizon in SHOWN_HORIZONS]
    for last in (PEER_HORIZON, HORIZON):
        heads += [f"mAP 1 to {last}", "of ceiling"]
    lines = [f"|  | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for name in (TRUE, *SHOWN):
        records = [run["predictors"][name] for run in runs]
        precision = np.mean([record["average_precision"] for record in records], axis=0)
        cells = [f"{precision[horizon - 1]:.3f}" for horizon in SHOWN_HORIZONS]
        for summary in summaries:
            values = [record[summary] for record in records]
            cells.append(over_seeds(values))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for run in runs:
        record = run["predictors"]["model"]
        low, high = record[f"of_ceiling_to_{PEER_HORIZON}_interval"]
        cost = ", ".join(f"{name} {seconds:.0f}" for name, seconds in run["cpu_s"].items())
        lines += ["", f"Seed {run['seed']}, {run['clips']} {run['split']} clips: mAP 1 to {PEER_HORIZON} of ceiling "
                  f"{record[f'of_ceiling_to_{PEER_HORIZON}']:.3f} ({low:.3f} to {high:.3f})"
                  + (f"; CPU seconds: {cost}" if cost else "")]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    run_stage(main, Options)
