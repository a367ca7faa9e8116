"""What do frozen embeddings know? Ridge regression reads true state off them, fitted in one pass.

The penalty of each column is chosen by cross-validation over *groups*, such as videos: of a frame left out alone, the
frames before and after it would tell everything. Nothing but second moments is kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""On the squared weights of standardised features, per sample."""
FOLDS = 3
MOST_FEATURES = 4096
"""Tokens are flattened into so many features at most; larger grids are averaged over their tokens."""


@dataclass(frozen=True)
class Probe:
    """A fitted linear probe for each column."""

    shape: tuple[int, ...]
    """Shape of an embedding, (*tokens, D)."""
    mean: Tensor
    std: Tensor
    """float64 (F,), of the features."""
    target_mean: Tensor
    target_std: Tensor
    """float64 (C,); 1 for a column that does not vary."""
    weights: Tensor
    """float64 (F, C), of standardised features and columns."""
    penalties: tuple[float, ...]
    """The penalty chosen for each column."""

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Embeddings (..., *tokens, D) -> columns float64 (..., C), on the probe's device."""
        features = probe_features(embeddings.to(self.mean.device), self.shape).double()
        return ((features - self.mean) / self.std) @ self.weights * self.target_std + self.target_mean


def probe_features(embeddings: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What a probe is shown of embeddings (..., *tokens, D): all tokens, or their mean where these are too many."""
    flat = embeddings.flatten(-len(shape))  # (..., tokens x D)
    return flat if flat.shape[-1] <= MOST_FEATURES else flat.unflatten(-1, (-1, shape[-1])).mean(dim=-2)


def fit_probe(batches: Iterable[tuple[Tensor, Tensor, Tensor]], shape: tuple[int, ...]) -> Probe:
    """Fit a probe on embeddings float (B, *tokens, D), columns float (B, C) and groups int (B,), in one pass.

    Samples of one group are held out together; groups numbered one after the other spread evenly over the folds.

    Raises:
        ValueError: there are fewer than two groups.
    """
    origin = torch.empty(0, dtype=torch.float64)
    moments: dict[int, Tensor] = {}
    for embeddings, columns, groups in batches:
        features = probe_features(embeddings, shape).double()
        rows = torch.cat([torch.ones_like(features[:, :1]), features, columns.to(features)], dim=1)  # (B, 1 + F + C)
        if not len(origin):  # moments about 0 would cancel where a column is far from it
            origin = rows.mean(dim=0)
            origin[0] = 0
        rows = rows - origin
        folds = groups.to(rows.device) % FOLDS
        for fold in folds.unique().tolist():
            own = rows[folds == fold]
            moments[fold] = moments.get(fold, 0) + own.mT @ own
    if len(moments) < 2:
        raise ValueError("a probe takes at least two groups: of one alone, no penalty can be chosen")
    total = torch.stack(list(moments.values())).sum(dim=0)
    inputs = len(origin) - 1 - columns.shape[1]
    errors = sum(_held_out_errors(total - fold, fold, inputs) for fold in moments.values())
    chosen = torch.as_tensor(errors).argmin(dim=0)  # (C,)
    mean, std = _mean_and_std(total)
    weights = _solve(_standardised(total, mean, std) / total[0, 0], inputs)  # (penalties, F, C)
    column = torch.arange(len(chosen), device=chosen.device)
    centre = mean + origin
    return Probe(
        shape=tuple(shape),
        mean=centre[1 : inputs + 1],
        std=std[1 : inputs + 1],
        target_mean=centre[inputs + 1 :],
        target_std=std[inputs + 1 :],
        weights=weights[chosen, :, column].mT,
        penalties=tuple(PENALTIES[index] for index in chosen.tolist()),
    )


def _mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Of the ones, features and columns whose products are summed in (1 + F + C, 1 + F + C); std 1 where it is 0."""
    samples = moments[0, 0]
    mean = moments[0] / samples
    squares = moments.diagonal() / samples
    variance = squares - mean.square()
    std = torch.where(variance > 1e-12 * squares, variance, 1).sqrt()
    return torch.cat([torch.zeros_like(mean[:1]), mean[1:]]), torch.cat([torch.ones_like(std[:1]), std[1:]])


def _standardised(moments: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The same sums of products, of (rows - mean) / std."""
    shift = moments[0][:, None] * mean
    return (moments - shift - shift.mT + moments[0, 0] * mean[:, None] * mean) / (std[:, None] * std)


def _solve(standardised: Tensor, inputs: int) -> Tensor:
    """Weights (penalties, F, C) from mean products of standardised features and columns."""
    features, columns = slice(1, inputs + 1), slice(inputs + 1, None)
    values, vectors = torch.linalg.eigh(standardised[features, features])
    rotated = vectors.mT @ standardised[features, columns]
    return torch.stack([vectors @ (rotated / (values.clamp_min(0)[:, None] + penalty)) for penalty in PENALTIES])


def _held_out_errors(train: Tensor, held_out: Tensor, inputs: int) -> Tensor:
    """Sums of squared errors (penalties, C) on one fold's moments of what is fitted on the others'."""
    mean, std = _mean_and_std(train)
    weights = _solve(_standardised(train, mean, std) / train[0, 0], inputs)
    test = _standardised(held_out, mean, std)
    features, columns = slice(1, inputs + 1), slice(inputs + 1, None)
    cross = (weights * test[features, columns]).sum(dim=1)
    return test.diagonal()[columns] - 2 * cross + (weights * (test[features, features] @ weights)).sum(dim=1)
