"""Past embeddings -> next embedding.

A predictor maps a sequence of embeddings (B, T, D) to predictions (B, outputs, D), one after each of the last
`outputs` embeddings (by default only the last): the prediction of embedding t + 1 depends on embeddings up to t only.
It lives in *standardised* space, where each feature of the training embeddings has mean 0 and standard deviation 1;
`Predictor.standardise` leads there. The networks inside are in `jepa.networks`, the guesses to beat in
`jepa.baselines`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from jepa.baselines import Baseline, CopyLast, LinearExtrapolation, Mean, Ridge, Shrunk
from jepa.encoder import ConfigurationError
from jepa.networks import NETWORKS, Network, Steps, zero_linear
from jepa.shrinkage import LONGEST, no_shrinkage


@dataclass(frozen=True)
class PredictorConfig:
    """The temporal predictor."""

    kind: str = "mlp"
    """`mlp`: residual MLP on the last `context` embeddings. `direct`: an MLP that forecasts `horizon` steps at once,
    for few and noisy videos. `transformer`: causal. `gru`: recurrent. Or another of `jepa.networks.NETWORKS`."""
    context: int = 8
    """How many past embeddings a prediction starts from."""
    width: int = 512
    """Width of the hidden layers."""
    depth: int = 3
    """Number of residual blocks or layers."""
    heads: int = 8
    """transformer: attention heads; twice their number must divide the width."""
    dropout: float = 0.0
    """Dropout between layers."""
    horizon: int = 8
    """direct: steps that are forecast at once; no more than are trained by --rollout-steps."""
    latent_dimension: int = 0
    """Numbers drawn at random for each step of a sampled future; 0 for a predictor that knows one future only."""


class LatentBlock(nn.Module):
    """What chance decides: a residual block modulated by the latent; (B, T, width), (B, T, Z) -> (B, T, width)."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.modulate = nn.Linear(config.latent_dimension, 2 * config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.width), nn.GELU(), nn.Linear(config.width, config.width)
        )

    def forward(self, hidden: Tensor, latent: Tensor) -> Tensor:
        scale, shift = self.modulate(latent).chunk(2, dim=-1)
        modulated: Tensor = hidden + self.mlp(self.norm(hidden) * (1 + scale) + shift)
        return modulated


class Member(nn.Module):
    """One network of a predictor, and its head; steps -> velocities in units of sigma a tick, (B, outputs, D)."""

    def __init__(self, dimension: int, config: PredictorConfig) -> None:
        super().__init__()
        self.network = NETWORKS[config.kind](2 * dimension + 2, config)
        self.latent_block = LatentBlock(config) if config.latent_dimension else None
        if self.network.gives_velocities and config.latent_dimension:
            raise ConfigurationError(
                f"--predictor.latent-dimension {config.latent_dimension} with --predictor.kind {config.kind}: it has a "
                "head of its own, and no hidden states for what is drawn to act on; take another kind"
            )
        self.head = nn.Identity() if self.network.gives_velocities else zero_linear(config.width, dimension)

    def forward(self, steps: Steps, outputs: int, state: Any, latent: Tensor | None) -> tuple[Tensor, Any]:
        hidden, state = self.network(steps, outputs, state)
        if self.latent_block is not None:
            hidden = self.latent_block(hidden, latent)
        return self.head(hidden), state


class State(NamedTuple):
    """What a rollout remembers of the steps before."""

    last: Tensor
    """(B, 1, D), the newest embedding."""
    gap: Tensor
    """(B, 1), ticks from it to the next."""
    ticks: Tensor
    """(B, 1), its time."""
    members: list[Any]
    """Of each network."""


