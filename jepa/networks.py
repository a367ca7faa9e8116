"""The networks inside predictors, a configuration beside each; `PredictorConfig` names them all, and yours."""

from collections import OrderedDict
from collections.abc import Sequence as Several
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from jepa.config import Bounded, NotNegativeInt, PositiveInt, Share
from jepa.errors import ConfigurationError


@dataclass(frozen=True)
class NetworkConfig(Bounded):
    """Options of every network."""

    kind: ClassVar[str]
    context: PositiveInt = 8
    """Past embeddings that a prediction starts from. 1: where nothing but what is seen matters, such as in a maze."""
    width: PositiveInt = 512
    """Width of the hidden layers."""
    depth: PositiveInt = 3
    """Number of residual blocks or layers."""
    dropout: Share = 0.0
    """Dropout between layers."""
    latent_dimension: NotNegativeInt = 0
    """Numbers drawn at random for each step of a sampled future; 0: one future."""

    def build(self, features: int, grid: bool, *, actions: int = 0) -> nn.Module:
        """A causal map from steps of so many features to hidden states, with a state to go on from.

        It takes steps (B, T, F), after the features so many numbers of an action, which weigh nothing at first
        (`Embed`); the number of last steps to answer for, the state after the steps before (None at the beginning), and
        the rows and columns of the grid whose places follow each other in B, or (); it gives hidden states (B, last,
        width) and the state for the next step. Step by step it finds the same hidden states as in the whole sequence.
        Without `grid` there never is one.
        """
        raise NotImplementedError


class Embed(nn.Linear):
    """A linear map of features, and of actions after them, whose weights are 0 at first; of one step or of several.

    (..., steps x (features + actions)) -> (..., width). All else begins as it does without actions, to the bit.
    """

    def __init__(self, features: int, actions: int, width: int, *, steps: int = 1) -> None:
        super().__init__(steps * features, width)
        self.steps, self.features = steps, features
        self.action_weight = nn.Parameter(torch.zeros(width, steps * actions)) if actions else None

    def forward(self, seen: Tensor) -> Tensor:
        if self.action_weight is None:
            return super().forward(seen)
        parts = seen.unflatten(-1, (self.steps, -1)).tensor_split([self.features], dim=-1)
        # As they would lie without actions: the last bits depend on that, too.
        features, actions = (part.flatten(-2).contiguous() for part in parts)
        return super().forward(features) + functional.linear(actions, self.action_weight)


class Windowed(nn.Sequential):
    """Layers on the last `context` steps, flattened: (B, last, context x F); the state is the steps before."""

    def __init__(self, context: int, *layers: Any) -> None:
        super().__init__(*layers)
        self.context = context

    def forward(  # type: ignore[override]
        self, features: Tensor, last: int, state: Tensor | None = None, grid: Several[int] = ()
    ) -> tuple[Tensor, Tensor]:
        features = features if state is None else torch.cat([state, features], dim=1)
        hidden = super().forward(last_windows(features, self.context, last))
        return hidden, features[:, max(0, features.shape[1] - self.context + 1) :]


class Residual(nn.Sequential):
    """Normalisation and an MLP with one hidden layer, added to what it is shown, (..., width)."""

    def __init__(self, config: NetworkConfig, hidden: int) -> None:
        inner, outer = nn.Linear(config.width, hidden), nn.Linear(hidden, config.width)
        super().__init__(nn.LayerNorm(config.width), inner, nn.GELU(), nn.Dropout(config.dropout), outer)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return hidden + super().forward(hidden)


@dataclass(frozen=True)
class MLPConfig(NetworkConfig):
    """A residual MLP on the last embeddings, of a grid on those of each place."""

    kind: ClassVar[str] = "mlp"

    def build(self, features: int, grid: bool, *, actions: int = 0) -> nn.Module:
        layers = OrderedDict[str, nn.Module](embed=Embed(features, actions, self.width, steps=self.context))
        layers["blocks"] = nn.Sequential(*(Residual(self, self.width) for _ in range(self.depth)))
        layers["norm"] = nn.LayerNorm(self.width)
        return Windowed(self.context, layers)


