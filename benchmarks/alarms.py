r"""Are false alarms as rare as they are said to be, and are events found? Draws of ordinary video with one model.

  python -m benchmarks.alarms --run runs/demo

Makes balls as real videos: ordinary ones, and ones in which a ball turns round in mid-air or all stand still. Each draw
splits the ordinary ones anew: one half chooses the threshold of alarms, as `video-jepa surprise --normal` does, the
other half is watched. Counted is in how many draws the false alarms lie in the interval that was said, and of the
events those that set off an alarm within two seconds, and after how long. Leaves `results.json`.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import markdown, run, write_results
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
