"""Rollout skill: error by horizon, beside every trivial guess, with confidence intervals (`jepa.bootstrap`)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jepa.baselines import Baseline, Shrunk
from jepa.bootstrap import Bootstrap, interval
from jepa.diagnostics import Spread, spread
from jepa.predictor import Predictor
from jepa.sampling import expected_future
from jepa.shrinkage import shrink

REFERENCES = ("copy_last", "ridge", "mean", "adapting_ridge")
"""What others are compared with, pair by pair on the same windows, where it is among them."""


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
    spread: list[Spread]
    """Of the imagined embeddings over the windows: predictions that grow timid over the horizon lose it."""

    @property
    def useful_steps(self) -> int:
        """The useful horizon: how many steps from the first on are better than the mean, without interruption.

        Better means that the whole confidence interval of the error relative to the mean lies below 1. Beyond it, to
        know the video's past is worth nothing that can be shown on these windows.
        """
        better = self.relative_interval["mean"][:, 1] < 1
        return len(better) if better.all() else int(better.argmin())


@torch.no_grad()
def imagine(
    predictor: Predictor | Baseline, past: Tensor, horizon: int | None = None, times_s: Tensor | None = None
) -> Tensor:
    """The futures of many windows; past (N, T, D) -> (N, horizon, D).

    Expected futures, shrunk as far as validation advised where the predictor has a `shrinkage`.

    Args:
        predictor: a predictor or a baseline.
        past: (N, T, D), standardised.
        horizon: number of steps on the clock; or else
        times_s: (horizon,), increasing seconds after the past; see `jepa.rollout.rollout`.
    """
    return as_advised(predictor, imagine_unshrunk(predictor, past, horizon, times_s), past, times_s)


@torch.no_grad()
def imagine_unshrunk(
    predictor: Predictor | Baseline,
    past: Tensor,
    horizon: int | None = None,
    times_s: Tensor | None = None,
    batch: int = 4096,
) -> Tensor:
    """Expected futures as the predictor gives them, in batches; see `imagine`."""
    return torch.cat([expected_future(predictor, part, horizon, times_s) for part in past.split(batch)])


def as_advised(
    predictor: Predictor | Baseline, imagined: Tensor, past: Tensor, times_s: Tensor | None = None
) -> Tensor:
    """Such futures (N, horizon, D), shrunk as far as validation advised; past (N, T, D)."""
    if not isinstance(predictor, Predictor | Shrunk):
        return imagined
    ticks = times_s * predictor.fps if times_s is not None and isinstance(predictor, Predictor) else None
    return shrink(imagined, past[:, -1], predictor.shrinkage, ticks=ticks)


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


def spread_by_horizon(embeddings: Tensor) -> list[Spread]:
    """Spread over the windows at each horizon, (N, horizon, D)."""
    return [spread(embeddings[:, step]) for step in range(embeddings.shape[1])]


def measure_skill(
    imagined: dict[str, Tensor], future: Tensor, bootstrap: Bootstrap, bank: Tensor, true_rows: Tensor
) -> dict[str, Skill]:
    """Skill of several predictors on the same windows.

    Args:
        imagined: rollouts (N, horizon, D) by predictor; copy_last, ridge and mean must be among them.
        future: (N, horizon, D), what came.
        bootstrap: over groups of these N windows.
        bank: see `retrieval_at_1`.
        true_rows: see `retrieval_at_1`.
    """
    errors = {name: (value - future).square().mean(dim=2).double().cpu().numpy() for name, value in imagined.items()}
    resampled = {name: bootstrap.means(error) for name, error in errors.items()}  # (resamples, horizon)
    references = [name for name in REFERENCES if name in errors]
    return {
        name: Skill(
            mse=error.mean(axis=0),
            mse_interval=interval(resampled[name]),
            relative={to: error.mean(axis=0) / errors[to].mean(axis=0) for to in references},
            relative_interval={to: interval(resampled[name] / resampled[to]) for to in references},
            retrieval_at_1=retrieval_at_1(imagined[name], bank, true_rows),
            spread=spread_by_horizon(imagined[name]),
        )
        for name, error in errors.items()
    }
