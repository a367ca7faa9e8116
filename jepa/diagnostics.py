"""Is it collapsed? Standard deviation and effective rank, over the batch and over time.

Rank alone is blind to scale (a collapsed embedding can still read full rank), standard deviation alone is blind to
redundancy, and both over the batch are blind to an embedding that only tells clips apart: so all are watched.
"""

from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor


class Spread(NamedTuple):
    """How embeddings spread out; plain numbers."""

    std: float
    """Root mean square over features of the standard deviation."""
    rank: float
    """Effective rank, between 1 and the number of features."""


class SequenceSpread(NamedTuple):
    """Spread of (clips, time, features) embeddings over everything, and over time within clips."""

    batch: Spread
    time: Spread
    """0 and rank 1 for clips of one frame, such as still images."""


LEAST_STD = 1e-2
"""Of the features that vary, as a share of their median: what varies less is measured as if it varied so much."""


def floor_std(std: Tensor) -> Tensor:
    """Standard deviations (D,) that can be divided by, one that is next to nothing beside the others raised.

    A feature that was constant in training and moves a little in a test would be thousands of its own deviations away,
    and swamp the errors of all the others.
    """
    varying = std[std > 1e-6 * std.max()]  # not by rounding alone
    return std.clamp_min(max(1e-6, LEAST_STD * float(varying.median()) if len(varying) else 0.0))


def effective_rank(embeddings: Tensor) -> float:
    """Exp of the entropy of the normalised singular values of the centred embeddings (N, D).

    RankMe (Garrido et al. 2023, arXiv:2210.02885), on centred embeddings: without centring a large mean counts as
    a dimension of its own. 1 if the embeddings do not vary at all.
    """
    values = torch.linalg.svdvals((embeddings - embeddings.mean(dim=0)).double().cpu())
    total = values.sum()
    if not total > 0:
        return 1.0
    share = values / total
    return float(torch.exp(torch.special.entr(share).sum()))


def spread(embeddings: Tensor) -> Spread:
    """Spread of embeddings (N, D) over their first dimension; over one alone there is none."""
    if len(embeddings) < 2:
        return Spread(0.0, 1.0)
    return Spread(float(embeddings.float().var(dim=0).mean().sqrt()), effective_rank(embeddings))


def sequence_spread(embeddings: Tensor) -> SequenceSpread:
    """Spread of (clips, time, D) embeddings: of all frames together, and around each clip's own mean."""
    around_clip = embeddings - reduce(embeddings, "c t d -> c 1 d", "mean")
    return SequenceSpread(
        batch=spread(rearrange(embeddings, "c t d -> (c t) d")),
        time=spread(rearrange(around_clip, "c t d -> (c t) d")),
    )


SMALLEST_OBJECTIVE_STD = 0.25
"""VICReg holds the standard deviation of what it sees at its margin, 1; collapsed runs fall below a tenth of that."""
SMALLEST_EMBEDDING_STD = 0.02
"""Relative to the size of the embedding itself: the embedding has no scale of its own."""
SMALLEST_TIME_SHARE = 0.02
"""Standard deviation over time within a clip, relative to that over everything."""
SMALLEST_RANK = 2.0
SMALLEST_PREDICTED_SHARE = 0.25
"""Of the true embeddings' standard deviation and rank, for predicted ones."""


def encoder_alarms(embeddings: Tensor, outputs: Tensor | None) -> list[str]:
    """What is wrong with an encoder, one line each; empty when it is healthy.

    Args:
        embeddings: (clips, time, D) embeddings of frames that follow each other in time; of still images, time is 1.
        outputs: (clips, time, E) the expander's outputs for them; None where the objective sees the embeddings.
    """
    alarms = []
    spreads = {"embedding": sequence_spread(embeddings)}
    if outputs is not None:
        spreads["expander output"] = sequence_spread(outputs)
    seen, std = list(spreads.items())[-1][0], list(spreads.values())[-1].batch.std
    if std < SMALLEST_OBJECTIVE_STD:
        alarms.append(f"the {seen}'s standard deviation is {std:.3f} (healthy: about 1)")
    size = float(embeddings.float().square().mean().sqrt())
    if spreads["embedding"].batch.std < SMALLEST_EMBEDDING_STD * size:
        alarms.append(f"the embedding's standard deviation is {spreads['embedding'].batch.std / size:.4f} of its size")
    for name, value in spreads.items():
        if value.batch.rank < SMALLEST_RANK:
            alarms.append(f"the {name}'s effective rank is {value.batch.rank:.1f}")
        if embeddings.shape[1] > 1 and value.time.std < SMALLEST_TIME_SHARE * value.batch.std:
            alarms.append(f"the {name} hardly changes over time: it tells clips apart, not moments")
    return alarms


def prediction_alarms(predicted: Tensor, true: Tensor) -> list[str]:
    """What is wrong with predicted embeddings, one line each; empty when they vary as the true ones do.

    Args:
        predicted: (clips, time, D) one-step predictions.
        true: (clips, time, D) the embeddings that they predict.
    """
    alarms = []
    for over, value, reference in zip(
        ("the batch", "time"), sequence_spread(predicted), sequence_spread(true), strict=True
    ):
        if value.std < SMALLEST_PREDICTED_SHARE * reference.std:
            alarms.append(f"predictions vary over {over} by {value.std:.3f}, the truth by {reference.std:.3f}")
        if value.rank < SMALLEST_PREDICTED_SHARE * reference.rank:
            alarms.append(
                f"predictions have effective rank {value.rank:.1f} over {over}, the truth {reference.rank:.1f}"
            )
    return alarms
