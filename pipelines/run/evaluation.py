"""Judges a predictor on the windows of a cache: what the command, the demo and the notebook share.

Windows go through in batches, on the predictor's device; of each a few numbers are kept. Errors are of all windows; the
rest, which costs more, is of at most `DETAILED` of them, retrieval and collapse at a few horizons and, of a grid of
tokens, on the mean of its tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import reduce
from torch import Tensor
from tqdm import tqdm

from data.cache import EmbeddingCache
from data.groups import group_windows
from data.windows import Windows
from jepa import metrics
from jepa.baselines import CopyLast, LinearExtrapolation, Mean
from jepa.bootstrap import Bootstrap, divide, r2, reading_moments, useful_steps
from jepa.calibration import Calibration
from jepa.diagnostics import CollapseStats, collapse_stats
from jepa.predictor import Predictor
from jepa.probe import FOLDS, Probe, fit_probe
from jepa.rollout import expected_rollout, rollout
from jepa.samples import coverage, energy_score, live_features
from jepa.sequence import Future, Sequence
from pipelines.run.command import require
from pipelines.run.models import require_changing, take_finite

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
    def future(self) -> Future:
        """The ticks that are forecast."""
        return Future.ticks(self.windows.length - self.predictor.config.context, self.predictor.fps)

    def take(self, windows: Windows, indices: np.ndarray) -> Tensor:
        """Embeddings of some windows, (N, length, *tokens, D). Raises `UserError` where they are not finite."""
        return take_finite(windows, indices).to(self.predictor.mean.device)


class ForecastBatch(NamedTuple):
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
def forecast_batch(judged: Judged, indices: np.ndarray) -> ForecastBatch:
    """Forecasts of some windows. Raises `UserError` where embeddings are not finite."""
    predictor, calibration, fps, future = judged.predictor, judged.calibration, judged.predictor.fps, judged.future
    seen, came = judged.take(judged.windows, indices).split([predictor.config.context, len(future.times)], dim=1)
    past = Sequence.on_clock(seen, fps)
    with judged.autocast():
        rolled, ridged = expected_rollout(predictor, past, future), rollout(calibration.ridge, past, future)
    # As rollout(..., calibration=calibration), which would roll both out again.
    believed = calibration.believe(rolled, ridged, past, (future.times * fps).to(rolled.device))
    forecasts = {"model": believed, "rollout": rolled, "ridge": ridged}
    guesses = {"copy_last": CopyLast(fps), "linear_extrapolation": LinearExtrapolation(fps)}
    for name, guess in (guesses | {"mean": Mean(fps, predictor.mean)}).items():
        forecasts[name] = rollout(guess, past, future)
    standardised = {name: predictor.standardise(value.float()) for name, value in forecasts.items()}
    return ForecastBatch(past, standardised, predictor.standardise(came))


def sample_futures(judged: Judged, batch: ForecastBatch, samples: int, generator: torch.Generator) -> Tensor:
    """Futures (samples, B, H, *tokens, D), standardised; without a latent the forecast with Gaussian usual errors."""
    predictor, calibration, believed = judged.predictor, judged.calibration, batch.forecasts["model"]
    if predictor.latent_dimension:
        with judged.autocast():
            drawn = rollout(predictor, batch.past, judged.future, samples, generator=generator, calibration=calibration)
        return predictor.standardise(drawn.float())
    steps = torch.arange(believed.shape[1], device=believed.device).clamp(max=calibration.horizon - 1)
    noise = torch.randn(samples, *believed.shape, generator=generator, device=believed.device)
    roots = torch.linalg.inv(calibration.whitening[steps])  # (H, D, D)
    errors = torch.einsum("h d k, n b h ... k -> n b h ... d", roots, noise)
    return believed + errors + calibration.error_mean[steps].view(-1, *[1] * (believed.ndim - 3), believed.shape[-1])


def fit_readout(cache: EmbeddingCache, columns: tuple[str, ...], predictor: Predictor) -> Readout:
    """A probe of single frames, fitted on a cache. Raises `UserError` where it lacks a column, or says too little."""
    frames = Windows(cache, 1)
    indices = frames.evenly(PROBE_FRAMES)
    true = read_columns(frames, indices, columns)[:, 0]  # (N, C)
    known = true.isfinite().all(dim=1).numpy()
    indices, true = indices[known], true[known]
    shown = ", ".join(columns)
    require(len(true) >= FOLDS, f"{cache.folder}: only {len(true)} frames say {shown}, and {FOLDS} are needed")
    _, groups = np.unique([cache.clips[clip].key.source for clip in frames.clip_of(indices)], return_inverse=True)
    if groups.max() + 1 < FOLDS:  # of few videos parts, one after the other
        groups = np.arange(len(indices)) * FOLDS // len(indices)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for part in in_parts(0, len(indices), numbers=int(np.prod(cache.shape))):
            embeddings = frames.take(indices[part])[:, 0].to(predictor.mean.device)
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


def lay_out_bank(judged: Judged) -> tuple[Tensor, np.ndarray]:
    """Frames to find the one that came among, standardised (frames, D), and their rows in the cache, (frames,)."""
    frames, numbers = Windows(judged.windows.cache, 1), int(np.prod(judged.predictor.shape))
    indices = frames.evenly(BANK)
    parts = (judged.take(frames, indices[part]) for part in in_parts(0, len(indices), numbers=numbers))
    bank = torch.cat([pool(judged.predictor.standardise(part))[:, 0] for part in parts])
    return bank, frames.rows(indices)[:, 0]


@torch.no_grad()
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

    It is judged on at most so many windows, evenly over all, by so many sampled futures of each (or none), and by what
    is read off forecasts; the seed is that of the bootstrap and of the samples.

    Raises:
        UserError: embeddings are not finite or never change, or the cache lacks a column.
    """
    windows, predictor, fps, horizon = judged.windows, judged.predictor, judged.predictor.fps, len(judged.future.times)
    indices = windows.evenly(most)
    first = np.linspace(0, len(indices) - 1, min(DETAILED, len(indices))).astype(int)
    indices, detailed = np.concatenate([indices[first], np.delete(indices, first)]), len(first)
    groups, grouped_by = group_windows(windows, indices)
    details = Details(judged, samples=samples, readout=readout, seed=seed)
    numbers = horizon * int(np.prod(predictor.shape)) * (10 + 4 * samples)
    parts = [*in_parts(0, detailed, numbers=numbers), *in_parts(detailed, len(indices), numbers=numbers)]
    measures: dict[tuple[str, str], np.ndarray] = {}
    for part in tqdm(parts, desc="forecasting", unit="batch", leave=False):
        batch = forecast_batch(judged, indices[part])
        store(measures, measure_errors(judged, batch), part, windows=len(indices))
        if part.start < detailed:
            store(measures, details.measure(batch, indices[part]), part, windows=detailed)
    bootstrap = Bootstrap(groups, resamples, seed=seed)
    require_changing(windows.cache, bool((measures["copy_last", "mse"] > 0).any()))
    records = make_records(measures, bootstrap, fps=fps, columns=readout.columns if readout else ())
    truth, useful = records.pop("truth"), {}
    for name, rows in records.items():
        relative, high = ([row[f"relative_to_mean{end}"] for row in rows] for end in ("", "_high"))
        steps = useful_steps(np.array(relative), np.array(high))
        useful[name] = {"steps": steps, "time_s": steps / fps, "exceeds_longest": steps == horizon}
    return {
        "fps": fps,
        "context": predictor.config.context,
        "windows": len(indices),
        "clips": len(windows.cache.clips),
        "interval": bootstrap.describe(grouped_by),
        "samples": samples,
        "probe_columns": list(readout.columns) if readout else [],
        "useful_horizon": useful,
        "truth": truth,
        "predictors": records,
    }


