"""Encoders by name: published ones of timm or of transformers, and folders of our own."""

from pathlib import Path
from typing import Any, Literal

from jepa.backbones import build_backbone
from jepa.encoder import EncoderConfig, FrameEncoder
from jepa.errors import ConfigurationError
from jepa.video_encoder import ClipEncoder, ClipEncoderConfig, load_clip_encoder
from pipelines.run.command import require
from pipelines.run.folder import load_module

AnyEncoder = FrameEncoder | ClipEncoder


def find_encoder(
    name: str,
    *,
    weights: Path | None = None,
    tokens: Literal["vector", "grid"] = "vector",
    grid: tuple[int, int] = (0, 0),
    levels: tuple[int, ...] = (),
    image_size: tuple[int, int] = (0, 0),
    window: int = 0,
) -> AnyEncoder:
    """An encoder in evaluation mode.

    Args:
        name: `timm:MODEL`, `hf:MODEL`, or a folder of our own, which has all else in it.
        weights: safetensors file for a model of timm's, instead of the hub.
        tokens: one embedding for all of a frame, as the backbone itself pools it, or a grid of them.
        grid: rows and columns of it; 0 0: those of the first level.
        levels: feature levels of a timm model, counted as its `out_indices`; none: the last, or the backbone's output.
        image_size: height and width of the frames; 0 0: those that the model was trained on.
        window: frames that a clip encoder sees; 0: as many as it was trained on.

    Raises:
        ConfigurationError: the encoder cannot be had, or does not take what it is asked for.
        UserError: the folder holds no encoder, or something is asked for that it does not take.
    """
    source, colon, model = name.partition(":")
    if not colon or source not in ("timm", "hf"):
        fixed = not (weights or any(grid) or levels or any(image_size) or window or tokens == "grid")
        require(
            fixed, f"--encoder {name} is a folder: its tokens, levels, sizes and weights are those in it; drop these"
        )
        return load_encoder(Path(name))
    if source == "hf":
        require(
            not weights and not levels and not any(grid), "--encoder hf:... has no levels, no other grid and no file"
        )
        require(image_size[0] == image_size[1], f"--image-size is {image_size}: a clip encoder takes squares")
        return load_clip_encoder(model, tokens=tokens, window=window, image_size=image_size[0])
    require(not window, "--window is for clip encoders: a model of timm sees one frame")
    require(tokens == "grid" or not any(grid), "--grid needs --tokens grid")
    try:
        return _timm_encoder(model, weights, tokens == "grid", grid=grid, levels=levels, image_size=image_size)
    except ConfigurationError as error:
        of_file = error.field == "weights" and weights is not None
        field = {"backbone": "encoder", "weights": "encoder_weights" if of_file else "encoder"}
        raise ConfigurationError(field.get(error.field, error.field), error.message) from error


def _timm_encoder(
    model: str,
    weights: Path | None,
    is_grid: bool,
    *,
    grid: tuple[int, int],
    levels: tuple[int, ...],
    image_size: tuple[int, int],
) -> FrameEncoder:
    import timm  # here, because it takes seconds

    published: Any = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    height, width = image_size if any(image_size) or not published else published.input_size[1:]
    backbone = build_backbone(model, (height, width), load=True, weights_file=weights)
    if is_grid and not any(grid):
        level = (levels or (-1,))[0]
        if not -len(backbone.feature_info) <= level < len(backbone.feature_info):
            raise ConfigurationError("levels", f"is {level}: {model} has 0 to {len(backbone.feature_info) - 1}")
        stride = backbone.feature_info[level]["reduction"]
        grid = (-(-height // stride), -(-width // stride))
    config = EncoderConfig(
        backbone=model,
        weights="frozen",
        image_size=(height, width),
        grid=grid,
        levels=levels or (-1,),
        pooling="average" if levels else "native",
        embedding_dimension=0,
    )
    return FrameEncoder(config, backbone).eval()


def load_encoder(folder: Path) -> AnyEncoder:
    """The encoder in a folder that `pretrain_encoder` or `cache_embeddings` left.

    Raises:
        UserError: there is none, it is damaged, or something else.
    """
    return load_module(folder, "encoder", build_encoder)


def build_encoder(config: dict[str, Any]) -> AnyEncoder:
    """An encoder with new weights, from the configuration of an artefact."""
    fields = dict(config)
    if fields.pop("kind", None) == ClipEncoderConfig.kind:
        return ClipEncoder(ClipEncoderConfig(**fields))
    return FrameEncoder(EncoderConfig(**fields))
