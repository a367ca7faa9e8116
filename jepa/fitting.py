"""What is fitted in closed form: ridge regression on training windows, and a calibration on validation clips.

Nothing of a calibration is applied to what it was fitted on: clips are held out in turn.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as functional
from einops import rearrange, reduce
from torch import Tensor

from jepa.baselines import Ridge
from jepa.calibration import Calibration, energy, most_surprising, usual_errors
from jepa.samples import central_interval, live_features

MOST_INPUTS = 4096
"""Numbers that a ridge regression looks at: its normal equations have the square of that."""
FOLDS = 10
"""Parts that the clips are held out in, at most."""
SPREADS = [0.5 + 0.05 * step for step in range(31)]
"""Factors by which samples may be widened."""
SHARES = (0.5, 0.9)
"""Central intervals whose coverage the spread of samples is fitted to."""


def ridge_context(context: int, dimension: int) -> int:
    """Embeddings that ridge regression looks back on: the predictor's context, or as many as can be afforded."""
    return max(1, min(context, MOST_INPUTS // dimension))


def fit_ridge(windows: Iterable[Tensor], like: Ridge, penalties: Sequence[float]) -> list[Ridge]:
    """Ridge regressions from `context` embeddings to the next, one for each penalty, solved in float64.

    Batches are (N, context + 1, *tokens, D), raw, gone through once; context and standardisation are those of `like`. A
    penalty is added to the diagonal of the inputs' second moment, per sample.
    """
    gram, moment, samples = torch.zeros(()), torch.zeros(()), 0
    for part in windows:
        targets = ((part[:, -1] - like.mean) / like.std).flatten(0, -2).double()
        inputs = functional.pad(like.inputs(part[:, :-1]).double(), (0, 1), value=1.0)
        gram, moment, samples = gram + inputs.T @ inputs, moment + inputs.T @ targets, samples + len(inputs)
    fitted = []
    for penalty in penalties:
        diagonal = torch.full((len(gram),), penalty * samples, dtype=torch.float64)
        diagonal[-1] = 1e-9  # the bias is not penalised
        solution = torch.linalg.solve(gram + torch.diag(diagonal), moment)
        ridge = Ridge(like.fps, like.context, mean=like.mean, std=like.std, on_grid=like.on_grid)
        ridge.weight.copy_(solution[:-1])
        ridge.bias.copy_(solution[-1])
        fitted.append(ridge)
    return fitted


class Forecasts(NamedTuple):
    """Guesses of the same windows and what came, (N, H, *tokens, D); standardised, float32."""

    rolled: Tensor
    """Rollouts of the predictor."""
    ridged: Tensor
    """Rollouts of ridge regression."""
    last: Tensor
    """(N, 1, *tokens, D), what both started from."""
    came: Tensor
    groups: np.ndarray
    """int (N,): windows of one clip have one number."""

    def errors(self, step: int) -> Tensor:
        """Errors of the four guesses at one horizon, float64 (4, N, places, D)."""
        came = self.came[:, step]
        guesses = (self.rolled[:, step], self.ridged[:, step], self.last[:, 0], torch.zeros_like(came))
        return rearrange(torch.stack([guess - came for guess in guesses]).double(), "g n ... d -> g n (...) d")


@torch.no_grad()
def fit_calibration(ridge: Ridge, forecasts: Forecasts, drawn: Tensor | None = None) -> Calibration:
    """A calibration on forecasts for clips that the predictor was not trained on, of at least two groups.

    With a latent in the predictor also on sampled futures (n, N, H, *tokens, D), standardised.
    """
    windows, horizon, *tokens, _ = forecasts.came.shape
    calibration, parts = Calibration(ridge, horizon, windows), hold_out(forecasts.groups)
    for step in range(horizon):
        calibration.blend[step], left = cross_fit_blend(forecasts.errors(step), parts)
        (calibration.error_mean[step], calibration.whitening[step]), places = cross_fit_energy(left, parts)
        energies = most_surprising(places.view(windows, 1, *tokens))[:, 0]
        calibration.unit[step] = energies.mean()
        calibration.energies[:, step] = energies / energies.mean()
    calibration.clips.copy_(torch.from_numpy(forecasts.groups))
    if drawn is not None:
        calibration.sample_spread.copy_(fit_spread(drawn, forecasts.came))
    return calibration


def hold_out(groups: np.ndarray) -> list[Tensor]:
    """The parts, of whole and contiguous groups, that are held out in turn: bool (N,) each."""
    names, membership = np.unique(groups, return_inverse=True)
    parts = min(FOLDS, len(names))
    part_of = (np.arange(len(names)) * parts // len(names))[membership]
    return [torch.from_numpy(part_of == part) for part in range(parts)]


def cross_fit_blend(errors: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The blend, and what blends of the other parts leave: (4, N, places, D), float64 -> (4,) and (N, places, D)."""
    left = torch.empty_like(errors[0])
    of_parts = (errors[:, chosen] for chosen in parts)
    grams = torch.stack([torch.einsum("gnpd,knpd->gk", part, part) for part in of_parts])  # (parts, 4, 4)
    blends = best_blend(grams.sum(dim=0) - grams)
    for chosen, blend in zip(parts, blends, strict=True):
        left[chosen] = torch.einsum("g,gnpd->npd", blend, errors[:, chosen])
    return blends.mean(dim=0), left


def best_blend(gram: Tensor) -> Tensor:
    """Minimise w G w over weights that are not negative and sum to 1, (..., k, k) -> (..., k): every face is tried."""
    guesses = gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None].clamp_min(1e-12)
    gram = gram / scale + 1e-6 * torch.eye(guesses, dtype=gram.dtype)
    choices, costs = [], []
    for subset in range(1, 2**guesses):
        chosen = [guess for guess in range(guesses) if subset >> guess & 1]
        face = gram[..., chosen, :][..., chosen]
        solution = torch.linalg.solve(face, torch.ones(*face.shape[:-1], dtype=gram.dtype))
        weights = torch.zeros(gram.shape[:-1], dtype=gram.dtype)
        weights[..., chosen] = solution / solution.sum(dim=-1, keepdim=True)
        cost = torch.einsum("...g,...gk,...k->...", weights, gram, weights)
        choices.append(weights)
        costs.append(torch.where(weights.amin(dim=-1) >= 0, cost, torch.inf))
    best = torch.stack(costs).argmin(dim=0)
    return torch.stack(choices).gather(0, best[None, ..., None].expand(1, *gram.shape[:-1]))[0]


def cross_fit_energy(errors: Tensor, parts: list[Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Usual errors, of what the believed forecast leaves, and the energy of each place in units of the other parts.

    Float64 (N, places, D) -> mean (D,) and whitening (D, D), for which energies are 1 in the mean; and energies (N,
    places).
    """
    energies = torch.empty(errors.shape[:2], dtype=torch.float64)
    usual_mean, usual_precision = torch.zeros(()), torch.zeros(())
    for chosen in parts:
        mean, precision = usual_errors(errors[~chosen].flatten(0, 1))
        energies[chosen] = energy(errors[chosen], mean, precision)
        usual_mean, usual_precision = usual_mean + mean / len(parts), usual_precision + precision / len(parts)
    # The mean of the parts' units, not the units of all: a new clip then meets units fitted on as little as were those
    # that each held-out clip met, and few clips make it no less surprising than they were.
    scale = energies.mean().clamp_min(1e-12)
    values, vectors = torch.linalg.eigh(usual_precision / scale)
    return (usual_mean, vectors * values.clamp_min(0).sqrt() @ vectors.T), energies / scale


def fit_spread(drawn: Tensor, came: Tensor) -> Tensor:
    """Factors (H,) for which the coverage of the central 50 % and 90 % is least off, taken together.

    Of samples (n, N, H, *tokens, D), for what came, (N, H, *tokens, D).
    """
    centre = drawn.mean(dim=0)
    error, live = came - centre, live_features(came)
    off = torch.zeros(len(SPREADS), came.shape[1])
    for share in SHARES:
        low, high = central_interval(drawn - centre, share)
        for number, spread in enumerate(SPREADS):
            inside = (error >= spread * low) & (error <= spread * high)
            off[number] += (reduce(inside[..., live].float(), "n h ... -> h", "mean") - share).abs()
    return torch.tensor(SPREADS)[off.argmin(dim=0)]
