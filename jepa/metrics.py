"""How good is a forecast? Errors and retrieval.

Embeddings are standardised here: (B, H, *tokens, D), for B windows and H horizons.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor

TIE = 1e-5
"""Difference up to which two distances are equal, relative and in standard deviations."""


def squared_error(forecast: Tensor, came: Tensor) -> Tensor:
    """Mean squared error over tokens and features, (B, H, *tokens, D) twice -> (B, H)."""
    return (forecast - came).square().flatten(2).mean(dim=2)


def change_cosine(forecast: Tensor, came: Tensor, last: Tensor) -> Tensor:
    """The cosine between the change that was foreseen and the one that came, since the last embedding (B, *tokens, D).

    How far off a forecast is depends, on real video, above all on how much there was to foresee. This asks only whether
    things went the way they were expected to go.

    Returns:
        (B, H): 1 as foreseen, 0 unrelated, or nothing changes, below 0 against it.
    """
    foreseen, true = ((value - last[:, None]).flatten(2) for value in (forecast, came))
    return functional.cosine_similarity(foreseen, true, dim=2)


def nearest_rows(embeddings: Tensor, bank: Tensor) -> Tensor:
    """The row of a bank (frames, D) that is nearest to each embedding; (N, D) -> int (N,)."""
    return torch.cat([torch.cdist(part, bank).argmin(dim=1) for part in embeddings.split(1024)])


def retrieved(forecast: Tensor, came: Tensor, bank: Tensor) -> Tensor:
    """Whether no frame of a bank (frames, D) is nearer to a forecast than the one that came; (N, D) twice -> bool (N,).

    Equal distances are hits: frames of a standing picture, or of two clocks, are the same.
    """
    # Found by products of matrices, which round much; then measured exactly.
    frames = came, bank[nearest_rows(forecast, bank)]
    true, nearest = ((forecast - frame).square().mean(dim=-1).sqrt() for frame in frames)
    return true <= nearest * (1 + TIE) + TIE
