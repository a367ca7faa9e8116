"""The expander: only the loss sees its outputs, so that the embedding before it keeps what prediction needs."""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from jepa.config import Bounded, PositiveInt


@dataclass(frozen=True)
class ExpanderConfig(Bounded):
    """The expander."""

    widths: tuple[PositiveInt, ...] = (512, 512)
    """Widths of hidden layers and of the output. Empty: the objective sees the embeddings themselves."""


class Expander(nn.Sequential):
    """Embeddings (..., D) to expander outputs (..., E). Bardes et al. 2022 (VICReg), section 4.2.

    Each hidden layer has batch normalisation and ReLU. The paper's are 8192 wide, two hidden ones and the output.
    """

    def __init__(self, embedding_dimension: int, config: ExpanderConfig) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((embedding_dimension, *config.widths)):
            layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
        super().__init__(*layers[:-2])

    def forward(self, embeddings: Tensor) -> Tensor:
        """(..., D) to (..., E); all leading axes are samples of the batch normalisation."""
        return super().forward(embeddings.flatten(0, -2)).unflatten(0, embeddings.shape[:-1])
