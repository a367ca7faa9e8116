"""Is it collapsed? Standard deviation and effective rank, over the batch and over time.

Rank alone is blind to scale, standard deviation alone to redundancy, and both over the batch to an embedding that only
tells clips apart: so all are watched. A clip of tokens counts as so many clips.
"""

from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

LEAST_STD = 1e-2
"""Lower bound on a feature's standard deviation, as a fraction of the median one."""
SMALLEST_OBJECTIVE_STD = 0.25
"""VICReg holds the standard deviation of what it sees at its margin, 1; collapsed runs fall below a tenth of that."""
SMALLEST_EMBEDDING_STD = 0.02
"""Relative to the size of the embedding itself: the embedding has no scale of its own."""
SMALLEST_TIME_SHARE = 0.02
"""Standard deviation over time within a clip, relative to that over everything."""
SMALLEST_RANK = 2.0
MOST_ROWS = 10_000
"""Embeddings that the rank is measured on, evenly spread: tokens make many."""
SMALLEST_PREDICTED_SHARE = 0.25
"""Standard deviation and rank of predicted embeddings, relative to those of the true ones."""


class CollapseStats(NamedTuple):
    """Root mean square over features of the standard deviation, and rank between 1 and the number of features."""

    std: float
    effective_rank: float


def floor_std(std: Tensor) -> Tensor:
    """Standard deviations (D,) to divide by, raised where one is next to nothing beside the others.

    A feature that was constant in training and moves a little in a test would swamp the errors of all the others.
    """
    varying = std[std > 1e-6 * std.max()]  # not by rounding alone
    return std.clamp_min(max(1e-6, LEAST_STD * float(varying.median()) if len(varying) else 0.0))


def effective_rank(embeddings: Tensor) -> float:
    """Exp of the entropy of the normalised singular values of the centred embeddings (N, D); 1 if they do not vary.

    RankMe (Garrido et al. 2023, arXiv:2210.02885), centred: else a large mean counts as a dimension of its own.
    """
    rows = torch.linspace(0, len(embeddings) - 1, min(MOST_ROWS, len(embeddings))).long()
    some = embeddings[rows.to(embeddings.device)].cpu().double()
    some = some - some.mean(dim=0)
    values = torch.linalg.eigvalsh(some.mT @ some).clamp_min(0).sqrt()  # (D,)
    if not values.sum() > 0:
        return 1.0
    return float(torch.exp(torch.special.entr(values / values.sum()).sum()))


def collapse_stats(embeddings: Tensor) -> CollapseStats:
    """Collapse statistics of embeddings (N, D) over their first dimension; one embedding alone does not vary."""
    if len(embeddings) < 2:
        return CollapseStats(0.0, 1.0)
    return CollapseStats(float(embeddings.float().var(dim=0).mean().sqrt()), effective_rank(embeddings))


def sequence_stats(embeddings: Tensor) -> dict[str, CollapseStats]:
    """Collapse statistics of (B, T, *tokens, D): of the "batch", and around each clip's mean, over "time"."""
    over_time = embeddings - reduce(embeddings, "b t ... d -> b 1 ... d", "mean")
    parts = {"batch": embeddings, "time": over_time}
    return {name: collapse_stats(rearrange(part, "... d -> (...) d")) for name, part in parts.items()}


def encoder_alarms(embeddings: Tensor, outputs: Tensor) -> list[str]:
    """Alarms about an encoder, one line each; none when it is healthy.

    Embeddings (B, T, *tokens, D) are of consecutive frames, outputs (B, T, *tokens, E) the expander's.
    """
    alarms, of_embeddings, of_outputs = [], sequence_stats(embeddings), sequence_stats(outputs)
    if (std := of_outputs["batch"].std) < SMALLEST_OBJECTIVE_STD:
        alarms.append(f"the expander output's standard deviation is {std:.3f} (healthy: about 1)")
    size = float(embeddings.float().square().mean().sqrt())
    if (std := of_embeddings["batch"].std) < SMALLEST_EMBEDDING_STD * size:
        alarms.append(f"the embedding's standard deviation is {std / size:.4f} of its size")
    for name, stats in (("embedding", of_embeddings), ("expander output", of_outputs)):
        batch, time = stats["batch"], stats["time"]
        if batch.effective_rank < SMALLEST_RANK:
            alarms.append(f"the {name}'s effective rank is {batch.effective_rank:.1f}")
        if embeddings.shape[1] > 1 and time.std < SMALLEST_TIME_SHARE * batch.std:
            alarms.append(f"the {name} hardly changes over time: it tells clips apart, not moments")
    return alarms


def prediction_alarms(predicted: Tensor, true: Tensor) -> list[str]:
    """Alarms about predictions (B, T, *tokens, D), one line each; none when they vary as the true embeddings do."""
    alarms = []
    stats, of_true = sequence_stats(predicted), sequence_stats(true)
    for over, (std, rank) in stats.items():
        true_std, true_rank = of_true[over]
        if std < SMALLEST_PREDICTED_SHARE * true_std:
            alarms.append(f"predictions vary over {over} by {std:.3f}, the truth by {true_std:.3f}")
        if rank < SMALLEST_PREDICTED_SHARE * true_rank:
            alarms.append(f"predictions have effective rank {rank:.1f} over {over}, the truth {true_rank:.1f}")
    return alarms
