"""The way to a future: a predictor fed with its own predictions."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from jepa.predictor import Forecaster
from jepa.sequence import CLOCK_TOLERANCE, Future, Sequence

EXPECTED_OF = 16
"""Rollouts whose mean is the expected future, where there are several."""


class Believer(Protocol):
    """What `jepa.calibration.Calibration` is to a rollout."""

    ridge: Any

    def believe(self, rolled: Tensor, ridged: Tensor, past: Sequence, ticks: Tensor) -> Tensor:
        """The believed forecast."""

    def widen(self, drawn: Tensor, ticks: Tensor) -> Tensor:
        """Samples as far apart as coverage wants."""


def rollout(
    predictor: Forecaster,
    past: Sequence,
    future: Future,
    samples: int = 1,
    *,
    generator: torch.Generator | None = None,
    calibration: Believer | None = None,
) -> Tensor:
    """Predict the embeddings after the past, each from the past and the predictions before it.

    Each step costs one step of the network, however long the rollout: networks carry their own state (keys and values,
    hidden states) along. Between two ticks of the clock, and before the first, the way is straight.

    Without a calibration this is the bare network, differentiable where the predictor is; of a predictor with a latent,
    the future of the latent's mean. With one it is the believed forecast, the same at each call.

    Args:
        predictor: a predictor or a baseline.
        past: consecutive ticks of the predictor's clock.
        future: when, and what is done until then.
        samples: futures to draw, from a predictor with a latent.
        generator: draws them.
        calibration: how far to believe them.

    Returns:
        (B, H, *tokens, D); with several samples (samples, B, H, *tokens, D).

    Raises:
        ValueError: the past is not on the clock, actions are missing, or several samples are asked of a predictor
            without a latent.
    """
    past.require_clock(predictor.fps)
    ticks = future.times.to(past.embeddings.device) * predictor.fps  # (H,)
    steps = max(1, math.ceil(float(ticks[-1]) - CLOCK_TOLERANCE))
    if future.actions is not None and future.actions.shape[1] < steps:
        raise ValueError(f"the future has actions for {future.actions.shape[1]} ticks, and {steps} are asked for")
    if samples > 1 and not (predictor.latent_dimension and generator is not None):
        raise ValueError("several samples take a predictor with a latent, and a generator that draws it")
    if calibration is None:
        drawn = _draw(predictor, past, future, ticks, steps=steps, samples=samples, generator=generator)
        return drawn if samples > 1 else drawn[0]
    expected = expected_rollout(predictor, past, future)
    ridged = _at(ticks, past, _roll(calibration.ridge, past, future, steps=steps, latents=None))
    believed = calibration.believe(expected, ridged, past, ticks)
    if samples == 1:
        return believed
    # Of few samples the mean is uncertain itself: more are drawn to centre them.
    count = max(samples, EXPECTED_OF)
    drawn = _draw(predictor, past, future, ticks, steps=steps, samples=count, generator=generator)
    return (believed + calibration.widen(drawn, ticks) - drawn.mean(dim=0))[:samples]


def expected_rollout(predictor: Forecaster, past: Sequence, future: Future) -> Tensor:
    """The rollout (B, H, *tokens, D); of a predictor with a latent the mean of several, by the same draws each time."""
    if not predictor.latent_dimension:
        return rollout(predictor, past, future)
    generator = torch.Generator(past.embeddings.device).manual_seed(0)
    return rollout(predictor, past, future, EXPECTED_OF, generator=generator).mean(dim=0)


def _draw(
    predictor: Forecaster,
    past: Sequence,
    future: Future,
    ticks: Tensor,
    *,
    steps: int,
    samples: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Rollouts (samples, B, H, *tokens, D), each with latents of its own, or one with the latent's mean."""
    drawn = []
    for _ in range(samples):
        latents = None
        if generator is not None and predictor.latent_dimension:
            shape = (len(past.embeddings), steps, predictor.latent_dimension)
            latents = torch.randn(shape, generator=generator, device=generator.device).to(past.embeddings)
        drawn.append(_at(ticks, past, _roll(predictor, past, future, steps=steps, latents=latents)))
    return torch.stack(drawn)


def _roll(predictor: Forecaster, past: Sequence, future: Future, *, steps: int, latents: Tensor | None) -> Tensor:
    """The next `steps` ticks, (B, steps, *tokens, D)."""
    state: Any = None
    newest, predictions = past, []
    for step in range(steps):
        newest = newest.followed_by(None if future.actions is None else future.actions[:, step : step + 1])
        latent = None if latents is None else latents[:, step : step + 1]
        predicted, state = predictor.step(newest, state, latent)
        predictions.append(predicted)
        newest = Sequence(predicted, past.times[:, -1:] + (step + 1) / predictor.fps)
    return torch.cat(predictions, dim=1)


def _at(ticks: Tensor, past: Sequence, predictions: Tensor) -> Tensor:
    """The predictions (B, steps, *tokens, D) of consecutive ticks at given ones (H,), between them interpolated."""
    nearest = ticks.round()
    if float((ticks - nearest).abs().max()) <= CLOCK_TOLERANCE and float(nearest[0]) >= 1:
        chosen = nearest.long() - 1
        is_whole = len(chosen) == predictions.shape[1]  # increasing, so these are all of them
        return predictions if is_whole else predictions[:, chosen]
    way = torch.cat([past.embeddings[:, -1:], predictions], dim=1)
    before = ticks.floor().long().clamp(0, way.shape[1] - 2)
    share = (ticks - before).to(way.dtype).view(1, -1, *[1] * (way.ndim - 2))
    return torch.lerp(way[:, before], way[:, before + 1], share.clamp(0, 1))
