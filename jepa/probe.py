"""What do frozen embeddings know? Ridge regression reads true state off them.

The penalty of each column is chosen by cross-validation over *groups*, such as videos: of a frame left out alone, the
frames before and after it would tell everything.
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
    features: tuple[Tensor, Tensor]
    """Mean and standard deviation of the features, float64 (F,)."""
    columns: tuple[Tensor, Tensor]
    """Mean and standard deviation of the columns, float64 (C,); 1 for one that does not vary."""
    weights: Tensor
    """float64 (F, C), of standardised features and columns."""
    penalties: tuple[float, ...]
    """The penalty chosen for each column."""

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Embeddings (..., *tokens, D) -> columns float64 (..., C), on the probe's device."""
        features = probe_features(embeddings.to(self.weights.device), self.shape)
        mean, std = self.columns
        return _standardise(features, self.features) @ self.weights * std + mean


def probe_features(embeddings: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What a probe is shown of embeddings (..., *tokens, D): all tokens, or their mean where these are too many."""
    flat = embeddings.flatten(-len(shape))  # (..., tokens x D)
    return flat if flat.shape[-1] <= MOST_FEATURES else flat.unflatten(-1, (-1, shape[-1])).mean(dim=-2)


def fit_probe(batches: Iterable[tuple[Tensor, Tensor, Tensor]], shape: tuple[int, ...]) -> Probe:
    """Fit a probe on embeddings float (B, *tokens, D), columns float (B, C) and groups int (B,).

    Samples of one group are held out together; groups numbered one after the other spread evenly over the folds.
    Raises `ValueError` where there are fewer than two groups.
    """
    parts = ((probe_features(embeddings, shape), *others) for embeddings, *others in batches)
    features, columns, groups = (torch.cat(part) for part in zip(*parts, strict=True))
    columns, folds = columns.to(features.device).double(), groups.to(features.device) % FOLDS
    if len(folds.unique()) < 2:
        raise ValueError("a probe takes at least two groups: of one alone, no penalty can be chosen")
    errors = torch.zeros(len(PENALTIES), columns.shape[1], dtype=torch.float64, device=features.device)
    for fold in folds.unique():
        mine = folds == fold
        x, y = _mean_and_std(features[~mine]), _mean_and_std(columns[~mine])
        weights = _ridge(_standardise(features[~mine], x), _standardise(columns[~mine], y))
        read = _standardise(features[mine], x) @ weights  # (penalties, N, C)
        errors += (read - _standardise(columns[mine], y)).square().sum(dim=1)
    chosen = errors.argmin(dim=0)  # (C,)
    x, y = _mean_and_std(features), _mean_and_std(columns)
    weights = _ridge(_standardise(features, x), _standardise(columns, y))[chosen, :, torch.arange(len(chosen))].mT
    return Probe(shape, x, y, weights, penalties=tuple(PENALTIES[index] for index in chosen.tolist()))


def _mean_and_std(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows (N, F), float64 (F,) each; a deviation is 1 where it is nothing but rounding."""
    mean = rows.mean(dim=0, dtype=torch.float64)
    std = (rows - mean).square().mean(dim=0).sqrt()
    return mean, torch.where(std > 1e-12 * mean.abs(), std, 1)


def _standardise(rows: Tensor, mean_and_std: tuple[Tensor, Tensor]) -> Tensor:
    mean, std = mean_and_std
    return (rows - mean) / std


def _ridge(features: Tensor, columns: Tensor) -> Tensor:
    """Weights (penalties, F, C) from standardised features (N, F) to standardised columns (N, C)."""
    values, vectors = torch.linalg.eigh(features.mT @ features / len(features))
    rotated = vectors.mT @ (features.mT @ columns) / len(features)
    return torch.stack([vectors @ (rotated / (values.clamp_min(0)[:, None] + penalty)) for penalty in PENALTIES])
