"""Confidence intervals by a bootstrap over groups.

Neighbouring windows of one clip are not independent, so whole *groups* are drawn: clips where there are many, stretches
of a clip where there are few. All that is measured on the same windows is resampled alike, so ratios are of the same
groups above and below the line.
"""

import numpy as np


class Bootstrap:
    """Resamples of groups (Efron 1979), drawn once.

    Args:
        groups: int (N,), samples of one group are drawn together.
        resamples: how many.
        seed: of the draws.
    """

    def __init__(self, groups: np.ndarray, resamples: int = 1000, seed: int = 0) -> None:
        names, self.membership = np.unique(groups, return_inverse=True)
        even = np.full(len(names), 1 / len(names))
        draws = np.random.default_rng(seed).multinomial(len(names), even, size=resamples)
        self.draws = draws.astype(np.float64)  # (resamples, groups): how often each is in each

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of float (N, ...) over the samples in each resample, (resamples, ...)."""
        by_group = np.zeros((self.draws.shape[1], *values.shape[1:]))
        np.add.at(by_group, self.membership, values)
        return np.tensordot(self.draws, by_group, axes=1)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Mean of float (N, ...) over the samples in each resample, (resamples, ...)."""
        return self.sums(values) / self.sums(np.ones((len(values), *[1] * (values.ndim - 1))))


def interval(resampled: np.ndarray) -> np.ndarray:
    """The middle 95 % of what was resampled, (resamples, ...) -> (..., 2)."""
    return np.moveaxis(np.quantile(resampled, [0.025, 0.975], axis=0), 0, -1)
