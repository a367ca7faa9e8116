"""The predictor and its calibration on disk, and what is asked of caches that they are used on."""

from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from data.cache import CachedClip, EmbeddingCache
from jepa.calibration import Calibration
from jepa.fingerprint import fingerprint
from jepa.networks import NetworkConfig, PredictorConfig
from jepa.predictor import Predictor
from pipelines.run.command import UserError, require
from pipelines.run.folder import load_artefact, load_weights, save_artefact


def load_predictor(folder: Path) -> tuple[Predictor, Calibration]:
    """A predictor and its calibration, from the run folder of train_predictor.

    Raises:
        UserError: they are not there, are damaged, or do not belong together.
    """
    folder = folder.parent if folder.name == "predictor" and not (folder / "predictor").is_dir() else folder
    config, state = load_artefact(folder / "predictor", "predictor")
    predictor = build(folder / "predictor", lambda: build_predictor(config))
    load_weights(predictor, state, folder / "predictor")
    config, state = load_artefact(folder / "calibration", "calibration")
    owner = config.pop("predictor_fingerprint", None)
    require(
        owner == fingerprint(predictor, predictor.description()),
        f"{folder}/calibration is that of another predictor: run calibrate.py --predictor {folder}",
    )
    calibration = build(folder / "calibration", lambda: Calibration.build(**config))
    load_weights(calibration, state, folder / "calibration")
    return predictor.eval(), calibration.eval()


def build_predictor(description: dict[str, Any]) -> Predictor:
    """A predictor with new weights, from `Predictor.description`."""
    fields = dict(description)
    return Predictor(network_config(fields.pop("predictor")), tuple(fields.pop("shape")), **fields)


def network_config(fields: dict[str, Any]) -> NetworkConfig:
    """The configuration of a network, from its kind and its fields."""
    fields = dict(fields)
    kinds = {kind.kind: kind for kind in get_args(PredictorConfig)}
    return kinds[fields.pop("kind")](**fields)


def build(folder: Path, make: Any) -> Any:
    """What an artefact describes, or one line that says why it cannot be built."""
    try:
        return make()
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{folder}/config.json describes nothing that can be built ({error}): train it again") from error


def save_calibration(calibration: Calibration, predictor: Predictor, folder: Path) -> None:
    """Leave the calibration beside its predictor, in place of an older one."""
    owner = {"predictor_fingerprint": fingerprint(predictor, predictor.description())}
    save_artefact(folder / "calibration", "calibration", calibration.description() | owner, calibration)


def require_no_video_in_both(one: EmbeddingCache, other: EmbeddingCache) -> None:
    """What is fitted and judged on the same videos flatters. Raises `UserError`."""
    if shared := {clip.key.source for clip in one.clips} & {clip.key.source for clip in other.clips}:
        raise UserError(f"{min(shared)} is in both {one.folder} and {other.folder}: keep videos apart")


def require_finite(cache: EmbeddingCache, clip: CachedClip, embeddings: Tensor) -> None:
    """Raises `UserError` where embeddings of a clip are NaN or infinite."""
    if not bool(torch.isfinite(embeddings).all()):
        raise UserError(
            f"{cache.folder} holds embeddings that are not finite, first of {clip.key.source}: see what is wrong with "
            f"pipelines/inspect.py {cache.folder} --verify"
        )


def require_changing(cache: EmbeddingCache, changing: bool) -> None:
    """Raises `UserError` where no embedding of a cache ever changes."""
    require(changing, f"{cache.folder}: no embedding ever changes, so nothing can beat copying it: bring moving video")
