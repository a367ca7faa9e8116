"""Past embeddings -> next embedding, and the trivial guesses that a predictor has to beat.

Every predictor maps a sequence of embeddings (B, T, D) to predictions (B, outputs, D), one after each of the last
`outputs` embeddings (by default only the last): the prediction of embedding t + 1 depends on embeddings up to t only.
All of them live in *standardised* space, where each feature of the training embeddings has mean 0 and standard
deviation 1; `Predictor.standardise` leads there.

To add a predictor, write a network that maps steps (B, T, 2 D) causally to hidden states (B, outputs, width) of the
last `outputs` steps, say in `memory` how many past steps it makes use of, and name it in `NETWORKS`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as functional
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from jepa.encoder import ConfigurationError
from jepa.shrinkage import no_shrinkage

Kind = Literal["mlp", "transformer", "gru"]


@dataclass(frozen=True)
class PredictorConfig:
    """The temporal predictor."""

    kind: Kind = "mlp"
    """`mlp`: residual MLP on the last `context` embeddings. `transformer`: causal. `gru`: recurrent."""
    context: int = 8
    """How many past embeddings a prediction starts from."""
    width: int = 512
    """Width of the hidden layers."""
    depth: int = 3
    """Number of residual blocks or layers."""
    heads: int = 8
    """transformer: attention heads; must divide the width."""
    dropout: float = 0.0
    """Dropout between layers."""


class ResidualMLP(nn.Module):
    """Residual blocks on the last `context` steps, flattened; (B, T, inputs) -> (B, outputs, width)."""

    def __init__(self, inputs: int, config: PredictorConfig) -> None:
        super().__init__()
        self.context = self.memory = config.context
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

    def forward(self, steps: Tensor, outputs: int) -> Tensor:
        hidden = self.embed(last_steps(steps, self.context, outputs))  # (B, outputs, width)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.norm(hidden)


class CausalTransformer(nn.Module):
    """Pre-norm transformer over at most the last `context` steps; (B, T, inputs) -> (B, outputs, width).

    Attention reaches back `context` steps, with a learned bias for each head and distance: the same embeddings give
    the same prediction wherever in a sequence they stand.
    """

    def __init__(self, inputs: int, config: PredictorConfig) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ConfigurationError(
                f"--predictor.heads {config.heads} does not divide --predictor.width {config.width}: choose a divisor"
            )
        self.context = config.context
        self.memory = config.depth * (config.context - 1) + 1
        self.embed = nn.Linear(inputs, config.width)
        self.distance_bias = nn.Parameter(torch.zeros(config.heads, config.context))
        self.blocks = nn.ModuleList(AttentionBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, steps: Tensor, outputs: int) -> Tensor:
        at = torch.arange(steps.shape[1], device=steps.device)
        distance = at[:, None] - at[None, :]  # (T, T), positive towards the past
        visible = (distance >= 0) & (distance < self.context)
        bias = self.distance_bias[:, distance.clamp(0, self.context - 1)].masked_fill(~visible, float("-inf"))
        hidden = self.embed(steps)
        for block in self.blocks:
            hidden = block(hidden, bias)  # (B, T, width)
        return self.norm(hidden[:, -outputs:])


class AttentionBlock(nn.Module):
    """Pre-norm self-attention with an additive bias (heads, T, T), then an MLP; (B, T, width) -> (B, T, width)."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(config.width)
        self.queries_keys_values = nn.Linear(config.width, 3 * config.width)
        self.mix = nn.Linear(config.width, config.width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        projected = self.queries_keys_values(self.attention_norm(hidden))
        queries, keys, values = rearrange(projected, "b t (three h c) -> three b h t c", three=3, h=self.heads)
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, dropout_p=self.dropout if self.training else 0.0
        )
        hidden = hidden + self.mix(rearrange(attended, "b h t c -> b t (h c)"))
        return hidden + self.mlp(hidden)


