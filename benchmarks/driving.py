r"""Real video: recorded laps of a driving simulator, trained on three recordings, tested on a fourth.

  python benchmarks/driving.py --seeds 0 1 2 --output-dir runs/benchmarks/driving
  python benchmarks/driving.py --seeds 0 --test a_00 --output-dir runs/benchmarks/driving

Needs the recordings (`a_00 b_00 b_01 b_02.mp4`) in `$JEPA_SHARED/driving` (default `../shared/driving`). At
4 fps: encoder and predictor learn from a_00, b_00 and b_01, the predictor as an ensemble: for each recording two
members that do without it, and are chosen and calibrated on it, and two that learn from all; b_02 is the test, from
whose own past `adapting` forecasts learn while they watch it; speed and steering are read off the imagined futures by
ridge regression that was fitted on the training recordings. Then scores b_02 with a stretch of 40 frames played
backwards, at many places, and with a splice of a_00. Prints tables in Markdown and writes `results.json`.
Whatever is to be found out goes by the second command, which never reads b_02.
"""

import csv
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sklearn.metrics import roc_auc_score

from data.embedding_cache import EmbeddingCache
from data.synthetic import write_video
from data.video import read_on_clock
from jepa.energy import agreement
from pipelines.artefacts import load_predictor
from pipelines.evaluate_rollout import lay_out_trials
from pipelines.seed_tables import print_by_horizon
from pipelines.stage import require, run_python, run_stage, write_json

ROOT = Path(__file__).parent.parent
RECORDINGS = ("a_00", "b_00", "b_01")
FPS = 4
SIZE = (32, 64)
STRETCH_FRAMES = 40
ENCODER = {
    "steps": 1000,
    "phases": 3,
    "views.light-amplitude": 0,
    "views.pixel-noise": 0,
    "encoder.embedding-dimension": 128,
    "encoder.head-widths": 256,
    "encoder.head-dropout": 0.3,
}
"""The camera moves: there is no static background that changing light would have to make useless."""
PREDICTOR = {
    "predictor.kind": "direct",
    "predictor.context": 4,
    "predictor.horizon": 20,
    "predictor.width": 512,
    "predictor.depth": 2,
    "predictor.dropout": 0.2,
    "input-noise": 1.0,
    "rollout-steps": 20,
    "rollout-error": "squared",
    "optimizer.learning-rate": 3e-3,
    "steps": 400,
}
"""Both found on a_00 and on b_00, each held out from encoder and predictor; not on b_02, but for `rollout-error`."""
RIDGE_CONTEXT = 8
"""The ridge regression to beat looks so far back, further than our predictor."""
HORIZONS = (1, 5, 10, 15, 20)
COLUMNS = ("speed", "steering")


