r"""Real video: recorded laps of a driving simulator, trained on three recordings, tested on a fourth.

  python -m benchmarks.driving --seeds 0 1 2
  python -m benchmarks.driving --seeds 0 --test a_00

Needs the recordings (`a_00 b_00 b_01 b_02`, mp4 and csv) in `$JEPA_SHARED/driving`. At 4 fps and by the plain recipe:
encoder and predictor learn from the first four fifths of a_00, b_00 and b_01, the last fifth of each chooses and
calibrates, and b_02 is the test; the forecasts' speed and steering are read off by ridge regression. Then scores b_02
with ten seconds played backwards, at many places. Prints tables in Markdown and writes `results.json`. Whatever is to
be found out goes by the second command, which never reads b_02.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks.common import (
    Recipe,
    finished,
    forecasts,
    make_model,
    read_scores,
    run,
    shared,
    table_by_horizon,
    table_of_measures,
)
from benchmarks.robot import compare_with_the_best
from data.clock import read_on_clock
from data.synthetic import write_video
from pipelines.run.command import run_command
from pipelines.run.files import write_json

RECORDINGS = ("a_00", "b_00", "b_01")
FPS = 4
SEGMENT = 40
"""Frames that are reversed."""
HELD_OUT, GAP_S = 0.2, 2.0
"""Share of each training recording that is validation, and what is left out before it: one context."""
RECIPE = Recipe(
    fps=FPS,
    encoder={"steps": 1000, "views.light-amplitude": 0, "views.pixel-noise": 0,
             "encoder.image-size": (32, 64), "encoder.embedding-dimension": 128, "encoder.head-widths": 256},
    predictor={"rollout-steps": 20, "steps": 400},
    columns=("speed", "steering"),
)  # fmt: skip
"""The camera moves: there is no static background that changing light would have to make useless."""
HORIZONS = (1, 5, 10, 15, 20)


@dataclass(frozen=True)
class Options:
    """Real video, several seeds."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the weights, the order and the noise; the recordings are the same."""
    test: Literal["b_02", "a_00", "b_00"] = "b_02"
    """What is learned from the other recordings is tested on this one; b_02 is only ever the test."""
    output_dir: Path = Path("runs/benchmarks/driving")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: cut and reverse the videos, run each seed, gather, print."""
    recordings = shared("driving")
    folder = options.output_dir.absolute() / options.test
    (folder / "cut").mkdir(parents=True, exist_ok=True)
    names = [name for name in RECORDINGS if name != options.test]
    halves = [cut_recording(recordings / f"{name}.mp4", folder / "cut") for name in names]
    test = recordings / f"{options.test}.mp4"
    videos = {"train": [head for head, _ in halves], "val": [tail for _, tail in halves], "test": [test]}
    reversals = write_reversed(test, folder)
    results = [measure_seed(folder / f"seed_{seed}", videos, reversals, seed) for seed in options.seeds]
    write_json(folder / "results.json", results)
    for name in results[0]["forecasts"]:
        print(f"\n{name}\n\n{table_by_horizon([result['forecasts'][name] for result in results], HORIZONS)}")
    print(f"\n{table_of_measures({'': [result['measures'] for result in results]})}")


def cut_recording(path: Path, folder: Path) -> tuple[Path, Path]:
    """The beginning and the end of a recording with their tables, cut at a key frame and not encoded again."""
    parts = folder / f"{path.stem}_head.mp4", folder / f"{path.stem}_tail.mp4"
    if parts[1].with_suffix(".csv").exists():
        return parts
    with av.open(str(path)) as source:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        times_s = np.array([float(packet.pts * packet.time_base) for packet in packets])
        wanted_s = times_s.min() + (1 - HELD_OUT) * np.ptp(times_s)
        keys = [index for index, packet in enumerate(packets) if packet.is_keyframe]
        begin = min(keys, key=lambda index: abs(times_s[index] - wanted_s))
        end = int(np.argmax(times_s >= times_s[begin] - GAP_S))  # in the order of decoding: all before it is whole
        rows = list(csv.DictReader(path.with_suffix(".csv").read_text().splitlines()))
        for part, chosen in zip(parts, (slice(0, end), slice(begin, None)), strict=True):
            start_s = times_s[chosen].min()
            with av.open(str(part), "w") as target:
                copy = target.add_stream_from_template(stream)
                for packet in packets[chosen]:
                    ticks = round(start_s / packet.time_base)
                    packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, copy
                    target.mux(packet)
            shown = np.sort(times_s[chosen])
            own = rows[: len(shown)] if chosen.start == 0 else rows[-len(shown) :]
            with part.with_suffix(".csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(row | {"frame": number, "time_s": f"{time_s - start_s:.6f}"}
                                 for number, (row, time_s) in enumerate(zip(own, shown, strict=True)))  # fmt: skip
    return parts


def write_reversed(test: Path, folder: Path) -> dict[Path, float]:
    """The test on its clock with one segment played backwards, at several places; the second at which each begins."""
    true = np.stack([timed.frame.transpose(1, 2, 0) for timed in read_on_clock(test, (160, 320), fps=FPS)])
    reversals = {}
    for start in range(100, len(true) - 2 * SEGMENT, 60):
        path, frames = folder / f"reversed_at_{start}.mp4", true.copy()
        frames[start : start + SEGMENT] = true[start : start + SEGMENT][::-1]
        if not path.exists():
            write_video(path, frames, FPS)
        reversals[path] = start / FPS
    return reversals


def measure_seed(
    folder: Path, videos: dict[str, list[Path]], reversals: dict[Path, float], seed: int
) -> dict[str, Any]:
    """All figures of one seed: of forecasts at each of `HORIZONS`, and the others."""
    measures = make_model(folder, videos, RECIPE, seed) | compare_with_the_best(folder / "evaluation")
    if not finished(folder / "reversed"):
        cache, encoder = folder / "reversed_cache", folder / "encoder" / "encoder"
        run("cache_embeddings", {"videos": list(reversals), "encoder": encoder, "fps": FPS}, "--output-dir", cache)
        run("score_surprise", {"cache": cache, "predictor": folder / "predictor"},
            "--output-dir", folder / "reversed", "--overwrite")  # fmt: skip
    scores = read_scores(folder / "reversed" / "surprise.csv", "energy")
    cosines = read_scores(folder / "reversed" / "surprise.csv", "change_cosine")
    against = {video: rows * [1, -1] for video, rows in cosines.items()}
    for name, values in {"energy": scores, "disagreement": against}.items():
        noticed = notice_reversals(values, reversals)
        measures |= {f"reversed, AUROC of {of}, by {name}": value for of, value in noticed.items()}
    tables = {name: forecasts(folder / "evaluation", name, HORIZONS)
              for name in ("relative_to_copy_last", "relative_to_ridge", "probe_r2")}  # fmt: skip
    return {"forecasts": tables, "measures": measures}


def notice_reversals(scores: dict[str, np.ndarray], reversals: dict[Path, float]) -> dict[str, float]:
    """AUROC of reversed moments among all, and of mean scores over segments, of the reversed one and of all others.

    Of each segment of 10 s the beginning does not count: forecasts that see its seam notice a cut, not which way time
    goes. Neither does what follows a reversed segment, for as long.
    """
    length_s = SEGMENT / FPS
    moments, segments = [], []
    for path, start_s in reversals.items():
        times_s, values = scores[str(path)].T
        for begin_s in np.arange(start_s % length_s, times_s[-1] - length_s, length_s):
            # Times in files are rounded.
            counted = values[(times_s > begin_s + GAP_S - 0.5 / FPS) & (times_s < begin_s + length_s - 0.5 / FPS)]
            moments += [(begin_s == start_s, value) for value in counted]
            segments.append((begin_s == start_s, counted.mean()))
    return {
        name: float(roc_auc_score(*zip(*labelled, strict=True)))
        for name, labelled in (("moments", moments), ("10 s", segments))
    }


if __name__ == "__main__":
    run_command(main, Options)
