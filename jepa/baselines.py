"""Ridge regression, the simple guess that is hard to beat; it is rolled out like a predictor."""

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from jepa.networks import last_windows
from jepa.sequence import Sequence

AROUND = 2
"""Last steps whose neighbours are looked at."""


class Ridge(nn.Module):
    """Ridge regression on the last `context` embeddings, standardised.

    On a grid all places share the weights, and each also looks at the mean of the 3x3 cells around it.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    latent_dimension = 0

    def __init__(self, fps: float, context: int, *, mean: Tensor, std: Tensor, on_grid: bool) -> None:
        super().__init__()
        self.fps, self.context, self.on_grid = fps, context, on_grid
        dimension, looked_at = len(mean), context + AROUND * on_grid
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.register_buffer("weight", torch.zeros(looked_at * dimension, dimension))
        self.register_buffer("bias", torch.zeros(dimension))

    def step(self, newest: Sequence, state: Tensor | None, latent: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of a rollout, as `jepa.predictor.Predictor.step`; the state is the embeddings still needed."""
        seen = newest.embeddings if state is None else torch.cat([state, newest.embeddings], dim=1)
        return self(seen), seen[:, -self.context :]

    def fill(self, seen: Sequence) -> Sequence:
        """What has nothing hidden. Raises `ValueError` at all else, of which ridge regression has no guess."""
        if seen.hidden is not None:
            raise ValueError("parts are hidden, and ridge regression does not fill them in")
        return seen

    def forward(self, embeddings: Tensor) -> Tensor:
        """The next embedding, (B, T, *tokens, D) -> (B, 1, *tokens, D)."""
        outputs = (self.inputs(embeddings) @ self.weight + self.bias) * self.std + self.mean  # (B x places, D)
        return outputs.unflatten(0, (len(embeddings), 1, *embeddings.shape[2:-1]))

    def inputs(self, embeddings: Tensor) -> Tensor:
        """What the next embedding is a linear function of, (B, T, *tokens, D) -> (B x places, F)."""
        standardised = (embeddings - self.mean) / self.std
        looked_at = [last_windows(rearrange(standardised, "b t ... d -> (b ...) t d"), self.context, 1)]
        if self.on_grid:
            images = rearrange(standardised[:, -AROUND:], "b t r c d -> (b t) d r c")
            means = functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
            steps = rearrange(means, "(b t) d r c -> (b r c) t d", b=len(embeddings))
            looked_at.append(last_windows(steps, AROUND, 1))
        return torch.cat(looked_at, dim=2)[:, 0]
