"""What do frozen embeddings know of classes? Nearest neighbours, ridge regression, and linear probes trained by SGD."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as functional
from einops import rearrange
from sklearn.linear_model import RidgeClassifierCV
from torch import Tensor, nn

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""As in Wu et al. 2018 (arXiv:1805.01978), who take 200 neighbours on ImageNet."""
RIDGE_PENALTIES = tuple(np.logspace(-1, 6, 15))
QUERIES_AT_ONCE = 1024


def knn_scores(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor | None,
    classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Votes of the nearest embeddings by cosine, each with weight exp(cosine / temperature).

    Args:
        bank: (N, D) embeddings whose classes are known.
        labels: int64 (N,).
        queries: (M, D); None for the bank itself, each embedding classified by all others.
        classes: how many there are.
        neighbours: at most all there are.
        temperature: the lower, the more the very nearest count.

    Returns:
        float32 (M, classes).
    """
    unit = functional.normalize(bank.float(), dim=1)
    asked = unit if queries is None else functional.normalize(queries.float(), dim=1)
    neighbours = min(neighbours, len(unit) - (queries is None))
    scores = []
    for start in range(0, len(asked), QUERIES_AT_ONCE):
        cosines = asked[start : start + QUERIES_AT_ONCE] @ unit.T
        if queries is None:
            cosines.diagonal(start).fill_(-torch.inf)
        nearest, rows = cosines.topk(neighbours, dim=1)
        votes = torch.zeros(len(cosines), classes, device=bank.device)
        scores.append(votes.scatter_add_(1, labels[rows], ((nearest - 1) / temperature).exp()))
    return torch.cat(scores)


def ridge_scores(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Ridge regression onto the classes, its penalty chosen by leave-one-out on the training embeddings.

    Args:
        train: (N, D).
        labels: int64 (N,), of at least two classes, and every class among them.
        test: (M, D).

    Returns:
        float32 (M, classes).
    """
    mean, std = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    classifier = RidgeClassifierCV(RIDGE_PENALTIES)
    classifier.fit(((train - mean) / std).cpu().double().numpy(), labels.cpu().numpy())
    scores = classifier.decision_function(((test - mean) / std).cpu().double().numpy())
    if scores.ndim == 1:  # of two classes, that of the second
        scores = np.stack([-scores, scores], axis=1)
    return torch.from_numpy(scores).float()


def accuracy(scores: Tensor, labels: Tensor, top: int = 1) -> float:
    """Share of samples whose class is among the `top` highest of their scores, (M, classes) and int64 (M,)."""
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices  # (M, top)
    return float((best == labels.to(best.device)[:, None]).any(dim=1).double().mean())


class LinearProbes(nn.Module):
    """Linear classifiers of one representation that learn side by side, each at a learning rate of its own.

    Args:
        mean: (D,), of the training embeddings; they are standardised, so that rates mean the same for all encoders.
        std: (D,)
        classes: how many there are.
        rates: learning rates of SGD with momentum, each at batches of 256 as usual.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, classes: int, rates: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std.clamp_min(1e-6))
        self.rates = tuple(rates)
        self.heads = nn.ModuleList(nn.Linear(len(mean), classes) for _ in rates)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, D) to scores (rates, B, classes)."""
        standardised = (embeddings - self.mean) / self.std
        return torch.stack([head(standardised) for head in self.heads])

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The sum of all classifiers' cross-entropies: none sees the others' gradients."""
        return torch.stack([functional.cross_entropy(scores, labels) for scores in self(embeddings)]).sum()

    def parameter_groups(self) -> list[dict[str, object]]:
        """For an optimiser: each classifier at its rate."""
        return [{"params": list(head.parameters()), "lr": rate, "peak_rate": rate}
                for head, rate in zip(self.heads, self.rates, strict=True)]  # fmt: skip


class OnlineProbe(nn.Module):
    """Linear classifiers that learn beside the encoder, on its embeddings and on the expander's outputs.

    They see both without their gradients, so the encoder never learns of the classes.
    """

    def __init__(self, embedding_dimension: int, output_dimension: int, classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, classes))
                for name, width in (("embedding", embedding_dimension), ("expander", output_dimension))
            }
        )

    def forward(self, embeddings: Tensor, outputs: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the accuracies on a batch that the classifiers have not learnt from yet, this time.

        Args:
            embeddings: (V x B, D), of V views of each sample.
            outputs: (V x B, E).
            labels: int64 (B,); -1 for those that are not known.
        """
        labels = labels.repeat(len(embeddings) // len(labels))
        known = (labels >= 0).sum().clamp_min(1)
        losses, accuracies = [], {}
        for (name, head), seen in zip(self.heads.items(), (embeddings, outputs), strict=True):
            scores = head(seen.detach().float())
            losses.append(functional.cross_entropy(scores, labels, ignore_index=-1, reduction="sum") / known)
            accuracies[f"{name}_linear_accuracy"] = (scores.argmax(dim=1) == labels).sum() / known
        return torch.stack(losses).sum(), accuracies


def knn_accuracies(embeddings: Tensor, outputs: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Of embeddings (C, T, D) and expander outputs (C, T, E), each sample classified by the nearest of the others."""
    labels = labels.repeat_interleave(embeddings.shape[1]).to(embeddings.device)
    known = labels >= 0
    found = {}
    for name, seen in (("embedding", embeddings), ("expander", outputs)):
        scores = knn_scores(rearrange(seen, "c t d -> (c t) d")[known], labels[known], None, classes)
        found[f"{name}_knn_accuracy"] = accuracy(scores, labels[known])
    return found
