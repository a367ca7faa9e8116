"""How far to believe a rollout, by horizon: fitted once on validation clips, kept beside the predictor.

*Blend.* A rollout that has learned from other videos is overconfident on a new one. The believed forecast combines four
guesses, with weights that are not negative and sum to 1: the rollout, ridge regression, copying the last embedding, and
the mean (Bates and Granger 1969; by least squares, Granger and Ramanathan 1984).

*Energy.* Surprise: the squared error of the believed forecast, whitened by the covariance of the errors that are usual
so far ahead (a squared Mahalanobis distance per dimension); ordinary video has 1.

*Percentile.* The share of ordinary moments with less energy. Clips differ in their ordinary level, and a new video is a
new clip: its log energy is a new clip's level (Student's t over those seen) plus what moments differ from their own
clip. So of few clips percentiles are cautious.

Nothing is applied to what it was fitted on: clips are held out in turn.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from scipy import stats
from torch import Tensor, nn

from jepa.baselines import Ridge
from jepa.metrics import central_interval, live_features
from jepa.sequence import Sequence

GUESSES = ("rollout", "ridge", "copy_last", "mean")
FOLDS = 10
"""Parts that the clips are held out in, at most."""
COVARIANCE_SHRINKAGE = 0.05
"""Share of the diagonal in the covariance of errors: features keep their own scale on short validation sets."""
QUANTILES, LEVELS = 1001, 200
SPREADS = [0.5 + 0.05 * step for step in range(31)]
"""Factors by which samples may be widened."""
SHARES = (0.5, 0.9)
"""Central intervals whose coverage the spread of samples is fitted to."""
FAR_LEVEL = 99.0
"""Percentile among ordinary clips above which a video's ordinary level is far from the calibration's."""


class Forecasts(NamedTuple):
    """Guesses of the same windows and what came; standardised, float32."""

    rolled: Tensor
    """(N, H, *tokens, D), the predictor's rollouts."""
    ridged: Tensor
    """(N, H, *tokens, D), those of ridge regression."""
    last: Tensor
    """(N, 1, *tokens, D), what both started from."""
    came: Tensor
    """(N, H, *tokens, D)."""
    groups: np.ndarray
    """int (N,): windows of one clip have one number."""

    def errors(self, step: int) -> Tensor:
        """Errors of the four guesses at one horizon, float64 (4, N, places, D)."""
        came = self.came[:, step]
        guesses = (self.rolled[:, step], self.ridged[:, step], self.last[:, 0], torch.zeros_like(came))
        return rearrange(torch.stack([guess - came for guess in guesses]).double(), "g n ... d -> g n (...) d")


