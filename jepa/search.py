"""Nearest neighbours among many embeddings: exact, block by block, so that memory does not depend on their number."""

from collections.abc import Iterable

import torch
from torch import Tensor


def nearest(
    queries: Tensor, blocks: Iterable[tuple[Tensor, Tensor, Tensor]], most: int, *, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Euclidean distances and numbers int64 (Q, most) of the nearest to queries (Q, F), the nearest first.

    All that is searched comes in blocks: embeddings (N, F), their numbers int64 (N,) and groups int64 (N,). With
    `groups` of the queries, int64 (Q,), the nearest of other groups alone are wanted. Where there are fewer, distances
    are infinite, and numbers -1.
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
