"""VICReg: variance, invariance, covariance (Bardes, Ponce, LeCun 2022, arXiv:2105.04906).

Convention: the authors' published code, with which the coefficients 25 / 25 / 1 were found. It differs from the
paper's equations in two factors: the invariance term averages over features as well as samples (equation 5 sums
over features), and the variance terms of the two views are averaged (equation 6 sums them). Other codebases have
other conventions, so coefficients do not transfer unchanged.

The statistics are those of the *whole* batch, over all ranks: see `gather_with_gradient`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor


@dataclass(frozen=True)
class VICRegConfig:
    """The objective of the encoder."""

    variance_weight: float = 25.0
    """Keeps every feature's standard deviation above 1. At 0 the embeddings collapse."""
    invariance_weight: float = 25.0
    """Pulls the two views of a frame together."""
    covariance_weight: float = 1.0
    """Decorrelates the features."""
    margin: float = 1.0
    """The standard deviation below which a feature is pushed apart."""
    epsilon: float = 1e-4
    """Added to the variance under the square root."""


class VICRegTerms(NamedTuple):
    """The weighted sum and its unweighted terms; scalars, float32 (float64 for float64 input)."""

    loss: Tensor
    variance: Tensor
    invariance: Tensor
    covariance: Tensor


def vicreg(first: Tensor, second: Tensor, config: VICRegConfig) -> VICRegTerms:
    """The VICReg objective on the expander outputs of two views.

    Args:
        first: (N, D) outputs of the first view on this rank; computed in float32 at least, also under autocast.
        second: (N, D) outputs of the second view.
        config: weights, margin, epsilon.

    Returns:
        The terms over the global batch, equal on all ranks. Collective when several processes run.

    Raises:
        ValueError: the views differ in shape, or the global batch has fewer than 2 samples.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"views have shapes {tuple(first.shape)} and {tuple(second.shape)}: both must be (N, D)")
    with torch.autocast(first.device.type, enabled=False):
        first, second = (
            gather_with_gradient(view if view.dtype == torch.float64 else view.float()) for view in (first, second)
        )  # (N x ranks, D)
        if len(first) < 2:
            raise ValueError("the variance of a batch of 1 is not defined: use a batch of at least 2")
        invariance = (first - second).square().mean()
        variance = (variance_hinge(first, config) + variance_hinge(second, config)) / 2
        covariance = off_diagonal_covariance(first) + off_diagonal_covariance(second)
        loss = (
            config.variance_weight * variance
            + config.invariance_weight * invariance
            + config.covariance_weight * covariance
        )
    return VICRegTerms(loss, variance, invariance, covariance)


def variance_hinge(outputs: Tensor, config: VICRegConfig) -> Tensor:
    """Mean over features of max(0, margin - sqrt(var + epsilon)), equation 1; outputs (N, D) -> scalar."""
    std = (outputs.var(dim=0, correction=1) + config.epsilon).sqrt()  # (D,)
    return (config.margin - std).relu().mean()


def off_diagonal_covariance(outputs: Tensor) -> Tensor:
    """Sum of the squared off-diagonal entries of the covariance, over D, equations 3 and 4; (N, D) -> scalar."""
    samples, features = outputs.shape
    centred = outputs - outputs.mean(dim=0)
    covariance = centred.T @ centred / (samples - 1)  # (D, D)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / features


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; the gradient of a rank's rows is the sum of what all ranks' losses say about them."""

    @staticmethod
    def forward(context: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        gathered = [torch.empty_like(local) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, local.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]


def gather_with_gradient(local: Tensor) -> Tensor:
    """(N, D) on each rank -> (N x ranks, D) on all, differentiable; the identity in one process.

    `accelerator.gather` drops gradients. Here every rank computes the same global loss, and the gradient that
    reaches its rows is multiplied by the number of ranks (one copy of the loss on each), which is just what the
    average over ranks in DistributedDataParallel divides by: the parameters' gradients are those of one process
    with the whole batch. All ranks must bring equally many rows.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return local
    return _Gather.apply(local)
