r"""Moving MNIST: how long do imagined digits stay where the true ones are?

  python -m benchmarks.moving_mnist --seeds 0 1 2

Needs `mnist.npz` in `$JEPA_SHARED/images`. For each seed: makes videos of digits that no other split has, trains by the
commands, and trains a detection head on embeddings of true frames. From the first two frames of each test clip the
model imagines the rest; the head's average precision (AP) on it is measured at each horizon, beside that on the
embeddings of the true frames, the ceiling. Prints tables in Markdown and writes `results.json`. Settings are chosen
with other seeds and `--split val`; larger ones go in as `--encoder-options="--encoder.backbone resnet18 --steps 5000"`,
with the equals sign.

The measure is that of eb_jepa's video example, which publishes a mean AP (mAP) of .607 over horizons 1 to 7 after
training on a GPU. What differs here: the digits of the test are in no training clip (there, the 10,000 published
sequences are split, not their digits); frames go through H.264; cells are those of the true centres (there, of the
boxes around what is connected and bright, so one for digits that touch); rollouts start from the first two frames of
a clip (there, from any two), and AP is that of all clips (there, a mean over batches of 64); an embedding is a vector
(there, a map), and the encoder learns before the predictor (there, together).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from benchmarks.common import Recipe, make_model, markdown, over_seeds, shared
from benchmarks.detection import average_precision, fit_detection_head, occupied_cells
from benchmarks.digits import FPS, SIZE, STATE_COLUMNS, read_digits, write_digit_videos
from data.cache import EmbeddingCache
from data.windows import Windows
from jepa.baselines import CopyLast, Mean
from jepa.bootstrap import Bootstrap
from jepa.calibration import Calibration
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence
from pipelines.run.command import run_command
from pipelines.run.files import write_json
from pipelines.run.models import load_predictor

CONTEXT = 2
HORIZON = 18
PEER_HORIZON = 7
"""The last horizon of the mean that eb_jepa publishes."""
SHOWN_HORIZONS = (1, 2, 3, 5, 7, 10, 14, 18)
RESAMPLES = 200


@dataclass(frozen=True)
class Options:
    """Moving MNIST, several seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each makes its own videos and models."""
    output_dir: Path = Path("runs/benchmarks/moving_mnist")
    """Where all runs and the results are left."""
    split: Literal["val", "test"] = "test"
    """Clips to report on: `val` while settings are chosen."""
    clips: tuple[int, int] = (6000, 500)
    """Clips to train on; clips for validation, and as many for the test."""
    encoder_options: str = (
        "--steps 800 --encoder.embedding-dimension 128 --views.light-amplitude 0 --views.pixel-noise 0"
    )
    """Options of pretrain_encoder. On black, there is no background to make useless by changing light."""
    predictor_options: str = "--steps 5000 --rollout-steps 7 --precision bf16"
    """Options of train_predictor."""


def main(options: Options) -> None:
    """The story: run each seed, gather, print."""
    digits = read_digits(shared("images/mnist.npz"))
    runs = [measure_seed(seed, options.output_dir / f"seed_{seed}", digits, options) for seed in options.seeds]
    write_json(options.output_dir / "results.json", runs)
    rows: list[list[object]] = [["", *(f"AP at {horizon}" for horizon in SHOWN_HORIZONS)]]
    for last in (PEER_HORIZON, HORIZON):
        rows[0] += [f"mAP 1 to {last}", "of ceiling"]
    for name in runs[0]["predictors"]:
        records = [run["predictors"][name] for run in runs]
        precision = np.mean([record["average_precision"] for record in records], axis=0)
        summaries = [f"{kind}_to_{last}" for last in (PEER_HORIZON, HORIZON) for kind in ("mean", "of_ceiling")]
        cells = [over_seeds([record[summary] for record in records]) for summary in summaries]
        rows.append([name, *(float(precision[horizon - 1]) for horizon in SHOWN_HORIZONS), *cells])
    print(markdown(rows))
    for run in runs:
        low, high = run["of_ceiling_interval"]
        print(f"\nSeed {run['seed']}: mAP 1 to {PEER_HORIZON}, 95 % from {low:.3f} to {high:.3f} of the ceiling; "
              + ", ".join(f"{name} {value:.0f}" for name, value in run["seconds"].items()))  # fmt: skip


def measure_seed(seed: int, folder: Path, digits: dict[str, np.ndarray], options: Options) -> dict[str, Any]:
    """Average precision of all forecasts of one seed, and what training took."""
    for number, (split, images) in enumerate(digits.items()):
        clips = options.clips[0] if split == "train" else options.clips[1]
        write_digit_videos(folder / "videos" / split, clips, images, frames=CONTEXT + HORIZON, seed=3 * seed + number)
    recipe = Recipe(
        fps=FPS,
        encoder=options.encoder_options.split(),
        predictor=[{"predictor.context": CONTEXT, "validation-horizon": HORIZON}, *options.predictor_options.split()],
        columns=STATE_COLUMNS,
        evaluation={"horizon": HORIZON},
    )
    seconds = make_model(folder, {split: folder / "videos" / split for split in digits}, recipe, seed)
    predictor, calibration = load_predictor(folder / "predictor")
    train, validation = (labelled(EmbeddingCache(folder / "cache" / split), predictor) for split in ("train", "val"))
    head = fit_detection_head(train, validation, seed=seed)
    cache = EmbeddingCache(folder / "cache" / options.split)
    results = {"seed": seed, "seconds": seconds, **measure(cache, predictor, calibration, head)}
    write_json(folder / f"{options.split}.json", results)
    return results


def labelled(cache: EmbeddingCache, predictor: Predictor) -> tuple[Tensor, Tensor]:
    """All embeddings of a cache, standardised (frames, D), and the cells that digits are in (frames, cells^2)."""
    rows = np.concatenate([clip.start + np.arange(clip.frames) for clip in cache.clips])
    return predictor.standardise(torch.from_numpy(cache.take(rows))), cells_of_digits(cache, rows)


def cells_of_digits(cache: EmbeddingCache, rows: np.ndarray) -> Tensor:
    """The cells that digits are in, (..., cells^2)."""
    positions = torch.from_numpy(np.stack([cache.take(rows, column) for column in STATE_COLUMNS], axis=-1))
    return occupied_cells(rearrange(positions, "... (digits xy) -> ... digits xy", xy=2), SIZE)


@torch.no_grad()
def measure(
    cache: EmbeddingCache, predictor: Predictor, calibration: Calibration, head: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Average precision at each horizon, and its means over horizons, of the forecasts and of the true frames."""
    windows = Windows(cache, CONTEXT + HORIZON)  # one a clip
    indices = np.arange(len(windows))
    embeddings = windows.take(indices)
    past, future = Sequence.on_clock(embeddings[:, :CONTEXT], FPS), Future.ticks(HORIZON, FPS)
    found = {
        "true frames": embeddings[:, CONTEXT:],
        "model": rollout(predictor, past, future, calibration=calibration),
        "copy_last": rollout(CopyLast(FPS), past, future),
        "ridge": rollout(calibration.ridge, past, future),
        "mean": rollout(Mean(FPS, predictor.mean), past, future),
    }
    logits = {name: head(predictor.standardise(value)) for name, value in found.items()}  # (N, HORIZON, cells^2)
    occupied = cells_of_digits(cache, windows.rows(indices)[:, CONTEXT:])

    def by_horizon(name: str, weights: np.ndarray | None = None, last: int = HORIZON) -> np.ndarray:
        steps = range(last)
        return np.array([average_precision(logits[name][:, step], occupied[:, step], weights) for step in steps])

    precision = {name: by_horizon(name) for name in logits}
    bootstrap = Bootstrap(np.arange(len(windows)), RESAMPLES)
    resampled = [[by_horizon(name, draw.astype(float), PEER_HORIZON).mean() for name in ("model", "true frames")]
                 for draw in bootstrap.draws]  # fmt: skip
    ratios = np.array(resampled)[:, 0] / np.array(resampled)[:, 1]
    records = {}
    for name, value in precision.items():
        records[name] = {"average_precision": value.tolist()}
        for last in (PEER_HORIZON, HORIZON):
            records[name][f"mean_to_{last}"] = value[:last].mean()
            records[name][f"of_ceiling_to_{last}"] = value[:last].mean() / precision["true frames"][:last].mean()
    return {"clips": len(windows), "predictors": records, "of_ceiling_interval": bootstrap.interval(ratios).tolist()}


if __name__ == "__main__":
    run_command(main, Options)