class Calibration(nn.Module):
    """A calibration of one predictor.

    Args:
        ridge: fitted on the predictor's training windows.
        horizon: ticks ahead with numbers of their own; later ones share the last.
    """

    blend: Tensor
    error_mean: Tensor
    whitening: Tensor
    quantiles: Tensor
    levels: Tensor
    sample_spread: Tensor

    def __init__(self, ridge: Ridge, horizon: int) -> None:
        super().__init__()
        self.ridge, self.horizon, dimension = ridge, horizon, len(ridge.mean)
        self.register_buffer("blend", torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(horizon, 1))
        self.register_buffer("error_mean", torch.zeros(horizon, dimension))
        self.register_buffer("whitening", torch.eye(dimension).repeat(horizon, 1, 1))
        self.register_buffer("quantiles", torch.zeros(horizon, QUANTILES))
        self.register_buffer("levels", torch.zeros(horizon, 3))
        self.register_buffer("sample_spread", torch.ones(horizon))

    def description(self) -> dict[str, Any]:
        """What it is built from, as JSON values."""
        return {
            "horizon": self.horizon,
            "context": self.ridge.context,
            "dimension": len(self.ridge.mean),
            "fps": self.ridge.fps,
        }

    @classmethod
    def build(cls, *, horizon: int, context: int, dimension: int, fps: float) -> "Calibration":
        """An empty one, from its description."""
        return cls(Ridge(fps, context, mean=torch.zeros(dimension), std=torch.ones(dimension)), horizon)

    def believe(self, rolled: Tensor, ridged: Tensor, past: Sequence, ticks: Tensor) -> Tensor:
        """The believed forecast.

        Args:
            rolled: (B, H, *tokens, D), a rollout, raw.
            ridged: (B, H, *tokens, D), that of `ridge`.
            past: what both started from.
            ticks: (H,), how far ahead each is.
        """
        weights = self._at(self.blend, ticks).to(rolled)  # (H, 4)
        weights = weights.view(1, len(ticks), 4, *[1] * (rolled.ndim - 2))
        rollout, ridge, copy, mean = weights.unbind(dim=2)
        return rollout * rolled + ridge * ridged + copy * past.embeddings[:, -1:] + mean * self.ridge.mean

    def widen(self, drawn: Tensor, ticks: Tensor) -> Tensor:
        """Samples (n, B, H, *tokens, D) moved apart around their mean as far as coverage wants."""
        spread = self._at(self.sample_spread, ticks).to(drawn).view(-1, *[1] * (drawn.ndim - 3))
        centre = drawn.mean(dim=0)
        return centre + spread * (drawn - centre)

    def energy(self, believed: Tensor, came: Tensor, ticks: Tensor) -> Tensor:
        """How badly each embedding of a future fits the past.

        Args:
            believed: (B, H, *tokens, D), the believed forecast, raw.
            came: (B, H, *tokens, D).
            ticks: (H,), how far ahead each is.

        Returns:
            (B, H), the mean over tokens; about 1 on ordinary video.
        """
        errors = rearrange((came - believed) / self.ridge.std, "b h ... d -> b h (...) d")
        centred = errors - self._at(self.error_mean, ticks)[:, None]
        whitened = torch.einsum("b h p d, h d k -> b h p k", centred, self._at(self.whitening, ticks))
        return reduce(whitened.square(), "b h p k -> b h", "mean")

    def percentile(self, energies: Tensor, ticks: int) -> Tensor:
        """The share of ordinary moments with less energy so many ticks ahead, in percent; any shape."""
        quantiles = self.quantiles[min(ticks, self.horizon) - 1]
        return torch.searchsorted(quantiles, energies.contiguous()).clamp(max=QUANTILES - 1) * (100 / (QUANTILES - 1))

    def level(self, energies: Tensor, ticks: int) -> float:
        """The percentile of a video's ordinary level among those of ordinary clips; energies (N,)."""
        mean, spread, freedom = self.levels[min(ticks, self.horizon) - 1].tolist()
        level = float(energies.clamp_min(1e-12).log().mean())
        return 100 * float(stats.t.cdf((level - mean) / max(spread, 1e-12), max(freedom, 1.0)))

    def _at(self, values: Tensor, ticks: Tensor) -> Tensor:
        """The numbers (horizon, ...) of the nearest horizons, (H, ...)."""
        return values[(ticks.round().long() - 1).clamp(0, self.horizon - 1)]


@torch.no_grad()
def fit_calibration(ridge: Ridge, forecasts: Forecasts, drawn: Tensor | None = None) -> Calibration:
    """Fit all of a calibration.

    Args:
        ridge: whose rollouts are among the forecasts.
        forecasts: on clips that the predictor was not trained on, of at least two groups.
        drawn: (n, N, H, *tokens, D), sampled futures of a predictor with a latent, standardised.
    """
    horizon = forecasts.came.shape[1]
    calibration = Calibration(ridge, horizon)
    folds = hold_out(forecasts.groups)
    for step in range(horizon):
        errors = forecasts.errors(step)  # (4, N, places, D)
        blend, left = cross_fit_blend(errors, folds)  # (4,), (N, places, D)
        usual, energies = cross_fit_energy(left, folds)
        quantiles, levels = predictive_quantiles(energies, forecasts.groups)
        calibration.blend[step] = blend
        calibration.error_mean[step], calibration.whitening[step] = usual
        calibration.quantiles[step], calibration.levels[step] = quantiles, levels
    if drawn is not None:
        calibration.sample_spread.copy_(fit_spread(drawn, forecasts.came))
    return calibration


