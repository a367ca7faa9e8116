"""Load what earlier stages left behind, or say in one line why it cannot be loaded or used."""

import io
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors import SafetensorError
from torch import Tensor

from data.embedding_cache import EmbeddingCache
from data.windows import Windows
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


def require_finite(cache: EmbeddingCache, found: Iterable[Tensor]) -> None:
    """Raises `UserError` naming the first clip that holds NaN or infinity, if `found` in the cache are any."""
    if all(bool(part.isfinite().all()) for part in found):
        return
    clips = [clip for clip in cache.clips if not np.isfinite(cache.clip_embeddings(clip)).all()]
    raise UserError(
        f"{cache.folder} holds embeddings that are not finite, first of {clips[0].key.source}: "
        f"see what is wrong with pipelines/inspect_cache.py --cache {cache.folder} --verify"
    )


def require_changing(cache: EmbeddingCache, found: Iterable[Tensor], guess: str) -> None:
    """Raises `UserError` if in none of the sequences (..., T, D) `found` in the cache anything changes over time."""
    if not any(bool((part != part[..., :1, :]).any()) for part in found):
        raise UserError(f"{cache.folder}: no embedding ever changes, so nothing can beat {guess}: bring moving video")


def require_several(windows: Windows) -> None:
    """Nothing varies over a single window, so nothing can be measured on it. Raises `UserError`."""
    if len(windows) < 2:
        raise UserError(
            f"{windows.cache.folder} holds one window of {windows.length} embeddings, and at least 2 are needed: bring "
            "longer videos, or lower the context, the horizon or the stride"
        )


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
