"""Objectives of the encoder: two views of a frame alike, and not all frames alike.

To add one: a dataclass with a `kind` and a method `terms`, and its name in `Objective`. Every vector is a sample,
whether of a frame or of a token. Statistics are those of the *whole* batch, over all ranks, with exact gradients.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor

from jepa.config import Bounded, NotNegative, PositiveInt, Share
from jepa.distributed import sum_over_ranks, world_size

MARGIN, EPSILON = 1.0, 1e-4
"""Standard deviation that VICReg pushes features up to, and what it adds to the variance under the root."""
KNOTS, LAST_KNOT = 17, 3.0
"""Points at which SIGReg compares characteristic functions, from 0 on, as published."""

Weighted = dict[str, tuple[float, Tensor]]


class Terms(NamedTuple):
    """The loss and what it is made of; scalars, float32 (float64 for float64 input), equal on all ranks."""

    loss: Tensor
    unweighted: dict[str, Tensor]
    weighted: dict[str, Tensor]
    """Addends of the loss."""

    def plus(self, unweighted: dict[str, Tensor], weighted: dict[str, Tensor]) -> "Terms":
        """The same with more of them."""
        loss = self.loss + torch.stack(list(weighted.values())).sum()
        return Terms(loss, unweighted | self.unweighted, weighted | self.weighted)


@dataclass(frozen=True)
class _Objective(Bounded):
    kind: ClassVar[str]

    def __call__(self, first: Tensor, second: Tensor, *, generator: torch.Generator) -> Terms:
        """Terms of two views' outputs (B, *tokens, D) on this rank, in float32 at least, also under autocast.

        All ranks take part, with the same B and the generator in the same state; only SIGReg draws from it. Raises
        `ValueError` where the views differ in shape, or the global batch has fewer than 2 samples.
        """
        if first.shape != second.shape or first.ndim < 2:
            raise ValueError(f"views have shapes {tuple(first.shape)} and {tuple(second.shape)}: must be (B, ..., D)")
        with torch.autocast(first.device.type, enabled=False):
            views = rearrange([first, second], "v ... d -> v (...) d")
            views = views if views.dtype == torch.float64 else views.float()
            samples = views.shape[1] * world_size()
            if samples < 2:
                raise ValueError(f"a batch of {samples} does not vary: use a batch of at least 2")
            terms = self.terms(views, samples, generator)
            weighted = {name: weight * term for name, (weight, term) in terms.items()}
            unweighted = {name: term for name, (_, term) in terms.items()}
            return Terms(torch.stack(list(weighted.values())).sum(), unweighted, weighted)

    def terms(self, views: Tensor, samples: int, generator: torch.Generator) -> Weighted:
        """Weight and value of each term, of outputs (2, N, D) on this rank and so many samples on all of them."""
        raise NotImplementedError


@dataclass(frozen=True)
class VICReg(_Objective):
    """Variance, invariance, covariance (Bardes, Ponce, LeCun 2022, arXiv:2105.04906).

    Convention: the authors' published code, with which the coefficients 25 / 25 / 1 were found. The paper's equation 5
    sums over features instead of averaging, its equation 6 sums the two views' variance terms.
    """

    kind: ClassVar[str] = "vicreg"
    variance_weight: NotNegative = 25.0
    """Weight of every feature's standard deviation staying above 1. At 0 the embeddings collapse."""
    invariance_weight: NotNegative = 25.0
    """Weight of the two views of a frame being alike."""
    covariance_weight: NotNegative = 1.0
    """Weight of the features being uncorrelated."""

    def terms(self, views: Tensor, samples: int, generator: torch.Generator) -> Weighted:
        features = views.shape[-1]
        # Two passes, the mean first: moments about zero would cancel where the mean is large.
        centred = views - sum_over_ranks(views.sum(dim=1, keepdim=True)) / samples  # (2, N, D)
        variance = sum_over_ranks(centred.square().sum(dim=1)) / (samples - 1)  # (2, D)
        covariance = sum_over_ranks(centred.mT @ centred) / (samples - 1)  # (2, D, D)
        return {
            "variance": (self.variance_weight, (MARGIN - (variance + EPSILON).sqrt()).relu().mean()),
            "invariance": (self.invariance_weight, mean_square(views[0] - views[1], samples)),
            # Half of the symmetric matrix, twice: all squares less those of the diagonal would cancel.
            "covariance": (self.covariance_weight, 2 * covariance.triu(1).square().sum() / features),
        }


@dataclass(frozen=True)
class SIGReg(_Objective):
    """LeJEPA (Balestriero, LeCun 2025, arXiv:2511.08544): outputs are pressed into an isotropic Gaussian.

    Normality is measured by the Epps-Pulley test on random directions, alikeness by the views' mean square distance to
    their mean. Convention: the authors' published code.
    """

    kind: ClassVar[str] = "sigreg"
    share: Share = 0.05
    """Weight of normality, LeJEPA's lambda; the rest of 1 is the weight of the invariance."""
    slices: PositiveInt = 256
    """Random directions on which normality is tested, new ones each time."""

    def terms(self, views: Tensor, samples: int, generator: torch.Generator) -> Weighted:
        directions = torch.randn(views.shape[-1], self.slices, generator=generator, device=generator.device).to(views)
        directions = functional.normalize(directions, dim=0)
        knots = torch.linspace(0, LAST_KNOT, KNOTS).to(views)
        gaussian = (-knots.square() / 2).exp()  # the characteristic function to have, and the weight of each knot
        trapezoid = torch.full_like(knots, 2 * LAST_KNOT / (KNOTS - 1))  # twice: the integrand is even
        trapezoid[[0, -1]] /= 2
        angles = (views @ directions)[..., None] * knots  # (2, N, slices, knots)
        found = sum_over_ranks(torch.stack([angles.cos().sum(dim=1), angles.sin().sum(dim=1)])) / samples
        error = (found[0] - gaussian).square() + found[1].square()  # (2, slices, knots)
        return {
            "sigreg": (self.share, samples * (error @ (trapezoid * gaussian)).mean()),
            "invariance": (1 - self.share, mean_square((views[0] - views[1]) / 2, samples)),
        }


Objective = VICReg | SIGReg


def mean_square(values: Tensor, samples: int) -> Tensor:
    """Mean square of (N, D) on this rank, over features and the samples of all ranks."""
    return sum_over_ranks(values.square().sum()) / (samples * values.shape[-1])
