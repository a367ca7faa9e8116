"""Frame encoders: one image in; one embedding, or a grid of tokens, out.

A backbone (any timm model, or a small convolutional one that trains on a laptop in a minute) and a head on each token
of its features: linear, with hidden layers before it, principal components, or none. Frames are encoded one by one, so
nothing of the future can leak into an embedding of the past.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from jepa.backbones import SMALL_CONV, build_backbone
from jepa.config import Bounded, NotNegativeInt, PositiveInt, Side, shown
from jepa.errors import ConfigurationError
from jepa.fingerprint import fingerprint

SHARPNESS = 4.0
"""Of the soft-max over places: normalised features are some units high where they are strong."""


class Encoder(nn.Module):
    """Frames up to a tick to the embedding of that tick: the base of all encoders.

    To add one, subclass it and name its configuration, which has a `kind`: artefacts and caches tell it by that.

    Args:
        config: what can be built from again; its `embedding_dimension` is the head's, 0 for none.
        backbone: gives the features.
        window: frames that one embedding is made of; the last of them is the tick's own.
        image_size: (height, width) of the frames in pixels.
        tokens: () or (rows, columns).
        features: length of a token before the head.
        pixels: mean and standard deviation of the pixels that the backbone wants, by channel.
    """

    configuration: ClassVar[type[Any]]
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, config: Any, backbone: Any, *, window: int, image_size: tuple[int, int], tokens: tuple[int, ...],
        features: int, pixels: tuple[Sequence[float], Sequence[float]],
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.backbone, self.window, self.image_size = config, backbone, window, image_size
        self.tokens, self.features, self.head = tokens, features, nn.Sequential()
        for name, values in zip(("pixel_mean", "pixel_std"), pixels, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    @staticmethod
    def build(config: dict[str, Any]) -> "Encoder":
        """An encoder with new weights, from the JSON of its configuration; without a `kind` it is a frame encoder's."""
        fields = dict(config)
        kinds = {getattr(encoder.configuration, "kind", None): encoder for encoder in Encoder.__subclasses__()}
        encoder: Any = kinds[fields.pop("kind", None)]
        return encoder(encoder.configuration(**fields))

    @property
    def shape(self) -> tuple[int, ...]:
        """(*tokens, D): shape of one embedding."""
        return (*self.tokens, self.config.embedding_dimension or self.features)

    @property
    def fingerprint(self) -> str:
        """Hash of weights and configuration; it tells the spaces of two encoders apart."""
        kind = {"kind": self.config.kind} if hasattr(self.config, "kind") else {}
        return fingerprint(self.state_dict(), kind | asdict(self.config))

    def embed(self, frames: Tensor) -> Tensor:
        """Embeddings (B, *tokens, D), float32, of frames (B, window, 3, H, W), uint8 or float in [0, 1]."""
        raise NotImplementedError

    def normalise(self, frames: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Frames (B, *shape) as the backbone wants them. Raises `ValueError` where they have another shape."""
        if frames.shape[1:] != shape:
            raise ValueError(f"frames have shape {tuple(frames.shape)}: this encoder takes (B, {shape})")
        frames = frames.float() / 255 if frames.dtype == torch.uint8 else frames
        return (frames - self.pixel_mean) / self.pixel_std

    def replace_head(self, head: nn.Linear) -> None:
        """Put a fitted linear head, such as principal components, where there is none."""
        self.head = nn.Sequential(head.requires_grad_(False))
        self.config = replace(self.config, embedding_dimension=head.out_features)


@dataclass(frozen=True)
class EncoderConfig(Bounded):
    """Frame encoder."""

    backbone: str = SMALL_CONV
    """`small_conv`, or any timm model by name: resnet18, vit_tiny_patch16_224, vgg16, ..."""
    weights: Literal["scratch", "published", "frozen"] = "scratch"
    """Backbone weights to start from: random, published (of timm), or published and not trained."""
    image_size: tuple[Side, Side] = (64, 64)
    """HEIGHT WIDTH in pixels that frames are resized to."""
    grid: tuple[NotNegativeInt, NotNegativeInt] = (0, 0)
    """ROWS COLUMNS of tokens, an embedding each. 0 0: one embedding for the whole frame."""
    levels: tuple[int, ...] = (-1,)
    """Feature levels of the backbone to take, counted as timm's `out_indices`; several are concatenated."""
    pooling: Literal["flatten", "softmax", "average", "native"] = "flatten"
    """Pooling where there is no grid: `flatten` keeps where things are, `softmax` only where each feature is strongest,
    `average` only what things are. `native`: the whole backbone with its own pooling, such as a class token."""
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
            raise ConfigurationError("grid", f"is {shown(self.grid)}: rows and columns must both be positive, or 0 0")
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise ConfigurationError("levels", f"is {shown(self.levels) or 'empty'}: name each level once")


class FrameEncoder(Encoder):
    """Frames (B, 3, H, W), uint8 or float in [0, 1], to embeddings (B, *tokens, D), float32.

    A whole backbone is taken with its weights; by default a new one is made, without published weights. Raises
    `ConfigurationError` where there is no such backbone, or level. That it does not take the image size shows at the
    first frame.
    """

    configuration = EncoderConfig
    config: EncoderConfig

    def __init__(self, config: EncoderConfig, backbone: Any = None) -> None:
        backbone = backbone or build_backbone(config.backbone, config.image_size)
        levels, features = _plan(config, backbone)
        if levels:
            # What comes after the last level would be trained by nothing, and kept for nothing.
            backbone.prune_intermediate_layers(levels, prune_norm=False, prune_head=True)
        tokens, pixels = config.grid if any(config.grid) else (), backbone.pretrained_cfg
        super().__init__(
            config, backbone, window=1, image_size=config.image_size, tokens=tokens, features=features,
            pixels=(pixels["mean"], pixels["std"]),
        )  # fmt: skip
        self.levels = levels
        self.backbone.requires_grad_(config.weights != "frozen")
        for outputs in config.head_widths:
            self.head.extend([nn.Linear(features, outputs), nn.BatchNorm1d(outputs), nn.ReLU()])
            features = outputs
        if config.embedding_dimension:
            self.head.append(nn.Linear(features, config.embedding_dimension))

    def forward(self, frames: Tensor) -> Tensor:
        """Embeddings, with gradients. Raises as `normalise`, and `ConfigurationError` if the size does not fit."""
        images = self.normalise(frames, (3, *self.image_size))
        try:
            features = self._features(images)  # (B, *tokens, F)
            if (found := features.shape[-1]) != self.features:
                raise AssertionError(f"{found} features come, its strides promise {self.features}")
        except Exception as error:  # of any network of timm
            if re.search("memory|CUDA", str(error)):
                raise
            reason = (str(error) or repr(error)).splitlines()[0]
            own = tuple(self.backbone.pretrained_cfg.get("input_size", ())[1:])
            mend = f"take {shown(own)}, which it was made for" if own != self.image_size else "take another backbone"
            raise ConfigurationError(
                "image_size",
                f"is {shown(self.image_size)}, which backbone {self.config.backbone} does not take ({reason}): {mend}, "
                "or another pooling",
            ) from error
        # One head for all tokens: its batch normalisation takes the statistics of all of them together.
        return self.head(features.flatten(0, -2)).view(*features.shape[:-1], -1)

    @torch.no_grad()
    def embed(self, frames: Tensor) -> Tensor:
        """Embeddings (B, *tokens, D), float32, of frames (B, 1, 3, H, W); always as in evaluation."""
        was_training = self.training
        embeddings: Tensor = self.eval()(rearrange(frames, "b 1 c h w -> b c h w")).float()
        self.train(was_training)
        return embeddings

    def train(self, mode: bool = True) -> "FrameEncoder":
        """Switch to training, in which a frozen backbone keeps its normalisation statistics too."""
        super().train(mode)
        if self.config.weights == "frozen":
            self.backbone.eval()
        return self

    def _features(self, images: Tensor) -> Tensor:
        """Features of normalised images, (B, F) or (B, rows, columns, F)."""
        if not self.levels:
            return self.backbone(images)
        maps = self.backbone.forward_intermediates(
            images, indices=self.levels, norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        pool = partial(resize_map, grid=self.config.grid) if self.tokens else POOLINGS[self.config.pooling]
        return torch.cat([pool(level) for level in maps], dim=-1)


def create_encoder(config: EncoderConfig, weights_file: Path | None = None) -> FrameEncoder:
    """A new encoder, its backbone with published weights if asked for; raises as `build_backbone`."""
    published = config.weights != "scratch"
    backbone = build_backbone(config.backbone, config.image_size, load=published, weights_file=weights_file)
    return FrameEncoder(config, backbone)


def spatial_softmax(features: Tensor) -> Tensor:
    """Where each channel of a feature map (B, C, h, w) is strong: expected rows and columns in [-1, 1], (B, 2 x C).

    The expectation is over a soft-max of all places (Levine et al. 2016, arXiv:1504.00702, section 4).
    """
    rows, columns = (torch.linspace(-1, 1, side, device=features.device) for side in features.shape[2:])
    share = (SHARPNESS * features.float()).flatten(2).softmax(dim=2).unflatten(2, features.shape[2:])
    return torch.cat([share.sum(dim=3) @ rows, share.sum(dim=2) @ columns], dim=1).to(features.dtype)


def resize_map(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Feature map (B, C, h, w) on another grid (B, rows, columns, C).

    Adaptive average pooling along an axis that shrinks, linear interpolation along one that grows: as matrices, which
    are deterministic on any device, backwards too.
    """
    for axis, length in ((2, grid[0]), (3, grid[1])):
        if length != (before := features.shape[axis]):
            way = functional.adaptive_avg_pool1d if length < before else partial(functional.interpolate, mode="linear")
            matrix = way(torch.eye(before)[None], length)[0]
            features = (features.movedim(axis, -1) @ matrix.to(features)).movedim(-1, axis)
    return rearrange(features, "b c rows columns -> b rows columns c")


POOLINGS = {
    "flatten": lambda level: level.flatten(1),
    "softmax": spatial_softmax,
    "average": lambda level: level.mean(dim=(2, 3)),
}
"""From a feature map (B, C, h, w) to (B, F)."""


def _plan(config: EncoderConfig, backbone: Any) -> tuple[list[int], int]:
    """Levels to take, counted from 0, and length of the features of a token, as the backbone says of itself."""
    info, is_grid = backbone.feature_info, any(config.grid)
    if config.pooling == "native" and not is_grid:
        return [], backbone.head_hidden_size
    if not all(-len(info) <= level < len(info) for level in config.levels):
        raise ConfigurationError("levels", f"is {shown(config.levels)}: {config.backbone} has 0 to {len(info) - 1}")
    levels, features = sorted(level % len(info) for level in config.levels), 0
    for level in levels:
        cells = math.prod(-(-side // info[level]["reduction"]) for side in config.image_size)
        each = {"flatten": cells, "softmax": 2}.get(config.pooling, 1)
        features += info[level]["num_chs"] * (1 if is_grid else each)
    return levels, features
