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


def shrink(imagined: Tensor, last: Tensor, weights: Tensor, mean: Tensor | None = None) -> Tensor:
    """Combine a rollout with copying and with the mean.

    Args:
        imagined: (B, horizon, D), a rollout, standardised.
        last: (B, D), the embedding that it started from.
        weights: (LONGEST, 2), of the rollout and of the mean; what is left of 1 is copying's.
        mean: (B, D), of the training embeddings; None for 0, which it is in standardised space.

    Returns:
        (B, horizon, D).
    """
    at = torch.arange(imagined.shape[1], device=weights.device).clamp(max=LONGEST - 1)
    on_rollout, on_mean = weights[at, 0, None], weights[at, 1, None]  # (horizon, 1)
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
        weights[step:] = _least_squares_in_triangle(towards @ towards.T, towards @ change).float()
    return weights


def _least_squares_in_triangle(gram: Tensor, moment: Tensor) -> Tensor:
    """Minimise w G w - 2 m w over w >= 0 with w_1 + w_2 <= 1; (2, 2), (2,) -> (2,)."""
    origin, rollout, mean = gram.new_tensor([[0, 0], [1, 0], [0, 1]])
    candidates = []
    for start, end in ((origin, rollout), (origin, mean), (rollout, mean)):
        along = end - start
        length = (along @ (moment - gram @ start)) / (along @ gram @ along).clamp_min(1e-12)
        candidates.append(start + length.clamp(0, 1) * along)
    free = torch.linalg.pinv(gram) @ moment
    if free.min() >= 0 and free.sum() <= 1:
        candidates.append(free)
    return min(candidates, key=lambda w: float(w @ gram @ w - 2 * moment @ w))
