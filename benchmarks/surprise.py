r"""Impossible events: is a trained world model surprised by what cannot happen, and only by that?

  python benchmarks/surprise.py --run runs/benchmarks/balls/seed_0 --output-dir runs/benchmarks/surprise

Makes pairs of clips as real videos: in one of each pair a ball turns round in mid-air, both balls freeze, or they pass
through each other; the other is its lawful twin, the same up to that moment, behind the same flickering background.
Each predictor scores both at the same frames, and the AUROC says how well its scores tell the impossible clips from the
lawful ones. With t the first frame that shows the event, the score of a clip is, for every predictor alike,

  reverse                     the greatest energy of the frames t to t + 2
  freeze                      the mean energy of the frames t to t + 4
  pass_through                the mean energy of the frames t + 2 to t + 6, when the lawful bounce is over
  pass_through, at the bounce the greatest energy of the frames t to t + 2, hard to predict in the lawful twin, too

The energy is that of `jepa.energy`, each predictor's errors in units of its own usual ones on the run's validation
clips, one step ahead; beside it stands the plain squared error. Prints a table in Markdown and writes `results.json`.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from einops import rearrange
from sklearn.metrics import roc_auc_score
from torch import Tensor

from data.embedding_cache import EmbeddingCache
from data.synthetic import BallWorld, Event, write_ball_pairs
from jepa.baselines import Baseline
from jepa.energy import measure_usual_errors, prediction_errors
from jepa.predictor import Predictor
from pipelines.artefacts import load_predictor
from pipelines.stage import require, run_python, run_stage, write_json

EVENTS: list[Event] = [event for event in get_args(Event) if event != "none"]
PREDICTORS = ("model", "copy_last", "linear_extrapolation", "ridge")
RESAMPLES = 1000


@dataclass(frozen=True)
class Options:
    """Impossible events among bouncing balls."""

    run: tuple[Path, ...]
    """Trained runs on balls, each a folder with `encoder/`, `predictor/` and `cache/val`, as the demo leaves it."""
    seeds: tuple[int, ...] = (200, 201, 202)
    """Of the pairs: each makes its own."""
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
    """(pairs, T, D), standardised."""
    impossible: Tensor
    """(pairs, T, D), standardised."""
    shown_at: np.ndarray
    """(pairs,), the first frame that shows the event."""


def main(options: Options) -> None:
    """The story: load, make pairs, and for each run embed them, score them; print."""
    world = BallWorld()
    predictors = {run: load_predictor(run / "predictor" / "predictor") for run in options.run}
    for run, predictor in predictors.items():
        require(predictor.fps == world.fps, f"{run} was trained at {predictor.fps:g} fps, the pairs have {world.fps}")
        context, earliest = predictor.config.context, world.frames // 4
        require(
            context <= earliest, f"{run}: its context of {context} is more than the {earliest} frames before events"
        )
    folders = {
        event: [options.output_dir / "pairs" / event / f"seed_{seed}_{options.pairs}" for seed in options.seeds]
        for event in EVENTS
    }
    for event, each in folders.items():
        for folder, seed in zip(each, options.seeds, strict=True):
            write_ball_pairs(folder, options.pairs, world, seed, event)
    results = []
    for run, predictor in predictors.items():
        cache = options.output_dir / "cache" / predictor.encoder_fingerprint
        embed([folder for each in folders.values() for folder in each], run / "encoder" / "encoder", world.fps, cache)
        pairs = {event: read_pairs(cache, each, predictor) for event, each in folders.items()}
        results += [{"run": str(run)} | found for found in measure(predictor, EmbeddingCache(run / "cache/val"), pairs)]
    write_json(options.output_dir / "results.json", results)
    print("| run | event | predictor | pairs | AUROC of the energy | AUROC of the squared error |")
    print("| --- | --- | --- | --- | --- | --- |")
    for found in results:
        cells = [found[name] for name in ("run", "event", "predictor", "pairs")]
        cells += ["{:.3f} ({:.3f} to {:.3f})".format(*found[name]) for name in ("energy", "squared_error")]
        print(f"| {' | '.join(map(str, cells))} |")


def embed(videos: list[Path], encoder: Path, fps: float, cache: Path) -> None:
    """Cache the embeddings of all videos in some folders, as one does with one's own."""
    run_python(
        "pipelines/cache_embeddings.py", "--videos", *videos, "--encoder", encoder, "--fps", fps, "--output-dir", cache,
    )  # fmt: skip


