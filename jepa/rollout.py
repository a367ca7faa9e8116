"""Imagine the future: a predictor fed with its own predictions."""

import torch
from torch import Tensor, nn


def rollout(predictor: nn.Module, past: Tensor, horizon: int) -> Tensor:
    """Predict `horizon` embeddings after `past`, each from the past and the predictions before it.

    Args:
        predictor: maps (B, T, D) to the next embedding, (B, 1, D); of the sequence it is given the last
            `predictor.memory` embeddings.
        past: (B, T, D), standardised.
        horizon: number of steps.

    Returns:
        (B, horizon, D). Differentiable where the predictor is.

    Raises:
        ValueError: `past` is not (B, T, D) with T at least 1, or `horizon` is less than 1.
    """
    if past.ndim != 3 or past.shape[1] == 0:
        raise ValueError(f"past has shape {tuple(past.shape)}: it must be (B, T, D) with at least one embedding")
    if horizon < 1:
        raise ValueError(f"horizon is {horizon}: it must be at least 1")
    sequence, memory = past, int(predictor.memory)  # type: ignore[arg-type]
    for _ in range(horizon):
        sequence = torch.cat([sequence, predictor(sequence[:, -memory:])], dim=1)
    return sequence[:, past.shape[1] :]
