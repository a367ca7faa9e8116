"""What the encoder is trained for: two views of a frame alike, and not all frames alike.

`vicreg`: variance, invariance, covariance (Bardes, Ponce, LeCun 2022, arXiv:2105.04906). Convention: the authors'
published code, with which the coefficients 25 / 25 / 1 were found. It differs from the paper's equations in two
factors: the invariance term averages over features as well as samples (equation 5 sums over features), and the variance
terms of the two views are averaged (equation 6 sums them). Other codebases have other conventions, so coefficients do
not transfer unchanged.

`sigreg`: LeJEPA (Balestriero, LeCun 2025, arXiv:2511.08544): outputs are pressed into an isotropic Gaussian by the
Epps-Pulley test of normality on random directions. Convention: the authors' published code.

`infonce`: NT-Xent of SimCLR (Chen et al. 2020, arXiv:2002.05709): among all outputs of the batch, find the other view.

`invariance`: the two views alike and nothing else, which a constant satisfies: the embeddings collapse. It is there to
show what the others are for.

The statistics are those of the *whole* batch, over all ranks, with exact gradients: see `jepa.collectives`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as distributed
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor

from jepa.collectives import gather_rows, rows_of_ranks, sum_over_ranks, world_size

KNOTS, LAST_KNOT = 17, 3.0
"""Points at which `sigreg` compares characteristic functions, from 0 on: as published."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective of the encoder."""

    kind: Literal["vicreg", "sigreg", "infonce", "invariance"] = "vicreg"
    """`vicreg`: variance, invariance, covariance. `sigreg`: LeJEPA. `infonce`: SimCLR. `invariance`: only that the two
    views are alike, which collapses: to show that it does."""
    variance_weight: float = 25.0
    """vicreg: keeps every feature's standard deviation above the margin. At 0 the embeddings collapse."""
    invariance_weight: float = 25.0
    """vicreg: pulls the two views of a frame together."""
    covariance_weight: float = 1.0
    """vicreg: decorrelates the features."""
    margin: float = 1.0
    """vicreg: the standard deviation below which a feature is pushed apart."""
    epsilon: float = 1e-4
    """vicreg: added to the variance under the square root."""
    sigreg_share: float = 0.05
    """sigreg: the weight of normality, LeJEPA's lambda; the rest of 1 is the weight of the invariance."""
    slices: int = 256
    """sigreg: random directions on which normality is tested, new ones each time."""
    temperature: float = 0.1
    """infonce: divides the cosines. The lower, the more the nearest other frames count."""


class Terms(NamedTuple):
    """The loss and what it is made of; scalars, float32 (float64 for float64 input), equal on all ranks."""

    loss: Tensor
    unweighted: dict[str, Tensor]
    weighted: dict[str, Tensor]
    """Their sum is the loss."""


