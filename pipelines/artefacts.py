"""Load what earlier stages left behind, or say in one line why it cannot be loaded."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from data.embedding_cache import EmbeddingCache
from jepa.encoder import FrameEncoder
from jepa.expander import Expander
from jepa.predictor import Predictor
from pipelines.stage import UserError

Artefact = TypeVar("Artefact", FrameEncoder, Expander, Predictor)


def load_encoder(folder: Path) -> FrameEncoder:
    """The encoder that `pretrain_encoder` wrote. Raises `UserError`."""
    return _load(FrameEncoder, folder, "encoder", "pretrain_encoder")


def load_expander(folder: Path) -> Expander:
    """The expander that `pretrain_encoder` wrote. Raises `UserError`."""
    return _load(Expander, folder, "expander", "pretrain_encoder")


def load_predictor(folder: Path) -> Predictor:
    """The predictor that `train_predictor` wrote. Raises `UserError`."""
    return _load(Predictor, folder, "predictor", "train_predictor")


def require_calibrated(predictor: Predictor, folder: Path) -> None:
    """A predictor that saw no validation clips knows no usual errors, and no ridge regression. Raises `UserError`."""
    if not bool(predictor.energy_quantiles.any()):
        raise UserError(
            f"{folder} is not calibrated: run train_predictor --initial-predictor {folder} --steps 0 on caches of its "
            "encoder, and take the predictor that it leaves"
        )


def require_no_video_in_both(one: EmbeddingCache, name: str, other: EmbeddingCache, other_name: str) -> None:
    """What is fitted and judged on the same videos flatters. Raises `UserError`."""
    shared = {clip.key.source for clip in one.clips} & {clip.key.source for clip in other.clips}
    if shared:
        raise UserError(f"{min(shared)} is in both {name} and {other_name}: keep videos apart")


def _load(kind: type[Artefact], folder: Path, name: str, stage: str) -> Artefact:
    # Checked here because from_pretrained would take a missing folder for a name on the hub.
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: there is no {name} here ({file} is missing): {stage} writes one")
    try:
        with redirect_stdout(io.StringIO()):  # the hub's mixin prints a line of its own
            return kind.from_pretrained(folder).eval()
    except (SafetensorError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: the {name} here cannot be loaded ({error}): run {stage} again") from error