@dataclass(frozen=True)
class Options:
    """Real video, several seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights, the order and the noise; the recordings are the same."""
    test: Literal["b_02", "a_00", "b_00"] = "b_02"
    """What is learned from the other recordings is tested on this one; b_02 is only ever the test."""
    output_dir: Path = Path("runs/benchmarks/driving")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: make the manipulated videos, run each seed, gather, print."""
    recordings = Path(os.environ.get("JEPA_SHARED", ROOT.parent / "shared")) / "driving"
    require(recordings.is_dir(), f"{recordings}: the driving recordings are not there; set JEPA_SHARED")
    folder = options.output_dir.absolute() / options.test
    folder.mkdir(parents=True, exist_ok=True)
    train = [recordings / f"{name}.mp4" for name in RECORDINGS if name != options.test]
    test = recordings / f"{options.test}.mp4"
    reversals, splice = write_manipulated(test, train[0], folder)
    runs = [measure_seed(seed, folder / f"seed_{seed}", train, test, reversals, splice) for seed in options.seeds]
    write_json(folder / "results.json", runs)
    print_by_horizon(runs, HORIZONS)


def write_manipulated(test: Path, other: Path, folder: Path) -> tuple[dict[Path, float], tuple[Path, float]]:
    """The test on its clock with one stretch played backwards, at several places, and with a splice of the other.

    Returns:
        The reversed videos with the second at which the stretch begins, and the spliced one with its second.
    """
    true, foreign = (
        np.stack([timed.frame.transpose(1, 2, 0) for timed in read_on_clock(video, (160, 320), FPS)])
        for video in (test, other)
    )
    reversals = {}
    for start in range(100, len(true) - 2 * STRETCH_FRAMES, 60):
        stretch = slice(start, start + STRETCH_FRAMES)
        path = folder / f"reversed_at_{start}.mp4"
        frames = true.copy()
        frames[stretch] = true[stretch][::-1]
        if not path.exists():
            write_video(path, frames, FPS)
        reversals[path] = start / FPS
    splice_at = len(true) // 2
    spliced = folder / "spliced.mp4"
    if not spliced.exists():
        middle = foreign[500 : 500 + STRETCH_FRAMES]
        write_video(spliced, np.concatenate([true[:splice_at], middle, true[splice_at:]]), FPS)
    return reversals, (spliced, splice_at / FPS)


def measure_seed(
    seed: int, folder: Path, train: list[Path], test: Path, reversals: dict[Path, float], splice: tuple[Path, float]
) -> dict[str, Any]:
    """All figures of one seed: of forecasts at each of `HORIZONS`, and the others."""
    started, fresh = time.monotonic(), not folder.exists()
    if not (folder / "encoder" / "metrics.json").exists():
        run_python(
            "pipelines/pretrain_encoder.py", "--videos", *train, "--output-dir", folder / "encoder", "--fps", FPS,
            "--encoder.image-size", *SIZE, "--seed", seed, "--resume", *words(ENCODER),
        )  # fmt: skip
    for name, videos, phases in (
        ("train", train, 3),
        ("test", [test], 1),
    ):
        run_python(
            "pipelines/cache_embeddings.py", "--videos", *videos, "--encoder", folder / "encoder" / "encoder", "--fps",
            FPS, "--output-dir", folder / "cache" / name, "--phases", phases,
        )  # fmt: skip
    if not (folder / "predictor" / "metrics.json").exists():
        run_python(
            "pipelines/train_predictor.py", "--train-cache", folder / "cache" / "train", "--folds", len(train),
            "--members", 2, "--output-dir", folder / "predictor", "--seed", seed, "--resume", *words(PREDICTOR),
        )  # fmt: skip
    measures = {"training: seconds": time.monotonic() - started} if fresh else {}
    # One step of a predictor that looks further back, for the ridge regression that comes with it.
    run_python(
        "pipelines/train_predictor.py", "--train-cache", folder / "cache" / "train", "--folds", len(train),
        "--output-dir", folder / "ridge", "--predictor.context", RIDGE_CONTEXT, "--steps", 1, "--tracker", "none",
        "--overwrite",
    )  # fmt: skip
    evaluations = [evaluate(folder, name) for name in ("predictor", "ridge")]
    models = ["--encoder", folder / "encoder" / "encoder", "--predictor", folder / "predictor" / "predictor"]
    for name, videos in (("reversed", list(reversals)), ("spliced", [splice[0]])):
        run_python(
            "pipelines/score_surprise.py", "--videos", *videos, *models, "--output-dir", folder / name, "--overwrite"
        )
    measures |= {
        "useful horizon: seconds": evaluations[0]["useful_horizon"]["model"]["time_s"],
        "reversed stretches": float(len(reversals)),
    }
    for name, scores in score_reversals(folder, list(reversals)).items():
        noticed = notice_reversals(scores, reversals)
        measures |= {f"reversed, AUROC of {of}, by {name}": value for of, value in noticed.items()}
    energies = read_scores(folder / "spliced" / "surprise.csv", "energy")
    measures["splice: rank among all moments, by energy"] = notice_splice(energies, splice)
    return {"forecasts": compare_forecasts(*evaluations), "measures": measures}


def compare_forecasts(model: dict[str, Any], further: dict[str, Any]) -> dict[str, list[float]]:
    """Rows of figures at each of `HORIZONS`, of two evaluations: as far back as our predictor looks, and further.

    Contexts of another length leave other moments out: ratios to copying can be compared, errors cannot. So intervals
    by pairs are those of predictors that look equally far back.
    """
    sources = {name: (model, name) for name in ("model", "adapting_model")}
    sources |= {name: (further, name) for name in ("ridge", "shrunk_ridge", "adapting_ridge")}
    # As far back as our predictor: with so little to learn from, further is not always better.
    sources |= {f"near_{name}": (model, name) for name in ("ridge", "adapting_ridge")}
    records = {
        name: [source["predictors"][key][horizon - 1] for horizon in HORIZONS]
        for name, (source, key) in sources.items()
    }
    of_copying = {name: [record["relative_to_copy_last"] for record in found] for name, found in records.items()}
    rows = {f"{name} of copy-last": values for name, values in of_copying.items()}
    comparisons = [("model", "ridge"), ("model", "near_ridge"), ("adapting_model", "ridge"),
                   ("adapting_model", "adapting_ridge"), ("adapting_model", "near_adapting_ridge")]  # fmt: skip
    for name, to in comparisons:
        pairs = zip(of_copying[name], of_copying[to], strict=True)
        rows[f"{name} of {to}"] = [error / other for error, other in pairs]
        if to.startswith("near_"):
            intervals = [record[f"relative_to_{to.removeprefix('near_')}_interval"] for record in records[name]]
            for side, values in zip(("from", "to"), zip(*intervals, strict=True), strict=True):
                rows[f"{name} of {to}, 95 % interval by pairs: {side}"] = list(values)
    rows["model of mean"] = [record["relative_to_mean"] for record in records["model"]]
    for index, column in enumerate(COLUMNS):
        for name in ("model", "adapting_model", "ridge", "copy_last", "truth"):
            found = model["truth"] if name == "truth" else model["predictors"][name]
            rows[f"R2 of {column} read off: {name}"] = [found[h - 1]["probe_r2"][index] for h in HORIZONS]
    return rows


def evaluate(folder: Path, name: str) -> dict[str, Any]:
    """What evaluate_rollout finds of one of the trained predictors on the test recording."""
    output = folder / f"evaluation_{name}"
    run_python(
        "pipelines/evaluate_rollout.py", "--cache", folder / "cache" / "test", "--predictor",
        folder / name / "predictor", "--output-dir", output, "--probe-cache", folder / "cache" / "train",
        "--probe-columns", *COLUMNS, "--overwrite",
    )  # fmt: skip
    results: dict[str, Any] = json.loads((output / "rollout.json").read_text())
    return results


def words(options: dict[str, Any]) -> list[object]:
    """Options as they stand on a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", value)]