def hold_out(groups: np.ndarray) -> np.ndarray:
    """The part in which each window is held out, int (N,): contiguous groups, at most `FOLDS` parts."""
    names, membership = np.unique(groups, return_inverse=True)
    parts = min(FOLDS, len(names))
    return (np.arange(len(names)) * parts // len(names))[membership]


def cross_fit_blend(errors: Tensor, folds: np.ndarray) -> tuple[Tensor, Tensor]:
    """The blend, and the errors that blends of the other parts leave.

    Args:
        errors: float64 (4, N, places, D), of the guesses.
        folds: int (N,).

    Returns:
        float64 (4,) and (N, places, D).
    """
    held_out, left = _held_out(folds), torch.empty_like(errors[0])
    parts = (errors[:, chosen] for chosen in held_out)
    grams = torch.stack([torch.einsum("gnpd,knpd->gk", part, part) for part in parts])  # (parts, 4, 4)
    blends = best_blend(grams.sum(dim=0) - grams)
    for chosen, blend in zip(held_out, blends, strict=True):
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


def cross_fit_energy(errors: Tensor, folds: np.ndarray) -> tuple[tuple[Tensor, Tensor], np.ndarray]:
    """Usual errors, and the energies of each window in units of those of the other parts.

    Args:
        errors: float64 (N, places, D), what the believed forecast leaves.
        folds: int (N,).

    Returns:
        Mean (D,) and whitening (D, D), for which held-out energies are 1 in the mean; and energies (N,).
    """
    held_out = _held_out(folds)
    energies = torch.empty(len(errors), dtype=torch.float64)
    usual_mean, usual_precision = torch.zeros(()), torch.zeros(())
    for chosen in held_out:
        mean, precision = _precision(errors[~chosen].flatten(0, 1))
        centred = errors[chosen] - mean
        energies[chosen] = reduce(centred @ precision * centred, "n p d -> n", "sum") / centred[0].numel()
        usual_mean, usual_precision = usual_mean + mean / len(held_out), usual_precision + precision / len(held_out)
    # The mean of the parts' units, not the units of all: a new clip then meets units fitted on as little as were those
    # that each held-out clip met, and few clips make it no less surprising than they were.
    scale = energies.mean().clamp_min(1e-12)
    values, vectors = torch.linalg.eigh(usual_precision / scale)
    return (usual_mean, vectors * values.clamp_min(0).sqrt() @ vectors.T), (energies / scale).numpy()


def _precision(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and inverse covariance (D, D) of errors (N, D)."""
    mean = errors.mean(dim=0)
    covariance = (errors - mean).mT @ (errors - mean) / len(errors)
    variance = covariance.diagonal().clamp_min(1e-12)
    shrunk = (1 - COVARIANCE_SHRINKAGE) * covariance + COVARIANCE_SHRINKAGE * torch.diag(variance)
    values, vectors = torch.linalg.eigh(shrunk)
    return mean, vectors / values.clamp_min(1e-12) @ vectors.T


def predictive_quantiles(energies: np.ndarray, groups: np.ndarray) -> tuple[Tensor, Tensor]:
    """Quantiles of the energy of a moment in a new clip; and mean, spread and degrees of freedom of clips' levels.

    Args:
        energies: (N,), each in units that its own clip had no part in.
        groups: int (N,), the clip of each, at least two.
    """
    logs = np.log(np.maximum(energies, 1e-12))
    _, membership, counts = np.unique(groups, return_inverse=True, return_counts=True)
    level = np.bincount(membership, logs) / counts  # (clips,)
    within, clips = logs - level[membership], len(level)
    spread = float(level.std(ddof=1)) * (1 + 1 / clips) ** 0.5  # of a new clip around the mean of those seen
    new = stats.t.ppf((np.arange(LEVELS) + 0.5) / LEVELS, clips - 1) * spread + level.mean()
    some = np.sort(within)[np.linspace(0, len(within) - 1, min(len(within), 2000)).astype(int)]
    quantiles = np.quantile(np.exp(new[:, None] + some), np.linspace(0, 1, QUANTILES))
    return torch.from_numpy(quantiles), torch.tensor([level.mean(), spread, clips - 1.0])


def fit_spread(drawn: Tensor, came: Tensor) -> Tensor:
    """How far samples have to lie apart for central intervals to hold what they should, by horizon.

    For each horizon the factor for which the coverage of the central 50 % and 90 % is least off, taken together.

    Args:
        drawn: (n, N, H, *tokens, D), samples.
        came: (N, H, *tokens, D).
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


def _held_out(folds: np.ndarray) -> list[Tensor]:
    """For each part, whether each window is in it, bool (N,)."""
    return [torch.from_numpy(folds == fold) for fold in range(int(folds.max()) + 1)]
