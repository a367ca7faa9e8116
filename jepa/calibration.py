"""How far to believe a rollout, by horizon: fitted once on validation clips, kept beside the predictor.

*Blend*: rollout, ridge regression, copying the last embedding and the mean, with weights that are not negative and sum
to 1 (Bates and Granger 1969; by least squares, Granger and Ramanathan 1984). *Energy*: the believed forecast's squared
Mahalanobis distance, per dimension, among the errors that are usual so far ahead; of a grid at each place, and of the
moment the mean of its most surprising places. *Percentile*: the share of ordinary moments with less energy, where
log energy is a new clip's level (Student's t over those seen) plus what moments differ from their own clip's.
"""

from collections.abc import Sequence as Several
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from scipy import stats
from torch import Tensor, nn

from jepa.baselines import Ridge
from jepa.config import Positive, PositiveInt, require_fits
from jepa.sequence import Sequence

QUANTILES = 1001
LEVELS = 200
"""Quantiles that the level of a new clip is drawn at."""
MOST_SURPRISING = 0.03
"""Share of the places of a grid that tell a moment."""
COVARIANCE_SHRINKAGE = 0.05
"""Share of the diagonal in the covariance of errors: features keep their own scale on short validation sets."""
FAR_LEVEL = 99.0
"""Percentile among ordinary clips above which a video's ordinary level is far from the calibration's."""


class Ordinary(NamedTuple):
    """What is ordinary: the energies of moments in new clips that are like those of a calibration."""

    quantiles: Tensor
    """(QUANTILES,)"""
    mean: float
    """Of the logarithms of clips' levels, then their spread and its degrees of freedom."""
    spread: float
    freedom: float

    @classmethod
    def of(cls, energies: np.ndarray, groups: np.ndarray) -> "Ordinary":
        """Learned from energies (N,), each in units that its own clip had no part in; groups int (N,) say the clips."""
        logs = np.log(np.maximum(energies, 1e-12))
        _, membership, counts = np.unique(groups, return_inverse=True, return_counts=True)
        level = np.bincount(membership, logs) / counts  # (clips,)
        within, clips = logs - level[membership], len(level)
        # Of a new clip around the mean; in units of the others alone each of those seen was farther off.
        spread = float(level.std(ddof=1)) * (1 - 1 / clips) * (1 + 1 / clips) ** 0.5
        new = stats.t.ppf((np.arange(LEVELS) + 0.5) / LEVELS, clips - 1) * spread + level.mean()
        some = np.sort(within)[np.linspace(0, len(within) - 1, min(len(within), 2000)).astype(int)]
        quantiles = np.quantile(np.exp(new[:, None] + some), np.linspace(0, 1, QUANTILES))
        return cls(torch.from_numpy(quantiles).float(), float(level.mean()), spread, clips - 1.0)

    def percentile(self, energies: Tensor) -> Tensor:
        """The share of ordinary moments with less energy, in percent; any shape."""
        below = torch.searchsorted(self.quantiles.to(energies.device), energies.float().contiguous())
        return below.clamp(max=QUANTILES - 1) * (100 / (QUANTILES - 1))

    def level(self, energies: Tensor) -> float:
        """The percentile of a video's ordinary level among those of ordinary clips; energies (N,)."""
        level = float(energies.clamp_min(1e-12).log().mean())
        return 100 * float(stats.t.cdf((level - self.mean) / max(self.spread, 1e-12), max(self.freedom, 1.0)))


