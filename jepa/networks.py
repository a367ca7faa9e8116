"""The networks inside predictors. To add one, write a class here and name it in `NETWORKS`.

A network is causal: it maps the steps of a sequence to hidden states, one for each of the last `outputs` steps, and
remembers what it needs to go on from there, so that a rollout costs one step for each imagined frame, and no more. A
head maps hidden states to velocities, unless the network has one itself and says so (`Network.gives_velocities`).
Steps that are given together with a state were imagined. To most networks that makes no difference: step by step they
find the same hidden states as in the whole sequence; `DirectMLP` does not look at what was imagined.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from jepa.attention import AttentionBlock
from jepa.encoder import ConfigurationError


class NetworkConfig(Protocol):
    """What networks are built from: `jepa.predictor.PredictorConfig` documents the fields."""

    @property
    def context(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def horizon(self) -> int: ...


class Steps(NamedTuple):
    """A sequence as networks see it."""

    features: Tensor
    """float (B, T, F): the embedding and its velocity, D each, then the gaps before and after; F = 2 D + 2."""
    ticks: Tensor
    """float (B, T): the time of each step, in ticks of the clock."""
    gaps: Tensor | None = None
    """float (B, T): ticks from each step to the next; None on the clock, where all are 1."""


class Network(nn.Module):
    """What all networks are, and what a network that differs says of itself.

    Built from the number of features F and a `NetworkConfig`; called with `Steps`, the number of outputs and a state,
    None at the beginning, it returns hidden states (B, outputs, width) and its state for the next step.
    """

    gives_velocities = False
    """It has a head of its own: instead of hidden states it gives velocities (B, outputs, D), where D = F / 2 - 1."""
    steps_at_once = 1
    """How many steps it forecasts from the same past; the training has to reach the last of them."""
    leaps_anywhere = False
    """Its futures are ways through time, of which a leap of any length takes its part; others have to learn to leap."""


class ResidualMLP(Network):
    """Residual blocks on the last `context` steps, flattened. Its state is the steps before the newest."""

    def __init__(self, inputs: int, config: NetworkConfig) -> None:
        super().__init__()
        self.context = config.context
        self.embed = nn.Linear(inputs * config.context, config.width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(config.width),
                nn.Linear(config.width, config.width),
                nn.GELU(),
                nn.Dropout(config.dropout),
                nn.Linear(config.width, config.width),
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, steps: Steps, outputs: int, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features = steps.features if state is None else torch.cat([state, steps.features], dim=1)
        hidden = self.embed(last_steps(features, self.context, outputs))  # (B, outputs, width)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.norm(hidden), features[:, max(0, features.shape[1] - self.context + 1) :]


class DirectState(NamedTuple):
    """What a direct forecast remembers."""

    recent: Tensor
    """(B, up to context - 1, F), the newest steps."""
    forecast: tuple[Tensor, ...]
    """`steps_at_once` times (B, 1, D): the velocity within each tick."""
    begun: Tensor
    """(B, 1), the time of the step that it was made from."""
    taken: int
    """How many of its steps have been taken."""


class DirectMLP(Network):
    """Forecasts `horizon` steps at once from the last `context` ones, not each from the one imagined before it.

    Direct instead of iterated forecasts (Ben Taieb et al. 2012, arXiv:1108.3259): errors are not fed back. Within a
    tick the way is straight; after `horizon` steps, however long, the next forecast is made from what was imagined.

    Nothing is normalised: on strange video a normalised hidden state would be as large as ever, and the forecast
    as bold.

    It has a head of its own for each step, and so gives velocities instead of hidden states.
    """

    gives_velocities = True
    leaps_anywhere = True

    def __init__(self, inputs: int, config: NetworkConfig) -> None:
        super().__init__()
        if config.horizon < 1:
            raise ConfigurationError(f"--predictor.horizon is {config.horizon}: it must be positive")
        self.context, self.steps_at_once = config.context, config.horizon
        dimension = inputs // 2 - 1
        widths = [(inputs - 1) * config.context] + [config.width] * config.depth
        self.layers = nn.Sequential(
            *(
                layer
                for before, after in pairwise(widths)
                for layer in (nn.Linear(before, after), nn.GELU(), nn.Dropout(config.dropout))
            )
        )
        self.heads = zero_linear(config.width, config.horizon * dimension)

    def forward(self, steps: Steps, outputs: int, state: DirectState | None = None) -> tuple[Tensor, DirectState]:
        features = steps.features[..., :-1]  # the last is the gap that is asked for: the forecast is the same for all
        recent = features if state is None else torch.cat([state.recent, features], dim=1)
        now = steps.ticks[:, -outputs:]
        if state is None or state.taken == self.steps_at_once:
            velocities = self.heads(self.layers(last_steps(recent, self.context, outputs)))
            velocities = rearrange(velocities, "b o (h d) -> h b o d", h=self.steps_at_once)
            forecast, begun, taken = velocities.unbind(), now, 0
        else:
            forecast, begun, taken = state.forecast, state.begun, state.taken
        kept = recent[:, max(0, recent.shape[1] - self.context + 1) :]
        state = DirectState(kept, tuple(tick[:, -1:] for tick in forecast), begun[:, -1:], taken + 1)
        if steps.gaps is None:
            return forecast[taken], state
        return self.between(forecast, now - begun, steps.gaps[:, -outputs:]), state

    def between(self, forecast: tuple[Tensor, ...], start: Tensor, gap: Tensor) -> Tensor:
        """The mean velocity from `start` on, over a gap; (B, outputs) in ticks -> (B, outputs, D)."""
        ticks = torch.arange(self.steps_at_once, device=start.device)
        ends = torch.cat([ticks[1:], ticks.new_tensor([2**31])])  # beyond the horizon it goes straight on
        start, end = start[..., None], (start + gap)[..., None]
        share = (end.minimum(ends) - start.maximum(ticks)).clamp_min(0) / gap[..., None]  # (B, outputs, horizon)
        return torch.einsum("b o h, h b o d -> b o d", share.to(forecast[0].dtype), torch.stack(forecast))


class CausalTransformer(Network):
    """Pre-norm transformer; each layer attends to the last `context` steps, by rotary positions in time.

    Rotary positions (Su et al. 2021, arXiv:2104.09864) turn queries and keys by angles that grow with *time*, not with
    the index, so attention knows how long ago a step was, on an irregular clock too, and never when the sequence
    began. The state holds each layer's keys and values of the last `context` - 1 steps.
    """

    def __init__(self, inputs: int, config: NetworkConfig) -> None:
        super().__init__()
        if config.width % (2 * config.heads):
            raise ConfigurationError(
                f"--predictor.width {config.width} is no multiple of twice --predictor.heads {config.heads}: "
                "rotary positions turn pairs of channels; choose another number of heads"
            )
        self.embed = nn.Linear(inputs, config.width)
        self.blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self, steps: Steps, outputs: int, state: list[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        hidden, kept = self.embed(steps.features), []
        for index, block in enumerate(self.blocks):
            hidden, keys_values = block(hidden, steps.ticks, None if state is None else state[index])
            kept.append(keys_values)
        return self.norm(hidden[:, -outputs:]), kept


class CausalBlock(AttentionBlock):
    """Causal self-attention, then an MLP; hidden (B, T, width), ticks (B, T), keys and values of the steps before."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config.width, config.heads, config.dropout)
        self.context = config.context

    def forward(
        self, hidden: Tensor, ticks: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        queries, keys, values = self.project(hidden)
        queries, keys = self.turn(queries, ticks), self.turn(keys, ticks)
        if state is not None:
            keys, values = torch.cat([state[0], keys], dim=2), torch.cat([state[1], values], dim=2)
        mask = self.visible(queries.shape[2], keys.shape[2], hidden.device)
        oldest = max(0, keys.shape[2] - self.context + 1)
        return self.attend(hidden, queries, keys, values, mask), (keys[:, :, oldest:], values[:, :, oldest:])

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Which keys each query may see: itself and the `context` - 1 before it; None for all of them."""
        if queries == 1 and keys <= self.context:
            return None
        back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
        return (back >= 0) & (back < self.context)  # (queries, keys)

    def turn(self, channels: Tensor, ticks: Tensor) -> Tensor:
        """Turn pairs of channels (B, heads, T, C) by time; wavelengths from 4 ticks to 16 contexts."""
        pairs = channels.shape[3] // 2
        slowest = 16.0 * self.context / 4.0
        angular = (2 * torch.pi / 4) * slowest ** -(torch.arange(pairs, device=ticks.device) / max(1, pairs - 1))
        # In float32 whatever the precision: in half of it, angles would be off by a quarter turn.
        angle = ticks[:, None, :, None] * angular  # (B, 1, T, C / 2)
        cosine, sine = angle.cos().to(channels.dtype), angle.sin().to(channels.dtype)
        even, odd = channels[..., :pairs], channels[..., pairs:]
        return torch.cat([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)


class GRU(Network):
    """Gated recurrent unit. Its state is the hidden state."""

    def __init__(self, inputs: int, config: NetworkConfig) -> None:
        super().__init__()
        dropout = config.dropout if config.depth > 1 else 0.0
        self.recurrence = nn.GRU(inputs, config.width, config.depth, batch_first=True, dropout=dropout)

    def forward(self, steps: Steps, outputs: int, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden, state = self.recurrence(steps.features, state)
        return hidden[:, -outputs:], state


NETWORKS: dict[str, Callable[[int, NetworkConfig], Network]] = {
    "mlp": ResidualMLP,
    "direct": DirectMLP,
    "transformer": CausalTransformer,
    "gru": GRU,
}


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer that gives zeros until it has learned something: a guess that stays as it is."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def last_steps(steps: Tensor, context: int, outputs: int) -> Tensor:
    """For each of the last `outputs` steps the `context` steps up to it, oldest first, flattened.

    Before the beginning the first step is repeated. (B, T, F) -> (B, outputs, context x F).
    """
    needed = context + outputs - 1
    steps = steps[:, -needed:]
    padded = functional.pad(rearrange(steps, "b t f -> b f t"), (needed - steps.shape[1], 0), mode="replicate")
    return rearrange(padded.unfold(2, context, 1), "b f t k -> b t (k f)")
