"""How far to believe a rollout, by horizon: fitted once on validation clips, kept beside the predictor.

*Blend*: rollout, ridge regression, copying the last embedding and the mean, with weights that are not negative and sum
to 1 (Bates and Granger 1969; by least squares, Granger and Ramanathan 1984). *Energy*: the believed forecast's squared
Mahalanobis distance, per dimension, among the errors that are usual so far ahead. *Percentile*: the share of ordinary
moments with less energy, where log energy is a new clip's level (Student's t over those seen) plus what moments differ
from their own clip's.
"""

from typing import Any

import torch
from einops import rearrange, reduce
from scipy import stats
from torch import Tensor, nn

from jepa.baselines import Ridge
from jepa.sequence import Sequence

QUANTILES = 1001
FAR_LEVEL = 99.0
"""Percentile among ordinary clips above which a video's ordinary level is far from the calibration's."""


class Calibration(nn.Module):
    """A calibration of one predictor, with ridge regression fitted on the same windows; later ticks share the last."""

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
        ridge = self.ridge
        return {"horizon": self.horizon, "context": ridge.context, "dimension": len(ridge.mean), "fps": ridge.fps}

    @classmethod
    def build(cls, *, horizon: int, context: int, dimension: int, fps: float) -> "Calibration":
        """An empty one, from its description."""
        return cls(Ridge(fps, context, mean=torch.zeros(dimension), std=torch.ones(dimension)), horizon)

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

    def energy(self, believed: Tensor, came: Tensor, ticks: Tensor) -> Tensor:
        """How badly embeddings that came fit what was believed, (B, H, *tokens, D) twice, raw, `ticks` (H,) ahead.

        (B, H), the mean over tokens; about 1 on ordinary video.
        """
        errors = rearrange((came - believed) / self.ridge.std, "b h ... d -> b h (...) d")
        centred = errors - self._at(self.error_mean, ticks)[:, None]
        whitened = torch.einsum("b h p d, h d k -> b h p k", centred, self._at(self.whitening, ticks))
        return reduce(whitened.square(), "b h p k -> b h", "mean")

    def percentile(self, energies: Tensor, ticks: int) -> Tensor:
        """The share of ordinary moments with less energy so many ticks ahead, in percent; any shape."""
        quantiles = self.quantiles[min(ticks, self.horizon) - 1]
        below = torch.searchsorted(quantiles, energies.to(quantiles).contiguous())
        return below.clamp(max=QUANTILES - 1) * (100 / (QUANTILES - 1))

    def level(self, energies: Tensor, ticks: int) -> float:
        """The percentile of a video's ordinary level among those of ordinary clips; energies (N,)."""
        mean, spread, freedom = self.levels[min(ticks, self.horizon) - 1].tolist()
        level = float(energies.clamp_min(1e-12).log().mean())
        return 100 * float(stats.t.cdf((level - mean) / max(spread, 1e-12), max(freedom, 1.0)))

    def _at(self, values: Tensor, ticks: Tensor) -> Tensor:
        """The numbers (horizon, ...) of the nearest horizons, (H, ...)."""
        return values[(ticks.round().long() - 1).clamp(0, self.horizon - 1)]
