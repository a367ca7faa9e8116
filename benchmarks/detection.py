"""Where are the objects? A head reads the occupied cells of a map off an embedding, judged by average precision.

The head learns on embeddings of true frames and is then given imagined ones; its average precision on true embeddings
is the ceiling. As in the video example of eb_jepa (Terver et al. 2026, arXiv:2602.03604), whose head is convolutional,
because its embeddings are maps; ours are vectors, and it is an MLP.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as functional
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

VALIDATE_EVERY, STEPS, BATCH = 250, 1500, 256
WIDTH = 512


def occupied_cells(positions: Tensor, size: float, cells: int = 8) -> Tensor:
    """The cells of a map that hold the centre of an object.

    Args:
        positions: (..., objects, 2), x and y of each centre.
        size: width and height of the picture, in the same unit.
        cells: cells of the map along each side.

    Returns:
        float32 (..., cells^2), row by row, 1 where there is an object and 0 elsewhere.
    """
    at = (positions / size * cells).long().clamp(0, cells - 1)
    occupied = torch.zeros(*positions.shape[:-2], cells**2)
    return occupied.scatter_(-1, at[..., 1] * cells + at[..., 0], 1.0)


def average_precision(logits: Tensor, occupied: Tensor, weights: np.ndarray | None = None) -> float:
    """Area under the curve of precision over recall, all cells of all maps in one ranking.

    Args:
        logits: (N, cells^2).
        occupied: (N, cells^2), 0 or 1.
        weights: float (N,), how often each map counts; None for once.
    """
    each = None if weights is None else weights.repeat(logits.shape[1])
    return float(average_precision_score(occupied.flatten().numpy(), logits.flatten().numpy(), sample_weight=each))


@torch.enable_grad()
def fit_detection_head(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], *, seed: int = 0, steps: int = STEPS
) -> nn.Module:
    """A head from embeddings (..., D) to logits of cells (..., cells^2), by cross-entropy; the best one is kept.

    Args:
        train: standardised embeddings (N, D) and their cells (N, cells^2), as from `occupied_cells`.
        validation: likewise, to choose the best by.
        seed: of the weights and the batches.
        steps: of AdamW with a cosine to 0.
    """
    embeddings, occupied = train
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Sequential(nn.Linear(embeddings.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, occupied.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, best_precision = head, -1.0
    for step in range(1, steps + 1):
        drawn = torch.randint(len(embeddings), (BATCH,), generator=generator)
        loss = functional.binary_cross_entropy_with_logits(head(embeddings[drawn]), occupied[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % VALIDATE_EVERY == 0 or step == steps:
            with torch.no_grad():
                precision = average_precision(head(validation[0]), validation[1])
            if precision > best_precision:
                best, best_precision = copy.deepcopy(head), precision
    return best
