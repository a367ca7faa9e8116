"""The eye of the world model: one frame in, one embedding out.

A backbone (any timm model, or a small convolutional one that trains on a laptop in a minute) and a linear
embedding head. Frames are embedded one by one, so nothing of the future can leak into an embedding of the past.
"""

import difflib
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

SMALL_CONV = "small_conv"


class ConfigurationError(ValueError):
    """A choice that cannot be built; the message names it, its value and the mend."""


@dataclass(frozen=True)
class EncoderConfig:
    """The frame encoder."""

    backbone: str = SMALL_CONV
    """`small_conv`, or any timm model by name: resnet18, vit_tiny_patch16_224, vgg16, ..."""
    embedding_dimension: int = 64
    """Length of the embedding of a frame."""
    image_size: tuple[int, int] = (64, 64)
    """HEIGHT WIDTH in pixels that every frame is resized to."""
    pooling: Literal["flatten", "average"] = "flatten"
    """`flatten` keeps where things are; `average` only what they are (and costs far fewer weights at large sizes)."""
    pretrained: bool = False
    """Start from timm's published weights (downloaded from the hub) instead of from scratch."""
    frozen_backbone: bool = False
    """Train only the embedding head; for pre-trained backbones."""


class SmallConv(nn.Sequential):
    """Stride-2 convolutions with batch normalisation; (B, 3, H, W) -> (B, 64, H / 8, W / 8)."""

    def __init__(self, channels: tuple[int, ...] = (16, 32, 64)) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *channels), channels, strict=False):
            layers += [
                nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
        super().__init__(*layers)


class FrameEncoder(nn.Module, PyTorchModelHubMixin):
    """Frames (B, 3, H, W), uint8 or float in [0, 1], to embeddings (B, D), float32.

    Raises:
        ConfigurationError: the backbone is unknown (with suggestions), or does not support the image size.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        # JSON has no tuples: a configuration that comes back from config.json holds a list here.
        height, width = config.image_size
        self.config = replace(config, image_size=(height, width), pretrained=False)
        self.backbone, mean, std = _build_backbone(self.config)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)
        try:
            with torch.no_grad():
                features = self._features(torch.zeros(2, 3, height, width))
        except (RuntimeError, AssertionError) as error:
            raise ConfigurationError(
                f"backbone {config.backbone} does not take frames of {height}x{width} pixels ({error}): "
                "choose another --encoder.image-size"
            ) from error
        self.head = nn.Linear(features.shape[1], config.embedding_dimension)
        if config.frozen_backbone:
            self.backbone.requires_grad_(False)

    def forward(self, frames: Tensor) -> Tensor:
        """Embed frames.

        Args:
            frames: (B, 3, H, W), uint8 in [0, 255] or float in [0, 1], of the configured size.

        Returns:
            (B, D) embeddings.

        Raises:
            ValueError: the frames have another shape.
        """
        expected = (3, *self.config.image_size)
        if frames.ndim != 4 or tuple(frames.shape[1:]) != expected:
            raise ValueError(f"frames have shape {tuple(frames.shape)}: this encoder takes (B, {expected})")
        if frames.dtype == torch.uint8:
            frames = frames.float() / 255
        return self.head(self._features((frames - self.pixel_mean) / self.pixel_std))  # (B, D)

    def train(self, mode: bool = True) -> "FrameEncoder":
        """As `nn.Module.train`, but a frozen backbone keeps its normalisation statistics too."""
        super().train(mode)
        if self.config.frozen_backbone:
            self.backbone.eval()
        return self

    def fingerprint(self) -> str:
        """A hash of the weights and the configuration: which encoder made an embedding."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _features(self, images: Tensor) -> Tensor:
        if isinstance(self.backbone, SmallConv):
            features = self.backbone(images)  # (B, C, h, w)
        else:
            features = self.backbone.forward_features(images)  # (B, C, h, w), (B, h, w, C) or (B, tokens, C)
        if self.config.pooling == "flatten":
            return rearrange(features, "b ... -> b (...)")
        if features.ndim == 3:
            return features.mean(dim=1)
        channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        return features.mean(dim=(1, 2) if channels_last else (2, 3))


def create_encoder(config: EncoderConfig) -> FrameEncoder:
    """A new encoder, its backbone initialised from timm's published weights if the configuration asks for them.

    Raises:
        ConfigurationError: as `FrameEncoder`, or the weights cannot be had.
    """
    encoder = FrameEncoder(config)
    if config.pretrained:
        if config.backbone == SMALL_CONV:
            raise ConfigurationError("small_conv has no published weights: drop --encoder.pretrained")
        try:
            published, _, _ = _build_backbone(config)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigurationError(
                f"the published weights of {config.backbone} cannot be had ({reason}): "
                "check the network, or drop --encoder.pretrained"
            ) from error
        encoder.backbone.load_state_dict(published.state_dict())
    return encoder


def _build_backbone(config: EncoderConfig) -> tuple[Any, tuple[float, ...], tuple[float, ...]]:
    """The backbone and the mean and standard deviation of the pixels that it expects."""
    if config.backbone == SMALL_CONV:
        return SmallConv(), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    import timm  # here, because it takes seconds, and every stage would wait for it

    if not timm.is_model(config.backbone):
        known = [SMALL_CONV, *timm.list_models()]
        near = difflib.get_close_matches(config.backbone, known, n=3, cutoff=0.5)
        hint = f"perhaps you meant {' or '.join(near)}" if near else "timm.list_models() lists all names"
        raise ConfigurationError(f"unknown backbone '{config.backbone}': {hint}")
    options: dict[str, Any] = {"pretrained": config.pretrained, "num_classes": 0, "global_pool": ""}
    try:
        backbone = timm.create_model(config.backbone, img_size=config.image_size, **options)
    except TypeError:
        # Only models with a fixed token grid take an image size; convolutional ones take any.
        backbone = timm.create_model(config.backbone, **options)
    except (AssertionError, ValueError) as error:
        height, width = config.image_size
        raise ConfigurationError(
            f"backbone {config.backbone} does not take frames of {height}x{width} pixels ({error}): "
            "choose another --encoder.image-size"
        ) from error
    if hasattr(backbone, "pre_logits"):
        # vgg's classifier layers: not part of the features, but most of the weights.
        backbone.pre_logits = nn.Identity()
    published: Any = backbone.pretrained_cfg
    return backbone, published["mean"], published["std"]
