"""The two views of VICReg: what an embedding must keep is what the two have in common.

`neighbours`: two frames one tick apart. What moves predictably stays in the embedding; independent low-frequency
light and shade on each view makes everything static and textured useless, because without it the easiest thing to
keep is which clip this is. No crops: they would make position useless too.

All others are recipes for still images: the image augmented twice, as published (`RECIPES`).

Whole batches at once, on the batch's device, with parameters drawn for each sample, all randomness from one generator:
a batch is a pure function of (frames, generator state).
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as functional
from einops import einsum, rearrange
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """How one view is made of an image. Probabilities and strengths as torchvision's transforms take them."""

    smallest_crop: float
    """Smallest area of the random crop, relative to the image; its sides are in proportions from 3:4 to 4:3."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_probability: float = 0.8
    """Of changing brightness, contrast, saturation and hue."""
    grey_probability: float = 0.2
    blur_probability: float = 0.0
    """Of a Gaussian blur with a deviation from .1 to 2 pixels."""
    solarise_probability: float = 0.0
    """Of inverting what is brighter than half."""


_VICREG, _CIFAR = Augmentation(0.08, blur_probability=0.5, solarise_probability=0.1), Augmentation(0.2)
RECIPES = {
    "vicreg": (
        replace(_VICREG, blur_probability=1.0, solarise_probability=0.0),
        replace(_VICREG, blur_probability=0.1, solarise_probability=0.2),
    ),
    "vicreg_symmetric": (_VICREG, _VICREG),
    "cifar": (replace(_CIFAR, solarise_probability=0.1), replace(_CIFAR, solarise_probability=0.1)),
    "cifar_asymmetric": (replace(_CIFAR, smallest_crop=0.08),
                         replace(_CIFAR, smallest_crop=0.08, solarise_probability=0.2)),
}  # fmt: skip
"""The first and the second view. `vicreg`: the authors' code, which follows BYOL; `vicreg_symmetric`: the paper,
appendix C.1; `cifar` and `cifar_asymmetric`: solo-learn's for images of 32 pixels, without blur.

What differs from them: a crop that would not fit is made narrower, not drawn again; hue is turned in YIQ, not in HSV;
crops are enlarged bilinearly, not bicubically; brightness, contrast, saturation and hue are changed in this order, not
in a random one.
"""
BLUR_RADIUS = 6
"""In pixels: three times the greatest deviation."""


@dataclass(frozen=True)
class ViewsConfig:
    """The two views of a frame."""

    kind: Literal["neighbours", "vicreg", "vicreg_symmetric", "cifar", "cifar_asymmetric"] = "neighbours"
    """`neighbours`: consecutive frames under changing light. The others, for still images: one image, cropped and
    coloured twice, as VICReg does on ImageNet, and as is usual for images of 32 pixels."""
    light_amplitude: float = 0.1
    """neighbours: amplitude of the low-frequency light and shade added to each view, of a pixel range of 1."""
    light_cells: int = 8
    """neighbours: light and shade is drawn on a grid of this many cells a side and enlarged."""
    pixel_noise: float = 0.05
    """neighbours: standard deviation of the noise added to each pixel."""


def make_views(
    frames: Tensor, following: Tensor, config: ViewsConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two views of each frame.

    Args:
        frames: uint8 (B, 3, H, W).
        following: uint8 (B, 3, H, W), the frames one tick later.
        config: which views.
        generator: on the frames' device.

    Returns:
        Two float tensors (B, 3, H, W) in [0, 1].
    """
    first = frames.float() / 255
    if config.kind == "neighbours":
        second = following.float() / 255
        return _relight(first, config, generator), _relight(second, config, generator)
    one, other = RECIPES[config.kind]
    return augment(first, one, generator), augment(first, other, generator)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _relight(images: Tensor, config: ViewsConfig, generator: torch.Generator) -> Tensor:
    batch, channels, height, width = images.shape
    amplitude, cells = config.light_amplitude, config.light_cells
    grid = _uniform((batch, channels, cells, cells), -amplitude, amplitude, generator)
    light = functional.interpolate(grid, size=(height, width), mode="bilinear", align_corners=True)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    # In place: on a CPU, fresh memory for each step would cost as much as the arithmetic.
    return noise.mul_(config.pixel_noise).add_(light).add_(images).clamp_(0, 1)


