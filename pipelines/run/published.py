"""What may be asked of a published encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jepa.config import Bounded, NotNegativeInt


@dataclass(frozen=True, kw_only=True)
class PublishedOptions(Bounded):
    """Options of a published encoder."""

    tokens: Literal["vector", "flat", "grid"] = "vector"
    """Embeddings of a frame by a published encoder: one, as the encoder itself pools its features; one of a timm
    model's features of all places, side by side, for --pca; or a grid."""
    grid: tuple[NotNegativeInt, NotNegativeInt] = (0, 0)
    """ROWS COLUMNS of the grid. 0 0: those of the feature level."""
    levels: tuple[int, ...] = ()
    """Feature levels of a timm model, counted as its `out_indices`. None: its output, or, of a grid, the last."""
    image_size: tuple[NotNegativeInt, NotNegativeInt] = (0, 0)
    """HEIGHT WIDTH of the frames for a timm model. 0 0: as it was trained."""
    window: NotNegativeInt = 0
    """Frames that a clip encoder sees. 0: as it was trained."""
    encoder_weights: Path | None = None
    """File of safetensors with a timm model's weights, where the hub is out of reach."""
    pca: NotNegativeInt = 0
    """Principal components to keep of a published encoder's features, fitted on these videos. 0: all features."""