def read_pairs(cache: Path, folders: list[Path], predictor: Predictor) -> Pairs:
    """The embeddings of all pairs in some folders, and when their events show."""
    stored = EmbeddingCache(cache)
    clips = {clip.key.source: clip for clip in stored.clips}
    twins: dict[str, list[Tensor]] = {"lawful": [], "impossible": []}
    shown_at = []
    for impossible in sorted(path for folder in folders for path in (folder / "impossible").glob("*.csv")):
        with impossible.open(newline="") as file:
            shown_at.append([row["event"] for row in csv.DictReader(file)].index("1"))
        for kind, embeddings in twins.items():
            video = (impossible.parent.parent / kind / impossible.name).with_suffix(".mp4").resolve()
            embeddings.append(predictor.standardise(torch.from_numpy(stored.clip_embeddings(clips[str(video)]))))
    return Pairs(torch.stack(twins["lawful"]), torch.stack(twins["impossible"]), np.array(shown_at))


@torch.no_grad()
def measure(predictor: Predictor, validation: EmbeddingCache, pairs: dict[Event, Pairs]) -> list[dict[str, Any]]:
    """AUROC, each with a 95 % interval over pairs, for every rule and predictor."""
    context = predictor.config.context
    usual_clips = torch.stack(
        [predictor.standardise(torch.from_numpy(validation.clip_embeddings(clip))) for clip in validation.clips]
    )
    records: list[dict[str, Any]] = []
    baselines = predictor.baselines()
    for name in PREDICTORS:
        one = predictor if name == "model" else baselines[name]
        usual = measure_usual_errors(one_step_errors(one, usual_clips, context))
        scorings = {"energy": usual.energy, "squared_error": squared_error}
        for title, rule in RULES.items():
            lawful, impossible, shown_at = pairs[rule.event]
            records.append(
                {"event": title, "predictor": name, "pairs": len(shown_at)}
                | {
                    scoring: auroc(*(score(one, clips, shown_at, context, rule, of) for clips in (lawful, impossible)))
                    for scoring, of in scorings.items()
                }
            )
    return records


def one_step_errors(one: Predictor | Baseline, clips: Tensor, context: int) -> Tensor:
    """Of each embedding after the first `context`; (B, T, D) -> (n, B x (T - context), 1, D), n predictions of each."""
    windows = rearrange(clips.unfold(1, context + 1, 1), "b t d k -> (b t) k d")
    return prediction_errors(one, windows[:, :context], windows[:, context:])


def squared_error(errors: Tensor) -> Tensor:
    """Mean over the features, of the nearest of n predictions; (n, B, h, D) -> (B, h)."""
    return errors.square().mean(dim=-1).amin(dim=0)


def score(
    one: Predictor | Baseline,
    clips: Tensor,
    shown_at: np.ndarray,
    context: int,
    rule: Rule,
    of_errors: Callable[[Tensor], Tensor],
) -> np.ndarray:
    """One number a clip; (pairs, T, D) -> (pairs,)."""
    energies = of_errors(one_step_errors(one, clips, context)).numpy().reshape(len(clips), -1)  # (pairs, T - context)
    frames = np.arange(rule.frames.start, rule.frames.stop) + shown_at[:, None] - context  # (pairs, frames)
    return rule.reduce(np.take_along_axis(energies, frames, axis=1), axis=1)


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
    run_stage(main, Options)
