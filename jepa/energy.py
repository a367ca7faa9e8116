"""How badly does a future fit a past? The number that a user calls surprise.

The energy of a moment is the squared error of its prediction, some steps ahead, measured in units of the errors that
the predictor makes that far ahead on ordinary video: whitened by their covariance on validation clips (a squared
Mahalanobis distance per dimension). Directions in which the predictor is always wrong count little, directions in
which it is always right count much. Its mean on validation clips is 1 by construction (with a latent, about 1). Not so
where the members of an ensemble were measured each alone, on clips that were held out from it: the mean of all members
is scored, which errs less than they do, and ordinary video has less than 1 on average.

With a latent there are several predictions, and the latent is marginalised: the energy is the free energy of a mixture
of Gaussians around them, -2 / D log mean exp(-D E / 2) (LeCun et al. 2006, "A tutorial on energy-based learning"),
which is little where *one* of the predictions is near. For a single prediction it is E itself.

How far off a prediction is depends, on real video, above all on how much there was to foresee at that place.
`agreement` asks only whether things went the way they were expected to go: a film that runs backwards may have ordinary
energies, but it goes against what was expected.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from jepa.baselines import Baseline
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.sampling import draw_latents

LATENTS = 16
"""Predictions of a moment by a predictor with a latent."""


@torch.no_grad()
def predictions(predictor: Predictor | Baseline, past: Tensor, horizon: int) -> Tensor:
    """What moments are judged by: rollouts (n, B, horizon, D) of any predictor, baselines too; past (B, T, D).

    n is 1, or `LATENTS` with a latent, which are the same for every moment and at every call.
    """
    if not isinstance(predictor, Predictor) or not predictor.config.latent_dimension:
        return rollout(predictor, past, horizon)[None]
    generator = torch.Generator().manual_seed(0)
    drawn = draw_latents((LATENTS, horizon, predictor.config.latent_dimension), generator).to(past)
    return torch.stack([rollout(predictor, past, horizon, latents=one.expand(len(past), -1, -1)) for one in drawn])


def prediction_errors(predictor: Predictor | Baseline, past: Tensor, future: Tensor) -> Tensor:
    """What came (B, horizon, D), less what was predicted: (n, B, horizon, D), see `predictions`."""
    return future - predictions(predictor, past, future.shape[1])


class UsualErrors(NamedTuple):
    """What errors are usual at each horizon: their mean, and the whitening that makes their covariance the identity."""

    mean: Tensor
    """(horizon, D)"""
    whitening: Tensor
    """(horizon, D, D)"""

    def energy(self, errors: Tensor) -> Tensor:
        """Squared Mahalanobis distance per dimension, marginalised over predictions; (n, B, h, D) -> (B, h)."""
        steps = errors.shape[2]
        whitened = torch.einsum("n b h d, h d k -> n b h k", errors - self.mean[:steps], self.whitening[:steps])
        each = whitened.square().mean(dim=-1)  # (n, B, h)
        if len(each) == 1:
            return each[0]
        inverse_temperature = errors.shape[3] / 2
        mixture = torch.logsumexp(-inverse_temperature * each, dim=0) - torch.tensor(float(len(each))).log()
        return -mixture / inverse_temperature


def measure_usual_errors(errors: Tensor, shrinkage: float = 0.05) -> UsualErrors:
    """Mean and whitening of errors (n, N, horizon, D), of the nearest of n predictions; their own mean energy is 1.

    `shrinkage` draws the covariance towards its diagonal, for short validation sets: features keep their own scale.
    """
    nearest = errors.square().mean(dim=-1).argmin(dim=0)  # (N, horizon)
    errors = errors.take_along_dim(nearest[None, ..., None], dim=0)[0].double()  # (N, horizon, D)
    centred = (errors - errors.mean(dim=0)).transpose(0, 1)  # (horizon, N, D)
    covariance = centred.mT @ centred / max(1, len(errors) - 1)
    variance = covariance.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
    values, vectors = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * torch.diag_embed(variance))
    whitening = (vectors / values.clamp_min(1e-12).sqrt()[:, None]) @ vectors.mT
    energy = (centred @ whitening).square().mean(dim=(1, 2)).clamp_min(1e-12)  # (horizon,)
    return UsualErrors(errors.mean(dim=0).float(), (whitening / energy.sqrt()[:, None, None]).float())


def energy(predictor: Predictor, past: Tensor, future: Tensor, predicted: Tensor | None = None) -> Tensor:
    """How badly each embedding of a future fits the past, predicted from the past alone.

    Args:
        predictor: with its usual errors measured (`calibrate_energy`).
        past: (B, T, D), standardised.
        future: (B, horizon, D).
        predicted: `predictions` of it, where they have been made already.

    Returns:
        (B, horizon).

    Raises:
        ValueError: the horizon is longer than usual errors were measured for.
    """
    if future.shape[1] > predictor.energy_horizon:
        raise ValueError(
            f"a future of {future.shape[1]} steps: energies are known for horizons up to {predictor.energy_horizon}"
        )
    usual = UsualErrors(predictor.error_mean, predictor.error_whitening)
    predicted = predictions(predictor, past, future.shape[1]) if predicted is None else predicted
    return usual.energy(future - predicted)


def agreement(predictor: Predictor | Baseline, past: Tensor, future: Tensor, predicted: Tensor | None = None) -> Tensor:
    """Does a future go where it was expected to? The cosine of the change that was imagined and of the one that came.

    Args:
        predictor: any predictor, baselines too; of several predictions the mean counts.
        past: (B, T, D), standardised.
        future: (B, horizon, D).
        predicted: `predictions` of it, where they have been made already.

    Returns:
        (B, horizon): 1 as imagined, 0 unrelated, or nothing changes, below 0 against it.
    """
    predicted = predictions(predictor, past, future.shape[1]) if predicted is None else predicted
    return functional.cosine_similarity(predicted.mean(dim=0) - past[:, -1:], future - past[:, -1:], dim=2)


def percentile(predictor: Predictor, energies: Tensor, horizon: int = 1) -> Tensor:
    """Which share of ordinary moments (on validation clips) has less energy at this horizon, in percent, 0 to 100."""
    quantiles = predictor.energy_quantiles[horizon - 1]
    steps = len(quantiles) - 1
    return torch.searchsorted(quantiles, energies.contiguous()).clamp(max=steps) * (100 / steps)


@torch.no_grad()
def calibrate_energy(predictor: Predictor, errors: Tensor) -> None:
    """Keep the statistics of the predictor's usual errors in its buffers.

    Args:
        predictor: changed in place.
        errors: (n, N, energy horizon, D), `prediction_errors` on ordinary video that it was not trained on.
    """
    usual = measure_usual_errors(errors)
    predictor.error_mean.copy_(usual.mean)
    predictor.error_whitening.copy_(usual.whitening)
    energies = usual.energy(errors).double()  # (N, horizon)
    grid = torch.linspace(0, 1, predictor.energy_quantiles.shape[1], dtype=torch.float64, device=energies.device)
    predictor.energy_quantiles.copy_(torch.quantile(energies, grid, dim=0).T)
