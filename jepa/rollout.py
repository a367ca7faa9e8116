"""Imagine the future: a predictor fed with its own predictions."""

from typing import Any

import torch
from torch import Tensor

from jepa.baselines import Baseline
from jepa.predictor import Predictor


def rollout(
    predictor: Predictor | Baseline,
    past: Tensor,
    horizon: int | None = None,
    times_s: Tensor | None = None,
    latents: Tensor | None = None,
) -> Tensor:
    """Predict the embeddings after `past`, each from the past and the predictions before it.

    Each step costs one step of the network, however long the rollout: networks carry their own state (keys and values,
    hidden states) along.

    Args:
        predictor: a predictor or a baseline.
        past: (B, T, D), standardised, on the predictor's clock.
        horizon: number of steps on the clock; or else
        times_s: increasing seconds after the last embedding of the past, (horizon,) or (B, horizon): a future asked
            for at given times, no leap shorter than a tick of the clock or longer than the predictor has learned.
        latents: (B, horizon, Z), standard normal, for predictors that have a latent; None for the latent's mean.

    Returns:
        (B, horizon, D). Differentiable where the predictor is.

    Raises:
        ValueError: `past` is not (B, T, D) with T at least 1, or the horizon or the times are not as above.
    """
    if past.ndim != 3 or past.shape[1] == 0:
        raise ValueError(f"past has shape {tuple(past.shape)}: it must be (B, T, D) with at least one embedding")
    if (horizon is None) == (times_s is None):
        raise ValueError("a rollout is asked for by its horizon or by times_s: give one of them")
    gaps, steps = (None, horizon or 0) if times_s is None else (_gaps(predictor, past, times_s), times_s.shape[-1])
    if steps < 1:
        raise ValueError(f"horizon is {steps}: it must be at least 1")
    newest, imagined = past, list[Tensor]()
    state: Any = None
    for step in range(steps):
        reached = past.shape[1] + step
        asked = None if gaps is None else gaps[:, reached - newest.shape[1] : reached]
        latent = None if latents is None else latents[:, step : step + 1]
        newest, state = predictor.advance(newest, asked, state, latent)
        imagined.append(newest)
    return torch.cat(imagined, dim=1)


def _gaps(predictor: Predictor | Baseline, past: Tensor, times_s: Tensor) -> Tensor:
    """Ticks from each embedding to the next, (B, T + horizon - 1) or (1, ...): 1 in the past, then as asked for."""
    if not isinstance(predictor, Predictor):
        raise ValueError(f"{type(predictor).__name__} has no clock: it can be asked for a horizon, not for times_s")
    times_s = torch.atleast_2d(times_s)  # (B or 1, horizon)
    gaps = torch.diff(times_s, dim=1, prepend=torch.zeros_like(times_s[:, :1])) * predictor.fps
    if bool((gaps <= 0).any()):
        raise ValueError("times_s must increase, from the first moment after the past (0 s)")
    shortest, longest = predictor.leaps
    # Times in float32 are no whole ticks to the last bit, the later the less.
    inexact = 1e-3 + 4 * torch.finfo(torch.float32).eps * float(times_s.max()) * predictor.fps
    for leap in (float(gaps.min()), float(gaps.max())):
        if not shortest - inexact <= leap <= longest + inexact:
            raise ValueError(
                f"times_s leaps by {leap:.3g} ticks of {1 / predictor.fps:.3g} s: this predictor has learned leaps of "
                f"{shortest:g} to {longest:g}; ask for moments on the way too, or train with a larger --longest-gap"
            )
    return torch.cat([gaps.new_ones(len(gaps), past.shape[1] - 1), gaps], dim=1).to(past)
