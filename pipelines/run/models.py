"""The predictor and its calibration on disk, and what is asked of caches that they are used on."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from data.cache import CachedClip, EmbeddingCache
from data.windows import Windows
from jepa.calibration import Calibration
from jepa.fingerprint import fingerprint
from jepa.networks import PredictorConfig
from jepa.predictor import Predictor
from pipelines.run.artefacts import load_module, save_artefact
from pipelines.run.command import UserError, require


def load_predictor(folder: Path) -> tuple[Predictor, Calibration]:
    """A predictor and its calibration, from the run folder of train_predictor.

    Raises:
        UserError: they are not there, are damaged, or do not belong together.
    """
    folder = run_of(folder)
    predictor = load_module(folder / "predictor", "predictor", build_predictor)
    owner = owner_of(predictor)

    def build_calibration(config: dict[str, Any]) -> Calibration:
        require(
            config.items() >= owner.items(),
            f"{folder}/calibration is that of another predictor: end the training there with --resume, or train anew",
        )
        return Calibration.build(**{name: value for name, value in config.items() if name not in owner})

    return predictor, load_module(folder / "calibration", "calibration", build_calibration)


def run_of(folder: Path) -> Path:
    """The run folder of a predictor, which may be named by the predictor's own."""
    return folder.parent if folder.name == "predictor" and not (folder / "predictor").is_dir() else folder


def build_predictor(description: dict[str, Any]) -> Predictor:
    """A predictor with new weights, from `Predictor.description`."""
    fields = dict(description)
    network = dict(fields.pop("predictor"))
    kinds = {kind.kind: kind for kind in get_args(PredictorConfig)}
    return Predictor(kinds[network.pop("kind")](**network), tuple(fields.pop("shape")), **fields)


def save_calibration(calibration: Calibration, predictor: Predictor, folder: Path) -> None:
    """Leave the calibration beside its predictor, in place of an older one."""
    save_artefact(folder / "calibration", *calibration_artefact(calibration, predictor))


def calibration_artefact(calibration: Calibration, predictor: Predictor) -> tuple[str, dict[str, Any], Calibration]:
    """Kind, configuration and module of a calibration's artefact: it says whose it is."""
    return "calibration", calibration.description() | owner_of(predictor), calibration


def owner_of(predictor: Predictor) -> dict[str, str]:
    """What a calibration says of the predictor that it belongs to."""
    return {"predictor_fingerprint": fingerprint(predictor, predictor.description())}


def require_no_video_in_both(one: EmbeddingCache, other: EmbeddingCache) -> None:
    """What is fitted and judged on the same videos flatters. Raises `UserError`."""
    if shared := {clip.key.source for clip in one.clips} & {clip.key.source for clip in other.clips}:
        raise UserError(f"{min(shared)} is in both {one.folder} and {other.folder}: keep videos apart")


def require_finite(cache: EmbeddingCache, clip: CachedClip, embeddings: Tensor) -> None:
    """Raises `UserError` where embeddings of a clip are NaN or infinite."""
    if not bool(torch.isfinite(embeddings).all()):
        raise UserError(
            f"{cache.folder} holds embeddings that are not finite, first of {clip.key.source}: see what is wrong with "
            f"video-jepa inspect {cache.folder} --verify"
        )


def take_finite(windows: Windows, indices: np.ndarray) -> Tensor:
    """Embeddings of some windows, float32 (N, length, *tokens, D). Raises `UserError` where they are not finite."""
    embeddings, cache = windows.take(indices), windows.cache
    for row in np.flatnonzero(~embeddings.isfinite().flatten(1).all(dim=1).numpy())[:1]:
        require_finite(cache, cache.clips[windows.clip_of(indices)[row]], embeddings[row])
    return embeddings


def require_changing(cache: EmbeddingCache, changing: bool) -> None:
    """Raises `UserError` where no embedding of a cache ever changes."""
    require(changing, f"{cache.folder}: no embedding ever changes, so nothing can beat copying it: bring moving video")
