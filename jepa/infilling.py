"""Embeddings on both sides of a gap -> those inside it, and the guess that has to be beaten: a straight line across.

A sequence of embeddings (B, T, D) comes with a mask (B, T), True where an embedding is hidden. Every gap has a visible
embedding on both sides. What stands at a hidden place has no influence on anything, not even if it is NaN. All of this
is in *standardised* space, as in `jepa.predictor`; `Infiller.standardise` leads there.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from jepa.attention import AttentionBlock
from jepa.diagnostics import floor_std
from jepa.encoder import ConfigurationError
from jepa.networks import zero_linear

NEAREST = 4
"""Visible embeddings on each side of a gap that each place in it is shown."""


@dataclass(frozen=True)
class InfillerConfig:
    """The infiller."""

    longest_gap: int = 9
    """How many embeddings in a row it learns to fill in, at most."""
    context: int = 8
    """How many embeddings it sees on each side of the longest gap."""
    width: int = 128
    """Width of the hidden layers."""
    depth: int = 2
    """Number of layers."""
    heads: int = 8
    """Attention heads; must divide the width."""
    dropout: float = 0.0
    """Dropout between layers."""

    @property
    def window(self) -> int:
        """Embeddings in the longest gap and its context together."""
        return self.longest_gap + 2 * self.context


class Block(AttentionBlock):
    """Pre-norm self-attention in both directions, then an MLP; (B, T, width) -> (B, T, width).

    Attention has a learned bias for each head and distance in time (Raffel et al. 2020, arXiv:1910.10683): the same
    embeddings give the same prediction wherever in a sequence they stand.
    """

    def __init__(self, config: InfillerConfig) -> None:
        super().__init__(config.width, config.heads, config.dropout)
        self.farthest = config.window - 1
        self.distance_bias = nn.Parameter(torch.zeros(config.heads, 2 * self.farthest + 1))

    def forward(self, states: Tensor) -> Tensor:
        at = torch.arange(states.shape[1], device=states.device)
        distance = (at - at[:, None]).clamp(-self.farthest, self.farthest)  # (T, T)
        queries, keys, values = self.project(states)
        bias = self.distance_bias[:, distance + self.farthest].to(queries.dtype)  # (heads, T, T)
        return self.attend(states, queries, keys, values, bias)


class Infiller(nn.Module, PyTorchModelHubMixin):
    """A trained infiller, with all that is needed to use it.

    A bidirectional transformer on embeddings of which some are masked (Devlin et al. 2019, arXiv:1810.04805). Of each
    hidden place it is told where in its gap that is, by a learned mask token; the line across the gap there; and the
    nearest visible embeddings on both sides relative to that line, each with a learned weight for that place. These
    also lead straight to the head: most of the answer is linear in them.

    Delta-parametrisation: to that line it adds sigma * f, where sigma is the line's usual error in gaps of that length
    and the head of f is zero at first, so training starts from linear interpolation. What is added is trusted, for each
    length, as far as validation clips advise (`fit_trust`).

    Raises:
        ConfigurationError: the configuration cannot be built.
    """

    mean: Tensor
    std: Tensor
    sigma: Tensor
    trust: Tensor

    def __init__(
        self, infiller: InfillerConfig, embedding_dimension: int, fps: float, encoder_fingerprint: str
    ) -> None:
        super().__init__()
        config, dimension = infiller, embedding_dimension
        for name in ("longest_gap", "context", "width", "depth", "heads"):
            if (value := getattr(config, name)) < 1:
                raise ConfigurationError(f"--infiller.{name.replace('_', '-')} is {value}: it must be positive")
        if not 0 <= config.dropout < 1:
            raise ConfigurationError(f"--infiller.dropout is {config.dropout:g}: it must be at least 0, below 1")
        if config.width % config.heads:
            raise ConfigurationError(
                f"--infiller.heads {config.heads} does not divide --infiller.width {config.width}: choose a divisor"
            )
        self.config, self.fps, self.encoder_fingerprint = config, fps, encoder_fingerprint
        views = 2 * NEAREST + 1
        places = 1 + config.longest_gap**2  # all visible ones are alike
        self.emphasis = nn.Parameter(torch.zeros(places, views))
        self.tokens = nn.Parameter(torch.zeros(places, config.width))
        self.embed = nn.Linear(views * dimension, config.width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)), nn.LayerNorm(config.width))
        self.head = zero_linear(config.width + views * dimension, dimension)
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("std", torch.ones(dimension))
        self.register_buffer("sigma", torch.ones(config.longest_gap, dimension))
        self.register_buffer("trust", torch.ones(config.longest_gap))

    def forward(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """Fill in what is hidden.

        Args:
            embeddings: (B, T, D), standardised.
            hidden: bool (B, T). Gaps longer than any in training are filled in too, worse.

        Returns:
            (B, T, D): the visible embeddings as they are, and predictions of the hidden ones.

        Raises:
            ValueError: the first or the last embedding of a sequence is hidden.
        """
        line = linear_interpolation(embeddings, hidden)
        at = self._gap_index(hidden)
        added = self.trust[at][..., None] * self.sigma[at] * self._deviation(line, hidden)
        return torch.where(hidden[..., None], line + added, line)

    def loss(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error of f over the hidden embeddings of each sequence, and over sequences. Scalar."""
        line = linear_interpolation(embeddings, hidden)
        target = (embeddings - line) / self.sigma[self._gap_index(hidden)]
        error = (self._deviation(line, hidden) - target).square().mean(dim=-1)  # (B, T)
        return ((error * hidden).sum(dim=1) / hidden.sum(dim=1)).mean()

    def standardise(self, embeddings: Tensor) -> Tensor:
        """Raw embeddings (..., D) to the space that the infiller lives in."""
        return (embeddings - self.mean) / self.std

    def _deviation(self, line: Tensor, hidden: Tensor) -> Tensor:
        """f: (B, T, D) with lines across the gaps, (B, T) -> (B, T, D), to be scaled by sigma."""
        before, after = nearest_visible(hidden)
        away, at = (torch.arange(count, device=hidden.device) for count in (NEAREST, hidden.shape[1]))
        seen = torch.cat([before[..., None] - away, after[..., None] + away], dim=-1).clamp(0, len(at) - 1)
        nearest = torch.take_along_dim(line, rearrange(seen, "b t k -> b (t k) 1"), dim=1)
        nearest = rearrange(nearest, "b (t k) d -> b t k d", t=len(at)) - line[:, :, None]
        views = torch.cat([line[:, :, None], nearest / self.sigma.mean(dim=0)], dim=2)  # (B, T, views, D)

        longest = self.config.longest_gap
        in_gap = (at - before - 1).clamp(0, longest - 1)
        place = torch.where(hidden, 1 + longest * self._gap_index(hidden) + in_gap, 0)  # (B, T)
        views = rearrange((1 + self.emphasis[place][..., None]) * views, "b t k d -> b t (k d)")
        states = self.blocks(self.embed(views) + self.tokens[place])
        return self.head(torch.cat([states, views], dim=-1))

    def _gap_index(self, hidden: Tensor) -> Tensor:
        """For each place its gap's length, less 1, as an index into `sigma`; (B, T) -> int (B, T)."""
        before, after = nearest_visible(hidden)
        return (after - before - 2).clamp(0, self.config.longest_gap - 1)


