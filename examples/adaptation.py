r"""Learning while watching: what became of earlier forecasts of a video mends its later ones.

  python examples/adaptation.py --cache cache/test --predictor runs/predictor

A predictor meets roads that it has not learned from. But by the time it begins a forecast, it has seen how those that
it began a while ago came out, and no label is needed to learn from that. Two things are learned, both of them anew at
each moment, from the forecasts whose whole future had been seen by then: what to add, which is what was missing from
earlier forecasts that began at similar moments (the mean of a Gaussian process with an exponential kernel on the past
embeddings, Rasmussen and Williams 2006, eq. 2.25), and how much of it to add, as much as would have been best so far.

Nothing in the predictor changes, and until anything is known, forecasts are the calibrated rollouts. On the driving
simulator's laps this is worth more than any predictor we trained (`docs/log/`). Learning at test time on a stream: Wang
et al. 2023 (arXiv:2307.05014); a Bayesian last layer for it: Harrison et al. 2018 (ALPaCA, arXiv:1807.08912).

Prints squared errors relative to copying at some horizons and writes `adaptation.json` into the output folder.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from data.cache import EmbeddingCache
from data.windows import Windows
from jepa.config import Bounded, PositiveInt
from jepa.metrics import squared_error
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence
from pipelines.run.command import run_command
from pipelines.run.files import write_json
from pipelines.run.models import load_predictor

PRIOR = 50
"""Forecasts' worth of belief in the whole correction, before any has been judged."""
REACH = 1 / 3
"""Distance over which moments are similar: root mean squared difference of past embeddings, in standard deviations."""
NOISE = 0.5
"""Share of an error that is chance, as variance relative to what similar moments share."""
MEMORY = 2048
"""Most forecasts that are remembered, the newest: the cost of a regression grows with their cube."""


@dataclass(frozen=True)
class Options(Bounded):
    """Compare forecasts with those that learn while watching."""

    cache: Path = Path("cache/test")
    """Embeddings of videos that the predictor was not trained on; long ones, or there is nothing to learn."""
    predictor: Path = Path("runs/predictor")
    """Run folder of train_predictor."""
    output_dir: Path = Path("runs/adaptation")
    """Where the results are left."""
    horizon: PositiveInt = 20
    """Steps into the future."""


def main(options: Options) -> None:
    """Forecast each clip from each of its moments, adapt, compare."""
    predictor, calibration = load_predictor(options.predictor)
    cache = EmbeddingCache(options.cache)
    cache.require_same_space(predictor.encoder_fingerprint, predictor.fps, predictor.shape, str(options.predictor))
    context, future = predictor.config.context, Future.ticks(options.horizon, predictor.fps)
    windows = Windows(cache, context + options.horizon)
    numbers = np.arange(len(windows))
    errors: dict[str, list[Tensor]] = {"model": [], "adapting": [], "ridge": [], "copy_last": []}
    for of_clip in tqdm(np.split(numbers, np.flatnonzero(np.diff(windows.clip_of(numbers))) + 1), unit="clip"):
        embeddings = windows.take(of_clip)
        past = Sequence.on_clock(embeddings[:, :context], predictor.fps)
        with torch.no_grad():
            believed = rollout(predictor, past, future, calibration=calibration)
            ridged = rollout(calibration.ridge, past, future)
        shown, came, forecasts, ridged = (
            rearrange(predictor.standardise(part), "n t ... d -> n t (... d)")
            for part in (past.embeddings, embeddings[:, context:], believed, ridged)
        )
        begun = torch.from_numpy(cache.take(windows.rows(of_clip)[:, context - 1], "ticks"))
        found = {"model": forecasts, "adapting": adapt(forecasts, shown, came, begun), "ridge": ridged,
                 "copy_last": shown[:, -1:].expand_as(came)}  # fmt: skip
        for name, forecast in found.items():
            errors[name].append(squared_error(forecast, came))
    means = {name: torch.cat(parts).mean(dim=0) for name, parts in errors.items()}  # (H,) each
    relative = {name: (error / means["copy_last"]).tolist() for name, error in means.items()}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "adaptation.json", relative)
    shown_horizons = sorted({1, *range(5, options.horizon + 1, 5), options.horizon})
    print("error relative to copying" + "".join(f"{horizon:>8}" for horizon in shown_horizons))
    for name, curve in relative.items():
        print(f"{name:25}" + "".join(f"{curve[horizon - 1]:8.3f}" for horizon in shown_horizons))


