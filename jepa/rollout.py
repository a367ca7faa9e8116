"""The way to a future: a predictor fed with its own predictions."""

import math
from typing import Any

import torch
from torch import Tensor

from jepa.predictor import Forecaster
from jepa.sequence import CLOCK_TOLERANCE, Future, Sequence


def rollout(
    predictor: Forecaster,
    past: Sequence,
    future: Future,
    samples: int = 1,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Predict the embeddings after the past, each from the past and the predictions before it.

    Each step costs one step of the network, however long the rollout: networks carry their own state (keys and values,
    hidden states) along. Between two ticks of the clock, and before the first, the way is straight.

    Args:
        predictor: a predictor or a baseline.
        past: consecutive ticks of the predictor's clock.
        future: when, and what is done until then.
        samples: how many futures to draw, from a predictor with a latent.
        generator: draws the latents; without one, the future is that of the latent's mean.

    Returns:
        (B, H, *tokens, D); with several samples (samples, B, H, *tokens, D). Differentiable where the predictor is.

    Raises:
        ValueError: the past is not on the clock, actions are missing, or samples are asked of a predictor without a
            latent.
    """
    past.require_clock(predictor.fps)
    ticks = future.times.to(past.embeddings.device) * predictor.fps  # (H,)
    last = math.ceil(float(ticks[-1]) - CLOCK_TOLERANCE)
    if future.actions is not None and future.actions.shape[1] < last:
        raise ValueError(f"the future has actions for {future.actions.shape[1]} ticks, and {last} are asked for")
    if samples == 1 and generator is None:
        return _at(ticks, past, _roll(predictor, past, future, steps=max(1, last), latents=None))
    if not predictor.latent_dimension or generator is None:
        raise ValueError("several samples take a predictor with a latent, and a generator that draws it")
    drawn = []
    for _ in range(samples):
        shape = (len(past.embeddings), max(1, last), predictor.latent_dimension)
        latents = torch.randn(shape, generator=generator, device=generator.device).to(past.embeddings)
        drawn.append(_at(ticks, past, _roll(predictor, past, future, steps=max(1, last), latents=latents)))
    return torch.stack(drawn) if samples > 1 else drawn[0]


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
        on_clock = len(chosen) == predictions.shape[1]  # increasing, so these are all of them
        return predictions if on_clock else predictions[:, chosen]
    way = torch.cat([past.embeddings[:, -1:], predictions], dim=1)
    before = ticks.floor().long().clamp(0, way.shape[1] - 2)
    share = (ticks - before).to(way.dtype).view(1, -1, *[1] * (way.ndim - 2))
    return torch.lerp(way[:, before], way[:, before + 1], share.clamp(0, 1))
