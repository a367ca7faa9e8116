"""Backbones of frame encoders: timm's, and a small convolutional one."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from jepa.errors import ConfigurationError

SMALL_CONV = "small_conv"


class SmallConv(nn.Module):
    """Stride-2 convolutions with batch normalisation, spoken to as a timm model."""

    channels = (16, 32, 64)
    head_hidden_size = channels[-1]
    feature_info = tuple({"num_chs": width, "reduction": 2 ** (i + 1)} for i, width in enumerate(channels))
    pretrained_cfg: ClassVar[dict[str, Any]] = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        for inputs, outputs in zip((3, *self.channels), self.channels, strict=False):
            convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=2, padding=1, bias=False)
            self.stages.append(nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU()))

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(images).mean(dim=(2, 3))

    def forward_intermediates(self, images: Tensor, indices: Sequence[int], **_: Any) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return [maps[index] for index in indices]

    def prune_intermediate_layers(self, indices: Sequence[int], **_: Any) -> None:
        self.stages = self.stages[: max(indices) + 1]


def build_backbone(
    name: str, image_size: tuple[int, int], *, load: bool = False, weights_file: Path | None = None
) -> Any:
    """Backbone without its classifier.

    With `load`, timm builds the published network whole and loads it strictly; only then it loses its classifier. So
    weights of another model, or a part of them, are never taken. They are the hub's, or a safetensors file's, named
    as timm does. The image size, (height, width) in pixels, is for models with a fixed token grid. Raises
    `ConfigurationError` where there is no such backbone, image size or weights.
    """
    if name == SMALL_CONV:
        if load:
            raise ConfigurationError("weights", f"are published for models of timm, not for {SMALL_CONV}")
        return SmallConv()
    import timm  # here, because it takes seconds, and every command would wait for it

    if not timm.is_model(name):
        raise ConfigurationError("backbone", f"is {name}, which timm does not know: timm.list_models() lists all")
    if weights_file and (weights_file.suffix != ".safetensors" or not weights_file.is_file()):
        raise ConfigurationError("weights", f"{weights_file}: there is no such safetensors file")
    overlay = {"file": str(weights_file)} if weights_file else None
    create = partial(timm.create_model, name, pretrained=load, pretrained_cfg_overlay=overlay)
    backbone: Any
    try:
        try:
            backbone = create(img_size=image_size)
        except TypeError:  # only models with a fixed token grid take an image size; convolutional ones take any
            backbone = create()
    except Exception as error:  # of the model, torch, safetensors or the hub's client
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 240 else f"{reason[:240]} ..."
        if not load:
            raise ConfigurationError("backbone", f"{name} cannot be built ({reason})") from error
        source = f"{weights_file} does not hold" if weights_file else "the hub does not give"
        mend = "take the file of this very model" if weights_file else "check the network, or take them from a file"
        raise ConfigurationError("weights", f"{source} the weights of {name} ({reason}): {mend}") from error
    backbone.reset_classifier(0)
    return backbone
