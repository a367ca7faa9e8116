"""What is measured and fitted before a predictor learns, how it is judged meanwhile, and its calibration afterwards."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.cache import EmbeddingCache
from data.windows import Windows
from jepa.baselines import Ridge
from jepa.calibration import Calibration
from jepa.diagnostics import floor_std, prediction_alarms
from jepa.fitting import Forecasts, cross_fit_blend, fit_calibration, fit_ridge, hold_out, ridge_context
from jepa.predictor import Predictor
from jepa.rollout import EXPECTED_OF, expected_rollout, rollout
from pipelines.run.caches import MOST_NUMBERS, MOST_WINDOWS, require_changing, require_finite
from pipelines.run.command import counted
from pipelines.run.models import in_batches, take_windows, windows_for

CHOSEN_BY = "validation_relative_to_copy_last"
"""Metric by which the best weights are chosen: the believed forecast's error, mean over horizons."""
RIDGE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RIDGE_SAMPLES = 200_000  # windows that ridge regression is fitted on at most, evenly spread, each token counted
VALIDATION_NUMBERS, VALIDATION_WINDOWS = 16_000_000, 1024
"""Size of the windows that each validation goes through, and their most."""
FEW_CLIPS = 20  # clips below which percentiles are called cautious


def measure_embeddings(predictor: Predictor, cache: EmbeddingCache) -> None:
    """Mean and standard deviation of embeddings, of their changes and of actions, into the predictor's buffers."""
    sums, places, changes = torch.zeros(3, predictor.shape[-1], dtype=torch.float64), 0, 0
    # Around an embedding: sums of squares around 0 would cancel where the mean is large.
    origin = torch.from_numpy(cache.take(np.arange(1))).double().flatten(0, -2).mean(dim=0)
    for clip in tqdm(cache.clips, desc="measuring", unit="clip", leave=False):
        for run in cache.unbroken_runs(clip):
            taken = torch.from_numpy(cache.take(np.arange(run[0], run[0] + len(run))))
            embeddings = require_finite(cache, taken).double()
            flat, change = embeddings.flatten(0, -2) - origin, embeddings.diff(dim=0).flatten(0, -2)  # (T x places, D)
            sums += torch.stack([flat.sum(dim=0), flat.square().sum(dim=0), change.square().sum(dim=0)])
            places, changes = places + len(flat), changes + len(change)
    require_changing(cache, bool(sums[2].any()))
    mean, square = sums[:2] / places
    predictor.mean.copy_(origin + mean)
    predictor.std.copy_(floor_std((square - mean.square()).clamp_min(0).sqrt()))
    predictor.change_std.copy_(floor_std((sums[2] / max(1, changes)).sqrt() / predictor.std))
    ticks = Windows(cache, 1, predictor.actions)
    if (actions := ticks.actions(ticks.evenly(RIDGE_SAMPLES))) is not None:
        predictor.action_mean.copy_(actions.double().mean(dim=(0, 1)))
        predictor.action_std.copy_(floor_std(actions.double().flatten(0, 1).std(dim=0, correction=0)))


