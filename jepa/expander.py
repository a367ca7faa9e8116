"""The expander: the network that only the loss sees.

VICReg decorrelates features in the expander's output space; the embedding before it keeps what prediction needs.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ExpanderConfig:
    """The expander."""

    width: int = 512
    """Width of the hidden layers and of the output."""
    hidden_layers: int = 1
    """Hidden layers, each with batch normalisation and ReLU. The paper uses 2 of width 8192 on ImageNet."""


class Expander(nn.Sequential):
    """Embeddings (B, D) to expander outputs (B, width). Bardes et al. 2022 (VICReg), section 4.2."""

    def __init__(self, embedding_dimension: int, config: ExpanderConfig) -> None:
        layers: list[nn.Module] = []
        inputs = embedding_dimension
        for _ in range(config.hidden_layers):
            layers += [nn.Linear(inputs, config.width, bias=False), nn.BatchNorm1d(config.width), nn.ReLU()]
            inputs = config.width
        super().__init__(*layers, nn.Linear(inputs, config.width, bias=False))
