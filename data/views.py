"""The two views of VICReg: what an embedding must keep is what the two have in common.

`neighbours`: two frames one tick apart. What moves predictably stays in the embedding; independent low-frequency
light and shade on each view makes everything static and textured useless, because without it the easiest thing to
keep is which clip this is. No crops: they would make position useless too.

`augmentations`: the classical two augmented views of one frame (crop, flip, colour, blur).

Whole batches at once, on the batch's device, all randomness from one generator: a batch is a pure function of
(frames, generator state).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor


@dataclass(frozen=True)
class ViewsConfig:
    """The two views of a frame."""

    kind: Literal["neighbours", "augmentations"] = "neighbours"
    """`neighbours`: consecutive frames under changing light. `augmentations`: one frame, cropped and coloured twice."""
    light_amplitude: float = 0.1
    """neighbours: amplitude of the low-frequency light and shade added to each view, of a pixel range of 1."""
    light_cells: int = 8
    """neighbours: light and shade is drawn on a grid of this many cells a side and enlarged."""
    pixel_noise: float = 0.05
    """neighbours: standard deviation of the noise added to each pixel."""
    smallest_crop: float = 0.3
    """augmentations: smallest area of the crop, relative to the frame."""
    colour_strength: float = 0.4
    """augmentations: greatest relative change of brightness, contrast and saturation."""
    blur_probability: float = 0.5
    """augmentations: how often a view is blurred."""


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
    return _augment(first, config, generator), _augment(first, config, generator)


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


def _augment(images: Tensor, config: ViewsConfig, generator: torch.Generator) -> Tensor:
    """Random resized crop, flip, brightness, contrast, saturation and blur, drawn for each sample of the batch."""
    batch = len(images)
    side = _uniform((batch,), config.smallest_crop, 1.0, generator).sqrt()
    stretch = _uniform((batch,), 0.75**0.5, 0.75**-0.5, generator)
    height, width = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    flip = torch.where(_uniform((batch,), 0, 1, generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = width * flip, height
    theta[:, 0, 2] = (1 - width) * _uniform((batch,), -1, 1, generator)
    theta[:, 1, 2] = (1 - height) * _uniform((batch,), -1, 1, generator)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    images = functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    strength = config.colour_strength
    brightness, contrast, saturation = _uniform((3, batch, 1, 1, 1), 1 - strength, 1 + strength, generator)
    images = images * brightness
    images = (images - images.mean(dim=(1, 2, 3), keepdim=True)) * contrast + images.mean(dim=(1, 2, 3), keepdim=True)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * saturation + grey

    sigma = _uniform((batch, 1), 0.1, 2.0, generator)
    taps = torch.arange(-3, 4, device=images.device)
    kernel = torch.exp(-(taps**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum(dim=1, keepdim=True)  # (B, 7)
    blurred = _separable_blur(images, kernel)
    chosen = _uniform((batch, 1, 1, 1), 0, 1, generator) < config.blur_probability
    return torch.where(chosen, blurred, images).clamp(0, 1)


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