def nearest_visible(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest visible places up to and from each place; bool (B, T) -> int (B, T) twice.

    Raises:
        ValueError: the first or the last embedding of a sequence is hidden.
    """
    if hidden[:, [0, -1]].any():
        raise ValueError("the first or the last embedding is hidden: a gap needs a visible one on both sides")
    last = hidden.shape[1] - 1
    at = torch.arange(last + 1, device=hidden.device)
    before = at.masked_fill(hidden, 0).cummax(dim=1).values
    after = at.masked_fill(hidden, last).flip(1).cummin(dim=1).values.flip(1)
    return before, after


def linear_interpolation(embeddings: Tensor, hidden: Tensor) -> Tensor:
    """A straight line across each gap; see `Infiller.forward`."""
    before, after = nearest_visible(hidden)
    at = torch.arange(hidden.shape[1], device=hidden.device)
    weight = (at - before) / (after - before).clamp_min(1)  # (B, T), 0 where visible
    start, end = (torch.take_along_dim(embeddings, place[..., None], dim=1) for place in (before, after))
    return torch.lerp(start, end, weight[..., None].to(embeddings.dtype))


def copy_last(embeddings: Tensor, hidden: Tensor) -> Tensor:
    """The last embedding before each gap once more; see `Infiller.forward`."""
    before, _ = nearest_visible(hidden)
    return torch.take_along_dim(embeddings, before[..., None], dim=1)


def draw_gaps(count: int, config: InfillerConfig, generator: torch.Generator) -> Tensor:
    """One gap in each of `count` windows, of random length and at a random place, bool (count, window)."""
    length = torch.randint(1, config.longest_gap + 1, (count, 1), generator=generator)
    start = 1 + (torch.rand(count, 1, generator=generator) * (config.window - length - 1)).long()
    at = torch.arange(config.window)
    return (at >= start) & (at < start + length)


def middle_gap(length: int, config: InfillerConfig) -> Tensor:
    """A gap in the middle of a window, bool (window,)."""
    hidden = torch.zeros(config.window, dtype=torch.bool)
    start = (config.window - length) // 2
    hidden[start : start + length] = True
    return hidden


def measure_windows(infiller: Infiller, windows: Tensor) -> None:
    """Standardisation, and the usual error of linear interpolation, into the infiller's buffers.

    Args:
        infiller: untrained.
        windows: raw embeddings of training clips, (N, window, D).
    """
    infiller.mean.copy_(windows.double().mean(dim=(0, 1)))
    infiller.std.copy_(floor_std(windows.double().std(dim=(0, 1))))
    standardised = infiller.standardise(windows)
    for length in range(1, infiller.config.longest_gap + 1):
        hidden = middle_gap(length, infiller.config)
        line = linear_interpolation(standardised, hidden.expand(len(windows), -1))
        error = (line - standardised)[:, hidden]
        infiller.sigma[length - 1] = floor_std(error.square().mean(dim=(0, 1)).sqrt())


@torch.no_grad()
def fit_trust(infiller: Infiller, windows: Tensor) -> Tensor:
    """How far what is added to the line is to be trusted, from 0 to 1, into the infiller: by least squares.

    Linear interpolation, trust 0, is among the choices: on these windows no length of a gap is worse.

    Args:
        infiller: in evaluation mode.
        windows: standardised embeddings of validation clips, (N, window, D).

    Returns:
        The mean squared error that is left, relative to linear interpolation's, (longest gap,).
    """
    infiller.trust.fill_(1.0)
    relative = torch.empty_like(infiller.trust)
    for length in range(1, infiller.config.longest_gap + 1):
        gap = middle_gap(length, infiller.config).to(windows.device)
        hidden = gap.expand(len(windows), -1)
        line = linear_interpolation(windows, hidden)[:, gap].double()
        added, missing = infiller(windows, hidden)[:, gap].double() - line, windows[:, gap].double() - line
        trust = least_squares_trust(added, missing)
        infiller.trust[length - 1] = trust
        error = (trust * added - missing).square().mean()
        relative[length - 1] = error / missing.square().mean().clamp_min(1e-12)
    return relative


def least_squares_trust(added: Tensor, missing: Tensor) -> Tensor:
    """The share, from 0 to 1, of what is added to a line that comes nearest to what is missing from it; a scalar."""
    return ((added * missing).sum() / added.square().sum().clamp_min(1e-12)).clamp(0, 1)
