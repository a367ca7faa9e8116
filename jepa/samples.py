"""How good are sampled futures? A proper score of them, and how often they cover what came."""

from itertools import combinations

import torch
from torch import Tensor


def energy_score(samples: Tensor, future: Tensor) -> Tensor:
    """E|X - y| - E|X - X'| / 2: small for samples that are near what came, and as far apart as they ought to be.

    A proper score of the whole vector (Gneiting and Raftery 2007): nobody gains by claiming to be more or less certain
    than he is. The second expectation is over *different* samples, which is fair to small ensembles (Ferro 2014).

    Samples (n, ..., D), at least 2, and what came (..., D) -> (...), in units of the root mean square per feature.
    """
    near = distance(samples, future[None]).mean(dim=0)
    apart = torch.stack([distance(one, other) for one, other in combinations(samples, 2)]).mean(dim=0)
    return near - apart / 2


def distance(first: Tensor, second: Tensor) -> Tensor:
    """Root mean square difference over the features, (..., D) twice -> (...); its gradient at 0 is 0."""
    return ((first - second).square().mean(dim=-1) + 1e-12).sqrt()


def coverage(samples: Tensor, future: Tensor, share: float) -> Tensor:
    """The share of features of what came (..., D) inside the samples' central interval that should hold `share`; (...).

    Samples (n, ..., D) from the truth itself have `share` on average, if there are enough: 3 for 50 %, 19 for 90 %.
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
