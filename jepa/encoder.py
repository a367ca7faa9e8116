"""Frame encoders: one image in; one embedding, or a grid of tokens, out.

A backbone (any timm model, or a small convolutional one that trains on a laptop in a minute) and a head on each token
of its features: linear, with hidden layers before it, principal components, or none. Frames are encoded one by one, so
nothing of the future can leak into an embedding of the past.
"""

import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from jepa.backbones import SMALL_CONV, build_backbone
from jepa.config import Bounded, NotNegativeInt, PositiveInt
from jepa.errors import ConfigurationError
from jepa.fingerprint import fingerprint


class Encoder(Protocol):
    """Anything that turns the frames up to a tick into the embedding of that tick."""

    @property
    def window(self) -> int:
        """Frames that one embedding is made of; the last of them is the tick's own."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the frames in pixels."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(*tokens, D): shape of one embedding."""

    @property
    def fingerprint(self) -> str:
        """Hash of weights and configuration; it tells the spaces of two encoders apart."""

    def embed(self, frames: Tensor) -> Tensor:
        """Embeddings (B, *tokens, D), float32, of frames (B, window, 3, H, W), uint8 or float in [0, 1]."""


@dataclass(frozen=True)
class EncoderConfig(Bounded):
    """Frame encoder."""

    backbone: str = SMALL_CONV
    """`small_conv`, or any timm model by name: resnet18, vit_tiny_patch16_224, vgg16, ..."""
    weights: Literal["scratch", "published", "frozen"] = "scratch"
    """Backbone weights to start from: random, published (of timm), or published and not trained."""
    image_size: tuple[PositiveInt, PositiveInt] = (64, 64)
    """HEIGHT WIDTH in pixels that frames are resized to."""
    grid: tuple[NotNegativeInt, NotNegativeInt] = (0, 0)
    """ROWS COLUMNS of tokens, an embedding each. 0 0: one embedding for the whole frame."""
    levels: tuple[int, ...] = (-1,)
    """Feature levels of the backbone to take, counted as timm's `out_indices`; several are concatenated."""
    pooling: Literal["flatten", "average", "native"] = "flatten"
    """Pooling where there is no grid: `flatten` keeps where things are, `average` only what they are. `native`: the
    whole backbone with its own pooling, such as a vision transformer's class token."""
    embedding_dimension: NotNegativeInt = 64
    """Length of an embedding. 0: no head, the features as they are."""
    head_widths: tuple[PositiveInt, ...] = ()
    """Hidden layers of the head, such as `512 128`, each with batch normalisation and ReLU."""

    def __post_init__(self) -> None:
        for name in ("image_size", "grid", "levels", "head_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has no tuples
        super().__post_init__()
        if self.head_widths and not self.embedding_dimension:
            raise ConfigurationError("head_widths", "need a head: give an embedding_dimension")
        if 0 in self.grid and any(self.grid):
            raise ConfigurationError("grid", f"is {_shown(self.grid)}: rows and columns must both be positive, or 0 0")
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise ConfigurationError("levels", f"is {_shown(self.levels) or 'empty'}: name each level once")


class FrameEncoder(nn.Module):
    """Frames (B, 3, H, W), uint8 or float in [0, 1], to embeddings (B, *tokens, D), float32.

    Args:
        config: what to build.
        backbone: a whole one to take, with its weights; by default a new one is made, without published weights.

    Raises:
        ConfigurationError: the backbone is unknown, or has no such levels. What it cannot do with the image size shows
            at the first frame.
    """

    window = 1
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: EncoderConfig, backbone: Any = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone or build_backbone(config.backbone, config.image_size)
        self.is_grid = any(config.grid)
        self.levels, self.features = self._plan()
        """Levels that are taken, counted from 0; length of the features that the head sees of a token."""
        if self.levels:
            # What comes after the last level would be trained by nothing, and kept for nothing.
            self.backbone.prune_intermediate_layers(self.levels, prune_norm=False, prune_head=True)
        pixels = self.backbone.pretrained_cfg
        self.register_buffer("pixel_mean", torch.tensor(pixels["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixels["std"]).view(3, 1, 1), persistent=False)
        self.backbone.requires_grad_(config.weights != "frozen")
        self.head = nn.Sequential()
        inputs = self.features
        for outputs in config.head_widths:
            self.head.extend([nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()])
            inputs = outputs
        if config.embedding_dimension:
            self.head.append(nn.Linear(inputs, config.embedding_dimension))

    def _plan(self) -> tuple[list[int], int]:
        """Levels and length of features, as the backbone says of itself."""
        config, info = self.config, self.backbone.feature_info
        if config.pooling == "native" and not self.is_grid:
            return [], self.backbone.head_hidden_size
        if not all(-len(info) <= level < len(info) for level in config.levels):
            raise ConfigurationError(
                "levels", f"is {_shown(config.levels)}: {config.backbone} has 0 to {len(info) - 1}"
            )
        levels, features = sorted(level % len(info) for level in config.levels), 0
        for level in levels:
            cells = math.prod(-(-side // info[level]["reduction"]) for side in config.image_size)
            is_flat = config.pooling == "flatten" and not self.is_grid
            features += info[level]["num_chs"] * (cells if is_flat else 1)
        return levels, features

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the frames in pixels."""
        return self.config.image_size

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,), or (rows, columns, D)."""
        return (*(self.config.grid if self.is_grid else ()), self.config.embedding_dimension or self.features)

    @property
    def fingerprint(self) -> str:
        """Hash of weights and configuration."""
        return fingerprint(self, asdict(self.config))

    def forward(self, frames: Tensor) -> Tensor:
        """Embed frames.

        Args:
            frames: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1], of the configured size.

        Returns:
            (B, *tokens, D) embeddings.

        Raises:
            ValueError: the frames have another shape.
            ConfigurationError: the backbone does not take frames of this size.
        """
        if frames.ndim != 4 or frames.shape[1:] != (3, *self.image_size):
            raise ValueError(
                f"frames have shape {tuple(frames.shape)}: this encoder takes (B, {(3, *self.image_size)})"
            )
        if frames.dtype == torch.uint8:
            frames = frames.float() / 255
        try:
            features = self._features((frames - self.pixel_mean) / self.pixel_std)  # (B, *tokens, F)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search(r"\b(size|shape)", str(error)):
                raise  # such as that memory ran out
            raise self._unfit(str(error).splitlines()[0]) from error
        if features.shape[-1] != self.features:
            raise self._unfit(f"{features.shape[-1]} features come, its strides promise {self.features}")
        # One head for all tokens: its batch normalisation takes the statistics of all of them together.
        return self.head(features.flatten(0, -2)).view(*features.shape[:-1], -1)

    @torch.no_grad()
    def embed(self, frames: Tensor) -> Tensor:
        """Embeddings (B, *tokens, D), float32, of frames (B, 1, 3, H, W); always as in evaluation."""
        if self.training:
            self.eval()
            try:
                return self.embed(frames)
            finally:
                self.train()
        return self(rearrange(frames, "b 1 c h w -> b c h w")).float()

    def train(self, mode: bool = True) -> "FrameEncoder":
        """Switch to training, in which a frozen backbone keeps its normalisation statistics too."""
        super().train(mode)
        if self.config.weights == "frozen":
            self.backbone.eval()
        return self

    def replace_head(self, head: nn.Linear) -> None:
        """Put a fitted linear head, such as principal components, in the place of the present one."""
        self.head = nn.Sequential(head)
        self.config = replace(self.config, embedding_dimension=head.out_features, head_widths=())

    def _features(self, images: Tensor) -> Tensor:
        """Features of normalised images, (B, F) or (B, rows, columns, F)."""
        if not self.levels:
            return self.backbone(images)
        maps = self.backbone.forward_intermediates(
            images, indices=self.levels, norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        if self.is_grid:
            return torch.cat([resize_map(level, self.config.grid) for level in maps], dim=-1)
        if self.config.pooling == "average":
            return torch.cat([level.mean(dim=(2, 3)) for level in maps], dim=-1)
        return torch.cat([level.flatten(1) for level in maps], dim=-1)

    def _unfit(self, reason: str) -> ConfigurationError:
        stride = self.backbone.feature_info[-1]["reduction"]
        return ConfigurationError(
            "image_size",
            f"is {_shown(self.image_size)}, which backbone {self.config.backbone} does not take ({reason}): choose "
            f"multiples of {stride}, or another pooling",
        )


def create_encoder(config: EncoderConfig, weights_file: Path | None = None) -> FrameEncoder:
    """A new encoder, its backbone initialised from published weights if the configuration asks for them.

    Args:
        config: what to build.
        weights_file: safetensors file under timm's names to take instead of asking the hub.

    Raises:
        ConfigurationError: as `FrameEncoder`; or the weights cannot be had, or are another model's.
    """
    published = config.weights != "scratch"
    backbone = build_backbone(config.backbone, config.image_size, load=published, weights_file=weights_file)
    return FrameEncoder(config, backbone)


def resize_map(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Feature map (B, C, h, w) on another grid (B, rows, columns, C).

    Adaptive average pooling along an axis that shrinks, linear interpolation along one that grows: as matrices, which
    are deterministic on any device, backwards too.
    """
    for axis, length in ((2, grid[0]), (3, grid[1])):
        identity = torch.eye(features.shape[axis])[None]
        if length < features.shape[axis]:
            matrix = functional.adaptive_avg_pool1d(identity, length)
        else:
            matrix = functional.interpolate(identity, length, mode="linear")
        if length != features.shape[axis]:
            features = (features.movedim(axis, -1) @ matrix[0].to(features)).movedim(-1, axis)
    return rearrange(features, "b c rows columns -> b rows columns c")


def _shown(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))
