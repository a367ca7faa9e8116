"""Learning while watching: what became of earlier forecasts of a clip mends its later ones.

A predictor meets roads that it has not learned from. But by the time it begins a forecast, it has seen how those that
it began a while ago came out, and no label is needed to learn from that. Three things are learned, all of them anew at
each moment, from the forecasts whose whole future had been seen by then:

1. how far to trust the rollouts (`jepa.shrinkage`): the advice of validation counts as much as `ADVICE` forecasts;
2. what to add: the errors that were left of earlier forecasts which began at similar moments, by regression with an
   exponential kernel on the past embeddings (the mean of a Gaussian process, Rasmussen and Williams 2006, eq. 2.25);
3. how much of that to add: as much as would have been best so far.

Before anything is known, forecasts are as validation advised. Nothing in the predictor changes, so it works for any,
and for ridge regression too. Learning at test time on a stream: Wang et al. 2023 (arXiv:2307.05014); a Bayesian last
layer for it: Harrison et al. 2018 (ALPaCA, arXiv:1807.08912).
"""

import torch
import torch.nn.functional as functional
from torch import Tensor

from jepa.shrinkage import least_squares_in_triangle, of_horizons

ADVICE = 50
"""So many forecasts of a clip's own weigh as much as what was advised before."""
REACH = 1 / 3
"""How far moments are similar: root mean squared difference of past embeddings, in standard deviations."""
NOISE = 0.5
"""How much of an error is chance, as variance relative to what similar moments share."""
MEMORY = 2048
"""Most forecasts that are remembered, the newest: the cost of a regression grows with their square and more."""


@torch.no_grad()
def adapt(imagined: Tensor, past: Tensor, future: Tensor, begun: Tensor, weights: Tensor) -> Tensor:
    """Forecasts of one clip, each mended by what had been seen of the future of earlier ones when it was begun.

    Args:
        imagined: (N, horizon, D), rollouts not shrunk (`jepa.skill.imagine_unshrunk`), standardised, in order of time.
        past: (N, context, D), what they started from.
        future: (N, horizon, D), what came. Only those are read whose last embedding had been seen when the newest
            forecast was begun: the others may hold anything, so what is asked for may be the future of a live stream.
        begun: int (N,), increasing: ticks at which the forecasts were begun. Only how far they lie apart counts.
        weights: (LONGEST, 2), how far to trust the rollouts before anything is known, see `jepa.shrinkage.shrink`.

    Returns:
        (N, horizon, D).
    """
    horizon = imagined.shape[1]
    known = count_known(begun, horizon)
    trusted = _trust(imagined, past[:, -1:], future, known, of_horizons(weights, horizon))
    correction = _similar_errors(future - trusted, past.flatten(1), known)
    return trusted + _earned(correction, future - trusted, known) * correction


def count_known(begun: Tensor, horizon: int) -> Tensor:
    """How many forecasts had all their steps seen when each was begun, int (N,); `begun` as for `adapt`."""
    return torch.searchsorted(begun, begun - horizon, right=True)


def _trust(imagined: Tensor, last: Tensor, future: Tensor, known: Tensor, advised: Tensor) -> Tensor:
    """Rollouts combined with copying and with the mean, by weights that each takes from those known to it.

    Rollouts and future (N, horizon, D), last (N, 1, D), known int (N,), advised (horizon, 2) -> (N, horizon, D).
    """
    rollout, mean, change = imagined - last, -last.expand_as(imagined), future - last
    # Sums over features, (N, horizon) each, then over forecasts.
    across = _sum_of_known((rollout * mean).double().sum(dim=2), known)
    squares = [_sum_of_known(part.double().square().sum(dim=2), known) for part in (rollout, mean)]
    gram = torch.stack([squares[0], across, across, squares[1]], dim=2).unflatten(2, (2, 2))
    moment = torch.stack([_sum_of_known((part * change).double().sum(dim=2), known) for part in (rollout, mean)], dim=2)
    # The advice enters as forecasts like those known, for which the advised weights would have been best.
    share = ADVICE / known.clamp_min(1).double()[:, None, None]
    moment = moment + share * (gram @ advised.double()[..., None])[..., 0]
    found = least_squares_in_triangle(gram * (1 + share[..., None]), moment).to(imagined)
    weights = torch.where(known[:, None, None] > 0, found, advised)  # (N, horizon, 2)
    return last + weights[..., :1] * rollout + weights[..., 1:] * mean


def _similar_errors(errors: Tensor, moments: Tensor, known: Tensor) -> Tensor:
    """What the errors (N, horizon, D) known to each forecast say of its own, by how similar the moments (N, F) are."""
    expected = torch.zeros_like(errors)
    begin = int((known == 0).sum())
    while begin < len(errors):
        # One regression serves a stretch of forecasts: until there are a few more to learn from.
        newest = int(known[begin])
        kept = slice(max(0, newest - MEMORY), newest)
        end = int(torch.searchsorted(known, newest + max(20, min(newest, MEMORY) // 20)))
        alike = _similarity(moments[kept], moments[kept])
        alike.diagonal().add_(NOISE)
        to_new = _similarity(moments[kept], moments[begin:end])
        weights = torch.cholesky_solve(to_new, torch.linalg.cholesky(alike))  # (kept, stretch)
        expected[begin:end] = torch.tensordot(weights, errors[kept], dims=([0], [0]))
        begin = end
    return expected


def _similarity(moments: Tensor, others: Tensor) -> Tensor:
    """The exponential kernel, (N, F), (M, F) -> (N, M): it is as rough as it needs to be, whatever the scale."""
    # Far from 0, as is a feature that never varied in training, distances in float32 are too wrong for a kernel.
    distance = torch.cdist(moments.double(), others.double()).to(moments)
    return torch.exp(-distance / (REACH * moments.shape[1] ** 0.5))


def _earned(correction: Tensor, errors: Tensor, known: Tensor) -> Tensor:
    """The share of the correction that would have been best so far, from 0 to 1.

    Correction and errors (N, horizon, D), known int (N,) -> (N, horizon, 1).
    """
    made = _sum_of_known(correction.double().square().sum(dim=2), known)
    useful = _sum_of_known((correction * errors).double().sum(dim=2), known)
    share = ADVICE / known.clamp_min(1).double()[:, None]
    earned = (useful + share * made) / ((1 + share) * made).clamp_min(1e-12)
    return earned.clamp(0, 1)[..., None].to(correction)


def _sum_of_known(values: Tensor, known: Tensor) -> Tensor:
    """Sums (N, horizon) over the first `known` of the values (N, horizon)."""
    return functional.pad(values.cumsum(dim=0), (0, 0, 1, 0))[known]
