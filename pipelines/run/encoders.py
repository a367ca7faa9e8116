"""Encoders in folders of ours."""

from pathlib import Path

import jepa.video_encoder  # noqa: F401, whose kind of encoder is known by being imported
from jepa.encoder import Encoder
from pipelines.run.artefacts import load_module


def load_encoder(folder: Path) -> Encoder:
    """The encoder that `pretrain_encoder` or `cache_embeddings` left, in evaluation mode.

    Raises:
        UserError: there is none, it is damaged, or something else.
    """
    return load_module(folder, "encoder", Encoder.build)
