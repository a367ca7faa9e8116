"""Judges a predictor on the windows of a cache: what the command, the demo and the notebook share.

Windows go through in batches, on the predictor's device, and leave sums by group (`jepa.metrics`): memory is flat in
their number. Errors are of all windows; the rest, which costs more, is of at most `DETAILED` of them, retrieval and
collapse at a few horizons and, of a grid of tokens, on the mean of its tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor
from tqdm import tqdm

from data.cache import EmbeddingCache
from data.windows import Windows, group_windows
from jepa.baselines import CopyLast, LinearExtrapolation, Mean
from jepa.calibration import Calibration
from jepa.diagnostics import CollapseStats, collapse_stats
from jepa.metrics import (
    Bootstrap,
    GroupSums,
    best_of,
    change_cosine,
    coverage,
    divide,
    energy_score,
    live_features,
    r2_and_r,
    reading_moments,
    retrieved,
    squared_error,
    useful_steps,
)
from jepa.predictor import Predictor
from jepa.probe import FOLDS, Probe, fit_probe
from jepa.rollout import expected_rollout, rollout
from jepa.sequence import Future, Sequence
from pipelines.run.command import require
from pipelines.run.models import require_changing, require_finite

DETAILED, BANK, LIVE_FRAMES, PROBE_FRAMES = 2000, 20_000, 256, 20_000
"""Most windows for details; frames to find the one that came among, to see what moves, to fit a probe on."""
BATCH_NUMBERS = 32_000_000
"""Size of the forecasts that are held at a time."""
REFERENCES = ("copy_last", "ridge", "mean")
"""Forecasts that errors are divided by."""


@dataclass(frozen=True)
class Judged:
    """A predictor, how far to believe it, and the windows of a context and a horizon that it is judged on."""

    predictor: Predictor
    calibration: Calibration
    windows: Windows
    autocast: Callable[[], Any] = torch.no_grad
    """Context of the networks' arithmetic."""

    @property
    def context(self) -> int:
        """Embeddings that are shown."""
        return self.predictor.config.context

    @property
    def future(self) -> Future:
        """The ticks that are forecast."""
        return Future.ticks(self.windows.length - self.context, self.predictor.fps)


class Batch(NamedTuple):
    """Some windows, what is forecast for them and what came; standardised."""

    past: Sequence
    """Raw embeddings (B, context, *tokens, D)."""
    forecasts: dict[str, Tensor]
    """(B, H, *tokens, D) by name: `model` is the believed forecast, `rollout` that of the bare network."""
    came: Tensor
    """(B, H, *tokens, D)"""


class Readout(NamedTuple):
    """A probe, and the columns of a cache that it reads off standardised embeddings."""

    columns: tuple[str, ...]
    probe: Probe


