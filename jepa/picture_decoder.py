"""A decoder from embeddings to small pictures, for looking only: nothing else learns from it or is judged by it."""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

PARTS = (16, 8, 4, 2)
"""Sizes on the way to the picture, as parts of it."""
NARROWEST = 32
"""Channels of the finest layers; each layer before has twice as many, up to `width`."""


class PictureDecoder(nn.Module):
    """Embeddings (B, *tokens, D), as an encoder gives them, to pictures (B, 3, height, width), about in [0, 1].

    Where an embedding leaves something open, the least squared error is the mean of all that may be: what is blurred
    has been forgotten. It begins as the mean picture.

    Args:
        shape: (*tokens, D); with rows and columns as tokens places stay where they are.
        size: (height, width) of the pictures.
        width: channels of the coarsest layer.
        encoder_fingerprint: whose embeddings it takes.
    """

    mean: Tensor
    std: Tensor
    mean_picture: Tensor

    def __init__(self, shape: tuple[int, ...], size: tuple[int, int], *, width: int, encoder_fingerprint: str) -> None:
        super().__init__()
        self.shape, self.size, self.width = tuple(shape), tuple(size), width
        self.encoder_fingerprint = encoder_fingerprint
        self.on_grid = len(shape) == 3
        sizes = [tuple(-(-side // part) for side in size) for part in PARTS]
        if self.on_grid:  # what is coarser than the grid would lose places
            sizes = [one for one in sizes[:-1] if one[0] > shape[0] and one[1] > shape[1]] + sizes[-1:]
        self.sizes, widths = sizes, [max(NARROWEST, width >> place) for place in range(len(sizes))]
        into = (shape[-1], width) if self.on_grid else (math.prod(shape), width * math.prod(sizes[0]))
        self.enter, pairs = nn.Linear(*into), zip([width, *widths], widths, strict=False)
        self.layers = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairs)
        self.leave = nn.Conv2d(widths[-1], 12, 3, padding=1, bias=False)
        nn.init.zeros_(self.leave.weight)
        for name, buffer in (("mean", (shape[-1],)), ("std", (shape[-1],)), ("mean_picture", (3, *size))):
            self.register_buffer(name, torch.full(buffer, float(name == "std")))

    def description(self) -> dict[str, Any]:
        """What it can be built from again: its arguments."""
        return {name: getattr(self, name) for name in ("shape", "size", "width", "encoder_fingerprint")}

    def forward(self, embeddings: Tensor) -> Tensor:
        hidden = (embeddings - self.mean) / self.std
        if self.on_grid:
            hidden = rearrange(self.enter(hidden), "b r c w -> b w r c")
        else:
            hidden = self.enter(hidden.flatten(1)).unflatten(1, (-1, *self.sizes[0]))
        for layer, size in zip(self.layers, self.sizes, strict=True):
            hidden = layer(functional.gelu(functional.interpolate(hidden, size, mode="bilinear")))
        picture = functional.pixel_shuffle(self.leave(functional.gelu(hidden)), 2)
        return self.mean_picture + picture[:, :, : self.size[0], : self.size[1]]
