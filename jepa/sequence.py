"""What flows through the house: embeddings with their times and actions, and the future that is asked for."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CLOCK_TOLERANCE = 0.1
"""Ticks by which a time may be off its tick: recordings jitter, and times are rounded."""


@dataclass(frozen=True)
class Sequence:
    """Embeddings on a clock; a video that nobody acts in has no actions. Raises `ValueError` if shapes do not fit."""

    embeddings: Tensor
    """float (B, T, *tokens, D), as the encoder gives them."""
    times: Tensor
    """float64 (B, T) or (1, T), seconds."""
    actions: Tensor | None = None
    """float (B, T, A): taken after each embedding, on the way to the next."""
    hidden: Tensor | None = None
    """bool (B, T, *tokens): what is not known, wherever it is; its embeddings have no influence."""

    def __post_init__(self) -> None:
        shape, times = tuple(self.embeddings.shape), tuple(self.times.shape)
        if len(shape) < 3 or shape[1] == 0:
            raise ValueError(f"embeddings have shape {shape}: it must be (B, T, *tokens, D) with at least one step")
        if times not in (shape[:2], (1, shape[1])):
            raise ValueError(f"times have shape {times}: it must be {shape[:2]} or {(1, shape[1])}")
        if self.actions is not None and (self.actions.ndim != 3 or self.actions.shape[:2] != shape[:2]):
            raise ValueError(f"actions have shape {tuple(self.actions.shape)}: it must be {shape[:2]} and their number")
        if self.hidden is not None and tuple(self.hidden.shape) != shape[:-1]:
            raise ValueError(f"hidden has shape {tuple(self.hidden.shape)}: it must be {shape[:-1]}")

    @classmethod
    def on_clock(
        cls, embeddings: Tensor, fps: float, actions: Tensor | None = None, *, hidden: Tensor | None = None
    ) -> "Sequence":
        """A sequence of consecutive ticks, the first at 0 s."""
        ticks = torch.arange(embeddings.shape[1], dtype=torch.float64, device=embeddings.device)
        return cls(embeddings, ticks[None] / fps, actions, hidden)

    def cut(self, context: int, fps: float) -> tuple["Sequence", "Future", Tensor]:
        """The first `context` steps, what is then asked of a rollout, and what came, (B, H, *tokens, D)."""
        acts, came = self.actions, self.embeddings[:, context:]
        known, done = (None, None) if acts is None else (acts[:, :context], acts[:, context - 1 : -1])
        past = replace(self, embeddings=self.embeddings[:, :context], times=self.times[:, :context], actions=known)
        return past, Future.ticks(came.shape[1], fps, done), came

    def followed_by(self, actions: Tensor | None) -> "Sequence":
        """The same with other actions (B, 1, A) after the last embedding."""
        before = [] if self.actions is None else [self.actions[:, :-1]]
        return self if actions is None else replace(self, actions=torch.cat([*before, actions], dim=1))

    def require_clock(self, fps: float) -> None:
        """Raises `ValueError` where the steps are not consecutive ticks of a clock."""
        jumps = (self.times.diff(dim=1) * fps).flatten()  # in ticks
        for jump in jumps[(jumps - 1).abs() > 2 * CLOCK_TOLERANCE].tolist():
            raise ValueError(f"the past jumps by {jump:.2f} ticks of {1 / fps:g} s: it must be consecutive ticks")


@dataclass(frozen=True)
class Future:
    """What is asked of a rollout: when, and what is done until then. Raises `ValueError` if times do not increase."""

    times: Tensor
    """float64 (H,), seconds after the last embedding of the past, increasing."""
    actions: Tensor | None = None
    """float (B, ticks, A): taken on the way to each tick of the clock up to the last time, the first of them now."""

    def __post_init__(self) -> None:
        if self.times.ndim != 1 or len(self.times) == 0:
            raise ValueError(f"times have shape {tuple(self.times.shape)}: it must be (H,) with at least one time")
        if bool((self.times.diff(prepend=self.times.new_zeros(1)) <= 0).any()):
            raise ValueError("times must increase, from above 0 s")

    @classmethod
    def ticks(cls, horizon: int, fps: float, actions: Tensor | None = None) -> "Future":
        """The next `horizon` ticks of a clock."""
        return cls(torch.arange(1, horizon + 1, dtype=torch.float64) / fps, actions)


def line_across(embeddings: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """A straight line in time across hidden embeddings, held where one side is visible, and 0 where nothing is.

    Embeddings (B, T, *tokens, D) and whether each is hidden, (B, T, *tokens) -> (B, T, *tokens, D), and how many ticks
    away the nearest visible one of the same place is, int (B, T, *tokens); T where there is none.
    """
    length = embeddings.shape[1]
    at = torch.arange(length, device=hidden.device).view(-1, *[1] * (hidden.ndim - 2)).expand_as(hidden)
    before = at.masked_fill(hidden, -length).cummax(dim=1).values
    after = at.masked_fill(hidden, 2 * length).flip(1).cummin(dim=1).values.flip(1)
    nearest = torch.minimum(at - before, after - at).clamp(max=length)
    first, last = torch.where(before < 0, after, before), torch.where(after >= length, before, after)
    share = ((at - first) / (last - first).clamp_min(1))[..., None].to(embeddings.dtype)
    left, right = (embeddings.take_along_dim(end.clamp(0, length - 1)[..., None], 1) for end in (first, last))
    return torch.lerp(left, right, share).masked_fill((nearest == length)[..., None], 0), nearest
