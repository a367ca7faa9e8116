"""What do frozen embeddings know? A linear probe reads true state off them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearProbe:
    """Standardised ridge regression from embeddings to targets."""

    mean: Tensor
    """(D,)"""
    std: Tensor
    """(D,)"""
    weight: Tensor
    """float64 (D + 1, targets); the last row is the bias."""

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Embeddings (..., D) -> targets (..., targets), float64."""
        inputs = ((embeddings - self.mean) / self.std).double()
        return inputs @ self.weight[:-1] + self.weight[-1]


def fit_linear_probe(embeddings: Tensor, targets: Tensor, penalty: float = 1e-4) -> LinearProbe:
    """Fit on embeddings (N, D) and targets (N, targets); `penalty` per sample on the standardised weights."""
    mean, std = embeddings.mean(dim=0), embeddings.std(dim=0).clamp_min(1e-6)
    inputs = ((embeddings - mean) / std).double()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    diagonal = torch.full((inputs.shape[1],), penalty * len(inputs), dtype=torch.float64)
    diagonal[-1] = 0.0  # the bias is not penalised
    weight = torch.linalg.solve(inputs.T @ inputs + torch.diag(diagonal), inputs.T @ targets.double())
    return LinearProbe(mean, std, weight)


def r_squared(predicted: Tensor, true: Tensor) -> Tensor:
    """Coefficient of determination of each target, (N, targets) twice -> (targets,): 1 - residual / variance."""
    predicted, true = predicted.double(), true.double()
    residual = (predicted - true).square().sum(dim=0)
    return 1 - residual / (true - true.mean(dim=0)).square().sum(dim=0)
