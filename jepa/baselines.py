"""Ridge regression, the simple guess that is hard to beat; it is rolled out like a predictor."""

import torch
from einops import rearrange
from torch import Tensor, nn

from jepa.networks import last_windows
from jepa.sequence import Sequence


class Ridge(nn.Module):
    """Ridge regression on the last `context` embeddings, standardised; all tokens of a grid share the weights."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    latent_dimension = 0

    def __init__(self, fps: float, context: int, *, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.fps, self.context = fps, context
        dimension = len(mean)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.register_buffer("weight", torch.zeros(context * dimension, dimension))
        self.register_buffer("bias", torch.zeros(dimension))

    def step(self, newest: Sequence, state: Tensor | None, latent: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of a rollout, as `jepa.predictor.Predictor.step`; the state is the embeddings still needed."""
        seen = newest.embeddings if state is None else torch.cat([state, newest.embeddings], dim=1)
        return self(seen), seen[:, -self.context :]

    def forward(self, embeddings: Tensor) -> Tensor:
        """The next embedding, (B, T, *tokens, D) -> (B, 1, *tokens, D)."""
        steps = rearrange((embeddings - self.mean) / self.std, "b t ... d -> (b ...) t d")
        inputs = last_windows(steps, self.context, 1)
        outputs = (inputs @ self.weight + self.bias) * self.std + self.mean  # (B x places, 1, D)
        return outputs.unflatten(0, (len(embeddings), *embeddings.shape[2:-1])).movedim(-2, 1)
