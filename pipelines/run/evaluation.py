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
from einops import reduce
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


def pool(embeddings: Tensor) -> Tensor:
    """The mean over tokens, (B, H, *tokens, D) -> (B, H, D)."""
    return reduce(embeddings, "b h ... d -> b h d", "mean")


class Evaluation:
    """An evaluation of a predictor.

    Args:
        judged: what is judged on which windows.
        most: windows at most, evenly over all.
        samples: futures drawn of each window.
        readout: what is read off forecasts.
        resamples: of the bootstrap.
        seed: of the bootstrap and of the samples.
    """

    def __init__(
        self,
        judged: Judged,
        *,
        most: int = 20_000,
        samples: int = 0,
        readout: Readout | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        self.judged, self.samples, self.readout = judged, samples, readout
        self.horizon = len(judged.future.times)
        self.shown = [step - 1 for step in shown_horizons(self.horizon)]
        windows, device = judged.windows, judged.predictor.mean.device
        indices = windows.evenly(most)
        first = np.linspace(0, len(indices) - 1, min(DETAILED, len(indices))).astype(int)
        self.detailed = len(first)
        self.indices = np.concatenate([indices[first], np.delete(indices, first)])
        self.groups, self.grouped_by = group_windows(windows, self.indices)
        self.bootstrap = Bootstrap(int(self.groups.max()) + 1, resamples, seed=seed)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.sums: dict[tuple[str, str], GroupSums] = defaultdict(lambda: GroupSums(self.bootstrap.groups))
        self.pooled: dict[str, list[Tensor]] = defaultdict(list)

    def run(self) -> dict[str, Any]:
        """All that is said of the predictor, as JSON values; NaN where a number is not defined.

        Raises:
            UserError: embeddings are not finite or never change, or the cache lacks a column.
        """
        bank, live = self._lay_out_bank()
        numbers = self.horizon * int(np.prod(self.judged.predictor.shape)) * (10 + 4 * self.samples)
        ends = ((0, self.detailed), (self.detailed, len(self.indices)))
        parts = [part for first, last in ends for part in in_parts(first, last, numbers=numbers)]
        for part in tqdm(parts, desc="forecasting", unit="batch", leave=False):
            batch = forecast_windows(self.judged, self.indices[part])
            self._add_errors(batch, part)
            if part.start < self.detailed:
                self._add_retrieval(batch, part, bank)
                self._add_samples(batch, part, live)
                self._add_readings(batch, part)
        return self._results()

    def _lay_out_bank(self) -> tuple[Tensor, Tensor]:
        """Frames of the cache, evenly, pooled over tokens: (frames, D); and which features move, bool (D,)."""
        frames, predictor = Windows(self.judged.windows.cache, 1), self.judged.predictor

        def take(indices: np.ndarray) -> Tensor:
            return predictor.standardise(frames.take(indices).to(predictor.mean.device))

        rows, numbers = frames.evenly(BANK), int(np.prod(predictor.shape))
        bank = torch.cat([pool(take(rows[part])) for part in in_parts(0, len(rows), numbers=numbers)])
        return bank[:, 0], live_features(take(frames.evenly(LIVE_FRAMES)))

    def _add_errors(self, batch: Batch, part: slice) -> None:
        last = self.judged.predictor.standardise(batch.past.embeddings[:, -1])
        for name, forecast in batch.forecasts.items():
            self.sums[name, "mse"].add(squared_error(forecast, batch.came), self.groups[part])
            self.sums[name, "change_cosine"].add(change_cosine(forecast, batch.came, last), self.groups[part])

    def _add_retrieval(self, batch: Batch, part: slice, bank: Tensor) -> None:
        """Hits at the shown horizons, NaN at others; and what collapse is measured on."""
        self.pooled["truth"].append(came := pool(batch.came[:, self.shown]))
        for name, forecast in batch.forecasts.items():
            self.pooled[name].append(pooled := pool(forecast[:, self.shown]))
            hits = torch.full(batch.came.shape[:2], np.nan)
            found = retrieved(pooled.flatten(0, 1), came.flatten(0, 1), bank)
            hits[:, self.shown] = found.unflatten(0, pooled.shape[:2]).float().cpu()
            self.sums[name, "retrieval_at_1"].add(hits, self.groups[part])

    def _add_samples(self, batch: Batch, part: slice, live: Tensor) -> None:
        if not self.samples:
            return
        drawn = sample_futures(self.judged, batch, self.samples, self.generator)
        flat, came = drawn.flatten(3), batch.came.flatten(2)
        scores = {"energy_score": energy_score(flat, came), "best_of": best_of(flat, came)}
        for share in (50, 90):
            covered = coverage(drawn[..., live], batch.came[..., live], share / 100)  # (B, H, *tokens)
            scores[f"coverage_{share}"] = reduce(covered, "b h ... -> b h", "mean")
        for measure, values in scores.items():
            self.sums["model", measure].add(values, self.groups[part])

    def _add_readings(self, batch: Batch, part: slice) -> None:
        """Moments of what is read off forecasts and off what came, in windows whose columns are all known."""
        if self.readout is None:
            return
        columns, probe = self.readout
        true = read_columns(self.judged.windows, self.indices[part], columns)[:, self.judged.context :]
        known = true.isfinite().flatten(1).all(dim=1)
        true = (true[known].to(probe.mean) - probe.target_mean) / probe.target_std
        for name, value in (batch.forecasts | {"truth": batch.came}).items():
            read = (probe(value[known]) - probe.target_mean) / probe.target_std
            self.sums[name, "moments"].add(reading_moments(read, true), self.groups[part][known.numpy()])

    def _results(self) -> dict[str, Any]:
        fps, cache, rows = self.judged.predictor.fps, self.judged.windows.cache, self._rows()
        require_changing(cache, bool((rows["copy_last"]["mse"] > 0).any()))
        ticks = [{"horizon": step, "time_s": step / fps} for step in range(1, self.horizon + 1)]
        records = {
            name: [
                tick | {key: values[step].tolist() for key, values in row.items()} for step, tick in enumerate(ticks)
            ]
            for name, row in rows.items()
        }
        truth, useful = records.pop("truth"), {}
        for name in records:
            steps = useful_steps(rows[name]["relative_to_mean"], rows[name]["relative_to_mean_interval"])
            useful[name] = {"steps": steps, "time_s": steps / fps, "exceeds_longest": steps == self.horizon}
        return {
            "fps": fps,
            "context": self.judged.context,
            "windows": len(self.indices),
            "clips": len(cache.clips),
            "interval": self.bootstrap.describe(self.grouped_by),
            "samples": self.samples,
            "probe_columns": list(self.readout.columns) if self.readout else [],
            "useful_horizon": useful,
            "truth": truth,
            "predictors": records,
        }

    def _rows(self) -> dict[str, dict[str, np.ndarray]]:
        """Measures and their intervals, (H, ...), of each forecast and of the truth."""
        rows: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        for (name, measure), sums in self.sums.items():
            if measure == "moments":
                scores = r2_and_r(sums.sums.sum(axis=0)), r2_and_r(self.bootstrap.sums(sums.sums))
                found = dict(zip(("probe_r2", "probe_r"), zip(*scores, strict=True), strict=True))
            else:
                found = {measure: (sums.mean, self.bootstrap.means(sums))}
            for to in REFERENCES if measure == "mse" else ():
                other = self.sums[to, "mse"]
                below = other.mean, self.bootstrap.means(other)
                found[f"relative_to_{to}"] = divide(found["mse"][0], below[0]), divide(found["mse"][1], below[1])
            for key, (point, resampled) in found.items():
                rows[name] |= {key: point, f"{key}_interval": self.bootstrap.interval(resampled)}
        for name, parts in self.pooled.items():
            collapse = np.full((self.horizon, len(CollapseStats._fields)), np.nan)
            collapse[self.shown] = [collapse_stats(step) for step in torch.cat(parts).unbind(dim=1)]
            rows[name] |= dict(zip(CollapseStats._fields, collapse.T, strict=True))
        return rows
