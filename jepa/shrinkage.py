"""How far to trust a rollout, by horizon: it is drawn towards copying the last embedding, and towards the mean.

A rollout that has learned from other videos is overconfident on a new one: it moves in the right direction, and too
far. So the forecast at each horizon is a combination of three guesses, with weights that are not negative and sum to
1, fitted by least squares on validation clips: the rollout, the mean of the training embeddings, and copying. Copying
is among the choices, so on those clips no horizon is worse than copying.

Bates and Granger 1969 (the combination of forecasts); Granger and Ramanathan 1984 (by least squares).
"""

import torch
from torch import Tensor

LONGEST = 64
"""Horizons that have weights of their own; later ones share the last."""


def no_shrinkage() -> Tensor:
    """The weights that leave a rollout as it is, float (LONGEST, 2)."""
    return torch.tensor([1.0, 0.0]).repeat(LONGEST, 1)


def of_horizons(weights: Tensor, horizon: int) -> Tensor:
    """The weights (LONGEST, ...) of the first `horizon` steps, (horizon, ...): later ones share the last."""
    return at_ticks(weights, torch.arange(1, horizon + 1, device=weights.device))


def at_ticks(weights: Tensor, ticks: Tensor) -> Tensor:
    """The weights (LONGEST, ...) so many ticks ahead, of any shape: those of the nearest horizon."""
    return weights[(ticks.round().long() - 1).clamp(0, LONGEST - 1)]


def shrink(
    imagined: Tensor, last: Tensor, weights: Tensor, mean: Tensor | None = None, ticks: Tensor | None = None
) -> Tensor:
    """Combine a rollout with copying and with the mean.

    Args:
        imagined: (B, horizon, D), a rollout, standardised.
        last: (B, D), the embedding that it started from.
        weights: (LONGEST, 2), of the rollout and of the mean; what is left of 1 is copying's.
        mean: (B, D), of the training embeddings; None for 0, which it is in standardised space.
        ticks: (horizon,) or (B, horizon), how far ahead each is; None for the clock: 1, 2, ...

    Returns:
        (B, horizon, D).
    """
    weights = of_horizons(weights, imagined.shape[1]) if ticks is None else at_ticks(weights, ticks)
    on_rollout, on_mean = weights[..., None].unbind(dim=-2)  # (horizon, 1) or (B, horizon, 1)
    shrunk = on_rollout * imagined + (1 - on_rollout - on_mean) * last[:, None]
    return shrunk if mean is None else shrunk + on_mean * mean[:, None]


def fit_shrinkage(imagined: Tensor, last: Tensor, future: Tensor, mean: Tensor | None = None) -> Tensor:
    """The weights with the least squared error, each horizon for itself.

    Args:
        imagined: (N, horizon, D), rollouts, standardised.
        last: (N, D), the embeddings that they started from.
        future: (N, horizon, D), what came.
        mean: (N, D), as for `shrink`.

    Returns:
        (LONGEST, 2) for `shrink`; horizons beyond those seen share the last.
    """
    weights = no_shrinkage()
    to_mean = -last if mean is None else mean - last
    for step in range(min(imagined.shape[1], LONGEST)):
        towards = torch.stack([imagined[:, step] - last, to_mean]).cpu().double().flatten(1)  # (2, N x D)
        change = (future[:, step] - last).cpu().double().flatten()
        weights[step:] = least_squares_in_triangle(towards @ towards.T, towards @ change).float()
    return weights


def least_squares_in_triangle(gram: Tensor, moment: Tensor) -> Tensor:
    """Minimise w G w - 2 m w over w >= 0 with w_1 + w_2 <= 1; (..., 2, 2), (..., 2) -> (..., 2)."""
    origin, rollout, mean = gram.new_tensor([[0, 0], [1, 0], [0, 1]])
    free = (torch.linalg.pinv(gram) @ moment[..., None])[..., 0]
    inside = (free.amin(dim=-1) >= 0) & (free.sum(dim=-1) <= 1)
    candidates = [torch.where(inside[..., None], free, origin)]
    for start, end in ((origin, rollout), (origin, mean), (rollout, mean)):
        along = end - start
        length = ((moment - gram @ start) @ along) / (gram @ along @ along).clamp_min(1e-12)
        candidates.append(start + length.clamp(0, 1)[..., None] * along)
    choices = torch.stack(candidates)  # (4, ..., 2)
    cost = ((gram @ choices[..., None])[..., 0] * choices - 2 * moment * choices).sum(dim=-1)
    return choices.gather(0, cost.argmin(dim=0)[None, ..., None].expand(1, *moment.shape))[0]
