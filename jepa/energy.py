"""How badly does what happened fit what was expected? The number that a user calls surprise.

The energy of a moment is the squared error of the one-step prediction, measured in units of the errors that the
predictor makes on ordinary video: whitened by their covariance on validation clips (a squared Mahalanobis distance
per dimension). Directions in which the predictor is always wrong count little, directions in which it is always
right count much. Its mean on validation clips is 1 by construction.
"""

import torch
from torch import Tensor

from jepa.predictor import Predictor


def prediction_errors(predictor: Predictor, embeddings: Tensor) -> Tensor:
    """One-step errors along sequences, after enough past to predict from.

    Args:
        predictor: the world model.
        embeddings: (B, T, D), standardised, T greater than the context.

    Returns:
        (B, T - context, D): for embeddings context, context + 1, ...

    Raises:
        ValueError: the sequences are not longer than the context.
    """
    context = predictor.config.context
    if embeddings.shape[1] <= context:
        raise ValueError(f"{embeddings.shape[1]} embeddings are not more than the context of {context}")
    return embeddings[:, context:] - predictor(embeddings[:, :-1], embeddings.shape[1] - context)


def energy(predictor: Predictor, embeddings: Tensor) -> Tensor:
    """Energy of each embedding given those before it; shapes as `prediction_errors`, without the last dimension."""
    errors = prediction_errors(predictor, embeddings) - predictor.error_mean
    return (errors @ predictor.error_whitening).square().mean(dim=-1)  # (B, T - context)


def percentile(predictor: Predictor, energies: Tensor) -> Tensor:
    """Which share of ordinary moments (on validation clips) has less energy, in percent, 0 to 100."""
    steps = len(predictor.energy_quantiles) - 1
    return torch.searchsorted(predictor.energy_quantiles, energies.contiguous()).clamp(max=steps) * (100 / steps)


@torch.no_grad()
def calibrate_energy(predictor: Predictor, sequences: list[Tensor], shrinkage: float = 0.05) -> None:
    """Measure the predictor's errors on validation clips and keep their statistics in its buffers.

    Args:
        predictor: changed in place.
        sequences: standardised embeddings (B, T, D) of ordinary video that the predictor was not trained on.
        shrinkage: of the covariance towards a multiple of the identity, for short validation sets.
    """
    errors = torch.cat([prediction_errors(predictor, part).flatten(0, 1) for part in sequences]).double()
    predictor.error_mean.copy_(errors.mean(dim=0))
    centred = errors - errors.mean(dim=0)
    covariance = centred.T @ centred / max(1, len(errors) - 1)
    scale = covariance.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    covariance = (1 - shrinkage) * covariance + shrinkage * scale * identity
    values, vectors = torch.linalg.eigh(covariance)
    predictor.error_whitening.copy_((vectors / values.sqrt()) @ vectors.T)
    energies = torch.cat([energy(predictor, part).flatten() for part in sequences])
    grid = torch.linspace(0, 1, len(predictor.energy_quantiles), dtype=torch.float64)
    predictor.energy_quantiles.copy_(torch.quantile(energies.double(), grid.to(energies.device)))
