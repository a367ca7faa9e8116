r"""Impossible events: is a trained world model surprised by what cannot happen, and only by that?

  python -m benchmarks.surprise --runs runs/benchmarks/balls/seed_0

Makes pairs of clips as real videos: in one of each pair a ball turns round in mid-air, both balls freeze, or they pass
through each other; the other is its lawful twin, the same up to that moment, behind the same flickering background.
Each forecast scores both at the same frames, and the AUROC says how well its scores tell the impossible clips from the
lawful ones. With t the first frame that shows the event, the score of a clip is, for every forecast alike,

  reverse                     the greatest energy of the frames t to t + 2
  freeze                      the mean energy of the frames t to t + 4
  pass_through                the mean energy of the frames t + 2 to t + 6, when the lawful bounce is over
  pass_through, at the bounce the greatest energy of the frames t to t + 2, hard to predict in the lawful twin, too

The energy of a forecast is the Mahalanobis distance of its one-step error among its own on the run's validation clips.
Prints a table in Markdown and leaves `results.json`.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from einops import rearrange
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.common import markdown, run, write_results
from benchmarks.synthetic_events import Event, write_ball_pairs
from data.cache import EmbeddingCache
from data.synthetic import BallWorld
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence
from pipelines.run.command import require, run_command
from pipelines.run.models import load_predictor

RESAMPLES = 1000


@dataclass(frozen=True)
class Options:
    """Impossible events among bouncing balls."""

    runs: tuple[Path, ...]
    """Trained runs on balls, each a folder with `encoder/`, `predictor/` and `cache/val`, as the demo leaves it."""
    seeds: tuple[int, ...] = (200, 201, 202)
    """Seeds of the pairs: each makes its own."""
    pairs: int = 100
    """Pairs of each event and seed."""
    output_dir: Path = Path("runs/benchmarks/surprise")
    """Where the pairs, their embeddings and the results are left."""


class Rule(NamedTuple):
    """How a clip is scored: which frames, counted from the first that shows the event, and what of their energies."""

    event: Event
    frames: slice
    reduce: Callable[..., np.ndarray]


RULES = {
    "reverse": Rule("reverse", slice(0, 3), np.max),
    "freeze": Rule("freeze", slice(0, 5), np.mean),
    "pass_through": Rule("pass_through", slice(2, 7), np.mean),
    "pass_through, at the bounce": Rule("pass_through", slice(0, 3), np.max),
}


class Pairs(NamedTuple):
    """All pairs of one event, embedded."""

    lawful: Tensor
    """(pairs, T, D), raw."""
    impossible: Tensor
    """(pairs, T, D), raw."""
    shown_at: np.ndarray
    """int (pairs,), the first frame that shows the event."""


def main(options: Options) -> None:
    """The story: make pairs, and for each run embed them and score them; print."""
    folders = {event: [options.output_dir / "pairs" / event / f"seed_{seed}_{options.pairs}" for seed in options.seeds]
               for event in get_args(Event)}  # fmt: skip
    for event, of_event in folders.items():
        for folder, seed in zip(of_event, options.seeds, strict=True):
            write_ball_pairs(folder, options.pairs, BallWorld(), seed=seed, event=event)
    rows: list[list[object]] = [["run", "event", "forecast", "AUROC", "95 % from", "to"]]
    for trained in options.runs:
        rows += [[str(trained), *row] for row in measure(trained, folders, options)]
    write_results(options.output_dir, rows)
    print(markdown(rows))


@torch.no_grad()
def measure(trained: Path, folders: dict[Event, list[Path]], options: Options) -> list[list[object]]:
    """Event, forecast, AUROC and its 95 % interval over pairs, for every rule and forecast of a run."""
    predictor, calibration = load_predictor(trained / "predictor")
    context, fps, next_tick = predictor.config.context, predictor.fps, Future.ticks(1, predictor.fps)
    require(context <= BallWorld().frames // 4, f"{trained}: its context reaches into the events")
    cache = options.output_dir / "cache" / predictor.encoder_fingerprint
    videos = [folder for of_event in folders.values() for folder in of_event]
    run("cache_embeddings", {"videos": videos, "encoder": trained / "encoder" / "encoder", "fps": fps,
                             "output-dir": cache})  # fmt: skip
    pairs = {event: read_pairs(EmbeddingCache(cache), of_event) for event, of_event in folders.items()}
    usual = EmbeddingCache(trained / "cache" / "val")
    ordinary = torch.stack([torch.from_numpy(usual.take(clip.rows)) for clip in usual.clips])
    forecasts: dict[str, Callable[[Sequence], Tensor]] = {
        "model": lambda past: rollout(predictor, past, next_tick, calibration=calibration),
        "copy_last": lambda past: past.embeddings[:, -1:],
        "ridge": lambda past: rollout(calibration.ridge, past, next_tick),
    }

    def errors_of(forecast: Callable[[Sequence], Tensor], clips: Tensor) -> np.ndarray:
        """Standardised errors of each embedding after the first `context`, (B x (T - context), D)."""
        windows = rearrange(clips.unfold(1, context + 1, 1), "b t d k -> (b t) k d")
        error = forecast(Sequence.on_clock(windows[:, :context], fps))[:, 0] - windows[:, context]
        return (error / predictor.std).numpy()

    rows: list[list[object]] = []
    for name, forecast in forecasts.items():
        energy = LedoitWolf().fit(errors_of(forecast, ordinary)).mahalanobis
        for title, rule in RULES.items():
            lawful, impossible, shown_at = pairs[rule.event]
            frames = np.arange(rule.frames.start, rule.frames.stop) + shown_at[:, None] - context  # (pairs, frames)
            energies = [energy(errors_of(forecast, clips)).reshape(len(clips), -1) for clips in (lawful, impossible)]
            scores = [rule.reduce(np.take_along_axis(one, frames, axis=1), axis=1) for one in energies]
            rows.append([title, name, *auroc(*scores)])
    return rows


def read_pairs(cache: EmbeddingCache, folders: list[Path]) -> Pairs:
    """The embeddings of all pairs in some folders, and when their events show."""
    clips = {clip.key.source: clip for clip in cache.clips}
    twins: dict[str, list[Tensor]] = {"lawful": [], "impossible": []}
    shown_at = []
    for impossible in sorted(path for folder in folders for path in (folder / "impossible").glob("*.csv")):
        with impossible.open(newline="") as file:
            shown_at.append([row["event"] for row in csv.DictReader(file)].index("1"))
        for kind, embeddings in twins.items():
            video = (impossible.parent.parent / kind / impossible.name).with_suffix(".mp4").resolve()
            embeddings.append(torch.from_numpy(cache.take(clips[str(video)].rows)))
    return Pairs(torch.stack(twins["lawful"]), torch.stack(twins["impossible"]), np.array(shown_at))


def auroc(lawful: np.ndarray, impossible: np.ndarray) -> tuple[float, float, float]:
    """AUROC of scores (pairs,), and its 95 % interval by a bootstrap over pairs."""

    def of(chosen: np.ndarray) -> float:
        labels = np.repeat([0, 1], len(chosen))
        return float(roc_auc_score(labels, np.concatenate([lawful[chosen], impossible[chosen]])))

    generator = np.random.default_rng(0)
    resampled = [of(generator.integers(len(lawful), size=len(lawful))) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return of(np.arange(len(lawful))), float(low), float(high)


if __name__ == "__main__":
    run_command(main, Options)
