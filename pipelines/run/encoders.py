"""Encoders in folders of ours."""

from pathlib import Path
from typing import Any

from jepa.encoder import Encoder, EncoderConfig, FrameEncoder
from jepa.video_encoder import ClipEncoder, ClipEncoderConfig
from pipelines.run.artefacts import load_module


def load_encoder(folder: Path) -> Encoder:
    """The encoder that `pretrain_encoder` or `cache_embeddings` left, in evaluation mode.

    Raises:
        UserError: there is none, it is damaged, or something else.
    """
    return load_module(folder, "encoder", build_encoder)


def build_encoder(config: dict[str, Any]) -> Encoder:
    """An encoder with new weights, from the configuration of an artefact."""
    fields = dict(config)
    if fields.pop("kind", None) == ClipEncoderConfig.kind:
        return ClipEncoder(ClipEncoderConfig(**fields))
    return FrameEncoder(EncoderConfig(**fields))
