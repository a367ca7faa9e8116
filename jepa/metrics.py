"""How good is a forecast, or a score?

Embeddings are standardised here: (B, H, *tokens, D), for B windows and H horizons.
"""

import numpy as np
import torch.nn.functional as functional
from scipy import stats
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


def roc_auc(scores: np.ndarray, is_event: np.ndarray) -> float:
    """The area under the ROC curve of scores (N,) for what is an event, bool (N,); NaN where all are, or none."""
    events, others = int(is_event.sum()), int((~is_event).sum())
    ranks = float(stats.rankdata(scores)[is_event].sum())
    return (ranks - events * (events + 1) / 2) / (events * others) if events and others else float("nan")
