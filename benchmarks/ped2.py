r"""Where something happened that never happened before: surprise on real surveillance video, beside simple scores.

  python -m benchmarks.ped2 --seeds 0 1 2
  python -m benchmarks.ped2 --train DIR --test DIR --labels CSV --seeds 0 --output-dir DIR

By default UCSD Ped2 (Mahadevan et al. 2010, people on a walkway; not normal are a cyclist, a skater, a cart). Patches
of a published backbone, frozen, from `$JEPA_SHARED/weights`; every fourth training clip calibrates. For each seed of
the predictor the scores of `video-jepa surprise`, and beside them its simple ones, by the same rule over places and
horizons: the energy of copying, the Mahalanobis distance of patches without time, their distance to the nearest of
40,000 training patches; the mean difference of frames, and the frame's number. The CSV has `video`, `first_abnormal`,
`last_abnormal`, frames counted from 0. Areas under the ROC curve over frames, raw: of all test clips pooled, and the
mean over the clips that have both classes; intervals by resampling clips. Prints a table and leaves `results.json`.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks.common import (
    markdown,
    over_seeds,
    read_json,
    read_scores,
    run,
    run_once,
    shared,
    train_on,
    write_results,
)
from data.clock import read_on_clock
from data.counting import count_frames
from jepa.config import Bounded, Positive
from pipelines.run.command import require, run_command

HORIZONS, SMOOTHING_S = (1, 2, 3, 4), 1.0
BESIDE = ("copying", "mahalanobis", "nearest")
RESAMPLES = 1000


@dataclass(frozen=True)
class Options(Bounded):
    """Surprise on surveillance video, several seeds of the predictor."""

    train: Path | None = None
    """Folder of ordinary videos; by default Ped2's."""
    test: Path | None = None
    """Folder of the videos to score; by default Ped2's."""
    labels: Path | None = None
    """Which of their frames are abnormal; by default Ped2's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the predictor."""
    fps: Positive = 2.5
    """Ticks a second; four clocks together see four times as many frames."""
    encoder_options: str = (
        "--encoder timm:tf_efficientnet_lite0 --tokens grid --grid 15 22 --image-size 240 352 --levels 3 "
        "--batch-size 16"
    )
    """Options of `cache_embeddings`."""
    predictor_options: str = (
        "--predictor.kind transformer --predictor.context 4 --predictor.width 256 --predictor.depth 2 "
        "--predictor.heads 4 --batch-size 512 --rollout-steps 4 --validation-horizon 4 --steps 400"
    )
    """Options of `train_predictor`."""
    output_dir: Path = Path("runs/benchmarks/ped2")
    """Where all caches, runs and the results are left."""


def main(options: Options) -> None:
    """The story: cache patches, train and score each seed, score by simple means, compare with the labels."""
    folder = options.output_dir
    ordinary = videos_in(options.train or shared("ped2") / "train")
    tests = videos_in(options.test or shared("ped2") / "test")
    abnormal = read_labels(options.labels or shared("ped2") / "labels.csv", tests)
    cached(folder, {"train": [one for number, one in enumerate(ordinary) if number % 4], "val": ordinary[::4],
                    "test": tests}, options)  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {"model": []}
    for seed in options.seeds:
        predictor = folder / f"predictor_{seed}"
        train_on(folder / "cache", predictor, options.predictor_options.split(), {"seed": seed})
        given = {
            "cache": folder / "cache" / "test", "predictor": predictor, "horizons": HORIZONS, "smoothing": SMOOTHING_S,
            "score": BESIDE if seed == options.seeds[0] else BESIDE[:1],  # they are alike for all seeds
        }  # fmt: skip
        run_once("score_surprise", folder / f"surprise_{seed}", given)
        found["model"].append(judge(read_surprise(folder / f"surprise_{seed}" / "surprise.csv", "energy"), abnormal))
    first = folder / f"surprise_{options.seeds[0]}" / "surprise.csv"
    beside = {"copy_last" if name == "copying" else name: read_surprise(first, name) for name in BESIDE}
    beside["frame_difference"] = {video.name: differences(video) for video in tests}
    beside["frame_number"] = {video.name: (np.array([0.0, 1e4]), np.array([0.0, 1e4])) for video in tests}
    for name, scores in beside.items():
        found[name] = [judge(scores, abnormal)]
    write_results(folder, {name: summarise(results) for name, results in found.items()})
    print(
        markdown(
            [
                ["score", "pooled", "by clips", "interval of pooled"],
                *map(row_of, read_json(folder / "results.json").items()),
            ]
        )
    )