def objective(
    first: Tensor,
    second: Tensor,
    config: ObjectiveConfig,
    generator: torch.Generator,
    rows: Sequence[int] | None = None,
) -> Terms:
    """The objective on the expander outputs of two views. Collective when several processes run.

    Args:
        first: (N, D) outputs of the first view on this rank; computed in float32 at least, also under autocast. N may
            differ between ranks.
        second: (N, D) outputs of the second view.
        config: which objective, and its weights.
        generator: in the same state on all ranks; only `sigreg` draws from it.
        rows: N of each rank, where it is known: otherwise they are exchanged, and the host waits for the device.

    Returns:
        The terms over the global batch, equal on all ranks.

    Raises:
        ValueError: the views differ in shape, or the global batch has fewer than 2 samples.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"views have shapes {tuple(first.shape)} and {tuple(second.shape)}: both must be (N, D)")
    rows = rows or rows_of_ranks(len(first), first.device)
    if sum(rows) < 2:
        raise ValueError(f"a batch of {sum(rows)} has no spread to speak of: use a batch of at least 2")
    with torch.autocast(first.device.type, enabled=False):
        views = torch.stack([first, second])  # (2, N, D)
        views = views if views.dtype == torch.float64 else views.float()
        if config.kind == "vicreg":
            unweighted = vicreg(views, rows, config)
            weights = {
                "variance": config.variance_weight,
                "invariance": config.invariance_weight,
                "covariance": config.covariance_weight,
            }
        elif config.kind == "sigreg":
            unweighted = sigreg(views, rows, config, generator)
            weights = {"sigreg": config.sigreg_share, "invariance": 1 - config.sigreg_share}
        elif config.kind == "infonce":
            unweighted, weights = infonce(views, rows, config), {"infonce": 1.0}
        else:
            unweighted, weights = {"invariance": invariance(views, rows)}, {"invariance": 1.0}
        weighted = {name: weights[name] * term for name, term in unweighted.items()}
        return Terms(torch.stack(list(weighted.values())).sum(), unweighted, weighted)


def vicreg(views: Tensor, rows: Sequence[int], config: ObjectiveConfig) -> dict[str, Tensor]:
    """The unweighted terms of VICReg.

    The covariance (D, D) is never needed, only the sum of its squares, which is also that of the Gram matrix of the
    centred samples (N, N). The smaller one is computed: below N = D global samples the Gram matrix, for which the ranks
    exchange their samples, from there on the covariance, for which they exchange moments. At N = D both
    arithmetic and traffic are equal; docs/objectives.md has the measured ratio.

    Args:
        views: (2, N, D) outputs on this rank, float32 or float64.
        rows: N of each rank.
        config: margin and epsilon.

    Returns:
        Variance (equation 1), invariance, and covariance (equations 3 and 4).
    """
    samples, features = sum(rows), views.shape[-1]
    # Two passes, the mean first: moments about zero would cancel where the mean is large.
    centred = views - sum_over_ranks(views.sum(dim=1, keepdim=True)) / samples  # (2, N, D)
    variance = sum_over_ranks(centred.square().sum(dim=1)) / (samples - 1)  # (2, D)
    if samples < features:
        off_diagonal = off_diagonal_by_gram(centred, variance, rows)
    else:
        off_diagonal = off_diagonal_by_moments(centred, samples)
    return {
        "variance": (config.margin - (variance + config.epsilon).sqrt()).relu().mean(),
        "invariance": invariance(views, rows),
        "covariance": off_diagonal / features,
    }


def invariance(views: Tensor, rows: Sequence[int]) -> Tensor:
    """Mean squared distance of the two views (2, N, D) on this rank, over features and the samples of all ranks."""
    return sum_over_ranks((views[0] - views[1]).square().sum()) / (sum(rows) * views.shape[-1])


def off_diagonal_by_moments(centred: Tensor, samples: int) -> Tensor:
    """Sum of squares of the off-diagonal covariances; centred (2, N, D) on this rank -> scalar, of both views."""
    products = sum_over_ranks(centred.mT @ centred)  # (2, D, D)
    # Half of the symmetric matrix, twice: all squares less those of the diagonal would cancel.
    return 2 * products.triu(1).square().sum() / (samples - 1) ** 2


def off_diagonal_by_gram(centred: Tensor, variance: Tensor, rows: Sequence[int]) -> Tensor:
    """The same from inner products of samples; each rank computes those of its own with all. Variance (2, D).

    Less the diagonal, which here cannot be nearly all there is: N samples that are fewer than D features leave
    correlations.
    """
    everyone = gather_rows(rearrange(centred, "v n d -> n (v d)"), rows)
    gram = centred @ rearrange(everyone, "n (v d) -> v d n", v=2)  # (2, N, N of all ranks)
    return sum_over_ranks(gram.square().sum()) / (sum(rows) - 1) ** 2 - variance.square().sum()


def sigreg(
    views: Tensor, rows: Sequence[int], config: ObjectiveConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """The unweighted terms of LeJEPA: the Epps-Pulley statistic, and the views' mean square distance to their mean.

    Args:
        views: (2, N, D) outputs on this rank, float32 or float64.
        rows: N of each rank.
        config: the number of slices.
        generator: in the same state on all ranks.
    """
    samples, features = sum(rows), views.shape[-1]
    directions = torch.randn(features, config.slices, generator=generator, device=generator.device).to(views)
    directions = functional.normalize(directions, dim=0)
    knots = torch.linspace(0, LAST_KNOT, KNOTS).to(views)
    gaussian = (-knots.square() / 2).exp()  # the characteristic function to have, and the weight of each knot
    trapezoid = torch.full_like(knots, 2 * LAST_KNOT / (KNOTS - 1))  # twice: the integrand is even
    trapezoid[[0, -1]] /= 2
    angles = (views @ directions)[..., None] * knots  # (2, N, slices, knots)
    found = sum_over_ranks(torch.stack([angles.cos().sum(dim=1), angles.sin().sum(dim=1)])) / samples
    error = (found[0] - gaussian).square() + found[1].square()  # (2, slices, knots)
    distance = sum_over_ranks((views - views.mean(dim=0)).square().sum()) / (2 * samples * features)
    return {"sigreg": samples * (error @ (trapezoid * gaussian)).mean(), "invariance": distance}


def infonce(views: Tensor, rows: Sequence[int], config: ObjectiveConfig) -> dict[str, Tensor]:
    """NT-Xent: the cross-entropy of finding each output's other view among the 2 N - 1 other outputs of all ranks.

    Args:
        views: (2, N, D) outputs on this rank, float32 or float64.
        rows: N of each rank.
        config: the temperature.
    """
    samples, local = sum(rows), views.shape[1]
    start = sum(rows[: distributed.get_rank()]) if world_size() > 1 else 0
    unit = functional.normalize(views, dim=-1)
    everyone = gather_rows(rearrange(unit, "v n d -> n (v d)"), rows)
    everyone = rearrange(everyone, "n (v d) -> (v n) d", v=2)
    logits = rearrange(unit, "v n d -> (v n) d") @ everyone.T / config.temperature  # (2 N, 2 N of all ranks)
    own = torch.arange(start, start + local, device=views.device)
    own, other = torch.cat([own, own + samples]), torch.cat([own + samples, own])
    logits = logits.scatter(1, own[:, None], -torch.inf)  # nobody finds itself
    return {"infonce": sum_over_ranks(functional.cross_entropy(logits, other, reduction="sum")) / (2 * samples)}
