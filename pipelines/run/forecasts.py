"""Forecasts on ordinary video, and the calibration that is fitted on them."""

import numpy as np
import torch
from torch import Tensor

from data.cache import EmbeddingCache
from data.windows import Windows
from jepa.baselines import Ridge
from jepa.calibration import Calibration
from jepa.fitting import Forecasts, fit_calibration
from jepa.predictor import Predictor
from jepa.rollout import EXPECTED_OF, expected_rollout, rollout
from jepa.sequence import Future, Sequence
from pipelines.run.command import counted
from pipelines.run.devices import summary
from pipelines.run.models import in_batches, require_changing

MOST_NUMBERS, MOST_WINDOWS = 32_000_000, 8192
"""Size of the forecasts that a calibration is fitted on, each of its four tensors, and their most."""
FEW_CLIPS = 20
"""Clips below which percentiles are called cautious."""


def calibrate(predictor: Predictor, ridge: Ridge, cache: EmbeddingCache, *, horizon: int) -> tuple[Calibration, str]:
    """A calibration on a cache, and a line that says how much it was fitted on."""
    context = predictor.config.context
    windows = Windows(cache, context + horizon)
    numbers = horizon * int(np.prod(predictor.shape)) * (EXPECTED_OF if predictor.latent_dimension else 1)
    chosen = windows.evenly(min(MOST_WINDOWS, max(64, MOST_NUMBERS // numbers)))
    predictor.eval()
    forecasts, drawn = forecast_windows(predictor, ridge, windows, chosen)
    _, names = ordinary_clips(windows, chosen)
    said = f"calibrated on {counted(len(chosen), 'window')} of {names}"
    if len(np.unique(forecasts.groups)) < FEW_CLIPS:
        said += ": few, so percentiles are cautious; video-jepa calibrate with more ordinary videos sharpens them"
    return fit_calibration(ridge, forecasts, drawn), said


@torch.no_grad()
def forecast_windows(
    predictor: Predictor, ridge: Ridge, windows: Windows, chosen: np.ndarray
) -> tuple[Forecasts, Tensor | None]:
    """Forecasts on some windows, and sampled futures where the predictor has a latent."""
    context, device = predictor.config.context, predictor.mean.device
    future = Future.ticks(windows.length - context, predictor.fps)
    found: list[tuple[Tensor, ...]] = []
    sampled = []
    generator = torch.Generator(device).manual_seed(0)
    for _, embeddings in in_batches(windows, chosen, device, doing="forecasting"):
        past = Sequence.on_clock(embeddings[:, :context], predictor.fps)
        guesses = expected_rollout(predictor, past, future), rollout(ridge.to(device), past, future)
        seen = embeddings.split([context - 1, 1, len(future.times)], dim=1)[1:]  # the last of the past, and what came
        found.append(tuple(predictor.standardise(part).cpu() for part in (*guesses, *seen)))
        if predictor.latent_dimension:
            drawn = rollout(predictor, past, future, EXPECTED_OF, generator=generator)
            sampled.append(predictor.standardise(drawn).cpu())
    rolled, ridged, last, came = (torch.cat(part) for part in zip(*found, strict=True))
    ridge.cpu()
    require_changing(windows.cache, bool((came != last).any()))
    groups, _ = ordinary_clips(windows, chosen)
    return Forecasts(rolled, ridged, last, came, groups), torch.cat(sampled, dim=1) if sampled else None


def ordinary_clips(windows: Windows, chosen: np.ndarray) -> tuple[np.ndarray, str]:
    """The clip of each window, int (N,), and what these are: videos, or parts of the only one there is."""
    sources = [windows.cache.clips[clip].key.source for clip in windows.clip_of(chosen)]
    _, videos = np.unique(sources, return_inverse=True)
    if videos.max() > 0:
        return videos, counted(int(videos.max()) + 1, "video")
    return np.arange(len(chosen)) * 4 // len(chosen), "4 parts of one video"


def clips_in_short(cache: EmbeddingCache) -> str:
    """The clips of a cache as runs record them: alike where they are the same."""
    return summary([clip.key for clip in cache.clips])