def store(
    measures: dict[tuple[str, str], np.ndarray], found: dict[tuple[str, str], Tensor], part: slice, *, windows: int
) -> None:
    """Put the measures of a part of the windows into arrays for all of them, (windows, ...)."""
    for key, tensor in found.items():
        values = tensor.cpu().numpy()
        if key not in measures:  # at once: small arrays kept between large ones that go would hold the heap open
            measures[key] = np.zeros((windows, *values.shape[1:]), values.dtype)
        measures[key][part] = values


def measure_errors(judged: Judged, batch: ForecastBatch) -> dict[tuple[str, str], Tensor]:
    """Errors and cosines of changes (B, H) by forecast and measure."""
    found, last = {}, judged.predictor.standardise(batch.past.embeddings[:, -1])
    for name, forecast in batch.forecasts.items():
        found[name, "mse"] = metrics.squared_error(forecast, batch.came)
        found[name, "change_cosine"] = metrics.change_cosine(forecast, batch.came, last)
    return found


class Details:
    """Measures beside errors of some windows."""

    def __init__(self, judged: Judged, *, samples: int, readout: Readout | None, seed: int) -> None:
        self.judged, self.samples, self.readout = judged, samples, readout
        self.generator = torch.Generator(judged.predictor.mean.device).manual_seed(seed)
        self.bank, _ = lay_out_bank(judged)
        frames = Windows(judged.windows.cache, 1)
        self.live = live_features(judged.predictor.standardise(judged.take(frames, frames.evenly(LIVE_FRAMES))))

    def measure(self, batch: ForecastBatch, indices: np.ndarray) -> dict[tuple[str, str], Tensor]:
        """By forecast, or `truth`, and measure: (B, H, ...), retrieval and what collapses at the shown horizons."""
        found, shown = dict[tuple[str, str], Tensor](), [step - 1 for step in shown_horizons(batch.came.shape[1])]
        pooled = {name: pool(value[:, shown]) for name, value in (batch.forecasts | {"truth": batch.came}).items()}
        for name, value in pooled.items():
            found[name, "pooled"] = value
            if name != "truth":
                hits = metrics.retrieved(value.flatten(0, 1), pooled["truth"].flatten(0, 1), self.bank)
                found[name, "retrieval_at_1"] = hits.unflatten(0, value.shape[:2])
        if self.samples:
            drawn = sample_futures(self.judged, batch, self.samples, self.generator)
            found["model", "energy_score"] = energy_score(drawn.flatten(3), batch.came.flatten(2))
            for share in (50, 90):
                inside = coverage(drawn[..., self.live], batch.came[..., self.live], share / 100)  # (B, H, *tokens)
                found["model", f"coverage_{share}"] = reduce(inside, "b h ... -> b h", "mean")
        if self.readout is not None:
            columns, probe = self.readout
            mean, std = probe.columns
            true = read_columns(self.judged.windows, indices, columns)[:, batch.past.length :].to(mean)
            known = true.isfinite().all(dim=2, keepdim=True).all(dim=1, keepdim=True)
            true = (true - mean) / std
            for name, value in (batch.forecasts | {"truth": batch.came}).items():
                moments = reading_moments((probe(value) - mean) / std, true)
                found[name, "moments"] = moments.where(known[..., None], 0)  # (B, H, C, 4)
        return found


