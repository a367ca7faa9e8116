"""Frame encoders: one image in; one embedding, or a grid of tokens, out.

A backbone (any timm model, or a small convolutional one that trains on a laptop in a minute) and a head on each token
of its features: linear, with hidden layers before it, principal components, or none. Frames are encoded one by one, so
nothing of the future can leak into an embedding of the past.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
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
        """Hash of the weights and the configuration; it tells the spaces of two encoders apart."""

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
    """ROWS COLUMNS of tokens, one embedding each. 0 0: a single embedding for the whole frame."""
    levels: tuple[int, ...] = (-1,)
    """Feature levels of the backbone behind a grid, counted as timm's `out_indices`; several are concatenated."""
    pooling: Literal["flatten", "average", "class_token", "native"] = "flatten"
    """Pooling without a grid: `flatten` keeps where things are, `average` only what they are. `class_token`: a vision
    transformer's own summary. `native`: the backbone's own pooling, as timm has it."""
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
        if self.backbone == SMALL_CONV and self.weights != "scratch":
            raise ConfigurationError("weights", f"is {self.weights}: {SMALL_CONV} has no published weights")


class FrameEncoder(nn.Module):
    """Frames (B, 3, H, W), uint8 or float in [0, 1], to embeddings (B, *tokens, D), float32.

    Published weights are not loaded here, but by `create_encoder`.

    Raises:
        ConfigurationError: the backbone is unknown (with suggestions) or lacks what the configuration asks of it. What
            it cannot do with the image size shows at the first frame.
    """

    window = 1
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: EncoderConfig, backbone: Any = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone or build_backbone(config.backbone, config.image_size)
        self.features = _features_of(self.backbone, config)
        """Length of the features that the head sees of one token."""
        if config.pooling != "native" and hasattr(self.backbone, "pre_logits"):
            self.backbone.pre_logits = nn.Identity()  # vgg's: no part of the features, but most of the weights
        pixels = self.backbone.pretrained_cfg
        self.register_buffer("pixel_mean", torch.tensor(pixels["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixels["std"]).view(3, 1, 1), persistent=False)
        self.backbone.requires_grad_(config.weights != "frozen")
        layers: list[nn.Module] = []
        inputs = self.features
        for outputs in config.head_widths:
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
            inputs = outputs
        if config.embedding_dimension:
            layers.append(nn.Linear(inputs, config.embedding_dimension))
        self.head = nn.Sequential(*layers)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the frames in pixels."""
        return self.config.image_size

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,), or (rows, columns, D)."""
        tokens = self.config.grid if any(self.config.grid) else ()
        return (*tokens, self.config.embedding_dimension or self.features)

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and the configuration."""
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
        if frames.ndim != 4 or tuple(frames.shape[1:]) != (3, *self.image_size):
            raise ValueError(f"frames have shape {tuple(frames.shape)}: this encoder takes (B, 3, H, W) of "
                             f"{_shown(self.image_size)} pixels")  # fmt: skip
        if frames.dtype == torch.uint8:
            frames = frames.float() / 255
        images = (frames - self.pixel_mean) / self.pixel_std
        try:
            features = self._grid(images) if any(self.config.grid) else self._vector(images)  # (B, *tokens, F)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, AssertionError) or re.search("kernel size|output size", str(error), re.IGNORECASE):
                raise self._impossible_size(str(error).splitlines()[0]) from error
            raise
        if features.shape[-1] != self.features:
            raise self._impossible_size(f"{features.shape[-1]} features, not {self.features}")
        # One head for all tokens: its batch normalisation takes the statistics of all of them together.
        embeddings = self.head(rearrange(features, "b ... f -> (b ...) f"))
        return embeddings.view(*features.shape[:-1], embeddings.shape[-1])

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

    def _vector(self, images: Tensor) -> Tensor:
        """Pooled features (B, F)."""
        if self.config.pooling == "native":
            return self.backbone(images)
        features = self.backbone.forward_features(images)  # (B, C, h, w), (B, h, w, C) or (B, tokens, C)
        if self.config.pooling == "class_token":
            return features[:, 0]
        if features.ndim == 3:
            has_class_token = getattr(self.backbone, "cls_token", None) is not None
            features = features[:, getattr(self.backbone, "num_prefix_tokens", int(has_class_token)) :]
            if features.shape[1] == 0:
                raise _lacking(self.config, "pooling", "patches at its end: take class_token")
        if self.config.pooling == "flatten":
            return rearrange(features, "b ... -> b (...)")
        if features.ndim == 3:
            return features.mean(dim=1)
        channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        return features.mean(dim=(1, 2) if channels_last else (2, 3))

    def _grid(self, images: Tensor) -> Tensor:
        """Features of a grid of tokens (B, rows, columns, F)."""
        maps = self.backbone.forward_intermediates(
            images, indices=list(self.config.levels), norm=True, stop_early=True, output_fmt="NCHW",
            intermediates_only=True,
        )  # fmt: skip
        return torch.cat([resize_map(level, self.config.grid) for level in maps], dim=-1)

    def _impossible_size(self, reason: str) -> ConfigurationError:
        return ConfigurationError(
            "image_size",
            f"is {_shown(self.image_size)}: backbone {self.config.backbone} does not take such frames ({reason}): "
            f"choose a multiple of {self.backbone.feature_info[-1]['reduction']}",
        )


def create_encoder(config: EncoderConfig, weights_file: Path | None = None) -> FrameEncoder:
    """A new encoder, its backbone initialised from published weights if the configuration asks for them.

    Args:
        config: what to build.
        weights_file: safetensors file under timm's names to take instead of asking the hub.

    Raises:
        ConfigurationError: as `FrameEncoder`; or the weights cannot be had, or are another model's.
    """
    backbone = build_backbone(
        config.backbone, config.image_size, load=config.weights != "scratch", weights_file=weights_file
    )
    return FrameEncoder(config, backbone)


def principal_components(batches: Iterable[Tensor], dimension: int) -> nn.Linear:
    """Linear head onto the leading principal components of features, fitted in one pass.

    Components stay on their natural scale: whitening them would give noise the same weight as signal.

    Args:
        batches: features (..., F).
        dimension: how many components.

    Raises:
        ConfigurationError: there are fewer components than asked for.
    """
    count, shift, total, scatter = 0, torch.empty(0), torch.zeros(()), torch.zeros(())
    for features in batches:
        rows = rearrange(features.double(), "... f -> (...) f")
        if not count:
            shift = rows.mean(dim=0)  # moments about zero would cancel where the mean is large
        rows = rows - shift
        count, total, scatter = count + len(rows), total + rows.sum(dim=0), scatter + rows.T @ rows
    if dimension > (most := max(0, min(len(shift), count - 1))):
        raise ConfigurationError("pca", f"is {dimension}: {count} tokens of {len(shift)} features have at most {most}")
    mean = total / count
    _, vectors = torch.linalg.eigh(scatter / count - torch.outer(mean, mean))  # ascending
    components = vectors.flip(1).T[:dimension]  # (D, F)
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    components = components * largest.sign()  # either sign would do: take one
    head = nn.Linear(len(mean), dimension)
    with torch.no_grad():
        head.weight.copy_(components)
        head.bias.copy_(-components @ (mean + shift))
    return head


def fingerprint(module: nn.Module, config: dict[str, Any]) -> str:
    """Hash of a module's weights and of its configuration."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def resize_map(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Feature map (B, C, h, w) on another grid (B, rows, columns, C).

    Adaptive average pooling along an axis that shrinks, linear interpolation along one that grows. Both are linear: as
    matrices they are deterministic on any device, backwards too.
    """
    for axis, length in ((2, grid[0]), (3, grid[1])):
        if features.shape[axis] != length:
            matrix = _resizing(features.shape[axis], length).to(features)
            features = (features.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return rearrange(features, "b c rows columns -> b rows columns c")


def _resizing(length: int, wanted: int) -> Tensor:
    """Matrix (length, wanted)."""
    identity = torch.eye(length)[None]
    if wanted < length:
        return functional.adaptive_avg_pool1d(identity, wanted)[0]
    return functional.interpolate(identity, wanted, mode="linear")[0]


def _features_of(backbone: Any, config: EncoderConfig) -> int:
    """How many features the head will see of a token, from what the backbone says of itself."""
    levels: Any = getattr(backbone, "feature_info", ())
    if any(config.grid):
        if not hasattr(backbone, "forward_intermediates"):
            raise _lacking(config, "grid", "feature levels in timm: take one embedding a frame")
        if not all(-len(levels) <= level < len(levels) for level in config.levels):
            raise ConfigurationError(
                "levels", f"is {_shown(config.levels)}: {config.backbone} has 0 to {len(levels) - 1}"
            )
        return sum(levels[level]["num_chs"] for level in config.levels)
    if config.pooling == "native":
        return backbone.head_hidden_size
    if config.pooling == "class_token" and getattr(backbone, "cls_token", None) is None:
        raise _lacking(config, "pooling", "class token: take average")
    if config.pooling == "flatten":
        return backbone.num_features * math.prod(-(-side // levels[-1]["reduction"]) for side in config.image_size)
    return backbone.num_features


def _lacking(config: EncoderConfig, field: str, what: str) -> ConfigurationError:
    value = getattr(config, field)
    shown = value if isinstance(value, str) else _shown(value)
    return ConfigurationError(field, f"is {shown}, but backbone {config.backbone} has no {what}")


def _shown(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
