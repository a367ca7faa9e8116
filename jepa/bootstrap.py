"""Confidence intervals by a bootstrap over groups.

Neighbouring windows of one clip are not independent, so whole *groups* are drawn: clips where there are many, stretches
of a clip where there are few. All that is measured on the same windows is resampled alike, so ratios are of the same
groups above and below the line.
"""

from typing import Any

import numpy as np

LEAST_GROUPS = 5
"""Of fewer, resamples say little of what another video would have given: no interval is claimed."""


class Bootstrap:
    """Resamples of groups (Efron 1979), drawn once.

    Of fewer than `LEAST_GROUPS` groups there is one resample, the samples themselves: what is measured on it are point
    estimates, and `claim` takes the intervals away, which have no width.

    Args:
        groups: int (N,), samples of one group are drawn together.
        resamples: how many.
        seed: of the draws.
    """

    def __init__(self, groups: np.ndarray, resamples: int = 1000, seed: int = 0) -> None:
        names, self.membership = np.unique(groups, return_inverse=True)
        self.enough = len(names) >= LEAST_GROUPS
        even = np.full(len(names), 1 / len(names))
        draws = np.random.default_rng(seed).multinomial(len(names), even, size=resamples)
        # (resamples, groups): how often each is in each
        self.draws = draws.astype(np.float64) if self.enough else np.ones((1, len(names)))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of float (N, ...) over the samples in each resample, (resamples, ...)."""
        by_group = np.zeros((self.draws.shape[1], *values.shape[1:]))
        np.add.at(by_group, self.membership, values)
        return np.tensordot(self.draws, by_group, axes=1)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Mean of float (N, ...) over the samples in each resample, (resamples, ...)."""
        return self.sums(values) / self.sums(np.ones((len(values), *[1] * (values.ndim - 1))))

    def describe(self, grouped_by: str) -> str:
        """What intervals are of, or that there are none; such as `grouped_by` "videos"."""
        groups = self.draws.shape[1]
        if self.enough:
            return f"95 %, bootstrap over {groups} {grouped_by}"
        return f"too few {grouped_by} ({groups}) for an interval"

    def claim(self, found: Any) -> Any:
        """Dictionaries and lists as they are or, of too few groups, with None for each `..._interval`."""
        if self.enough:
            return found
        if isinstance(found, dict):
            return {name: None if name.endswith("_interval") else self.claim(part) for name, part in found.items()}
        return [self.claim(part) for part in found] if isinstance(found, list) else found


def interval(resampled: np.ndarray) -> np.ndarray:
    """The middle 95 % of what was resampled, (resamples, ...) -> (..., 2)."""
    return np.moveaxis(np.quantile(resampled, [0.025, 0.975], axis=0), 0, -1)
