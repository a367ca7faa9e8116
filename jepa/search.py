"""Nearest neighbours among many embeddings: exact, block by block, so that memory does not depend on their number."""

from collections.abc import Iterable

import torch
from torch import Tensor


def nearest(
    queries: Tensor, blocks: Iterable[tuple[Tensor, Tensor, Tensor]], most: int, *, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Euclidean distances and numbers of the nearest, the nearest first.

    Args:
        queries: float (Q, F).
        blocks: embeddings (N, F), their numbers int64 (N,) and groups int64 (N,), of all that is searched.
        most: how many are wanted.
        groups: int64 (Q,): the nearest of other groups alone are wanted.

    Returns:
        Distances (Q, most), infinite where there are fewer, and numbers int64 (Q, most), then -1.
    """
    best = queries.new_full((len(queries), most), torch.inf)
    numbers = torch.full((len(queries), most), -1, device=queries.device)
    for embeddings, own, theirs in blocks:
        distances = torch.cdist(queries, embeddings)
        if groups is not None:
            distances.masked_fill_(groups[:, None] == theirs, torch.inf)
        near = distances.topk(min(most, len(own)), largest=False)  # first: to join all of them would copy them
        best, places = torch.cat([best, near.values], dim=1).topk(most, largest=False)
        numbers = torch.cat([numbers, own[near.indices]], dim=1).gather(1, places)
    return best, numbers.where(best < torch.inf, -1)
