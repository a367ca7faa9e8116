"""Published clip encoders: the frames up to a tick in, the embedding of that tick out.

The attention inside V-JEPA 2 (arXiv:2506.09985) looks both ways in time. So that nothing of the future is seen, its
window ends at the tick, and the tokens kept are those of the window's last temporal slot.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from jepa.config import Bounded, NotNegativeInt, PositiveInt
from jepa.encoder import Encoder
from jepa.errors import ConfigurationError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the pixels that V-JEPA 2 was trained on, by channel."""
NOT_THE_MODEL = ("transformers_version", "architectures", "dtype")
"""Fields of transformers' configurations that change nothing in an embedding."""


@dataclass(frozen=True)
class ClipEncoderConfig(Bounded):
    """Clip encoder."""

    kind: ClassVar[str] = "clip"
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of transformers' `VJEPA2Config`."""
    window: PositiveInt = 64
    """Frames that one embedding is made of."""
    tokens: Literal["vector", "grid"] = "vector"
    """Tokens of the last temporal slot: their mean, or all of them."""
    embedding_dimension: NotNegativeInt = 0
    """Length of a token after the head. 0: no head, the features as they are."""


class ClipEncoder(Encoder):
    """Frames (B, window, 3, H, W), uint8 or float in [0, 1], to embeddings (B, *tokens, D), float32; never trained.

    A `VJEPA2Model` is taken with its weights; by default a new one is made. Raises `ConfigurationError` where
    transformers is not installed, or the window does not fit the model.
    """

    configuration = ClipEncoderConfig

    def __init__(self, config: ClipEncoderConfig, model: Any = None) -> None:
        if model is None:
            transformers = _transformers()
            model = transformers.VJEPA2Model(transformers.VJEPA2Config(**config.model))
        described = model.config
        if config.window % described.tubelet_size:
            raise ConfigurationError("window", f"is {config.window}: it must be a multiple of {described.tubelet_size}")
        side = described.crop_size // described.patch_size
        super().__init__(
            config, model.encoder, window=config.window, image_size=(described.crop_size, described.crop_size),
            tokens=(side, side) if config.tokens == "grid" else (), features=described.hidden_size,
            pixels=(MEAN, STD),
        )  # fmt: skip
        self.side = side
        if config.embedding_dimension:
            self.head.append(nn.Linear(self.features, config.embedding_dimension))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def embed(self, frames: Tensor) -> Tensor:
        """Embeddings (B, *tokens, D) of windows of frames, the last one the tick's own. Raises as `normalise`."""
        images = self.normalise(frames, (self.window, 3, *self.image_size))
        tokens = self.backbone(images).last_hidden_state  # (B, slots h w, F)
        last = rearrange(tokens[:, -(self.side**2) :], "b (h w) f -> b h w f", h=self.side)
        return self.head(last if self.tokens else last.mean(dim=(1, 2))).float()


def load_clip_encoder(name: str, *, tokens: Literal["vector", "grid"] = "vector", window: int = 0) -> ClipEncoder:
    """A V-JEPA 2 of the hub, or in a folder; its window is so many frames, or (0) as many as it was trained on.

    Raises `ConfigurationError` as `ClipEncoder`; or where the encoder cannot be had, or is none.
    """
    transformers = _transformers()
    try:
        described = transformers.AutoConfig.from_pretrained(name)
        if described.model_type != "vjepa2":
            raise ValueError(f"it is a {described.model_type}, and only vjepa2 is known here")
        model, loading = transformers.VJEPA2Model.from_pretrained(
            name, config=described, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        if lost := [str(key) for kind in ("missing_keys", "mismatched_keys") for key in loading[kind]]:
            raise ValueError(f"it lacks weights, such as {lost[0]}")
    except Exception as error:  # of the hub's client, safetensors, torch or the configuration
        reason = " ".join(str(error).split())[:240]
        raise ConfigurationError("encoder", f"{name} cannot be had or used: {reason}") from error
    fields = {key: value for key, value in described.to_diff_dict().items() if key not in NOT_THE_MODEL}
    return ClipEncoder(ClipEncoderConfig(fields, window or described.frames_per_clip, tokens), model)


def _transformers() -> Any:
    try:
        import transformers  # here: it takes seconds, and is not always there
    except ImportError as error:
        mend = "pip install 'video-jepa[clips]'"
        raise ConfigurationError("encoder", f"needs transformers, which is not installed: {mend}") from error
    return transformers
