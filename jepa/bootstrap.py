"""Numbers over many windows, with confidence intervals by groups; what is not defined is NaN.

Neighbouring windows of one video are not independent, so intervals are of a bootstrap over *groups* of windows. What is
measured on the same windows is resampled alike, so ratios are of the same groups above and below the line.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

LEAST_GROUPS = 5
"""Smallest number of groups that an interval is claimed for: fewer say little of what another video would give."""
ROUNDING = 1e-12
"""Share of a second moment up to which a float64 variance is rounding."""


class Bootstrap:
    """Resamples of groups of windows (Efron 1979), drawn once; groups int (N,) are numbered from 0."""

    def __init__(self, groups: np.ndarray, resamples: int = 1000, *, seed: int = 0) -> None:
        self.groups, self.count = groups, int(groups.max()) + 1
        generator, size = np.random.default_rng(seed), self.count
        draws = (np.bincount(generator.integers(size, size=size), minlength=size) for _ in range(resamples))
        self.draws = np.stack([draw.astype(np.uint16) for draw in draws])  # (resamples, groups): how often each is in

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums over the windows in each resample, (N, ...) -> (resamples, ...); of fewer values the first windows."""
        by_group = np.zeros((self.count, *values.shape[1:]))
        np.add.at(by_group, self.groups[: len(values)], values)
        parts = np.array_split(self.draws, 20)  # all of the draws are 160 MB of float64 where there are 20,000 groups
        sums = np.concatenate([part.astype(np.float64) @ by_group.reshape(self.count, -1) for part in parts])
        return sums.reshape(-1, *values.shape[1:])

    def means(self, values: np.ndarray) -> np.ndarray:
        """Means over the windows in each resample, (N, ...) -> (resamples, ...)."""
        windows = self.sums(np.ones(len(values)))
        return divide(self.sums(values), windows.reshape(-1, *[1] * (values.ndim - 1)))

    def interval(self, resampled: np.ndarray) -> np.ndarray:
        """The middle 95 % of what is defined, (resamples, ...) -> (2, ...); NaN of fewer than `LEAST_GROUPS` groups."""
        if self.count < LEAST_GROUPS:
            return np.full((2, *resampled.shape[1:]), np.nan)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice")
            return np.nanquantile(resampled, [0.025, 0.975], axis=0)

    def describe(self, grouped_by: str) -> str:
        """What intervals are of, or why there are none; such as `grouped_by` "videos"."""
        few = f"too few {grouped_by} ({self.count}) for an interval"
        return few if self.count < LEAST_GROUPS else f"95 %, bootstrap over {self.count} {grouped_by}"


def divide(above: np.ndarray, below: np.ndarray | float) -> np.ndarray:
    """A quotient, NaN where its denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(below, 0), np.nan, above / below)


def useful_steps(relative: np.ndarray, high: np.ndarray) -> int:
    """The useful horizon: how many steps from the first on are better than the mean, without interruption.

    Errors (H,) relative to the mean's and the upper ends of their intervals, which must be below 1; NaN claims none.
    """
    better = np.where(np.isnan(high), relative, high) < 1
    return len(better) if better.all() else int(better.argmin())


def reading_moments(read: Tensor, true: Tensor) -> Tensor:
    """What R² is made of, for what was read off embeddings and the truth: 1, y, y², (p - y)²; (...) twice -> (..., 4).

    The truth should be centred near 0, so that sums do not cancel.
    """
    y = true.double()
    return torch.stack([torch.ones_like(y), y, y.square(), (read - y).square()], dim=-1)


def r2(sums: np.ndarray) -> np.ndarray:
    """R² (1 - residual / variance) from sums of `reading_moments`, (..., 4) -> (...); NaN of what does not vary."""
    n, y, yy, residual = np.moveaxis(sums, -1, 0)
    variance = yy - divide(y * y, n)
    return 1 - residual / np.where(variance > ROUNDING * yy, variance, np.nan)
