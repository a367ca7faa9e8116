"""The trivial guesses that a predictor has to beat, as predictors of the same interface.

All of them live in standardised space, as `jepa.predictor.Predictor` does, and on the clock.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from jepa.networks import last_steps


class Baseline(nn.Module):
    """A guess from the last `memory` embeddings: (B, T, D) -> (B, outputs, D)."""

    memory = 1

    def forward(self, past: Tensor, outputs: int = 1) -> Tensor:
        raise NotImplementedError

    def advance(
        self, embeddings: Tensor, gaps: Tensor | None, state: Tensor | None, latent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `jepa.predictor.Predictor.advance`; no latent is looked at. The state is the embeddings still needed.

        Raises:
            ValueError: it is asked for gaps of its own, which it knows nothing of.
        """
        if gaps is not None:
            raise ValueError(f"{type(self).__name__} knows the clock only: it cannot be asked for other times")
        kept = (embeddings if state is None else torch.cat([state, embeddings], dim=1))[:, -self.memory :]
        return self(kept), kept


class CopyLast(Baseline):
    """Nothing will change."""

    def forward(self, past: Tensor, outputs: int = 1) -> Tensor:
        return past[:, -outputs:]


class LinearExtrapolation(Baseline):
    """The last change will go on for ever."""

    memory = 2

    def forward(self, past: Tensor, outputs: int = 1) -> Tensor:
        return (past + changes(past))[:, -outputs:]


class Mean(Baseline):
    """The mean of the training embeddings, which is 0 in standardised space."""

    def forward(self, past: Tensor, outputs: int = 1) -> Tensor:
        return torch.zeros_like(past[:, -outputs:])


class Ridge(Baseline):
    """Linear regression with a penalty on the last `context` embeddings: the real baseline."""

    weight: Tensor
    bias: Tensor

    def __init__(self, dimension: int, context: int) -> None:
        super().__init__()
        self.context = self.memory = context
        self.register_buffer("weight", torch.zeros(context * dimension, dimension))
        self.register_buffer("bias", torch.zeros(dimension))

    def forward(self, past: Tensor, outputs: int = 1) -> Tensor:
        return last_steps(past, self.context, outputs) @ self.weight + self.bias


class Shrunk(Baseline):
    """Another predictor, whose rollouts `jepa.skill.imagine` shrinks by these weights (LONGEST, 2)."""

    def __init__(self, predictor: Baseline, shrinkage: Tensor) -> None:
        super().__init__()
        self.predictor, self.shrinkage = predictor, shrinkage
        self.memory = predictor.memory

    def forward(self, past: Tensor, outputs: int = 1) -> Tensor:
        guess: Tensor = self.predictor(past, outputs)
        return guess


def changes(embeddings: Tensor) -> Tensor:
    """Difference to the embedding before, (B, T, D) -> (B, T, D); 0 for the first."""
    return torch.diff(embeddings, dim=1, prepend=embeddings[:, :1])


def fit_ridge(windows: Tensor, context: int, penalties: Sequence[float]) -> list[Ridge]:
    """Fit ridge regressions from `context` embeddings to the next, one for each penalty.

    Args:
        windows: (N, context + 1, D) standardised.
        context: number of past embeddings.
        penalties: added to the diagonal of the inputs' second moment, per sample.

    Returns:
        The fitted predictors, solved in float64.
    """
    dimension = windows.shape[2]
    gram = torch.zeros(context * dimension + 1, context * dimension + 1, dtype=torch.float64)
    moment = torch.zeros(context * dimension + 1, dimension, dtype=torch.float64)
    for part in windows.cpu().split(8192):
        inputs = functional.pad(rearrange(part[:, :-1], "n k d -> n (k d)").double(), (0, 1), value=1.0)
        gram += inputs.T @ inputs
        moment += inputs.T @ part[:, -1].double()
    fitted = []
    for penalty in penalties:
        diagonal = torch.full((len(gram),), penalty * len(windows), dtype=torch.float64)
        diagonal[-1] = 1e-9  # the bias is not penalised
        solution = torch.linalg.solve(gram + torch.diag(diagonal), moment)
        ridge = Ridge(dimension, context)
        ridge.weight.copy_(solution[:-1])
        ridge.bias.copy_(solution[-1])
        fitted.append(ridge)
    return fitted