def augment(images: Tensor, recipe: Augmentation, generator: torch.Generator) -> Tensor:
    """One view of each image, float (B, 3, H, W) in [0, 1] twice; the generator is on their device."""
    images = random_crop(images, recipe.smallest_crop, generator)
    images = _jitter(images, recipe, generator)
    if recipe.blur_probability:
        deviation = _uniform((len(images), 1), 0.1, 2.0, generator)
        radius = min(BLUR_RADIUS, *(side - 1 for side in images.shape[2:]))
        taps = torch.arange(-radius, radius + 1, device=images.device)
        kernel = torch.exp(-(taps**2) / (2 * deviation**2))
        blurred = _separable_blur(images, kernel / kernel.sum(dim=1, keepdim=True))
        images = torch.where(_chosen(images, recipe.blur_probability, generator), blurred, images)
    if recipe.solarise_probability:
        solarised = torch.where(images > 0.5, 1 - images, images)
        images = torch.where(_chosen(images, recipe.solarise_probability, generator), solarised, images)
    return images.clamp(0, 1)


def random_crop(images: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """A random part of each image (B, C, H, W), enlarged to the whole and in half of the cases mirrored.

    `smallest` is its smallest area, relative to the image.
    """
    batch = len(images)
    side = _uniform((batch,), smallest, 1.0, generator).sqrt()
    stretch = _uniform((batch,), math.log(3 / 4) / 2, math.log(4 / 3) / 2, generator).exp()
    height, width = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    mirror = torch.where(_uniform((batch,), 0, 1, generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
    theta[:, 0, 2] = (1 - width) * _uniform((batch,), -1, 1, generator)
    theta[:, 1, 2] = (1 - height) * _uniform((batch,), -1, 1, generator)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _jitter(images: Tensor, recipe: Augmentation, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue for some of the images, and grey for some."""
    batch = len(images)
    jittered = _chosen(images, recipe.jitter_probability, generator)

    def factor(strength: float) -> Tensor:
        drawn = _uniform((batch, 1, 1, 1), max(0.0, 1 - strength), 1 + strength, generator)
        return torch.where(jittered, drawn, 1.0)

    images = (images * factor(recipe.brightness)).clamp(0, 1)
    mean = _grey(images).mean(dim=(2, 3), keepdim=True)
    images = torch.lerp(mean, images, factor(recipe.contrast)).clamp(0, 1)
    images = torch.lerp(_grey(images), images, factor(recipe.saturation)).clamp(0, 1)
    turn = torch.where(jittered, _uniform((batch, 1, 1, 1), -recipe.hue, recipe.hue, generator), 0.0)
    images = einsum(_hue_rotation(turn.flatten()), images, "b out c, b c h w -> b out h w").clamp(0, 1)
    return torch.where(_chosen(images, recipe.grey_probability, generator), _grey(images), images)


def _chosen(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Which of the images something happens to, bool (B, 1, 1, 1)."""
    return _uniform((len(images), 1, 1, 1), 0, 1, generator) < probability


def _grey(images: Tensor) -> Tensor:
    """Luma (B, 1, H, W) of (B, 3, H, W), ITU-R 601."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


@functools.cache  # or the host would wait for a GPU at every step
def _yiq(device: torch.device) -> tuple[Tensor, Tensor]:
    """The matrices (3, 3) from RGB to YIQ and back."""
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    return to_yiq.to(device), to_yiq.inverse().to(device)


def _hue_rotation(turns: Tensor) -> Tensor:
    """Matrices (B, 3, 3) that turn RGB around the grey axis by so many full turns (B,), at the same luma (YIQ)."""
    to_yiq, back = _yiq(turns.device)
    cosine, sine = torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)
    one, zero = torch.ones_like(turns), torch.zeros_like(turns)
    turn = torch.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine])
    turn = rearrange(turn, "(row column) b -> b row column", row=3)
    return back @ turn @ to_yiq


def _separable_blur(images: Tensor, kernel: Tensor) -> Tensor:
    """Blur each image (B, C, H, W) with its own one-dimensional kernel (B, taps), along both axes."""
    batch, channels, height, width = images.shape
    radius = kernel.shape[1] // 2
    weights = kernel.repeat_interleave(channels, dim=0)[:, None]  # (B x C, 1, taps)
    flat = images.reshape(1, batch * channels, height, width)
    flat = functional.pad(flat, (radius, radius, radius, radius), mode="reflect")
    flat = functional.conv2d(flat, weights[:, :, None, :], groups=batch * channels)
    flat = functional.conv2d(flat, weights[:, :, :, None], groups=batch * channels)
    return flat.reshape(images.shape)
