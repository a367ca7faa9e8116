r"""A robot's arms: what does it help to know what is done? With actions, without, and with another clip's.

  python -m benchmarks.robot --train DIR --test DIR --output-dir runs/benchmarks/robot

Folders of clips, each with a table that has columns `action_*`; the last seventh of TRAIN chooses and calibrates.
Without folders the episodes in `$JEPA_SHARED/robot`, the last eight of which are the test. Published patches, frozen,
and an encoder that is trained here; on the embeddings of each a predictor with actions and one without, a pair a seed,
of the same defaults but for the horizon. `results.json` has `true`, `none` and `shuffled`: errors of the believed
forecast relative to copying, 1 and 2 seconds ahead, of the same windows, mean over seeds; `trained_here` has those of
the other encoder. Intervals, of ratios too, are of resampled clips.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import SeedOptions, markdown, run, shared, train, train_on, write_results
from data.cache import EmbeddingCache
from jepa.bootstrap import Bootstrap
from jepa.metrics import squared_error
from pipelines.run.command import require, run_command
from pipelines.run.evaluation import Evaluation
from pipelines.run.models import in_batches, load_predictor, windows_for

FPS, SECONDS = 5.0, (1, 2)
HELD_OUT, PART = 8, 7
PUBLISHED = {"encoder": "timm:tf_efficientnet_lite0", "tokens": "flat", "levels": 3, "image-size": (64, 80), "pca": 8}
TRAINED = {"encoder.image-size": (64, 80), "encoder.embedding-dimension": 16, "slow-dimension": 8, "steps": 300,
           "encoder.pooling": "softmax", "encoder.levels": (-3, -2, -1), "batch-size": 128}  # fmt: skip
PREDICTOR = {"rollout-steps": 10, "validation-horizon": 10, "steps": 300, "log-every": 50, "predictor.context": 4,
             "predictor.width": 256, "predictor.depth": 2}  # fmt: skip


@dataclass(frozen=True)
class Options(SeedOptions):
    """A robot's arms, with actions and without."""

    train: Path | None = None
    """Folder of clips to train and to validate on."""
    test: Path | None = None
    """Folder of clips to test on."""
    encoder_weights: Path | None = None
    """File of safetensors with the published weights; that of the shared material if not given."""
    output_dir: Path = Path("runs/benchmarks/robot")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: divide the clips, embed them twice, train each pair, compare."""
    videos = divide(options)
    weights = options.encoder_weights or shared("weights/tf_efficientnet_lite0.safetensors")
    found = {}
    for name, encoder in (("published", PUBLISHED | {"encoder-weights": weights}), ("trained_here", {})):
        folder = options.output_dir / name
        if not encoder:
            given = {"videos": videos["train"], "fps": FPS, "seed": options.seeds[0]}
            train("pretrain_encoder", folder / "encoder", given, TRAINED)
            encoder = {"encoder": folder / "encoder" / "encoder"}
        for split, clips in videos.items():
            given = {"videos": clips, "fps": FPS, "columns": "action_*", "output-dir": folder / "cache" / split}
            run("cache_embeddings", encoder, given, {"clocks": 3 if split == "train" else 1})
            if name == "published":  # with the principal components of the training clips
                encoder = {"encoder": folder / "cache" / "train" / "encoder"}
        found[name] = compare(folder, options.seeds)
        print(f"\n{name}\n\n{table(found[name])}\n")
    write_results(options.output_dir, found["published"] | {"trained_here": found["trained_here"]})


def divide(options: Options) -> dict[str, list[Path]]:
    """Clips to train on, to choose and calibrate by, and to test on."""
    require(bool(options.train) == bool(options.test), "--train and --test belong together: give both or neither")
    first, last = options.train or shared("robot"), options.test or shared("robot")
    known, new = (sorted(folder.glob("*.mp4")) for folder in (first, last))
    if not options.test:
        known, new = known[:-HELD_OUT], new[-HELD_OUT:]
    require(
        len(known) > PART and len(new) > 1, f"{first} and {last} hold {len(known)} and {len(new)} mp4 files: too few"
    )
    held_out = -(len(known) // PART)
    return {"train": known[:held_out], "val": known[held_out:], "test": new}


def compare(folder: Path, seeds: tuple[int, ...], split: str = "test") -> dict[str, Any]:
    """Errors of both predictors on the same windows, mean over seeds, relative to copying, with intervals by clip."""
    cache, errors = EmbeddingCache(folder / "cache" / split), dict[str, list[np.ndarray]]()
    for seed in seeds:
        runs = {"none": {}, "true": {"actions": "action_*"}}
        for name, actions in runs.items():
            train_on(folder / "cache", folder / f"predictor_{name}_{seed}", PREDICTOR, actions, {"seed": seed})
        models = {name: load_predictor(folder / f"predictor_{name}_{seed}") for name in runs}
        predictor, _ = models["true"]
        windows = windows_for(cache, predictor, predictor.config.context + round(max(SECONDS) * FPS))
        for name, model in models.items():
            for kind, error in window_errors(Evaluation(*model, windows, seed=seed)).items():
                said = {"model": name, "shuffled_actions": "shuffled", "copy_last": "copying"}.get(kind)
                if said and not (kind == "copy_last" and name == "none"):
                    errors.setdefault(said, []).append(error)
    clips = np.unique(windows.video_of(np.arange(len(windows))), return_inverse=True)[1]
    return relative({name: np.mean(of_seeds, axis=0) for name, of_seeds in errors.items()}, Bootstrap(clips))


def window_errors(judge: Evaluation) -> dict[str, np.ndarray]:
    """Squared errors of each forecast, (N, seconds)."""
    windows, draws = judge.windows, np.random.default_rng(judge.seed)
    everything, found = np.arange(len(windows)), dict[str, list[torch.Tensor]]()
    others = windows.of_other_videos(everything, draws)
    for part, taken in in_batches(windows, everything, judge.device):
        batch = judge.forecast(taken, windows.actions(others[part]) if judge.predictor.actions else None)
        for name, value in batch.forecasts.items():
            error = squared_error(value, batch.came)[:, [round(second * FPS) - 1 for second in SECONDS]]
            found.setdefault(name, []).append(error)
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def relative(errors: dict[str, np.ndarray], bootstrap: Bootstrap) -> dict[str, Any]:
    """Ratios of mean errors at each second and their intervals; of pairs of contestants too."""
    pairs = {name: (name, "copying") for name in ("true", "none", "shuffled")}
    pairs |= {"true_of_none": ("true", "none"), "none_of_shuffled": ("none", "shuffled")}
    found = dict[str, Any]()
    for name, (one, other) in pairs.items():
        ratio = errors[one].mean(axis=0) / errors[other].mean(axis=0)
        ends = bootstrap.interval(bootstrap.means(errors[one]) / bootstrap.means(errors[other]))
        found[name] = {str(second): float(value) for second, value in zip(SECONDS, ratio, strict=True)}
        found[name]["intervals"] = {str(second): ends[:, place].tolist() for place, second in enumerate(SECONDS)}
    return found


def table(found: dict[str, Any]) -> str:
    """In Markdown."""
    rows: list[list[object]] = [["", *(f"{second} s" for second in SECONDS)]]
    for name, values in found.items():
        cells = [f"{values[str(second)]:.3f} ({' to '.join(f'{end:.3f}' for end in values['intervals'][str(second)])})"
                 for second in SECONDS]  # fmt: skip
        rows.append([name.replace("_", " "), *cells])
    return markdown(rows)


if __name__ == "__main__":
    run_command(main, Options)