class GRU(nn.Module):
    """Gated recurrent unit; (B, T, inputs) -> (B, outputs, width)."""

    def __init__(self, inputs: int, config: PredictorConfig) -> None:
        super().__init__()
        self.memory = 2 * config.context
        dropout = config.dropout if config.depth > 1 else 0.0
        self.recurrence = nn.GRU(inputs, config.width, config.depth, batch_first=True, dropout=dropout)

    def forward(self, steps: Tensor, outputs: int) -> Tensor:
        hidden, _ = self.recurrence(steps)
        return hidden[:, -outputs:]


NETWORKS: dict[str, type[nn.Module]] = {"mlp": ResidualMLP, "transformer": CausalTransformer, "gru": GRU}


class CopyLast(nn.Module):
    """Nothing will change."""

    memory = 1

    def forward(self, past: Tensor, outputs: int = 1) -> Tensor:
        return past[:, -outputs:]


class LinearExtrapolation(nn.Module):
    """The last change will go on for ever."""

    memory = 2

    def forward(self, past: Tensor, outputs: int = 1) -> Tensor:
        return (past + changes(past))[:, -outputs:]


class Mean(nn.Module):
    """The mean of the training embeddings, which is 0 in standardised space."""

    memory = 1

    def forward(self, past: Tensor, outputs: int = 1) -> Tensor:
        return torch.zeros_like(past[:, -outputs:])


class Ridge(nn.Module):
    """Linear regression with a penalty on the last `context` embeddings: the real baseline."""

    weight: Tensor
    bias: Tensor

    def __init__(self, dimension: int, context: int) -> None:
        super().__init__()
        self.context = self.memory = context
        self.register_buffer("weight", torch.zeros(context * dimension, dimension))
        self.register_buffer("bias", torch.zeros(dimension))

    def forward(self, past: Tensor, outputs: int = 1) -> Tensor:
        return last_steps(past, self.context, outputs) @ self.weight + self.bias


class Shrunk(nn.Module):
    """Another predictor, whose rollouts `jepa.skill.imagine` shrinks by these weights (LONGEST, 2)."""

    def __init__(self, predictor: nn.Module, shrinkage: Tensor) -> None:
        super().__init__()
        self.predictor, self.shrinkage = predictor, shrinkage
        self.memory = predictor.memory

    def forward(self, past: Tensor, outputs: int = 1) -> Tensor:
        return self.predictor(past, outputs)


class Member(nn.Module):
    """One network of a predictor, and its head; steps (B, T, 2 D) -> changes in units of sigma, (B, outputs, D)."""

    def __init__(self, dimension: int, config: PredictorConfig) -> None:
        super().__init__()
        self.network = NETWORKS[config.kind](2 * dimension, config)
        self.head = nn.Linear(config.width, dimension)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, steps: Tensor, outputs: int) -> Tensor:
        return self.head(self.network(steps, outputs))