class Calibration(nn.Module):
    """A calibration of one predictor, with ridge regression fitted on the same windows; later ticks share the last."""

    blend: Tensor
    error_mean: Tensor
    whitening: Tensor
    unit: Tensor
    energies: Tensor
    clips: Tensor
    sample_spread: Tensor

    def __init__(self, ridge: Ridge, horizon: int, windows: int = 2) -> None:
        super().__init__()
        self.ridge, self.horizon, dimension = ridge, horizon, len(ridge.mean)
        self.register_buffer("blend", torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(horizon, 1))
        self.register_buffer("error_mean", torch.zeros(horizon, dimension))
        self.register_buffer("whitening", torch.eye(dimension).repeat(horizon, 1, 1))
        self.register_buffer("unit", torch.ones(horizon))
        # Of the windows that it was fitted on, by units of the other clips; and the clip of each.
        self.register_buffer("energies", torch.ones(windows, horizon))
        self.register_buffer("clips", torch.arange(windows))
        self.register_buffer("sample_spread", torch.ones(horizon))

    def description(self) -> dict[str, Any]:
        """What it is built from, as JSON values."""
        sizes = {"horizon": self.horizon, "windows": len(self.clips), "dimension": len(self.ridge.mean)}
        return sizes | {name: getattr(self.ridge, name) for name in ("context", "fps", "on_grid")}

    @classmethod
    def build(cls, *, horizon: int, windows: int, dimension: int, **of_ridge: Any) -> "Calibration":
        """An empty one, from its description. Raises `ConfigurationError` where that cannot be."""
        sizes = {"horizon": horizon, "windows": windows, "dimension": dimension, "context": of_ridge.get("context")}
        for name, size in sizes.items():
            require_fits(name, size, PositiveInt)
        require_fits("fps", of_ridge.get("fps"), Positive)
        return cls(Ridge(mean=torch.zeros(dimension), std=torch.ones(dimension), **of_ridge), horizon, windows)

    def believe(self, rolled: Tensor, ridged: Tensor, past: Sequence, ticks: Tensor) -> Tensor:
        """The believed forecast, from rollouts of predictor and `ridge` from the past, (B, H, *tokens, D), raw.

        Each is so many ticks ahead, (H,).
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

    def energy_map(self, believed: Tensor, came: Tensor, ticks: Tensor, ignored: Tensor | None = None) -> Tensor:
        """How badly embeddings that came fit what was believed, at each place; about 1 on ordinary video.

        (B, H, *tokens, D) twice, raw, `ticks` (H,) ahead -> (B, H, *tokens), 0 at places (*tokens) that are ignored.
        """
        errors = rearrange((came - believed) / self.ridge.std, "b h ... d -> b h (...) d")
        centred = errors - self._at(self.error_mean, ticks)[:, None]
        whitened = torch.einsum("b h p d, h d k -> b h p k", centred, self._at(self.whitening, ticks))
        energies = reduce(whitened.square(), "b h p k -> b h p", "mean").view(came.shape[:-1])
        return energies if ignored is None else energies.masked_fill(ignored, 0)

    def energy(self, believed: Tensor, came: Tensor, ticks: Tensor) -> Tensor:
        """The energy of moments in units of what is usual, of a grid at its most surprising places.

        (B, H, *tokens, D) twice, raw, `ticks` (H,) ahead -> (B, H).
        """
        return self.of_moments(self.energy_map(believed, came, ticks), ticks)

    def of_moments(self, energy_map: Tensor, ticks: Tensor) -> Tensor:
        """The energy of moments (B, H) of its map (B, H, *tokens)."""
        return most_surprising(energy_map) / self._at(self.unit, ticks) if energy_map.ndim > 2 else energy_map

    def ordinary(self, horizons: Several[int]) -> Ordinary:
        """What is ordinary of the mean energy at some horizons."""
        chosen = [min(ticks, self.horizon) - 1 for ticks in horizons]
        return Ordinary.of(self.energies[:, chosen].mean(dim=1).cpu().double().numpy(), self.clips.cpu().numpy())

    def _at(self, values: Tensor, ticks: Tensor) -> Tensor:
        """The numbers (horizon, ...) of the nearest horizons, (H, ...)."""
        return values[(ticks.round().long() - 1).clamp(0, self.horizon - 1)]


def usual_errors(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and inverse covariance (D, D), shrunk to its diagonal, of errors (N, D)."""
    mean = errors.mean(dim=0)
    covariance = (errors - mean).mT @ (errors - mean) / len(errors)
    variance = covariance.diagonal().clamp_min(1e-12)
    shrunk = (1 - COVARIANCE_SHRINKAGE) * covariance + COVARIANCE_SHRINKAGE * torch.diag(variance)
    values, vectors = torch.linalg.eigh(shrunk)
    return mean, vectors / values.clamp_min(1e-12) @ vectors.T


def energy(errors: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """Squared Mahalanobis distance per feature, (..., D) -> (...)."""
    centred = errors - mean.to(errors)
    return (centred @ precision.to(errors) * centred).mean(dim=-1)


def most_surprising(energies: Tensor) -> Tensor:
    """The mean of the most surprising places, (B, H, *tokens) -> (B, H): one alone may be noise."""
    places = energies.view(*energies.shape[:2], -1)
    return places.topk(max(1, round(places.shape[2] * MOST_SURPRISING)), dim=2).values.mean(dim=2)
