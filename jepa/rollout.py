"""The way to a future: a predictor fed with its own predictions."""

import math
from typing import Any

import torch
from torch import Tensor

from jepa.baselines import Ridge
from jepa.calibration import Calibration
from jepa.predictor import Predictor
from jepa.sequence import CLOCK_TOLERANCE, Future, Sequence

EXPECTED_OF = 16
"""Rollouts whose mean is the expected future, where there are several."""


def rollout(
    predictor: Predictor | Ridge, past: Sequence, future: Future, samples: int = 1, *,
    generator: torch.Generator | None = None, calibration: Calibration | None = None,
) -> Tensor:  # fmt: skip
    """Predict the embeddings after the past, each from the past and the predictions before it.

    Networks carry their state along, so a step costs the same however long the rollout. Between two ticks of the clock,
    and before the first, the way is straight. Without a calibration this is the bare network, differentiable where the
    predictor is; with one it is the believed forecast, the same at each call. Of a predictor with a latent a generator
    draws futures.

    What is hidden in the past is filled in first.

    Returns (B, H, *tokens, D); with several samples (samples, B, H, *tokens, D). Raises `ValueError` where the past is
    not on the clock, actions are missing, several samples take a latent, or the predictor cannot fill in.
    """
    past.require_clock(predictor.fps)
    past = predictor.fill(past)
    if samples > 1 and not (predictor.latent_dimension and generator is not None):
        raise ValueError("several samples take a predictor with a latent, and a generator that draws it")
    if calibration is None:
        drawn = [_roll(predictor, past, future, generator) for _ in range(samples)]
        return torch.stack(drawn) if samples > 1 else drawn[0]
    ticks = future.times * predictor.fps
    rolled, ridged = expected_rollout(predictor, past, future), _roll(calibration.ridge, past, future)
    believed = calibration.believe(rolled, ridged, past, ticks)
    if samples == 1:
        return believed
    # Of few samples the mean is uncertain itself: more are drawn to centre them.
    several = rollout(predictor, past, future, max(samples, EXPECTED_OF), generator=generator)
    return (believed + calibration.widen(several, ticks) - several.mean(dim=0))[:samples]


def expected_rollout(predictor: Predictor | Ridge, past: Sequence, future: Future) -> Tensor:
    """The rollout (B, H, *tokens, D); of a predictor with a latent the mean of several, by the same draws each time."""
    if not predictor.latent_dimension:
        return rollout(predictor, past, future)
    generator = torch.Generator(past.embeddings.device).manual_seed(0)
    return rollout(predictor, past, future, EXPECTED_OF, generator=generator).mean(dim=0)


def _roll(
    predictor: Predictor | Ridge, past: Sequence, future: Future, generator: torch.Generator | None = None
) -> Tensor:
    """One rollout, (B, H, *tokens, D): of the latent's mean unless a generator draws it."""
    ticks = future.times.to(past.embeddings.device) * predictor.fps  # (H,)
    steps = max(1, math.ceil(float(ticks[-1]) - CLOCK_TOLERANCE))
    actions, latents = future.actions, None
    if actions is not None and actions.shape[1] < steps:
        raise ValueError(f"the future has actions for {actions.shape[1]} ticks, and {steps} are asked for")
    if generator is not None and predictor.latent_dimension:
        shape = (len(past.embeddings), steps, predictor.latent_dimension)
        latents = torch.randn(shape, generator=generator, device=generator.device).to(past.embeddings)
    state: Any = None
    newest, predictions = past, []
    for step in range(steps):
        newest = newest.followed_by(None if actions is None else actions[:, step : step + 1])
        predicted, state = predictor.step(newest, state, None if latents is None else latents[:, step : step + 1])
        predictions.append(predicted)
        newest = Sequence(predicted, past.times[:, -1:] + (step + 1) / predictor.fps)
    return _at(ticks, past, torch.cat(predictions, dim=1))


def _at(ticks: Tensor, past: Sequence, predictions: Tensor) -> Tensor:
    """The predictions (B, steps, *tokens, D) of consecutive ticks at given ones (H,), between them interpolated."""
    nearest = ticks.round()
    if float((ticks - nearest).abs().max()) <= CLOCK_TOLERANCE and float(nearest[0]) >= 1:
        return predictions[:, nearest.long() - 1] if len(nearest) < predictions.shape[1] else predictions
    way = torch.cat([past.embeddings[:, -1:], predictions], dim=1)
    before = ticks.floor().long().clamp(0, way.shape[1] - 2)
    share = (ticks - before).to(way.dtype).view(1, -1, *[1] * (way.ndim - 2))
    return torch.lerp(way[:, before], way[:, before + 1], share.clamp(0, 1))
