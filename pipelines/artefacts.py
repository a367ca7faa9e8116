"""Load what earlier stages left behind, or say in one line why it cannot be loaded."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from jepa.encoder import FrameEncoder
from jepa.predictor import Predictor
from pipelines.stage import UserError

Artefact = TypeVar("Artefact", FrameEncoder, Predictor)


def load_encoder(folder: Path) -> FrameEncoder:
    """The encoder that `pretrain_encoder` wrote. Raises `UserError`."""
    return _load(FrameEncoder, folder, "encoder", "pretrain_encoder")


def load_predictor(folder: Path) -> Predictor:
    """The predictor that `train_predictor` wrote. Raises `UserError`."""
    return _load(Predictor, folder, "predictor", "train_predictor")


def _load(kind: type[Artefact], folder: Path, name: str, stage: str) -> Artefact:
    # Checked here because from_pretrained would take a missing folder for a name on the hub.
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: there is no {name} here ({file} is missing): {stage} writes one")
    try:
        with redirect_stdout(io.StringIO()):  # the hub's mixin prints a line of its own
            return kind.from_pretrained(folder).eval()
    except (SafetensorError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: not a {name} that can be loaded ({error}): run {stage} again") from error