class Predictor(nn.Module, PyTorchModelHubMixin):
    """A trained predictor, with all that is needed to use it and to judge it.

    Delta-parametrisation: from the embeddings, their velocities in units of sigma (a typical change in one tick) and
    the gaps in time before and after them, a network f with a zero-initialised head gives e_t + gap * sigma * f, so
    training starts from copying the last embedding. An ensemble (`members` above 1) predicts the mean of its members'
    predictions, step by step of a rollout (Lakshminarayanan et al. 2017, arXiv:1612.01474).

    With a latent dimension it has one future for each draw of the latent: `jepa.sampling.sample`.

    Beside the network it holds the standardisation of its embedding space, the ridge regression fitted on the same
    training windows, for both how far their rollouts are to be trusted (`jepa.shrinkage`), how far samples are to lie
    apart (`jepa.sampling`), the statistics of its own errors on validation clips up to `energy_horizon` steps ahead
    (`jepa.energy`), and what the embeddings are: their dimension, the clock that they lie on and the encoder that made
    them; and the longest gap, in ticks of that clock, that it has learned to leap over.

    Raises:
        ConfigurationError: the configuration cannot be built.
    """

    mean: Tensor
    std: Tensor
    change_std: Tensor
    shrinkage: Tensor
    ridge_shrinkage: Tensor
    sample_spread: Tensor
    error_mean: Tensor
    error_whitening: Tensor
    energy_quantiles: Tensor

    def __init__(
        self,
        predictor: PredictorConfig,
        embedding_dimension: int,
        fps: float,
        encoder_fingerprint: str,
        members: int = 1,
        energy_horizon: int = 1,
        longest_gap: int = 1,
    ) -> None:
        super().__init__()
        config = predictor
        if config.kind not in NETWORKS:
            raise ConfigurationError(f"unknown predictor '{config.kind}': choose one of {', '.join(NETWORKS)}")
        if config.context < 2:
            raise ConfigurationError(f"--predictor.context is {config.context}: at least 2 embeddings are needed")
        for name in ("width", "depth", "heads"):
            if (value := getattr(config, name)) < 1:
                raise ConfigurationError(f"--predictor.{name} is {value}: it must be positive")
        if not 0 <= config.dropout < 1:
            raise ConfigurationError(f"--predictor.dropout is {config.dropout:g}: it must be at least 0, below 1")
        if config.latent_dimension < 0:
            raise ConfigurationError(f"--predictor.latent-dimension is {config.latent_dimension}: it must be 0 or more")
        if config.latent_dimension and members > 1:
            raise ConfigurationError(
                f"--predictor.latent-dimension {config.latent_dimension} with {members} members: the mean of several "
                "samples is no sample; train one member, without --folds"
            )
        self.config, self.fps, self.encoder_fingerprint = config, fps, encoder_fingerprint
        self.energy_horizon, self.longest_gap = energy_horizon, longest_gap
        dimension = embedding_dimension
        self.members = nn.ModuleList(Member(dimension, config) for _ in range(members))
        self.ridge = Ridge(dimension, config.context)
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("std", torch.ones(dimension))
        self.register_buffer("change_std", torch.ones(dimension))
        self.register_buffer("shrinkage", no_shrinkage())
        self.register_buffer("ridge_shrinkage", no_shrinkage())
        self.register_buffer("sample_spread", torch.ones(LONGEST))
        self.register_buffer("error_mean", torch.zeros(energy_horizon, dimension))
        self.register_buffer("error_whitening", torch.eye(dimension).repeat(energy_horizon, 1, 1))
        self.register_buffer("energy_quantiles", torch.zeros(energy_horizon, 1001))

    def forward(
        self, past: Tensor, outputs: int = 1, gaps: Tensor | None = None, latent: Tensor | None = None
    ) -> Tensor:
        """What comes after each of the last `outputs` embeddings.

        Args:
            past: (B, T, D), standardised.
            outputs: how many predictions.
            gaps: (B, T) or (1, T), ticks from each embedding to the next, the last up to the prediction; None for the
                clock, where all are 1.
            latent: (B, outputs, Z), standard normal; None for the latent's mean.

        Returns:
            (B, outputs, D).
        """
        return self._predict(past, outputs, gaps, None, latent)[0]

    def advance(
        self, embeddings: Tensor, gaps: Tensor | None, state: State | None, latent: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One step of a rollout: take in the past or, with a state, what was predicted last; predict the next one.

        Args:
            embeddings: (B, T, D), those that are new.
            gaps: (B, T) or (1, T), see `forward`.
            state: what this returned for the embeddings before; None at the beginning.
            latent: (B, 1, Z); None for the latent's mean.

        Returns:
            (B, 1, D), and the state for the next step.
        """
        return self._predict(embeddings, 1, gaps, state, latent)

    def _predict(
        self, embeddings: Tensor, outputs: int, gaps: Tensor | None, state: State | None, latent: Tensor | None
    ) -> tuple[Tensor, State]:
        shape, on_clock = embeddings.shape[:2], gaps is None
        gaps = embeddings.new_ones(shape) if gaps is None else gaps.to(embeddings).expand(shape)
        if state is None:
            state = State(embeddings[:, :1], gaps.new_ones(shape[0], 1), -gaps.new_ones(shape[0], 1), [])
        before = torch.cat([state.gap, gaps[:, :-1]], dim=1)  # (B, T)
        velocity = torch.diff(embeddings, dim=1, prepend=state.last) / (self.change_std * before[..., None])
        ticks = state.ticks + before.cumsum(dim=1)  # (B, T)
        features = torch.cat([embeddings, velocity, torch.stack([before, gaps], dim=-1).log2()], dim=-1)
        if latent is None and self.config.latent_dimension:
            latent = embeddings.new_zeros(shape[0], outputs, self.config.latent_dimension)
        steps = Steps(features, ticks, None if on_clock else gaps)
        of_members = state.members or [None] * len(self.members)
        found = [member(steps, outputs, kept, latent) for member, kept in zip(self.members, of_members, strict=True)]
        change = torch.stack([change for change, _ in found]).mean(dim=0)  # (B, outputs, D)
        predicted = embeddings[:, -outputs:] + gaps[:, -outputs:, None] * self.change_std * change
        return predicted, State(embeddings[:, -1:], gaps[:, -1:], ticks[:, -1:], [kept for _, kept in found])

    @property
    def leaps(self) -> tuple[float, float]:
        """The shortest and the longest leap of a rollout that it knows, in ticks."""
        return (0, torch.inf) if self._network.leaps_anywhere else (1, self.longest_gap)

    def only(self, members: Sequence[int]) -> "Predictor":
        """Some members as a predictor, sharing their weights and all statistics with this one."""
        part = copy.copy(self)
        part._modules = self._modules | {"members": nn.ModuleList([self.members[member] for member in members])}
        return part

    @property
    def steps_at_once(self) -> int:
        """How many steps its networks forecast from the same past, see `jepa.networks.Network`."""
        return self._network.steps_at_once

    @property
    def _network(self) -> Network:
        """One of its networks, which are alike."""
        member = self.members[0]
        assert isinstance(member, Member)
        return member.network

    def standardise(self, embeddings: Tensor) -> Tensor:
        """Raw embeddings (..., D) to the space that predictors live in."""
        return (embeddings - self.mean) / self.std

    def baselines(self) -> dict[str, Baseline]:
        """The guesses to beat, by name, as predictors of the same interface."""
        return {
            "copy_last": CopyLast(),
            "linear_extrapolation": LinearExtrapolation(),
            "ridge": self.ridge,
            "shrunk_ridge": Shrunk(self.ridge, self.ridge_shrinkage),
            "mean": Mean(),
        }
