"""Past embeddings -> the next embedding. A predictor predicts, and nothing else."""

from dataclasses import asdict, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from jepa.config import NotNegativeInt, Positive, PositiveInt, require_fits
from jepa.errors import ConfigurationError
from jepa.networks import NetworkConfig
from jepa.sequence import Sequence, line_across


class LatentBlock(nn.Module):
    """A residual block modulated by the latent; (B, T, width), (B, T, Z) -> (B, T, width)."""

    def __init__(self, width: int, latent_dimension: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulate = nn.Linear(latent_dimension, 2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, hidden: Tensor, latent: Tensor) -> Tensor:
        scale, shift = self.modulate(latent).chunk(2, dim=-1)
        return hidden + self.mlp(self.norm(hidden) * (1 + scale) + shift)  # type: ignore[no-any-return]


class Predictor(nn.Module):
    """A predictor of the next embedding.

    From the standardised embeddings, their velocities in units of sigma (a typical change in one tick) and the actions,
    a network f with a zero-initialised head gives e_t + sigma * f, so training starts from copying the last embedding.
    All tokens of a grid share one network. Embeddings are raw on the way in and on the way out. Actions weigh nothing
    at first: the weights of a predictor without them fit one with them (`load_state_dict`, not strict).

    Embeddings of the encoder with this fingerprint have `shape`, (*tokens, D), on a clock of `fps` ticks a second; an
    action has a number for each name of `actions`. The last `slow` numbers of an embedding stay what they are: they say
    what the others depend on, such as where walls are.
    """

    mean: Tensor
    std: Tensor
    change_std: Tensor
    action_mean: Tensor
    action_std: Tensor

    def __init__(
        self, config: NetworkConfig, shape: tuple[int, ...], *, fps: float, encoder_fingerprint: str,
        actions: tuple[str, ...] = (), slow: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value, hint in (
            ("shape", shape, tuple[PositiveInt, ...]), ("fps", fps, Positive), ("actions", actions, tuple[str, ...]),
            ("slow", slow, NotNegativeInt), ("encoder_fingerprint", encoder_fingerprint, str),
        ):  # fmt: skip
            require_fits(name, value, hint)
        self.config, self.shape, self.fps, self.encoder_fingerprint = config, shape, fps, encoder_fingerprint
        self.actions, self.slow, self.latent_dimension = actions, slow, config.latent_dimension
        dimension = self.shape[-1]
        if slow >= dimension:
            raise ConfigurationError("slow_dimension", f"is {slow}, and embeddings have {dimension} numbers: take less")
        self.network = config.build(2 * dimension, len(self.shape) == 3, actions=len(actions))
        self.latent_block = LatentBlock(config.width, config.latent_dimension) if config.latent_dimension else None
        self.head = nn.Linear(config.width, dimension - slow)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        for name, size in (("", dimension), ("action_", len(actions))):
            self.register_buffer(f"{name}mean", torch.zeros(size))
            self.register_buffer(f"{name}std", torch.ones(size))
        self.register_buffer("change_std", torch.ones(dimension))

    def forward(self, past: Sequence, last: int = 1, latent: Tensor | None = None) -> Tensor:
        """What comes after each of the last embeddings, (B, last, *tokens, D); it depends on those up to it only."""
        return self.step(self.fill(past), None, latent, last=last)[0]

    def step(
        self, newest: Sequence, state: tuple[Tensor, Any] | None, latent: Tensor | None = None, *, last: int = 1
    ) -> tuple[Tensor, tuple[Tensor, Any]]:
        """One step of a rollout: (B, last, *tokens, D), and the state for the next step, of predictor and network.

        Args:
            newest: the past or, with a state, what was predicted last; `ValueError` where actions are missing.
            state: what this returned for the embeddings before; None at the beginning.
            latent: (B, last, Z), standard normal; None for the latent's mean.
            last: how many predictions.
        """
        batch, tokens = len(newest.embeddings), newest.embeddings.shape[2:-1]
        places = tokens.numel()
        embeddings = rearrange(self.standardise(newest.embeddings), "b t ... d -> (b ...) t d")
        before, memory = (embeddings[:, :1], None) if state is None else state
        hidden, kept = self.network(self._features(newest, embeddings, before), last, memory, tokens)
        if self.latent_block is not None:
            latent = hidden.new_zeros(batch, last, self.latent_dimension) if latent is None else latent
            hidden = self.latent_block(hidden, latent.repeat_interleave(places, dim=0))
        predicted = embeddings[:, -last:] + self._change(hidden)  # (B x places, last, D)
        raw = self.unstandardise(predicted.unflatten(0, (batch, *tokens)).movedim(-2, 1))
        return raw, (embeddings[:, -1:], kept)

    def fill(self, seen: Sequence) -> Sequence:
        """The same with nothing hidden: what was is predicted from all that is visible, before, after and beside it.

        The prediction is line + sigma * f, by the same network and head, so training starts from the line across.
        Raises `ValueError` where the predictor was not trained to, or actions are missing.
        """
        if seen.hidden is None:
            return seen
        if not getattr(self.config, "infill", False):  # of most networks the configuration has no such field
            raise ValueError("parts are hidden, and the predictor was not trained to fill them in (infill)")
        tokens, length = seen.hidden.shape[2:], seen.hidden.shape[1]
        line, _ = line_across(self.standardise(seen.embeddings), seen.hidden)
        line, masked = rearrange(line, "b t ... d -> (b ...) t d"), rearrange(seen.hidden, "b t ... -> (b ...) t")
        hidden, _ = self.network(self._features(seen, line, line[:, :1]), length, None, tokens, masked)
        filled = (line + self._change(hidden)).unflatten(0, (len(seen.hidden), *tokens)).movedim(-2, 1)
        embeddings = torch.where(seen.hidden[..., None], self.unstandardise(filled), seen.embeddings)
        return replace(seen, embeddings=embeddings, hidden=None)

    def _change(self, hidden: Tensor) -> Tensor:
        """What hidden states (..., width) say that is added to standardised embeddings, (..., D)."""
        return self.change_std * functional.pad(self.head(hidden), (0, self.slow))

    def _features(self, newest: Sequence, embeddings: Tensor, before: Tensor) -> Tensor:
        """What the network is shown of standardised steps (B x places, T, D) after the one before them."""
        velocities = torch.diff(embeddings, dim=1, prepend=before) / self.change_std
        # Of one embedding alone there is no velocity, in a rollout neither.
        features = [embeddings, velocities if self.config.context > 1 else torch.zeros_like(velocities)]
        if self.actions:
            if newest.actions is None:
                raise ValueError(f"the predictor takes {len(self.actions)} actions a step, and none are given")
            actions = (newest.actions - self.action_mean) / self.action_std
            features.append(actions.repeat_interleave(len(embeddings) // len(actions), dim=0))
        return torch.cat(features, dim=2)

    def standardise(self, embeddings: Tensor) -> Tensor:
        """Raw embeddings (..., D) in units of their standard deviation around their mean."""
        return (embeddings - self.mean) / self.std

    def unstandardise(self, embeddings: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return embeddings * self.std + self.mean

    def description(self) -> dict[str, Any]:
        """What it is built from, as JSON values: `build_predictor` takes them."""
        return {
            "predictor": {"kind": self.config.kind, **asdict(self.config)}, "shape": list(self.shape), "fps": self.fps,
            "encoder_fingerprint": self.encoder_fingerprint, "actions": list(self.actions), "slow": self.slow,
        }  # fmt: skip