def videos_in(folder: Path) -> list[Path]:
    """The videos of a folder, by name."""
    videos = sorted(path for path in folder.iterdir() if path.suffix == ".mp4")
    require(len(videos) > 1, f"{folder} holds {len(videos)} .mp4 files: bring some")
    return videos


def read_labels(path: Path, videos: list[Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Times of each video's frames, float64 (T,), and whether they are abnormal, bool (T,)."""
    times_s = {}
    for video in videos:
        info = count_frames(video)
        times_s[video.name] = np.arange(info.frames or 0) / info.average_fps
    found = {name: (times, np.zeros(len(times), bool)) for name, times in times_s.items()}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["video"] in found:
                found[row["video"]][1][int(row["first_abnormal"]) : int(row["last_abnormal"]) + 1] = True
    return found


def cached(folder: Path, videos: dict[str, list[Path]], options: Options) -> None:
    """Caches of the splits; the encoder is kept in that of the training videos."""
    common, kept = {"fps": options.fps, "clocks": 4}, folder / "cache" / "train" / "encoder"  # of a published one
    for split, paths in videos.items():
        cache = folder / "cache" / split
        words = options.encoder_options.split()
        if split != "train" and kept.exists():
            words = ["--batch-size", "16", "--encoder", str(kept.absolute())]
        elif "efficientnet_lite0" in options.encoder_options:
            words += ["--encoder-weights", str(shared("weights") / "tf_efficientnet_lite0.safetensors")]
        run("cache_embeddings", {"videos": paths, "output-dir": cache} | common, words)


# Scores: by the name of a video its times and a score at each, both (N,), in the order of time

Scores = dict[str, tuple[np.ndarray, np.ndarray]]


def read_surprise(path: Path, column: str) -> Scores:
    """The scores of a column of `surprise.csv`."""
    times_s, scores = read_scores(path, "time_s"), read_scores(path, column)
    return {Path(video).name: (times_s[video], scores[video]) for video in scores}


def differences(video: Path) -> tuple[np.ndarray, np.ndarray]:
    """The mean difference of each frame to the one before it."""
    frames = list(read_on_clock(video, (120, 176), fps=10))
    pictures = np.stack([frame.frame for frame in frames]).astype(np.float32)
    return np.array([frame.time_s for frame in frames[1:]]), np.abs(np.diff(pictures, axis=0)).mean(axis=(1, 2, 3))


# Judgement


def judge(scores: Scores, abnormal: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Areas under the curve; each frame has the score that is interpolated at its time."""
    frames = [(truth, np.interp(times_s, *scores[name])) for name, (times_s, truth) in abnormal.items()]
    areas = [roc_auc_score(truth, score) for truth, score in frames if 0 < truth.mean() < 1]
    generator, resampled = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        chosen = generator.integers(len(frames), size=len(frames))
        truths = np.concatenate([frames[one][0] for one in chosen])
        if 0 < truths.mean() < 1:
            resampled.append(roc_auc_score(truths, np.concatenate([frames[one][1] for one in chosen])))
    pooled = roc_auc_score(*map(np.concatenate, zip(*frames, strict=True)))
    return {"pooled": pooled, "by_clips": np.mean(areas), "interval": np.quantile(resampled, [0.025, 0.975]).tolist()}


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and what each has."""
    mean = {name: np.mean([result[name] for result in results], axis=0).tolist() for name in results[0]}
    return mean | {"seeds": results}


def row_of(item: tuple[str, dict[str, Any]]) -> list[object]:
    """A line of the table."""
    name, found = item
    values = [over_seeds([seed[measure] for seed in found["seeds"]]) for measure in ("pooled", "by_clips")]
    return [name, *values, " to ".join(f"{end:.3f}" for end in found["interval"])]


if __name__ == "__main__":
    run_command(main, Options)
