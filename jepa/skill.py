"""Rollout skill: error by horizon, beside every trivial guess, with confidence intervals.

Neighbouring windows of one clip are not independent, so intervals come from a bootstrap over *groups*: clips where
there are many, stretches of a clip where there are few. Ratios are resampled in pairs (the same groups above and
below the line).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from jepa.rollout import rollout
from jepa.shrinkage import shrink

REFERENCES = ("copy_last", "ridge", "mean")


@dataclass(frozen=True)
class Skill:
    """What one predictor does at each horizon; every array is (horizon,)."""

    mse: np.ndarray
    """Mean squared error per feature, in standardised embedding space."""
    mse_interval: np.ndarray
    """(horizon, 2): 95 % confidence interval of `mse`."""
    relative: dict[str, np.ndarray]
    """`mse` divided by that of each reference."""
    relative_interval: dict[str, np.ndarray]
    """(horizon, 2) for each reference."""
    retrieval_at_1: np.ndarray
    """How often the nearest of all test frames to the imagined embedding is the frame that came."""


@torch.no_grad()
def imagine(predictor: nn.Module, past: Tensor, horizon: int, batch: int = 4096) -> Tensor:
    """The futures of many windows, in batches; past (N, T, D) -> (N, horizon, D).

    Rollouts, shrunk as far as validation advised where the predictor has a `shrinkage`.
    """
    imagined = torch.cat([rollout(predictor, part, horizon) for part in past.split(batch)])
    weights = getattr(predictor, "shrinkage", None)
    return imagined if weights is None else shrink(imagined, past[:, -1], weights)


@torch.no_grad()
def nearest_rows(embeddings: Tensor, bank: Tensor) -> Tensor:
    """Which row of the bank (frames, D) is nearest to each embedding; (N, D) -> int (N,)."""
    return torch.cat([torch.cdist(part, bank).argmin(dim=1) for part in embeddings.split(1024)])


@torch.no_grad()
def retrieval_at_1(imagined: Tensor, bank: Tensor, true_rows: Tensor) -> np.ndarray:
    """How often the nearest frame to an imagined embedding is the true one.

    Args:
        imagined: (N, horizon, D).
        bank: (frames, D), all test frames.
        true_rows: int (N, horizon), which row of the bank is the frame that came.

    Returns:
        float (horizon,).
    """
    hits = []
    for step in range(imagined.shape[1]):
        nearest = nearest_rows(imagined[:, step], bank)
        hits.append(float((nearest == true_rows[:, step]).float().mean()))
    return np.array(hits)


def measure_skill(
    imagined: dict[str, Tensor],
    future: Tensor,
    groups: np.ndarray,
    bank: Tensor,
    true_rows: Tensor,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Skill]:
    """Skill of several predictors on the same windows.

    Args:
        imagined: rollouts (N, horizon, D) by predictor; the names in `REFERENCES` must be among them.
        future: (N, horizon, D), what came.
        groups: int (N,), windows of one group are resampled together.
        bank: see `retrieval_at_1`.
        true_rows: see `retrieval_at_1`.
        seed: of the bootstrap.
        resamples: of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    names, membership = np.unique(groups, return_inverse=True)
    sizes = np.bincount(membership).astype(np.float64)  # (groups,)
    draws = generator.multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=resamples
    )  # (resamples, groups)
    weights = draws @ sizes  # windows in each resample

    errors = {name: (value - future).square().mean(dim=2).double().cpu().numpy() for name, value in imagined.items()}
    resampled = {}
    for name, error in errors.items():
        sums = np.zeros((len(names), error.shape[1]))
        np.add.at(sums, membership, error)
        resampled[name] = draws @ sums / weights[:, None]  # (resamples, horizon)

    def interval(samples: np.ndarray) -> np.ndarray:
        return np.quantile(samples, [0.025, 0.975], axis=0).T

    return {
        name: Skill(
            mse=error.mean(axis=0),
            mse_interval=interval(resampled[name]),
            relative={to: error.mean(axis=0) / errors[to].mean(axis=0) for to in REFERENCES},
            relative_interval={to: interval(resampled[name] / resampled[to]) for to in REFERENCES},
            retrieval_at_1=retrieval_at_1(imagined[name], bank, true_rows),
        )
        for name, error in errors.items()
    }
