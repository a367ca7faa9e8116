"""The trivial guesses that a predictor has to beat: forecasters of the same interface.

Ridge regression is the real one: it is fitted on the same training windows as the predictor.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Ordered

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from jepa.networks import last_windows
from jepa.sequence import Sequence

MOST_INPUTS = 4096
"""Numbers that a ridge regression looks at: its normal equations have the square of that."""


class Baseline(nn.Module):
    """A guess from the last `memory` embeddings."""

    latent_dimension = 0

    def __init__(self, fps: float, memory: int = 1) -> None:
        super().__init__()
        self.fps, self.memory = fps, memory

    def forward(self, embeddings: Tensor) -> Tensor:
        """The next embedding, (B, T, *tokens, D) -> (B, 1, *tokens, D)."""
        raise NotImplementedError

    def step(self, newest: Sequence, state: Tensor | None, latent: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of a rollout, as `jepa.predictor.Predictor.step`; the state is the embeddings still needed."""
        seen = newest.embeddings if state is None else torch.cat([state, newest.embeddings], dim=1)
        return self(seen), seen[:, -self.memory :]


class CopyLast(Baseline):
    """Nothing will change."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings[:, -1:]


class LinearExtrapolation(Baseline):
    """The last change will go on for ever."""

    def __init__(self, fps: float) -> None:
        super().__init__(fps, memory=2)

    def forward(self, embeddings: Tensor) -> Tensor:
        return 2 * embeddings[:, -1:] - embeddings[:, -2:][:, :1]


class Mean(Baseline):
    """The mean of the training embeddings, (D,)."""

    mean: Tensor

    def __init__(self, fps: float, mean: Tensor) -> None:
        super().__init__(fps)
        self.register_buffer("mean", mean.clone())

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.mean.expand_as(embeddings[:, -1:])


class Ridge(Baseline):
    """Linear regression with a penalty on the last `context` embeddings.

    All tokens of a grid share the weights and see their own past. It works on standardised embeddings inside.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, fps: float, context: int, *, mean: Tensor, std: Tensor) -> None:
        super().__init__(fps, memory=context)
        self.context, dimension = context, len(mean)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.register_buffer("weight", torch.zeros(context * dimension, dimension))
        self.register_buffer("bias", torch.zeros(dimension))

    def forward(self, embeddings: Tensor) -> Tensor:
        steps = rearrange((embeddings - self.mean) / self.std, "b t ... d -> (b ...) t d")
        inputs = last_windows(steps, self.context, 1)
        outputs = (inputs @ self.weight + self.bias) * self.std + self.mean  # (B x places, 1, D)
        return outputs.unflatten(0, (len(embeddings), *embeddings.shape[2:-1])).movedim(-2, 1)


def ridge_context(context: int, dimension: int) -> int:
    """Embeddings that ridge regression looks back on: the predictor's context, or as many as can be afforded."""
    return max(1, min(context, MOST_INPUTS // dimension))


def fit_ridge(windows: Iterable[Tensor], like: Ridge, penalties: Ordered[float]) -> list[Ridge]:
    """Ridge regressions from `context` embeddings to the next, one for each penalty, solved in float64.

    Args:
        windows: batches (N, context + 1, *tokens, D) of raw embeddings, gone through once.
        like: an empty regression, for its context and standardisation.
        penalties: added to the diagonal of the inputs' second moment, per sample.
    """
    context, dimension = like.context, len(like.mean)
    size = context * dimension + 1
    gram = torch.zeros(size, size, dtype=torch.float64)
    moment = torch.zeros(size, dimension, dtype=torch.float64)
    samples = 0
    for part in windows:
        flat = rearrange((part - like.mean) / like.std, "n k ... d -> (n ...) k d").double()
        inputs = functional.pad(rearrange(flat[:, :-1], "n k d -> n (k d)"), (0, 1), value=1.0)
        gram += inputs.T @ inputs
        moment += inputs.T @ flat[:, -1]
        samples += len(flat)
    fitted = []
    for penalty in penalties:
        diagonal = torch.full((size,), penalty * samples, dtype=torch.float64)
        diagonal[-1] = 1e-9  # the bias is not penalised
        solution = torch.linalg.solve(gram + torch.diag(diagonal), moment)
        ridge = Ridge(like.fps, context, mean=like.mean, std=like.std)
        ridge.weight.copy_(solution[:-1])
        ridge.bias.copy_(solution[-1])
        fitted.append(ridge)
    return fitted