class CausalTransformer(nn.Module):
    """A pre-norm transformer (Xiong et al. 2020, arXiv:2002.04745) with a causal window of `context` steps.

    On a grid attention goes over the time of each place, and before it every place sees those around it at that time: a
    layer more is a step farther, and the cost is linear in places. Its state is the number of steps so far, and each
    layer's keys and values of the last `context` - 1 of them.

    Told which steps are hidden, (B, T), it looks at both sides, and each hidden one carries a learned token.
    """

    def __init__(self, features: int, config: "TransformerConfig", grid: bool, *, actions: int = 0) -> None:
        super().__init__()
        self.embed = Embed(features, actions, config.width)
        self.blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.depth))
        self.around = nn.ModuleList(Neighbourhood(config.width) for _ in range(config.depth if grid else 0))
        self.norm = nn.LayerNorm(config.width)
        self.token = nn.Parameter(torch.zeros(config.width)) if config.infill else None

    def forward(
        self, features: Tensor, last: int, state: Any = None, grid: Several[int] = (), masked: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, list[Tensor]]]:
        seen, memories = state or (0, [None] * len(self.blocks))
        hidden, kept = self.embed(features), []
        if masked is not None and self.token is not None:
            hidden = hidden + masked[..., None] * self.token
        positions = torch.arange(seen, seen + features.shape[1], device=features.device)
        for block, around, memory in zip_longest(self.blocks, self.around, memories):
            if around is not None:
                hidden = around(hidden, grid)
            hidden, memory = block(hidden, positions, memory, both_sides=masked is not None)
            kept.append(memory)
        return self.norm(hidden[:, -last:]), (seen + features.shape[1], kept)


class CausalBlock(nn.Module):
    """Causal self-attention, or that to both sides, then an MLP."""

    def __init__(self, config: "TransformerConfig") -> None:
        super().__init__()
        self.config = config
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)
        self.mlp = Residual(config, 4 * config.width)

    def forward(
        self, hidden: Tensor, positions: Tensor, memory: Tensor | None, *, both_sides: bool
    ) -> tuple[Tensor, Tensor]:
        """(B, T, width) at positions (T,) to the same shape, and keys and values (2, B, heads, T, C) to remember."""
        context, qkv = self.config.context, self.qkv(self.attention_norm(hidden))
        queries, keys, values = rearrange(qkv, "b t (three h c) -> three b h t c", three=3, h=self.config.heads)
        queries, keys = (apply_rotary(part, positions, context) for part in (queries, keys))
        seen = torch.stack([keys, values])
        seen = seen if memory is None else torch.cat([memory, seen], dim=3)
        steps = torch.arange(seen.shape[3], device=hidden.device)
        back = steps[-queries.shape[2] :, None] - steps  # how many steps each key is before each query, (T, keys)
        mask = (back.abs() if both_sides else back.where(back >= 0, context)) < context
        dropout = self.config.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(queries, seen[0], seen[1], attn_mask=mask, dropout_p=dropout)
        hidden = hidden + self.out_proj(rearrange(attended, "b h t c -> b t (h c)"))
        return self.mlp(hidden), seen[:, :, :, max(0, seen.shape[3] - context + 1) :]


class Neighbourhood(nn.Module):
    """Every place sees those around it at the same time: a depthwise convolution of 3x3 cells, added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.convolve = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mix = nn.Linear(width, width)

    def forward(self, hidden: Tensor, grid: Several[int]) -> Tensor:
        """(B x rows x columns, T, width) to the same shape."""
        rows, columns = grid
        images = rearrange(self.norm(hidden), "(b r c) t w -> (b t) w r c", r=rows, c=columns)
        around = rearrange(self.convolve(images), "(b t) w r c -> (b r c) t w", t=hidden.shape[1])
        return hidden + self.mix(functional.gelu(around))  # type: ignore[no-any-return]


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
    """A causal transformer with rotary positions, on a grid over time and neighbouring places."""

    kind: ClassVar[str] = "transformer"
    heads: PositiveInt = 8
    """Attention heads; twice their number must divide the width."""
    infill: bool = False
    """Learn to fill in what is hidden, too: frames in a row, and tokens anywhere; gaps of half the context at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % (2 * self.heads):
            raise ConfigurationError("heads", f"is {self.heads}: twice that must divide the width, {self.width}")

    def build(self, features: int, grid: bool, *, actions: int = 0) -> nn.Module:
        return CausalTransformer(features, self, grid, actions=actions)


PredictorConfig = MLPConfig | TransformerConfig


def last_windows(steps: Tensor, context: int, last: int) -> Tensor:
    """The `context` steps up to each of the last ones, the first repeated; (B, T, F) -> (B, last, context x F)."""
    needed = context + last - 1
    steps = steps[:, -needed:]
    padded = functional.pad(rearrange(steps, "b t f -> b f t"), (needed - steps.shape[1], 0), mode="replicate")
    return rearrange(padded.unfold(2, context, 1), "b f t k -> b t (k f)")