class Predictor(nn.Module, PyTorchModelHubMixin):
    """A trained predictor, with all that is needed to use it and to judge it.

    Delta-parametrisation: from e_t and the last changes d / sigma, a network f with a zero-initialised head gives
    e_t + sigma * f, so training starts from copying the last embedding. An ensemble (`members` above 1) predicts the
    mean of its members' predictions, step by step of a rollout (Lakshminarayanan et al. 2017, arXiv:1612.01474).

    Beside the network it holds the standardisation of its embedding space, the ridge regression fitted on the same
    training windows, for both how far their rollouts are to be trusted (`jepa.shrinkage`), the statistics of its own
    errors on validation clips (`jepa.energy`), and what the embeddings are: their dimension, the clock that they lie
    on and the encoder that made them.

    Raises:
        ConfigurationError: the configuration cannot be built.
    """

    mean: Tensor
    std: Tensor
    change_std: Tensor
    shrinkage: Tensor
    ridge_shrinkage: Tensor
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
    ) -> None:
        super().__init__()
        config = predictor
        if config.kind not in NETWORKS:
            raise ConfigurationError(f"unknown predictor '{config.kind}': choose one of {', '.join(NETWORKS)}")
        if config.context < 2:
            raise ConfigurationError(f"--predictor.context is {config.context}: at least 2 embeddings are needed")
        self.config, self.fps, self.encoder_fingerprint = config, fps, encoder_fingerprint
        dimension = embedding_dimension
        self.members = nn.ModuleList(Member(dimension, config) for _ in range(members))
        self.memory = int(self.members[0].network.memory)  # type: ignore[arg-type, union-attr]
        self.ridge = Ridge(dimension, config.context)
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("std", torch.ones(dimension))
        self.register_buffer("change_std", torch.ones(dimension))
        self.register_buffer("shrinkage", no_shrinkage())
        self.register_buffer("ridge_shrinkage", no_shrinkage())
        self.register_buffer("error_mean", torch.zeros(dimension))
        self.register_buffer("error_whitening", torch.eye(dimension))
        self.register_buffer("energy_quantiles", torch.zeros(1001))

    def forward(self, past: Tensor, outputs: int = 1) -> Tensor:
        """Standardised embeddings (B, T, D) -> what comes after each of the last `outputs`, (B, outputs, D)."""
        steps = torch.cat([past, changes(past) / self.change_std], dim=-1)  # (B, T, 2 D)
        change = torch.stack([member(steps, outputs) for member in self.members]).mean(dim=0)  # (B, outputs, D)
        return past[:, -outputs:] + self.change_std * change

    def only(self, members: Sequence[int]) -> "Predictor":
        """Some members as a predictor, sharing their weights and all statistics with this one."""
        part = copy.copy(self)
        part._modules = self._modules | {"members": nn.ModuleList([self.members[member] for member in members])}
        return part

    def standardise(self, embeddings: Tensor) -> Tensor:
        """Raw embeddings (..., D) to the space that predictors live in."""
        return (embeddings - self.mean) / self.std

    def baselines(self) -> dict[str, nn.Module]:
        """The guesses to beat, by name, as predictors of the same interface."""
        return {
            "copy_last": CopyLast(),
            "linear_extrapolation": LinearExtrapolation(),
            "ridge": self.ridge,
            "shrunk_ridge": Shrunk(self.ridge, self.ridge_shrinkage),
            "mean": Mean(),
        }


def changes(embeddings: Tensor) -> Tensor:
    """Difference to the embedding before, (B, T, D) -> (B, T, D); 0 for the first."""
    return torch.diff(embeddings, dim=1, prepend=embeddings[:, :1])


def last_steps(steps: Tensor, context: int, outputs: int) -> Tensor:
    """For each of the last `outputs` steps the `context` steps up to it, oldest first, flattened.

    Before the beginning the first step is repeated. (B, T, F) -> (B, outputs, context x F).
    """
    needed = context + outputs - 1
    steps = steps[:, -needed:]
    padded = functional.pad(rearrange(steps, "b t f -> b f t"), (needed - steps.shape[1], 0), mode="replicate")
    return rearrange(padded.unfold(2, context, 1), "b f t k -> b t (k f)")


def fit_ridge(windows: Tensor, context: int, penalties: Sequence[float]) -> list[Ridge]:
    """Fit ridge regressions from `context` embeddings to the next, one for each penalty.

    Args:
        windows: (N, context + 1, D) standardised.
        context: number of past embeddings.
        penalties: added to the diagonal of the inputs' second moment, per sample.

    Returns:
        The fitted predictors, solved in float64.
    """
    dimension = windows.shape[2]
    gram = torch.zeros(context * dimension + 1, context * dimension + 1, dtype=torch.float64)
    moment = torch.zeros(context * dimension + 1, dimension, dtype=torch.float64)
    for part in windows.cpu().split(8192):
        inputs = functional.pad(rearrange(part[:, :-1], "n k d -> n (k d)").double(), (0, 1), value=1.0)
        gram += inputs.T @ inputs
        moment += inputs.T @ part[:, -1].double()
    fitted = []
    for penalty in penalties:
        diagonal = torch.full((len(gram),), penalty * len(windows), dtype=torch.float64)
        diagonal[-1] = 1e-9  # the bias is not penalised
        solution = torch.linalg.solve(gram + torch.diag(diagonal), moment)
        ridge = Ridge(dimension, context)
        ridge.weight.copy_(solution[:-1])
        ridge.bias.copy_(solution[-1])
        fitted.append(ridge)
    return fitted
