"""The eye of the world model: one frame in, one embedding out.

A backbone (any timm model, or a small convolutional one that trains on a laptop in a minute) and an embedding head:
linear, with hidden layers before it, or none. Frames are embedded one by one, so nothing of the future can leak into an
embedding of the past.
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
    """Length of the embedding of a frame. 0: no embedding head, the embedding is what pooling leaves of the backbone's
    features."""
    image_size: tuple[int, int] = (64, 64)
    """HEIGHT WIDTH in pixels that every frame is resized to."""
    pooling: Literal["flatten", "average", "class_token"] = "flatten"
    """`flatten` keeps where things are; `average` only what they are (and costs far fewer weights at large sizes); both
    are of patches only where a vision transformer has other tokens too. `class_token`: a vision transformer's own
    summary."""
    stem: Literal["published", "cifar"] = "published"
    """`cifar`: timm's ResNets begin with a 3x3 convolution of stride 1 and no max-pooling, for images of 32x32."""
    register_tokens: int = 0
    """Give a vision transformer so many tokens to work with (arXiv:2309.16588), which pooling leaves out. 0: those that
    it is published with."""
    head_widths: tuple[int, ...] = ()
    """Hidden layers of the embedding head, such as `512 128`, each with batch normalisation, ReLU and dropout."""
    head_dropout: float = 0.0
    """Share of each hidden layer's features that are dropped in training."""
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
        ConfigurationError: the backbone is unknown (with suggestions), does not support the image size, or lacks what
            the configuration asks of it.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    embedding_dimension: int
    """D: what the configuration says or, where it says 0, how many features the backbone has."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        _check(config)
        # JSON has no tuples: a configuration that comes back from config.json holds lists here.
        height, width = config.image_size
        self.config = replace(
            config, image_size=(height, width), head_widths=tuple(config.head_widths), pretrained=False
        )
        self.backbone, mean, std = _build_backbone(self.config)
        if config.stem == "cifar":
            _give_cifar_stem(self.backbone, config)
        if config.register_tokens and getattr(self.backbone, "num_reg_tokens", 0) != config.register_tokens:
            raise _lacking(config, "place for register tokens", "drop --encoder.register-tokens, or take a vit_...")
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)
        try:
            with torch.enable_grad():
                features = self._features(torch.zeros(2, 3, height, width))
                features.sum().backward()
        except (RuntimeError, AssertionError) as error:
            raise _impossible(config, error) from error
        # What features do not depend on, such as layers of a classifier, would never have a gradient, which
        # DistributedDataParallel refuses.
        for weight in self.backbone.parameters():
            weight.requires_grad_(weight.grad is not None and not config.frozen_backbone)
            weight.grad = None
        layers: list[nn.Module] = []
        inputs = features.shape[1]
        for outputs in self.config.head_widths:
            layers += [
                nn.Linear(inputs, outputs),
                nn.BatchNorm1d(outputs),
                nn.ReLU(),
                nn.Dropout(config.head_dropout),
            ]
            inputs = outputs
        self.head_layers = nn.Sequential(*layers)
        self.embedding_dimension = config.embedding_dimension or inputs
        self.head = nn.Linear(inputs, config.embedding_dimension) if config.embedding_dimension else nn.Identity()

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
        features = self._features((frames - self.pixel_mean) / self.pixel_std)
        return self.head(self.head_layers(features))  # (B, D)

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
        """Normalised images (B, 3, H, W) to pooled features (B, F)."""
        if isinstance(self.backbone, SmallConv):
            features = self.backbone(images)  # (B, C, h, w)
        else:
            features = self.backbone.forward_features(images)  # (B, C, h, w), (B, h, w, C) or (B, tokens, C)
        has_class_token = getattr(self.backbone, "cls_token", None) is not None
        if self.config.pooling == "class_token":
            if not has_class_token:
                raise _lacking(self.config, "class token", "take --encoder.pooling average")
            return features[:, 0]
        if features.ndim == 3:
            features = features[:, getattr(self.backbone, "num_prefix_tokens", int(has_class_token)) :]
            if features.shape[1] == 0:
                raise _lacking(self.config, "patches at its end", "take --encoder.pooling class_token")
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
    if config.pretrained:
        if config.stem != "published" or config.register_tokens:
            raise ConfigurationError(
                "published weights are for the published network: drop --encoder.pretrained, or --encoder.stem and "
                "--encoder.register-tokens"
            )
        if config.backbone == SMALL_CONV:
            raise ConfigurationError("small_conv has no published weights: drop --encoder.pretrained")
    encoder = FrameEncoder(config)
    if config.pretrained:
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


def _check(config: EncoderConfig) -> None:
    for name in ("embedding_dimension", "register_tokens"):
        if getattr(config, name) < 0:
            option = name.replace("_", "-")
            raise ConfigurationError(f"--encoder.{option} is {getattr(config, name)}: it must be 0 or more")
    if min(config.head_widths, default=1) < 1:
        raise ConfigurationError(f"--encoder.head-widths has {min(config.head_widths)}: widths must be positive")
    if config.head_widths and not config.embedding_dimension:
        raise ConfigurationError("--encoder.head-widths need an embedding head: give an --encoder.embedding-dimension")
    if not 0 <= config.head_dropout < 1:
        raise ConfigurationError(f"--encoder.head-dropout is {config.head_dropout:g}: it must be at least 0, below 1")
    if config.head_dropout and not config.head_widths:
        raise ConfigurationError("--encoder.head-dropout needs hidden layers: give --encoder.head-widths, such as 128")


def _give_cifar_stem(backbone: nn.Module, config: EncoderConfig) -> None:
    """As He et al. 2016 (arXiv:1512.03385), section 4.2: a small image keeps its size up to the first stage."""
    from timm.models.resnet import ResNet

    if not isinstance(backbone, ResNet):
        raise _lacking(config, "cifar stem", "drop --encoder.stem, or take a resnet such as resnet18")
    resnet: Any = backbone
    resnet.conv1 = nn.Conv2d(3, resnet.bn1.num_features, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()


def _lacking(config: EncoderConfig, what: str, mend: str) -> ConfigurationError:
    return ConfigurationError(f"backbone {config.backbone} has no {what}: {mend}")


def _impossible(config: EncoderConfig, error: Exception) -> ConfigurationError:
    height, width = config.image_size
    return ConfigurationError(
        f"backbone {config.backbone} does not take frames of {height}x{width} pixels ({error}): "
        "choose another --encoder.image-size"
    )


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
    tokens: dict[str, Any] = {"reg_tokens": config.register_tokens} if config.register_tokens else {}
    try:
        backbone = timm.create_model(config.backbone, img_size=config.image_size, **tokens, **options)
    except TypeError:
        # Only models with a fixed token grid take an image size; convolutional ones take any.
        backbone = timm.create_model(config.backbone, **options)
    except (AssertionError, ValueError) as error:
        raise _impossible(config, error) from error
    if hasattr(backbone, "pre_logits"):
        # vgg's classifier layers: not part of the features, but most of the weights.
        backbone.pre_logits = nn.Identity()
    published: Any = backbone.pretrained_cfg
    return backbone, published["mean"], published["std"]