def choose_windows(windows: Windows, predictor: Predictor) -> np.ndarray:
    """Numbers of as many windows, evenly spaced, as one looks at while training, int (N,)."""
    numbers = windows.length * int(np.prod(predictor.shape)) * (EXPECTED_OF if predictor.latent_dimension else 1)
    return windows.evenly(min(VALIDATION_WINDOWS, max(32, VALIDATION_NUMBERS // numbers)))


def copying_error(windows: Windows, predictor: Predictor) -> Tensor:
    """Squared error of copying the last embedding for 1, 2, ... ticks, standardised, on training windows; (steps,)."""
    context = predictor.config.context
    taken = predictor.standardise(windows.take(choose_windows(windows, predictor)))
    return (taken[:, context:] - taken[:, context - 1, None]).square().flatten(2).mean(dim=(0, 2)).clamp_min(1e-12)


def fit_ridge_on(train: EmbeddingCache, held_out: Windows, predictor: Predictor) -> Ridge:
    """Ridge regression on training windows, its penalty chosen by one-step errors on validation windows."""
    context, places = ridge_context(predictor.config.context, predictor.shape[-1]), int(np.prod(predictor.shape[:-1]))
    windows = Windows(train, context + 1)
    chosen = windows.evenly(max(1000, RIDGE_SAMPLES // places))
    batches = in_batches(windows, chosen, predictor.mean.device, doing="ridge regression")
    empty = Ridge(predictor.fps, context, mean=predictor.mean, std=predictor.std, on_grid=len(predictor.shape) == 3)
    fitted = fit_ridge((taken.embeddings for _, taken in batches), empty, RIDGE_PENALTIES)
    seen = held_out.take(held_out.evenly(max(32, VALIDATION_WINDOWS // places)))[:, : predictor.config.context + 1]
    errors = [(predictor.standardise(ridge(seen[:, :-1]) - seen[:, -1:])).square().mean() for ridge in fitted]
    return fitted[int(torch.stack(errors).argmin())]


def judge(predictor: Predictor, ridge: Ridge, windows: Windows) -> tuple[dict[str, float], list[str]]:
    """Errors on validation windows relative to copying, of the believed forecast and of the bare rollout, and alarms.

    What is believed is blended by weights that were fitted on other clips.
    """
    predictor.eval()
    chosen = choose_windows(windows, predictor)
    forecasts, _ = forecast_windows(predictor, ridge, windows, chosen)
    horizon, parts = forecasts.came.shape[1], hold_out(forecasts.groups)
    relative, bare = np.empty(horizon), np.empty(horizon)
    for step in range(horizon):
        errors = forecasts.errors(step)
        _, left = cross_fit_blend(errors, parts)
        rolled, _, copied, _ = errors.square().mean(dim=(1, 2, 3)).clamp_min(1e-12).tolist()
        relative[step], bare[step] = float(left.square().mean()) / copied, rolled / copied
    metrics = {CHOSEN_BY: float(relative.mean()), "validation_rollout_relative_to_copy_last": float(bare.mean())}
    metrics |= {f"{CHOSEN_BY}_{h}": float(relative[h - 1]) for h in sorted({1, 5, horizon}) if h <= horizon}
    some = take_windows(windows, chosen[:: max(1, len(chosen) // 256)], predictor.mean.device)
    with torch.no_grad():  # one step from each moment: over time predictions may collapse, too
        predicted = predictor(some, last=horizon + 1)[:, :-1]
    pair = (predictor.standardise(part).cpu() for part in (predicted, some.embeddings[:, -horizon:]))
    predictor.train()
    return metrics, prediction_alarms(*pair)


def calibrate(predictor: Predictor, ridge: Ridge, cache: EmbeddingCache, *, horizon: int) -> tuple[Calibration, str]:
    """A calibration on a cache, and a line that says how much it was fitted on."""
    windows = windows_for(cache, predictor, predictor.config.context + horizon)
    numbers = horizon * int(np.prod(predictor.shape)) * (EXPECTED_OF if predictor.latent_dimension else 1)
    chosen = windows.evenly(min(MOST_WINDOWS, max(64, MOST_NUMBERS // numbers)))
    predictor.eval()
    forecasts, drawn = forecast_windows(predictor, ridge, windows, chosen)
    said = f"calibrated on {counted(len(chosen), 'window')} of {counted(len(windows.videos(chosen)), 'video')}"
    if len(np.unique(forecasts.groups)) < FEW_CLIPS:
        said += ": few, so percentiles are cautious; video-jepa calibrate with more ordinary videos sharpens them"
    return fit_calibration(ridge, forecasts, drawn), said


@torch.no_grad()
def forecast_windows(
    predictor: Predictor, ridge: Ridge, windows: Windows, chosen: np.ndarray
) -> tuple[Forecasts, Tensor | None]:
    """Forecasts on some windows, and sampled futures where the predictor has a latent."""
    context, device = predictor.config.context, predictor.mean.device
    found: list[tuple[Tensor, ...]] = []
    sampled = []
    generator = torch.Generator(device).manual_seed(0)
    for _, taken in in_batches(windows, chosen, device, doing="forecasting"):
        past, future, came = taken.cut(context, predictor.fps)
        guesses = expected_rollout(predictor, past, future), rollout(ridge.to(device), past, future)
        parts = (*guesses, past.embeddings[:, -1:], came)
        found.append(tuple(predictor.standardise(part).cpu() for part in parts))
        if predictor.latent_dimension:
            drawn = rollout(predictor, past, future, EXPECTED_OF, generator=generator)
            sampled.append(predictor.standardise(drawn).cpu())
    rolled, ridged, last, came = (torch.cat(part) for part in zip(*found, strict=True))
    ridge.cpu()
    require_changing(windows.cache, bool((came != last).any()))
    _, videos = np.unique(windows.video_of(chosen), return_inverse=True)
    groups = videos if videos.max() > 0 else np.arange(len(chosen)) * 4 // len(chosen)  # parts of the only one
    return Forecasts(rolled, ridged, last, came, groups), torch.cat(sampled, dim=1) if sampled else None