def make_records(
    measures: dict[tuple[str, str], np.ndarray], bootstrap: Bootstrap, *, fps: float, columns: tuple[str, ...]
) -> dict[str, list[dict[str, float]]]:
    """Records by forecast, one for each horizon, with the ends of intervals as `_low` and `_high`."""
    horizon = measures["model", "mse"].shape[1]
    ticks = range(1, horizon + 1)
    records = {name: [{"horizon": tick, "time_s": tick / fps} for tick in ticks] for name, _ in measures}

    def put(name: str, measure: str, point: np.ndarray, *, resampled: np.ndarray | None = None) -> None:
        ends = {"": point}
        if resampled is not None:
            ends |= dict(zip(("_low", "_high"), bootstrap.interval(resampled), strict=True))
        for place, tick in enumerate(shown_horizons(horizon) if len(point) < horizon else ticks):
            records[name][tick - 1] |= {f"{measure}{end}": float(values[place]) for end, values in ends.items()}

    for (name, measure), values in measures.items():
        if measure == "pooled":
            stats = np.array([collapse_stats(torch.from_numpy(step)) for step in values.swapaxes(0, 1)])
            for field, point in zip(CollapseStats._fields, stats.T, strict=True):
                put(name, field, point)
        elif measure == "moments":
            point, resampled = r2(values.sum(axis=0)), r2(bootstrap.sums(values))
            there = np.isfinite(point)
            put(name, "probe_r2", divide(np.where(there, point, 0).sum(axis=1), there.sum(axis=1)))
            for place, column in enumerate(columns):
                put(name, f"probe_r2_{column}", point[:, place], resampled=resampled[..., place])
        else:
            point, resampled = values.mean(axis=0, dtype=float), bootstrap.means(values)
            put(name, measure, point, resampled=resampled)
            for to in REFERENCES if measure == "mse" else ():
                other = measures[to, "mse"]
                relative = divide(resampled, bootstrap.means(other))
                put(name, f"relative_to_{to}", divide(point, other.mean(axis=0, dtype=float)), resampled=relative)
    return records
