"""How good is a forecast? Errors, retrieval and proper scores, with confidence intervals by groups.

Neighbouring windows of one video are not independent, so intervals are of a bootstrap over *groups* of windows: videos
where there are many, parts of a video where there are few. All that is measured on the same windows is resampled
alike, so ratios are of the same groups above and below the line. What is not defined is NaN.

Embeddings are standardised here: (B, H, *tokens, D), for B windows and H horizons.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

LEAST_GROUPS = 5
"""Smallest number of groups that an interval is claimed for: fewer say little of what another video would give."""
ROUNDING = 1e-12
"""Share of a second moment up to which a float64 variance is rounding."""
TIE = 1e-5
"""Difference up to which two distances are equal, relative and in standard deviations."""


class Bootstrap:
    """Resamples of groups of windows (Efron 1979), drawn once.

    Args:
        groups: int (N,), the group of each window, numbered from 0.
        resamples: how many resamples.
        seed: of the draws.
    """

    def __init__(self, groups: np.ndarray, resamples: int = 1000, *, seed: int = 0) -> None:
        self.groups, self.count = groups, int(groups.max()) + 1
        generator, size = np.random.default_rng(seed), self.count
        draws = [np.bincount(generator.integers(size, size=size), minlength=size) for _ in range(resamples)]
        self.draws = np.array(draws, dtype=np.uint16)  # (resamples, groups): how often each group is in each

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums over the windows in each resample, (N, ...) -> (resamples, ...); of fewer values the first windows."""
        by_group = np.zeros((self.count, *values.shape[1:]))
        np.add.at(by_group, self.groups[: len(values)], values)
        parts = np.array_split(self.draws, max(1, len(self.draws) // 64))  # a part at a time in float64
        sums = np.concatenate([part.astype(np.float64) @ by_group.reshape(self.count, -1) for part in parts])
        return sums.reshape(-1, *values.shape[1:])

    def means(self, values: np.ndarray) -> np.ndarray:
        """Means over the windows in each resample, (N, ...) -> (resamples, ...)."""
        windows = self.sums(np.ones(len(values)))
        return divide(self.sums(values), windows.reshape(-1, *[1] * (values.ndim - 1)))

    def interval(self, resampled: np.ndarray) -> np.ndarray:
        """The middle 95 % of the resamples in which a number is defined, (resamples, ...) -> (2, ...).

        NaN of fewer than `LEAST_GROUPS` groups.
        """
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


def squared_error(forecast: Tensor, came: Tensor) -> Tensor:
    """Mean squared error over tokens and features, (B, H, *tokens, D) twice -> (B, H)."""
    return (forecast - came).square().flatten(2).mean(dim=2)


def change_cosine(forecast: Tensor, came: Tensor, last: Tensor) -> Tensor:
    """The cosine between the change that was foreseen and the one that came.

    How far off a forecast is depends, on real video, above all on how much there was to foresee. This asks only
    whether things went the way they were expected to go.

    Args:
        forecast: (B, H, *tokens, D).
        came: (B, H, *tokens, D).
        last: (B, *tokens, D), the newest embedding of the past.

    Returns:
        (B, H): 1 as foreseen, 0 unrelated, or nothing changes, below 0 against it.
    """
    foreseen, true = ((value - last[:, None]).flatten(2) for value in (forecast, came))
    return functional.cosine_similarity(foreseen, true, dim=2)


def useful_steps(relative: np.ndarray, high: np.ndarray) -> int:
    """The useful horizon: how many steps from the first on are better than the mean, without interruption.

    Beyond it, to know the video's past is worth nothing that can be shown on these windows.

    Args:
        relative: (H,), error relative to that of the mean.
        high: (H,), upper end of its interval, which has to lie below 1; NaN where none is claimed.
    """
    better = np.where(np.isnan(high), relative, high) < 1
    return len(better) if better.all() else int(better.argmin())


def nearest_rows(embeddings: Tensor, bank: Tensor) -> Tensor:
    """The row of a bank (frames, D) that is nearest to each embedding; (N, D) -> int (N,)."""
    return torch.cat([torch.cdist(part, bank).argmin(dim=1) for part in embeddings.split(1024)])


def retrieved(forecast: Tensor, came: Tensor, bank: Tensor) -> Tensor:
    """Whether no frame of a bank is nearer to a forecast than the frame that came.

    Equal distances are hits: frames of a standing picture, or of two clocks, are the same.

    Args:
        forecast: (N, D).
        came: (N, D).
        bank: (frames, D).

    Returns:
        bool (N,).
    """
    # Found by products of matrices, which round much; then measured exactly.
    nearest = bank[nearest_rows(forecast, bank)]
    return distance(forecast, came) <= distance(forecast, nearest) * (1 + TIE) + TIE


def energy_score(samples: Tensor, future: Tensor) -> Tensor:
    """E|X - y| - E|X - X'| / 2: small for samples that are near what came, and as far apart as they ought to be.

    A proper score of the whole vector (Gneiting and Raftery 2007): nobody gains by claiming to be more or less certain
    than he is. The error of a single certain guess is its special case. The second expectation is over *different*
    samples, which makes the estimate fair to small ensembles (Ferro 2014).

    Args:
        samples: (n, ..., D), n at least 2; tokens are flattened.
        future: (..., D), what came.

    Returns:
        (...), in units of the root mean square per feature. Differentiable.

    Raises:
        ValueError: there are fewer than 2 samples.
    """
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} samples: an energy score takes at least 2")
    near = distance(samples, future[None]).mean(dim=0)
    apart = torch.zeros_like(near)
    for shift in range(1, len(samples) // 2 + 1):  # each pair of different samples once, without n x n memory
        rolled = distance(samples, samples.roll(shift, dims=0)).sum(dim=0)
        apart = apart + (rolled / 2 if 2 * shift == len(samples) else rolled)
    pairs = len(samples) * (len(samples) - 1) / 2
    return near - apart / pairs / 2


def distance(first: Tensor, second: Tensor) -> Tensor:
    """Root mean square difference over the features, (..., D) twice -> (...); its gradient at 0 is 0."""
    return ((first - second).square().mean(dim=-1) + 1e-12).sqrt()


def coverage(samples: Tensor, future: Tensor, share: float) -> Tensor:
    """How often each feature of what came lies inside the central interval of the samples that should hold `share`.

    The interval runs from one sample to another, sorted; ranks are interpolated so that for samples from the true
    distribution the expected coverage is `share`, if there are enough of them: 3 for 50 %, 19 for 90 %.

    Args:
        samples: (n, ..., D).
        future: (..., D).
        share: 0.5 for the central 50 %.

    Returns:
        (...): the share of features covered.
    """
    low, high = central_interval(samples, share)
    return ((future >= low) & (future <= high)).float().mean(dim=-1)


def live_features(embeddings: Tensor) -> Tensor:
    """Features that move, (..., D) -> bool (D,): one that never does lies in any interval, or in none."""
    return embeddings.flatten(0, -2).std(dim=0) > 1e-3


def central_interval(samples: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Both ends of the interval of each feature that should hold `share`: (n, ..., D) -> (..., D) twice."""
    n = len(samples)
    ordered = samples.sort(dim=0).values

    def quantile(level: float) -> Tensor:
        # A new draw is below the k-th of n others with probability k / (n + 1).
        place = min(max(level * (n + 1) - 1, 0.0), n - 1.0)
        low = int(place)
        return torch.lerp(ordered[low], ordered[min(low + 1, n - 1)], place - low)

    return quantile((1 - share) / 2), quantile((1 + share) / 2)


def best_of(samples: Tensor, future: Tensor) -> Tensor:
    """Mean squared error per feature of the sample nearest to what came; (n, ..., D), (..., D) -> (...)."""
    return (samples - future[None]).square().mean(dim=-1).amin(dim=0)


def reading_moments(read: Tensor, true: Tensor) -> Tensor:
    """Moments of what was read off embeddings and of the truth: 1, y, p, y², p² and yp; (...) twice -> (..., 6).

    Their sums say R² and r; both should be centred near 0, so that the sums do not cancel.
    """
    y, p = true.double(), read.double()
    return torch.stack([torch.ones_like(y), y, p, y * y, p * p, y * p], dim=-1)


def r2_and_r(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R² (1 - residual / variance) and Pearson's r from sums of `reading_moments`, (..., 6) -> (...) twice.

    NaN where the truth does not vary and, for r, where what was read does not: a quotient of rounding says nothing.
    """
    n, y, p, yy, pp, yp = np.moveaxis(sums, -1, 0)
    variance, read_variance, covariance = yy - divide(y * y, n), pp - divide(p * p, n), yp - divide(y * p, n)
    variance = np.where(variance > ROUNDING * yy, variance, np.nan)
    read_variance = np.where(read_variance > ROUNDING * pp, read_variance, np.nan)
    return 1 - (yy - 2 * yp + pp) / variance, covariance / np.sqrt(variance * read_variance)
