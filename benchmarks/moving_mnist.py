r"""Moving MNIST: how long do imagined digits stay where the true ones are?

  python -m benchmarks.moving_mnist --seeds 0 1 2

Needs `mnist.npz` in `$JEPA_SHARED/images`. For each seed: makes videos of digits that no other split has, trains by the
commands, and trains a detection head on embeddings of true frames. From the first two frames of each test clip the
model imagines the rest; the head's average precision (AP) on it is measured at each horizon, beside that on the
embeddings of the true frames, the ceiling. Settings are chosen with other seeds and `--split val`; larger ones go in as
`--encoder-options="--encoder.backbone resnet18 --steps 5000"`, with the equals sign.

The measure is that of eb_jepa's video example, which publishes a mean AP (mAP) of .607 over horizons 1 to 7 after
training on a GPU. What differs here: the digits of the test are in no training clip (there, the 10,000 published
sequences are split, not their digits); frames go through H.264; cells are those of the true centres (there, of the
boxes around what is connected and bright, so one for digits that touch); rollouts start from the first two frames of
a clip (there, from any two), and AP is that of all clips (there, a mean over batches of 64); an embedding is a vector
(there, a map), and the encoder learns before the predictor (there, together).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from benchmarks.common import Figures, Recipe, SeedOptions, at_horizons, figures, make_model, measure_seeds, shared
from benchmarks.detection import average_precision, fit_detection_head, occupied_cells
from benchmarks.digits import FPS, SIZE, STATE_COLUMNS, read_digits, write_digit_videos
from data.cache import EmbeddingCache
from data.windows import Windows
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence
from pipelines.run.command import run_command
from pipelines.run.models import load_predictor

CONTEXT = 2
HORIZON = 18
PEER_HORIZON = 7
"""The last horizon of the mean that eb_jepa publishes."""


@dataclass(frozen=True)
class Options(SeedOptions):
    """Moving MNIST, several seeds."""

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
    """The story: each seed, then tables over seeds."""
    digits = read_digits(shared("images/mnist.npz"))
    recipe = Recipe(
        fps=FPS,
        encoder=options.encoder_options.split(),
        predictor=[{"predictor.context": CONTEXT, "validation-horizon": HORIZON}, *options.predictor_options.split()],
        evaluation={"horizon": HORIZON},
        columns=STATE_COLUMNS,
    )

    def measure(seed: int, folder: Path) -> Figures:
        for number, (split, images) in enumerate(digits.items()):
            clips, where = options.clips[0 if split == "train" else 1], folder / "videos" / split
            write_digit_videos(where, clips, images, frames=CONTEXT + HORIZON, seed=3 * seed + number)
        compared = figures(make_model(folder, {split: folder / "videos" / split for split in digits}, recipe, seed))
        found = find_digits(folder, options.split, seed)
        return Figures(compared.tables | found.tables, compared.measures | found.measures)

    measure_seeds(options, measure)


def labelled(cache: EmbeddingCache, predictor: Predictor) -> tuple[Tensor, Tensor]:
    """All embeddings of a cache, standardised (frames, D), and the cells that digits are in (frames, cells^2)."""
    rows = np.concatenate([clip.start + np.arange(clip.frames) for clip in cache.clips])
    return predictor.standardise(torch.from_numpy(cache.take(rows))), cells_of_digits(cache, rows)


def cells_of_digits(cache: EmbeddingCache, rows: np.ndarray) -> Tensor:
    """The cells that digits are in, (..., cells^2)."""
    positions = torch.from_numpy(np.stack([cache.take(rows, column) for column in STATE_COLUMNS], axis=-1))
    return occupied_cells(rearrange(positions, "... (digits xy) -> ... digits xy", xy=2), SIZE)


@torch.no_grad()
def find_digits(folder: Path, split: str, seed: int) -> Figures:
    """Average precision at each horizon, and its mean over horizons, of the forecasts and of the true frames."""
    predictor, calibration = load_predictor(folder / "predictor")
    train, validation = (labelled(EmbeddingCache(folder / "cache" / part), predictor) for part in ("train", "val"))
    head = fit_detection_head(train, validation, seed=seed)
    windows = Windows(EmbeddingCache(folder / "cache" / split), CONTEXT + HORIZON)  # one a clip
    indices = np.arange(len(windows))
    embeddings = windows.take(indices)
    past, future = Sequence.on_clock(embeddings[:, :CONTEXT], FPS), Future.ticks(HORIZON, FPS)
    found = {
        "true frames": embeddings[:, CONTEXT:],
        "model": rollout(predictor, past, future, calibration=calibration),
        "copy_last": embeddings[:, CONTEXT - 1, None].expand(-1, HORIZON, -1),
        "ridge": rollout(calibration.ridge, past, future),
        "mean": predictor.mean.expand_as(embeddings[:, CONTEXT:]),
    }
    occupied = cells_of_digits(windows.cache, windows.rows(indices)[:, CONTEXT:])
    precision = {}
    for name, value in found.items():
        logits = head(predictor.standardise(value))  # (N, HORIZON, cells^2)
        precision[name] = [average_precision(logits[:, step], occupied[:, step]) for step in range(HORIZON)]
    shown = {name: at_horizons(values) for name, values in precision.items()}
    mean = {name: float(np.mean(values[:PEER_HORIZON])) for name, values in precision.items()}
    measures = {f"mAP over 1 to {PEER_HORIZON}, {name}": value for name, value in mean.items()}
    measures |= {f"of the ceiling, {name}": value / mean["true frames"] for name, value in mean.items()}
    return Figures({"average precision": shown}, measures)


if __name__ == "__main__":
    run_command(main, Options)
