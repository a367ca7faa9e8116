"""The networks inside predictors, a configuration beside each; `PredictorConfig` names them all.

To add one, write a `Network` and a configuration that names it, and name that in `PredictorConfig`: training,
selection, rollout, samples, calibration, energy and evaluation come with it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from jepa.config import Bounded, NotNegativeInt, PositiveInt, SeveralInt, Share
from jepa.errors import ConfigurationError


class Network(nn.Module):
    """A causal map from steps to hidden states, with a state to go on from.

    From features (B, T, F), the number of last steps to answer for, and the state after the steps before (None at the
    beginning): hidden states (B, last, width) and the state for the next step. Step by step it finds the same hidden
    states as in the whole sequence.
    """

    def forward(self, features: Tensor, last: int, state: Any = None) -> tuple[Tensor, Any]:
        raise NotImplementedError


@dataclass(frozen=True)
class NetworkConfig(Bounded):
    """Options of every network."""

    network: ClassVar[type[Network]]
    """What is built."""
    context: SeveralInt = 8
    """Past embeddings that a prediction starts from."""
    width: PositiveInt = 512
    """Width of the hidden layers."""
    depth: PositiveInt = 3
    """Number of residual blocks or layers."""
    dropout: Share = 0.0
    """Dropout between layers."""
    latent_dimension: NotNegativeInt = 0
    """Numbers drawn at random for each step of a sampled future; 0: one future."""

    def build(self, features: int) -> Network:
        """The network for so many features a step."""
        return self.network(features, self)


class ResidualMLP(Network):
    """Residual blocks on the last `context` steps, flattened; its state is the steps before the newest."""

    def __init__(self, features: int, config: NetworkConfig) -> None:
        super().__init__()
        self.context = config.context
        self.embed = nn.Linear(features * config.context, config.width)
        self.blocks = nn.ModuleList(residual_branch(config, config.width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, features: Tensor, last: int, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features = features if state is None else torch.cat([state, features], dim=1)
        hidden = self.embed(last_windows(features, self.context, last))  # (B, last, width)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.norm(hidden), features[:, max(0, features.shape[1] - self.context + 1) :]


@dataclass(frozen=True)
class MLPConfig(NetworkConfig):
    """A residual MLP on the last embeddings."""

    kind: ClassVar[str] = "mlp"
    network: ClassVar[type[Network]] = ResidualMLP


class CausalTransformer(Network):
    """A pre-norm transformer (Xiong et al. 2020, arXiv:2002.04745) with a causal window of `context` steps.

    Its state is the number of steps so far, and each layer's keys and values of the last `context` - 1 of them.
    """

    def __init__(self, features: int, config: "TransformerConfig") -> None:
        super().__init__()
        self.embed = nn.Linear(features, config.width)
        self.blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self, features: Tensor, last: int, state: tuple[int, list[tuple[Tensor, Tensor]]] | None = None
    ) -> tuple[Tensor, tuple[int, list[tuple[Tensor, Tensor]]]]:
        seen, memories = state if state else (0, [None] * len(self.blocks))
        hidden, kept = self.embed(features), []
        for block, memory in zip(self.blocks, memories, strict=True):
            hidden, keys_values = block(hidden, seen, memory)
            kept.append(keys_values)
        return self.norm(hidden[:, -last:]), (seen + features.shape[1], kept)


class CausalBlock(nn.Module):
    """Causal self-attention, then an MLP; (B, T, width) -> (B, T, width) and keys and values to remember."""

    def __init__(self, config: "TransformerConfig") -> None:
        super().__init__()
        width = config.width
        self.context, self.heads, self.dropout = config.context, config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.mlp = residual_branch(config, 4 * width)

    def forward(
        self, hidden: Tensor, seen: int, memory: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        qkv = self.qkv(self.attention_norm(hidden))
        queries, keys, values = rearrange(qkv, "b t (three h c) -> three b h t c", three=3, h=self.heads)
        positions = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)
        queries, keys = (apply_rotary(part, positions, self.context) for part in (queries, keys))
        if memory is not None:
            keys, values = torch.cat([memory[0], keys], dim=2), torch.cat([memory[1], values], dim=2)
        mask = causal_mask(queries.shape[2], keys.shape[2], context=self.context, device=hidden.device)
        dropout = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
        hidden = hidden + self.out_proj(rearrange(attended, "b h t c -> b t (h c)"))
        oldest = max(0, keys.shape[2] - self.context + 1)
        return hidden + self.mlp(hidden), (keys[:, :, oldest:], values[:, :, oldest:])


def causal_mask(queries: int, keys: int, *, context: int, device: torch.device) -> Tensor:
    """Keys that each query may see, bool (queries, keys): itself and the `context` - 1 before it."""
    back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (back >= 0) & (back < context)


def apply_rotary(channels: Tensor, positions: Tensor, context: int) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): pairs of channels (B, heads, T, C) turned by time (T,).

    Wavelengths go from 4 ticks to 16 contexts. Attention knows how long ago a step was, never when the sequence began.
    """
    pairs, slowest = channels.shape[3] // 2, 16.0 * context / 4.0
    angular = (2 * torch.pi / 4) * slowest ** -(torch.arange(pairs, device=positions.device) / max(1, pairs - 1))
    # In float32 whatever the precision: in half of it, angles would be off by a quarter turn.
    angle = positions[:, None].float() * angular  # (T, C / 2)
    cosine, sine = angle.cos().to(channels.dtype), angle.sin().to(channels.dtype)
    first, second = channels[..., :pairs], channels[..., pairs:]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


@dataclass(frozen=True)
class TransformerConfig(NetworkConfig):
    """A causal transformer with rotary positions."""

    kind: ClassVar[str] = "transformer"
    network: ClassVar[type[Network]] = CausalTransformer
    heads: PositiveInt = 8
    """Attention heads; twice their number must divide the width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % (2 * self.heads):
            raise ConfigurationError("heads", f"is {self.heads}: twice that must divide the width, {self.width}")


class GRU(Network):
    """A gated recurrent unit; its state is the hidden state."""

    def __init__(self, features: int, config: NetworkConfig) -> None:
        super().__init__()
        dropout = config.dropout if config.depth > 1 else 0.0
        self.recurrence = nn.GRU(features, config.width, config.depth, batch_first=True, dropout=dropout)

    def forward(self, features: Tensor, last: int, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden, state = self.recurrence(features, state)
        return hidden[:, -last:], state


@dataclass(frozen=True)
class GRUConfig(NetworkConfig):
    """A gated recurrent unit."""

    kind: ClassVar[str] = "gru"
    network: ClassVar[type[Network]] = GRU


PredictorConfig = MLPConfig | TransformerConfig | GRUConfig


def residual_branch(config: NetworkConfig, hidden: int) -> nn.Sequential:
    """Normalisation and an MLP with one hidden layer, to be added to what it is shown, (..., width)."""
    inner, outer = nn.Linear(config.width, hidden), nn.Linear(hidden, config.width)
    return nn.Sequential(nn.LayerNorm(config.width), inner, nn.GELU(), nn.Dropout(config.dropout), outer)


def last_windows(steps: Tensor, context: int, last: int) -> Tensor:
    """The `context` steps up to each of the last ones, the first repeated; (B, T, F) -> (B, last, context x F)."""
    needed = context + last - 1
    steps = steps[:, -needed:]
    padded = functional.pad(rearrange(steps, "b t f -> b f t"), (needed - steps.shape[1], 0), mode="replicate")
    return rearrange(padded.unfold(2, context, 1), "b f t k -> b t (k f)")