Scores = dict[str, np.ndarray]
"""By video: float64 (moments, 2), the second and how surprising it is."""


def read_scores(table: Path, column: str) -> Scores:
    """A column of what score_surprise has written."""
    rows: dict[str, list[tuple[float, float]]] = {}
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["video"], []).append((float(row["time_s"]), float(row[column])))
    return {video: np.array(moments) for video, moments in rows.items()}


def score_reversals(folder: Path, reversals: list[Path]) -> dict[str, Scores]:
    """The reversed videos scored by energy and by disagreement, and by the disagreement of simple guesses."""
    table = folder / "reversed" / "surprise.csv"
    against = {video: moments * [1, -1] for video, moments in read_scores(table, "agreement").items()}
    scores = {"energy": read_scores(table, "energy"), "disagreement": against}
    run_python(
        "pipelines/cache_embeddings.py", "--videos", *reversals, "--encoder", folder / "encoder" / "encoder", "--fps",
        FPS, "--output-dir", folder / "cache" / "reversed",
    )  # fmt: skip
    predictor = load_predictor(folder / "predictor" / "predictor")
    trials = lay_out_trials(EmbeddingCache(folder / "cache" / "reversed"), predictor, 1)
    cache, last = trials.windows.cache, trials.future_rows[:, 0]
    for name, baseline in {"near_ridge": "ridge", "linear_extrapolation": "linear_extrapolation"}.items():
        found = -agreement(predictor.baselines()[baseline], trials.past, trials.future)[:, 0].numpy()
        scores[f"disagreement of {name}"] = {
            cache.clips[trials.windows.clips[part.start]].key.source: np.stack(
                [cache.times_s[last[part]], found[part]], axis=1
            )
            for part in trials.windows.by_clip()
        }
    return scores


def notice_reversals(scores: Scores, reversals: dict[Path, float]) -> dict[str, float]:
    """AUROC of reversed moments among all, and of mean scores over stretches, of the reversed one and of all others.

    Of each stretch of 10 s the beginning does not count: forecasts that see its seam notice a cut, not which way time
    goes. Neither does what follows a reversed stretch, for as long.
    """
    length_s, seam_s = STRETCH_FRAMES / FPS, PREDICTOR["predictor.context"] / FPS
    moments, stretches = [], []
    for path, start_s in reversals.items():
        times_s, values = scores[str(path)].T
        for begin_s in np.arange(start_s % length_s, times_s[-1] - length_s, length_s):
            # Times in files are rounded.
            counted = values[(times_s > begin_s + seam_s - 0.5 / FPS) & (times_s < begin_s + length_s - 0.5 / FPS)]
            moments += [(begin_s == start_s, value) for value in counted]
            stretches.append((begin_s == start_s, counted.mean()))
    return {
        name: float(roc_auc_score(*zip(*labelled, strict=True)))
        for name, labelled in (("moments", moments), ("10 s", stretches))
    }


def notice_splice(energies: Scores, splice: tuple[Path, float]) -> float:
    """The rank of the splice among all moments, by energy."""
    path, start_s = splice
    times_s, values = energies[str(path)].T
    edges_s = np.array([start_s, start_s + STRETCH_FRAMES / FPS])
    # The frame after an edge is the first that does not follow from its past.
    at_edge = (np.abs(times_s[:, None] - edges_s) < 0.5 / FPS).any(axis=1)
    return float(1 + (values > values[at_edge].max()).sum())


if __name__ == "__main__":
    run_stage(main, Options)
