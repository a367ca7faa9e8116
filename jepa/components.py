"""Principal components of features, as a linear head."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from jepa.errors import ConfigurationError


def principal_components(batches: Iterable[Tensor], dimension: int) -> nn.Linear:
    """Linear head onto the leading principal components of features, fitted in one pass.

    Features are (..., F). Components stay on their natural scale: whitened, noise would have the same weight as signal.
    Raises `ConfigurationError` where there are fewer components than asked for.
    """
    count, shift, total, scatter = 0, torch.empty(0), torch.zeros(()), torch.zeros(())
    for features in batches:
        rows = features.double().flatten(0, -2)
        shift = shift if count else rows.mean(dim=0)  # moments about zero would cancel where the mean is large
        rows = rows - shift
        count, total, scatter = count + len(rows), total + rows.sum(dim=0), scatter + rows.T @ rows
    if dimension > (most := max(0, min(len(shift), count - 1))):
        raise ConfigurationError("pca", f"is {dimension}: {count} tokens of {len(shift)} features have at most {most}")
    mean = total / count
    _, vectors = torch.linalg.eigh(scatter / count - torch.outer(mean, mean))  # ascending
    components = vectors.flip(1).T[:dimension]  # (D, F)
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    components = components * largest.sign()  # either sign would do: take one
    head = nn.Linear(len(mean), dimension)
    with torch.no_grad():
        head.weight.copy_(components)
        head.bias.copy_(-components @ (mean + shift))
    return head
