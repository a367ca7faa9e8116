r"""A predictor of one's own, in one file: all steps of a forecast at once, instead of each from the one before.

  python examples/direct_predictor.py train_predictor --predictor.kind direct --rollout-steps 20 \
      --train-cache cache/train --validation-cache cache/val --output-dir runs/direct
  python examples/direct_predictor.py evaluate_rollout --predictor runs/direct --cache cache/test

Direct instead of iterated forecasts (Ben Taieb et al. 2012, arXiv:1108.3259): errors are not fed back. A kind of
predictor is a network and a configuration that builds it; that is all of it, and training, samples, calibration and
evaluation come with it. Named in the union `PredictorConfig` of `jepa/networks.py`, every command knows it; here that
line stands at the end, so that one file is the whole example.
"""

import importlib
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from jepa import networks
from jepa.config import PositiveInt
from jepa.errors import ConfigurationError
from jepa.networks import NetworkConfig, last_windows


class DirectState(NamedTuple):
    """What a direct forecast remembers."""

    recent: Tensor
    """(B, up to context - 1, F): the newest steps."""
    forecast: Tensor
    """(B, horizon, width): hidden states of all steps, made at once."""
    taken: int
    """Steps of it that have been answered."""


class DirectMLP(nn.Module):
    """An MLP from the last `context` steps to hidden states for each of the next `horizon`.

    In a rollout the second step and those after it do not look at what was predicted; after `horizon` steps the next
    forecast begins. Nothing is normalised: on strange video a normalised hidden state would be as large as ever, and
    the forecast as bold.
    """

    def __init__(self, features: int, config: "DirectConfig") -> None:
        super().__init__()
        self.context, self.horizon = config.context, config.horizon
        widths = [features * config.context] + [config.width] * config.depth
        self.layers = nn.Sequential(
            *(layer for before, after in pairwise(widths)
              for layer in (nn.Linear(before, after), nn.GELU(), nn.Dropout(config.dropout))),
            nn.Linear(config.width, config.horizon * config.width),
        )  # fmt: skip

    def forward(
        self, features: Tensor, last: int, state: DirectState | None = None, grid: tuple[int, ...] = ()
    ) -> tuple[Tensor, DirectState]:
        recent = features if state is None else torch.cat([state.recent, features], dim=1)
        kept = recent[:, max(0, recent.shape[1] - self.context + 1) :]
        if state is not None and state.taken < self.horizon:
            answer = state.forecast[:, state.taken : state.taken + 1]
            return answer, DirectState(kept, state.forecast, state.taken + 1)
        hidden = self.layers(last_windows(recent, self.context, last))
        hidden = rearrange(hidden, "b last (h w) -> b last h w", h=self.horizon)
        return hidden[:, :, 0], DirectState(kept, hidden[:, -1], taken=1)


@dataclass(frozen=True)
class DirectConfig(NetworkConfig):
    """An MLP that forecasts all steps at once."""

    kind: ClassVar[str] = "direct"
    horizon: PositiveInt = 20
    """Steps that are forecast from the same past; training has to roll out so many."""

    def build(self, features: int, grid: bool, *, actions: int = 0) -> nn.Module:
        if actions:
            raise ConfigurationError("actions", "are not for a forecast made at once, which sees none but the first")
        return DirectMLP(features, self)


if __name__ == "__main__":
    vars(networks)["PredictorConfig"] = networks.PredictorConfig | DirectConfig  # before a command reads it
    from pipelines.run.command import run_command

    command = importlib.import_module(f"pipelines.{sys.argv.pop(1)}")
    run_command(command.main, command.Options)
