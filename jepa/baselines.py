"""The guesses that a predictor has to beat: forecasters of the same interface. Ridge regression is the real one."""

import torch
from einops import rearrange
from torch import Tensor, nn

from jepa.networks import last_windows
from jepa.sequence import Sequence


class Baseline(nn.Module):
    """A guess of the next embedding, (B, T, *tokens, D) -> (B, 1, *tokens, D), from the last `memory` ones."""

    latent_dimension, memory = 0, 1

    def __init__(self, fps: float) -> None:
        super().__init__()
        self.fps = fps

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

    memory = 2

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
    """Ridge regression on the last `context` embeddings, standardised; all tokens of a grid share the weights."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, fps: float, context: int, *, mean: Tensor, std: Tensor) -> None:
        super().__init__(fps)
        self.context = self.memory = context
        dimension = len(mean)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.register_buffer("weight", torch.zeros(context * dimension, dimension))
        self.register_buffer("bias", torch.zeros(dimension))

    def forward(self, embeddings: Tensor) -> Tensor:
        steps = rearrange((embeddings - self.mean) / self.std, "b t ... d -> (b ...) t d")
        inputs = last_windows(steps, self.context, 1)
        outputs = (inputs @ self.weight + self.bias) * self.std + self.mean  # (B x places, 1, D)
        return outputs.unflatten(0, (len(embeddings), *embeddings.shape[2:-1])).movedim(-2, 1)