def shown_horizons(horizon: int) -> list[int]:
    """Five horizons at most, evenly, the first and the last among them."""
    return sorted({1, *(-(-horizon * part // 4) for part in range(1, 5))})


@torch.no_grad()
def forecast_windows(judged: Judged, indices: np.ndarray) -> Batch:
    """Forecasts of some windows. Raises `UserError` where embeddings are not finite."""
    predictor, calibration, windows, fps = judged.predictor, judged.calibration, judged.windows, judged.predictor.fps
    embeddings, future = windows.take(indices).to(predictor.mean.device), judged.future
    for row in np.flatnonzero(~embeddings.isfinite().flatten(1).all(dim=1).cpu().numpy())[:1]:
        require_finite(windows.cache, windows.cache.clips[windows.clip_of(indices)[row]], embeddings[row])
    past = Sequence.on_clock(embeddings[:, : judged.context], fps)
    with judged.autocast():
        rolled, ridged = expected_rollout(predictor, past, future), rollout(calibration.ridge, past, future)
    # As rollout(..., calibration=calibration), which would roll both out again.
    believed = calibration.believe(rolled, ridged, past, (future.times * fps).to(embeddings.device))
    forecasts = {"model": believed, "rollout": rolled, "ridge": ridged}
    guesses = {
        "copy_last": CopyLast(fps),
        "linear_extrapolation": LinearExtrapolation(fps),
        "mean": Mean(fps, predictor.mean),
    }
    forecasts |= {name: rollout(guess, past, future) for name, guess in guesses.items()}
    return Batch(
        past=past,
        forecasts={name: predictor.standardise(value.float()) for name, value in forecasts.items()},
        came=predictor.standardise(embeddings[:, judged.context :]),
    )


def sample_futures(judged: Judged, batch: Batch, samples: int, generator: torch.Generator) -> Tensor:
    """Futures (samples, B, H, *tokens, D), standardised; without a latent the forecast with Gaussian usual errors."""
    calibration, believed = judged.calibration, batch.forecasts["model"]
    if judged.predictor.latent_dimension:
        with judged.autocast():
            drawn = rollout(
                judged.predictor, batch.past, judged.future, samples, generator=generator, calibration=calibration
            )
        return judged.predictor.standardise(drawn.float())
    steps = torch.arange(believed.shape[1], device=believed.device).clamp(max=calibration.horizon - 1)
    noise = torch.randn(samples, *believed.shape, generator=generator, device=believed.device)
    roots = torch.linalg.inv(calibration.whitening[steps])  # (H, D, D)
    errors = torch.einsum("h d k, n b h ... k -> n b h ... d", roots, noise)
    return believed + errors + calibration.error_mean[steps].view(-1, *[1] * (believed.ndim - 3), believed.shape[-1])


def fit_readout(cache: EmbeddingCache, columns: tuple[str, ...], predictor: Predictor) -> Readout:
    """A probe of single frames, fitted on a cache. Raises `UserError` where it lacks a column, or says too little."""
    windows = Windows(cache, 1)
    indices = windows.evenly(PROBE_FRAMES)
    true = read_columns(windows, indices, columns)[:, 0]  # (N, C)
    known = true.isfinite().all(dim=1).numpy()
    indices, true = indices[known], true[known]
    shown = ", ".join(columns)
    require(len(true) >= FOLDS, f"{cache.folder}: only {len(true)} frames say {shown}, and {FOLDS} are needed")
    _, groups = np.unique([cache.clips[clip].key.source for clip in windows.clip_of(indices)], return_inverse=True)
    if groups.max() + 1 < FOLDS:  # of few videos their parts, one after the other
        order = np.lexsort((windows.times_s(indices)[:, 0], groups))
        groups[order] = np.arange(len(order)) * FOLDS // len(order)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for part in in_parts(0, len(indices), numbers=int(np.prod(cache.shape))):
            embeddings = windows.take(indices[part])[:, 0].to(predictor.mean.device)
            yield predictor.standardise(embeddings), true[part], torch.from_numpy(groups[part])

    return Readout(columns, fit_probe(batches(), predictor.shape))


def read_columns(windows: Windows, indices: np.ndarray, columns: tuple[str, ...]) -> Tensor:
    """Columns on some windows, float64 (N, length, C); NaN where a table says nothing. Raises `UserError`."""
    folder, there = windows.cache.folder, windows.cache.provenance.columns
    for name in columns:
        is_number = name in there and there[name].shape == ()
        require(is_number, f"{folder} has no numbers {name}: cache its videos again with --columns {' '.join(columns)}")
    return torch.from_numpy(np.stack([windows.column(indices, name) for name in columns], axis=-1)).double()


def in_parts(start: int, stop: int, *, numbers: int) -> Iterator[slice]:
    """Parts of a range whose things, each of so many numbers, can be held at a time."""
    size = max(1, min(1024, BATCH_NUMBERS // numbers))
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def take_frames(judged: Judged, indices: np.ndarray, frames: Windows) -> Tensor:
    """Standardised embeddings of single frames, (N, 1, *tokens, D)."""
    return judged.predictor.standardise(frames.take(indices).to(judged.predictor.mean.device))


def pool(embeddings: Tensor) -> Tensor:
    """The mean over tokens, (B, H, *tokens, D) -> (B, H, D)."""
    return reduce(embeddings, "b h ... d -> b h d", "mean")


class Measures:
    """Sums of all measures of each forecast, by group of windows."""

    def __init__(
        self, judged: Judged, bootstrap: Bootstrap, *, samples: int, readout: Readout | None, seed: int
    ) -> None:
        self.judged, self.bootstrap, self.samples, self.readout = judged, bootstrap, samples, readout
        self.sums: dict[tuple[str, str], GroupSums] = defaultdict(lambda: GroupSums(bootstrap.groups))
        self.pooled: dict[str, list[Tensor]] = defaultdict(list)
        self.shown = [step - 1 for step in shown_horizons(len(judged.future.times))]
        self.generator = torch.Generator(judged.predictor.mean.device).manual_seed(seed)
        frames = Windows(judged.windows.cache, 1)
        self.live = live_features(take_frames(judged, frames.evenly(LIVE_FRAMES), frames))
        rows, numbers = frames.evenly(BANK), int(np.prod(judged.predictor.shape))
        parts = [pool(take_frames(judged, rows[part], frames)) for part in in_parts(0, len(rows), numbers=numbers)]
        self.bank = torch.cat(parts)[:, 0]  # (frames, D)

    def add(self, batch: Batch, groups: np.ndarray) -> None:
        """Errors of more windows."""
        last = self.judged.predictor.standardise(batch.past.embeddings[:, -1])
        for name, forecast in batch.forecasts.items():
            self.sums[name, "mse"].add(squared_error(forecast, batch.came), groups)
            self.sums[name, "change_cosine"].add(change_cosine(forecast, batch.came, last), groups)

    def add_details(self, batch: Batch, groups: np.ndarray, *, true: Tensor | None) -> None:
        """All else of more windows; `true` columns float64 (B, H, C), where they are read off."""
        came = pool(batch.came[:, self.shown])
        for name, forecast in (batch.forecasts | {"truth": batch.came}).items():
            pooled = pool(forecast[:, self.shown])
            self.pooled[name].append(pooled)
            if name != "truth":
                hits = retrieved(pooled.flatten(0, 1), came.flatten(0, 1), self.bank)
                self.sums[name, "retrieval_at_1"].add(hits.unflatten(0, came.shape[:2]), groups)
            if self.readout is not None and true is not None:
                known = true.isfinite().all(dim=2).all(dim=1)
                centre, scale = self.readout.probe.target_mean, self.readout.probe.target_std
                read, said = ((value - centre) / scale for value in (self.readout.probe(forecast), true.to(centre)))
                self.sums[name, "moments"].add(reading_moments(read, said)[known], groups[known.numpy()])
        if self.samples:
            drawn = sample_futures(self.judged, batch, self.samples, self.generator)
            flat, true_flat = rearrange(drawn, "n b h ... d -> n b h (... d)"), batch.came.flatten(2)
            self.sums["model", "energy_score"].add(energy_score(flat, true_flat), groups)
            self.sums["model", "best_of"].add(best_of(flat, true_flat), groups)
            for share in (50, 90):
                covered = coverage(drawn[..., self.live], batch.came[..., self.live], share / 100)  # (B, H, *tokens)
                self.sums["model", f"coverage_{share}"].add(reduce(covered, "b h ... -> b h", "mean"), groups)

    def rows(self) -> dict[str, dict[str, np.ndarray]]:
        """Measures and intervals (H, ...) of each forecast, and what is said of the `truth`; NaN where undefined."""
        interval, rows = self.bootstrap.interval, defaultdict[str, dict[str, np.ndarray]](dict)
        for (name, measure), sums in self.sums.items():
            if measure == "moments":
                scores = r2_and_r(sums.sums.sum(axis=0)), r2_and_r(self.bootstrap.sums(sums.sums))
                for score, point, values in zip(("probe_r2", "probe_r"), *scores, strict=True):
                    rows[name] |= {score: point, f"{score}_interval": interval(values)}
                continue
            resampled = self.bootstrap.means(sums)
            rows[name] |= {
                measure: self._at_shown(sums.mean),
                f"{measure}_interval": self._at_shown(interval(resampled)),
            }
            for to in REFERENCES if measure == "mse" else ():
                other = self.sums[to, "mse"]
                rows[name][f"relative_to_{to}"] = divide(sums.mean, other.mean)
                rows[name][f"relative_to_{to}_interval"] = interval(divide(resampled, self.bootstrap.means(other)))
        for name, parts in self.pooled.items():
            stats = np.array([collapse_stats(step) for step in torch.cat(parts).unbind(dim=1)])  # (shown, 2)
            rows[name] |= dict(zip(CollapseStats._fields, self._at_shown(stats).T, strict=True))
        return rows

    def _at_shown(self, values: np.ndarray) -> np.ndarray:
        """Values of all horizons; NaN where only some were measured."""
        horizon = len(self.judged.future.times)
        if len(values) == horizon:
            return values
        filled = np.full((horizon, *values.shape[1:]), np.nan)
        filled[self.shown] = values
        return filled


def evaluate(
    judged: Judged,
    *,
    most: int = 20_000,
    samples: int = 0,
    readout: Readout | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All that is said of a predictor, as JSON values; NaN where a number is not defined.

    Args:
        judged: what is judged on which windows.
        most: windows at most, evenly over all.
        samples: futures drawn of each window.
        readout: what is read off forecasts.
        resamples: of the bootstrap.
        seed: of the bootstrap and of the samples.

    Raises:
        UserError: embeddings are not finite or never change, or there is one window alone.
    """
    windows, fps, horizon = judged.windows, judged.predictor.fps, len(judged.future.times)
    one = f"{windows.cache.folder} holds one window of {windows.length} embeddings"
    require(len(windows) > 1, f"{one}, and at least 2 are needed: bring longer videos")
    indices = windows.evenly(most)
    first = np.linspace(0, len(indices) - 1, min(DETAILED, len(indices))).astype(int)
    indices = np.concatenate([indices[first], np.delete(indices, first)])
    groups, grouped_by = group_windows(windows, indices)
    bootstrap = Bootstrap(int(groups.max()) + 1, resamples, seed=seed)
    measures = Measures(judged, bootstrap, samples=samples, readout=readout, seed=seed)
    numbers = horizon * int(np.prod(judged.predictor.shape)) * (10 + 4 * samples)
    detailed, others = (in_parts(*ends, numbers=numbers) for ends in ((0, len(first)), (len(first), len(indices))))
    for part in tqdm([*detailed, *others], desc="forecasting", unit="batch", leave=False):
        batch = forecast_windows(judged, indices[part])
        measures.add(batch, groups[part])
        if part.start < len(first):
            true = (
                None if readout is None else read_columns(windows, indices[part], readout.columns)[:, judged.context :]
            )
            measures.add_details(batch, groups[part], true=true)
    rows = measures.rows()
    require_changing(windows.cache, bool((rows["copy_last"]["mse"] > 0).any()))
    records = {
        name: [
            {"horizon": step + 1, "time_s": (step + 1) / fps}
            | {key: values[step].tolist() for key, values in row.items()}
            for step in range(horizon)
        ]
        for name, row in rows.items()
    }
    truth = records.pop("truth")
    useful = {
        name: useful_steps(rows[name]["relative_to_mean"], rows[name]["relative_to_mean_interval"]) for name in records
    }
    return {
        "fps": fps,
        "context": judged.context,
        "windows": len(indices),
        "clips": len(windows.cache.clips),
        "interval": bootstrap.describe(grouped_by),
        "samples": samples,
        "probe_columns": list(readout.columns) if readout else [],
        "useful_horizon": {
            name: {"steps": steps, "time_s": steps / fps, "exceeds_longest": steps == horizon}
            for name, steps in useful.items()
        },
        "truth": truth,
        "predictors": records,
    }
