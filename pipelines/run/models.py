"""The predictor and its calibration on disk, and what is asked of caches that they are used on."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from tqdm import tqdm

from data.cache import EmbeddingCache
from data.files import matching
from data.windows import Windows
from jepa.calibration import Calibration
from jepa.fingerprint import fingerprint
from jepa.networks import PredictorConfig
from jepa.predictor import Predictor
from jepa.sequence import Sequence
from pipelines.run.artefacts import load_module
from pipelines.run.caches import BATCH_NUMBERS, clips_in_short, require_finite
from pipelines.run.command import counted, require
from pipelines.run.files import read_json
from pipelines.run.folder import read_mark


def load_predictor(folder: Path, device: torch.device | str = "cpu") -> tuple[Predictor, Calibration]:
    """A predictor and its calibration on a device, from the run folder of train_predictor.

    Raises `UserError` where they are not there, are damaged, or do not belong together.
    """
    predictor = load_module(folder / "predictor", "predictor", build_predictor)
    owner = owner_of(predictor)

    def build_calibration(config: dict[str, Any]) -> Calibration:
        said = f"{folder}/calibration is that of another predictor, or of another version of this program"
        mend = "end the training there with --resume, or train anew"
        require(config.get("predictor_fingerprint") == owner, f"{said}: {mend}")
        known = {"predictor_fingerprint", "fitted_on"}
        return Calibration.build(**{name: value for name, value in config.items() if name not in known})

    calibration = load_module(folder / "calibration", "calibration", build_calibration)
    return predictor.to(device), calibration.to(device)


def owner_of(predictor: Predictor) -> str:
    """The fingerprint of a predictor, of its weights and its description."""
    return fingerprint(predictor.state_dict(), predictor.description())


def build_predictor(description: dict[str, Any]) -> Predictor:
    """A predictor with new weights, from `Predictor.description`."""
    fields = dict(description)
    network, shape, actions = dict(fields.pop("predictor")), tuple(fields.pop("shape")), tuple(fields.pop("actions"))
    kinds = {kind.kind: kind for kind in get_args(PredictorConfig)}
    return Predictor(kinds[network.pop("kind")](**network), shape, actions=actions, **fields)


def calibration_artefact(
    calibration: Calibration, predictor: Predictor, fitted_on: str
) -> tuple[str, dict[str, Any], Calibration]:
    """Kind, configuration and module of a calibration's artefact: whose it is, and on which clips it was fitted."""
    owner = {"predictor_fingerprint": owner_of(predictor)}
    return "calibration", calibration.description() | owner | {"fitted_on": fitted_on}, calibration


def open_cache(folder: Path, predictor: Predictor) -> EmbeddingCache:
    """A cache of the embeddings that a predictor takes. Raises `CacheError` where it is of others."""
    cache = EmbeddingCache(folder)
    cache.require_same_space(predictor.encoder_fingerprint, predictor.fps, predictor.shape, "the predictor")
    find_columns(cache, predictor.actions)
    return cache


def find_columns(cache: EmbeddingCache, patterns: Iterable[str]) -> tuple[str, ...]:
    """Columns of numbers beside the embeddings, by name or pattern. Raises `UserError` where one is not there."""
    there = [name for name, column in cache.provenance.columns.items() if column.shape == ()]
    found = list[str]()
    for pattern in patterns:
        found += (names := matching(pattern, there))
        known = f"it has {', '.join(there) or 'none'}"
        mend = f"cache its videos again with --columns {' '.join(patterns)}"
        require(bool(names), f"{cache.folder} has no numbers {pattern}, {known}: {mend}")
    return tuple(dict.fromkeys(found))


def windows_for(cache: EmbeddingCache, predictor: Predictor, length: int) -> Windows:
    """Windows of a cache for a predictor; says so where some are left out for want of actions."""
    windows = Windows(cache, length, predictor.actions)
    if missing := windows.without_actions:
        shown = f"{cache.folder}: {counted(missing, 'embedding')} of {cache.frames:,} without actions"
        print(f"warning: {shown}, and all windows with them, are left out", file=sys.stderr)
    return windows


def take_windows(windows: Windows, chosen: np.ndarray, device: torch.device) -> Sequence:
    """Some windows with their actions. Raises `UserError` where embeddings are not finite."""
    embeddings, actions = require_finite(windows.cache, windows.take(chosen)), windows.actions(chosen)
    actions = None if actions is None else actions.to(device)
    return Sequence.on_clock(embeddings.to(device), windows.cache.provenance.fps, actions)


def trained_on(folder: Path) -> str | None:
    """The clips that the predictor of a run was trained on, in short; None where the run's record is not there."""
    return read_mark(folder).get("inputs", {}).get("train")


def inputs_of(folder: Path, cache: EmbeddingCache) -> dict[str, Any]:
    """What a judgement rests on, for its record; warns where the model has learned from this very cache."""
    calibration, clips = read_json(folder / "calibration" / "config.json")["config"], clips_in_short(cache)
    for name, learned_from in {"predictor": trained_on(folder), "calibration": calibration.get("fitted_on")}.items():
        if clips == learned_from:
            print(f"warning: the {name} has learned from {cache.folder}: it knows others less well", file=sys.stderr)
    return {"provenance": cache.provenance, "clips": clips, "calibration": calibration}


def in_batches(
    windows: Windows, chosen: np.ndarray, device: torch.device, *, copies: int = 8, doing: str = ""
) -> Iterator[tuple[slice, Sequence]]:
    """Parts of some windows, so many that memory holds their copies, and what is in them, (B, length).

    With a progress bar where it is said what is done. Raises `UserError` where embeddings are not finite.
    """
    size = max(1, BATCH_NUMBERS // (copies * windows.length * int(np.prod(windows.cache.shape))))
    for start in tqdm(range(0, len(chosen), size), desc=doing, unit="batch", leave=False, disable=not doing):
        part = slice(start, start + size)
        yield part, take_windows(windows, chosen[part], device)
