"""How good is a forecast?

Embeddings are standardised here: (B, H, *tokens, D), for B windows and H horizons.
"""

import torch.nn.functional as functional
from torch import Tensor


def squared_error(forecast: Tensor, came: Tensor) -> Tensor:
    """Mean squared error over tokens and features, (B, H, *tokens, D) twice -> (B, H)."""
    return (forecast - came).square().flatten(2).mean(dim=2)


def change_cosine(forecast: Tensor, came: Tensor, last: Tensor) -> Tensor:
    """The cosine between the change that was foreseen and the one that came, since the last embedding (B, *tokens, D).

    How far off a forecast is depends, on real video, above all on how much there was to foresee. This asks only whether
    things went the way they were expected to go: (B, H), 1 as foreseen, 0 unrelated or no change, below 0 against it.
    """
    foreseen, true = ((value - last[:, None]).flatten(2) for value in (forecast, came))
    return functional.cosine_similarity(foreseen, true, dim=2)