@torch.no_grad()
def adapt(forecasts: Tensor, past: Tensor, future: Tensor, begun: Tensor) -> Tensor:
    """Forecasts of one clip, each mended by what had been seen of the future of earlier ones when it was begun.

    Args:
        forecasts: (N, H, D), standardised, in order of time.
        past: (N, context, D), what they started from.
        future: (N, H, D), what came. Only those are read whose last embedding had been seen when the newest forecast
            was begun: the others may hold anything, so what is asked for may be the future of a live stream.
        begun: int (N,), increasing: ticks at which the forecasts were begun. Only how far they lie apart counts.

    Returns:
        (N, H, D).
    """
    known = count_known(begun, forecasts.shape[1])
    correction = similar_errors(future - forecasts, past.flatten(1), known)
    return forecasts + earned_share(correction, future - forecasts, known) * correction


def count_known(begun: Tensor, horizon: int) -> Tensor:
    """How many forecasts had all their steps seen when each was begun, int (N,)."""
    return torch.searchsorted(begun, begun - horizon, right=True)


def similar_errors(errors: Tensor, moments: Tensor, known: Tensor) -> Tensor:
    """What the errors (N, H, D) known to each forecast say of its own, by how similar the moments (N, F) are."""
    expected = torch.zeros_like(errors)
    begin = int((known == 0).sum())
    while begin < len(errors):
        # One regression serves a few forecasts: until there is a twentieth more to learn from.
        newest = int(known[begin])
        kept = slice(max(0, newest - MEMORY), newest)
        end = int(torch.searchsorted(known, newest + max(20, min(newest, MEMORY) // 20)))
        alike = similarity(moments[kept], moments[kept])
        alike.diagonal().add_(NOISE)
        to_new = similarity(moments[kept], moments[begin:end])
        weights = torch.cholesky_solve(to_new, torch.linalg.cholesky(alike))  # (kept, end - begin)
        expected[begin:end] = torch.tensordot(weights, errors[kept], dims=([0], [0]))
        begin = end
    return expected


def similarity(moments: Tensor, others: Tensor) -> Tensor:
    """The exponential kernel, (N, F), (M, F) -> (N, M)."""
    # Far from 0, as is a feature that never varied in training, distances in float32 are too wrong for a kernel.
    distance = torch.cdist(moments.double(), others.double()).to(moments)
    return torch.exp(-distance / (REACH * moments.shape[1] ** 0.5))


def earned_share(correction: Tensor, errors: Tensor, known: Tensor) -> Tensor:
    """The share of the correction that would have been best so far, from 0 to 1; (N, H, D) twice -> (N, H, 1)."""
    made = sum_of_known(correction.double().square().sum(dim=2), known)
    useful = sum_of_known((correction * errors).double().sum(dim=2), known)
    prior = PRIOR / known.clamp_min(1).double()[:, None]
    share = (useful + prior * made) / ((1 + prior) * made).clamp_min(1e-12)
    return share.clamp(0, 1)[..., None].to(correction)


def sum_of_known(values: Tensor, known: Tensor) -> Tensor:
    """Sums (N, H) over the first `known` of the values (N, H)."""
    return functional.pad(values.cumsum(dim=0), (0, 0, 1, 0))[known]


if __name__ == "__main__":
    run_command(main, Options)
