r"""Are false alarms as rare as they are said to be, and are events found? Draws of ordinary video with one model.

  python -m benchmarks.alarms --run runs/demo

Makes balls as real videos: ordinary ones, and ones in which a ball turns round in mid-air or all stand still. Each draw
splits the ordinary ones anew: one half chooses the threshold of alarms, as `video-jepa surprise --normal` does, the
other half is watched. Counted is in how many draws the false alarms lie in the interval that was said, and of the
events those that set off an alarm within two seconds, and after how long. Leaves `results.json`.

  python -m benchmarks.alarms --walkway runs/benchmarks/ped2

Of a finished run of `benchmarks/ped2.py`: is what is too rare for its ordinary video refused, and what is found at the
rarest rate that it allows? The ordinary video is that by which the predictor was calibrated: there is no other.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import markdown, read_scores, run, shared, write_results
from benchmarks.ped2 import HORIZONS, SMOOTHING_S, read_labels
from benchmarks.synthetic_events import Event, write_ball_pairs
from data.cache import EmbeddingCache
from data.synthetic import BallWorld, write_ball_videos
from data.windows import Windows
from jepa.alarms import Timeline, choose_threshold, find_events, hours_of
from jepa.config import Bounded, Positive, PositiveInt
from pipelines.run.command import run_command
from pipelines.run.models import load_predictor
from pipelines.run.scoring import Scorer, score_videos

EVENTS: tuple[Event, ...] = ("reverse", "freeze")
WITHIN_S = 2.0
"""Seconds within which an alarm is of the event."""


@dataclass(frozen=True)
class Options(Bounded):
    """False alarms and events, in draws of ordinary video."""

    run: Path = Path("runs/demo")
    """Trained run on balls, with `encoder/` and `predictor/`, as the demo leaves it."""
    walkway: Path | None = None
    """Finished run of `benchmarks/ped2.py` to watch instead, with its own test clips."""
    clips: PositiveInt = 600
    """Ordinary clips of five seconds."""
    pairs: PositiveInt = 40
    """Clips with each kind of event."""
    draws: PositiveInt = 20
    """Splits of the ordinary clips."""
    alarms_per_hour: Positive = 20.0
    """False alarms that are borne."""
    output_dir: Path = Path("runs/benchmarks/alarms")
    """Where videos, caches and results are left."""


def main(options: Options) -> None:
    """The story: make videos, score them, draw, count."""
    folder = options.output_dir
    if options.walkway:
        write_results(folder, results := watch_walkway(options.walkway))
        print(results)
        return
    write_ball_videos(folder / "videos" / "ordinary", options.clips, BallWorld(), seed=900)
    ordinary = score(folder / "videos" / "ordinary", "ordinary", options)
    planted = []
    for event in EVENTS:
        write_ball_pairs(folder / "videos" / event, options.pairs, BallWorld(), seed=901, event=event)
        timelines = score(folder / "videos" / event / "impossible", event, options)
        planted += [(timeline, shown_at_s(Path(video))) for video, timeline in timelines.items()]
    generator, draws = np.random.default_rng(0), []
    for _ in range(options.draws):
        normal, watched = np.array_split(generator.permutation(sorted(ordinary)), 2)
        alarm = choose_threshold([ordinary[video] for video in normal], options.alarms_per_hour)
        rest = [ordinary[video] for video in watched]
        found = sum(len(find_events(timeline, alarm.threshold)) for timeline in rest)
        low, high = alarm.expected(hours_of(rest))
        delays = [delay_s(timeline, at_s, alarm.threshold) for timeline, at_s in planted]
        draws.append({
            "false alarms": found, "said": [low, high], "inside": low <= found <= high, "hours": hours_of(rest),
            "recall": float(np.isfinite(delays).mean()), "delay_s": float(np.nanmedian(delays)),
        })  # fmt: skip
    inside = sum(bool(draw["inside"]) for draw in draws)
    results = {"inside": inside, "draws": len(draws), "planted": len(planted),
               "recall": [draw["recall"] for draw in draws], "each": draws}  # fmt: skip
    write_results(folder, results)
    rows = [[draw["false alarms"], "{} to {}".format(*draw["said"]), f"{draw['recall']:.2f}", f"{draw['delay_s']:.2f}"]
            for draw in draws]  # fmt: skip
    print(markdown([["false alarms", "said", "recall", "delay, s"], *rows]))
    print(f"inside what was said: {inside} of {len(draws)}")


def score(videos: Path, name: str, options: Options) -> dict[str, Timeline]:
    """Energies and times of each video of a folder."""
    cache, encoder = options.output_dir / "cache" / name, options.run / "encoder" / "encoder"
    run("cache_embeddings", {"videos": videos, "encoder": encoder, "fps": BallWorld().fps, "output-dir": cache})
    scorer = Scorer(*load_predictor(options.run / "predictor"), (1,))
    windows = Windows(EmbeddingCache(cache), scorer.length)
    return {str(scores.video): scores.timeline for scores in score_videos(scorer, windows)}


def watch_walkway(run_folder: Path) -> dict[str, Any]:
    """What is said of two alarms an hour; and, at the rarest rate that is allowed, what is found and how late."""
    scorer = Scorer(*load_predictor(run_folder / "predictor_0"), HORIZONS, smoothing_s=SMOOTHING_S)
    windows = Windows(EmbeddingCache(run_folder / "cache" / "val"), scorer.length)
    ordinary = [scores.timeline for scores in score_videos(scorer, windows)]
    try:
        refused = str(choose_threshold(ordinary, 2))
    except ValueError as error:
        refused = str(error)
    alarm = choose_threshold(ordinary, 1.001 / hours_of(ordinary))
    scored = run_folder / "surprise_0" / "surprise.csv"
    times_s, energies = read_scores(scored, "time_s"), read_scores(scored, "energy")
    abnormal = read_labels(shared("ped2") / "labels.csv", [Path(video) for video in times_s])
    delays_s, loud_though_ordinary = dict[str, float](), list[bool]()
    for video, at in times_s.items():
        frames_s, truth = abnormal[Path(video).name]
        begin_s, end_s = frames_s[truth][[0, -1]]
        is_loud, is_abnormal = energies[video] >= alarm.threshold, (at >= begin_s) & (at <= end_s)
        loud_s = at[is_loud & is_abnormal]
        delays_s[Path(video).name] = float(loud_s[0] - max(begin_s, at[0])) if len(loud_s) else float("nan")
        loud_though_ordinary += is_loud[~is_abnormal].tolist()
    return {"two an hour": refused, "rate": 1 / hours_of(ordinary), "threshold": alarm.threshold, "delays_s": delays_s,
            "ordinary moments": len(loud_though_ordinary), "above": sum(loud_though_ordinary)}  # fmt: skip


def shown_at_s(video: Path) -> float:
    """When a planted event shows, in seconds."""
    with video.with_suffix(".csv").open(newline="") as file:
        return [row["event"] for row in csv.DictReader(file)].index("1") / BallWorld().fps


def delay_s(timeline: Timeline, at_s: float, threshold: float) -> float:
    """Seconds from an event until the energy first passes the threshold; NaN where it does not soon."""
    energies, times_s = timeline
    loud = times_s[(energies >= threshold) & (times_s >= at_s - 1e-3) & (times_s <= at_s + WITHIN_S)]
    return float(loud[0] - at_s) if len(loud) else float("nan")


if __name__ == "__main__":
    run_command(main, Options)
