"""The expander: the network that only the loss sees.

VICReg decorrelates features in the expander's output space; the embedding before it keeps what prediction needs.
"""

from dataclasses import dataclass

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from jepa.encoder import ConfigurationError


@dataclass(frozen=True)
class ExpanderConfig:
    """The expander."""

    width: int = 512
    """Width of the hidden layers."""
    hidden_layers: int = 1
    """Hidden layers, each with batch normalisation and ReLU. The paper uses 2 of width 8192 on ImageNet."""
    output_dimension: int = 0
    """Width of the output, which the objective sees. 0: that of the hidden layers, as in the paper."""


class Expander(nn.Sequential, PyTorchModelHubMixin):
    """Embeddings (B, D) to expander outputs (B, E). Bardes et al. 2022 (VICReg), section 4.2.

    Raises:
        ConfigurationError: there is no such network.
    """

    output_dimension: int
    """E."""

    def __init__(self, embedding_dimension: int, expander: ExpanderConfig) -> None:
        for name, least in (("width", 1), ("hidden_layers", 0), ("output_dimension", 0)):
            if (value := getattr(expander, name)) < least:
                raise ConfigurationError(f"--expander.{name.replace('_', '-')} is {value}: it must be at least {least}")
        layers: list[nn.Module] = []
        inputs = embedding_dimension
        for _ in range(expander.hidden_layers):
            layers += [nn.Linear(inputs, expander.width, bias=False), nn.BatchNorm1d(expander.width), nn.ReLU()]
            inputs = expander.width
        outputs = expander.output_dimension or expander.width
        super().__init__(*layers, nn.Linear(inputs, outputs, bias=False))
        self.output_dimension = outputs
