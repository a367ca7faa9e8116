"""The views of a training sample: what an embedding must keep is what they have in common.

Whole batches at once, on the batch's device, all randomness from one generator: views are a pure function of (frames,
state of the generator).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor

LIGHT_CELLS = 8  # light and shade are drawn on a grid of this many cells a side and enlarged


@dataclass(frozen=True)
class Neighbours:
    """Consecutive frames, each under light of its own.

    What moves predictably stays in the embedding; independent light and shade make everything static and textured
    useless, because without them the easiest thing to keep is which clip this is. No crops: they would make position
    useless too.
    """

    light_amplitude: float = 0.1
    """Amplitude of the low-frequency light and shade added to each view; pixels range from 0 to 1."""
    pixel_noise: float = 0.05
    """Standard deviation of the noise added to each pixel."""

    def __call__(self, clips: Tensor, generator: torch.Generator) -> Tensor:
        """Views, float (B, T, 3, H, W) in [0, 1], of clips uint8 (B, T, 3, H, W)."""
        images = rearrange(clips, "b t c h w -> (t b) c h w").float() / 255
        views = torch.cat([self._relight(half, generator) for half in images.chunk(2)])
        return rearrange(views, "(t b) c h w -> b t c h w", b=len(clips))

    def _relight(self, images: Tensor, generator: torch.Generator) -> Tensor:
        batch, channels, height, width = images.shape
        grid = torch.rand((batch, channels, LIGHT_CELLS, LIGHT_CELLS), generator=generator, device=images.device)
        grid = grid * (2 * self.light_amplitude) - self.light_amplitude
        light = functional.interpolate(grid, size=(height, width), mode="bilinear", align_corners=True)
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        # In place: on a CPU, fresh memory for each step would cost as much as the arithmetic.
        return noise.mul_(self.pixel_noise).add_(light).add_(images).clamp_(0, 1)
