"""How badly does what happened fit what was expected? The number that a user calls surprise.

The energy of a moment is the squared error of the one-step prediction, measured in units of the errors that the
predictor makes on ordinary video: whitened by their covariance on validation clips (a squared Mahalanobis distance
per dimension). Directions in which the predictor is always wrong count little, directions in which it is always
right count much. Its mean on validation clips is 1 by construction.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from jepa.predictor import Predictor


def prediction_errors(predictor: nn.Module, embeddings: Tensor, context: int) -> Tensor:
    """One-step errors along sequences, after enough past to predict from.

    Args:
        predictor: any predictor, baselines too.
        embeddings: (B, T, D), standardised, T greater than `context`.
        context: how many embeddings come before the first prediction.

    Returns:
        (B, T - context, D): for embeddings context, context + 1, ...

    Raises:
        ValueError: the sequences are not longer than the context.
    """
    if embeddings.shape[1] <= context:
        raise ValueError(f"{embeddings.shape[1]} embeddings are not more than the context of {context}")
    return embeddings[:, context:] - predictor(embeddings[:, :-1], embeddings.shape[1] - context)


class UsualErrors(NamedTuple):
    """What errors are usual: their mean (D,) and the whitening (D, D) that makes their covariance the identity."""

    mean: Tensor
    whitening: Tensor

    def energy(self, errors: Tensor) -> Tensor:
        """Squared Mahalanobis distance per dimension; (..., D) -> (...)."""
        return ((errors - self.mean) @ self.whitening).square().mean(dim=-1)


def measure_usual_errors(errors: Tensor, shrinkage: float = 0.05) -> UsualErrors:
    """Mean and whitening of errors (N, D); their own mean energy is 1.

    `shrinkage` draws the covariance towards its diagonal, for short validation sets: features keep their own scale.
    """
    errors = errors.double()
    centred = errors - errors.mean(dim=0)
    covariance = centred.T @ centred / max(1, len(errors) - 1)
    variance = covariance.diagonal().clamp_min(1e-12)
    values, vectors = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * torch.diag(variance))
    whitening = (vectors / values.clamp_min(1e-12).sqrt()) @ vectors.T
    energy = (centred @ whitening).square().mean().clamp_min(1e-12)
    return UsualErrors(errors.mean(dim=0).float(), (whitening / energy.sqrt()).float())


def energy(predictor: Predictor, embeddings: Tensor) -> Tensor:
    """Energy of each embedding given those before it; standardised (B, T, D) -> (B, T - context)."""
    errors = prediction_errors(predictor, embeddings, predictor.config.context)
    return UsualErrors(predictor.error_mean, predictor.error_whitening).energy(errors)


def percentile(predictor: Predictor, energies: Tensor) -> Tensor:
    """Which share of ordinary moments (on validation clips) has less energy, in percent, 0 to 100."""
    steps = len(predictor.energy_quantiles) - 1
    return torch.searchsorted(predictor.energy_quantiles, energies.contiguous()).clamp(max=steps) * (100 / steps)


@torch.no_grad()
def calibrate_energy(predictor: Predictor, errors: Tensor) -> None:
    """Keep the statistics of the predictor's usual errors in its buffers.

    Args:
        predictor: changed in place.
        errors: (N, D), `prediction_errors` on ordinary video that the predictor was not trained on.
    """
    usual = measure_usual_errors(errors)
    predictor.error_mean.copy_(usual.mean)
    predictor.error_whitening.copy_(usual.whitening)
    energies = usual.energy(errors).double()
    grid = torch.linspace(0, 1, len(predictor.energy_quantiles), dtype=torch.float64, device=energies.device)
    predictor.energy_quantiles.copy_(torch.quantile(energies, grid))
