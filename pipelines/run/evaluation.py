"""Judges a predictor on the windows of a cache: what the command, the demo and the notebook share.

Windows go through in batches, on the predictor's device; of each a few numbers are kept. Errors are of all windows;
sampled futures and what is read off forecasts, which cost more, of at most `DETAILED` of them.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from data.cache import EmbeddingCache
from data.files import apart
from data.windows import Windows
from jepa.bootstrap import Bootstrap, divide, r2, reading_moments, useful_steps
from jepa.calibration import Calibration
from jepa.metrics import squared_error
from jepa.predictor import Predictor
from jepa.probe import FOLDS, Probe, fit_probe
from jepa.rollout import expected_rollout, rollout
from jepa.samples import coverage, energy_score, live_features
from jepa.sequence import Future, Sequence
from pipelines.run.caches import require_changing, require_finite
from pipelines.run.command import require
from pipelines.run.models import find_columns, in_batches

DETAILED, READ_WINDOWS, LIVE_FRAMES, PROBE_FRAMES = 2000, 500, 256, 20_000
"""Most windows for details, to read actions off; frames to see what moves, to fit a probe on."""
ENOUGH_VIDEOS = 20  # number of videos from which on the bootstrap resamples videos instead of segments of them
REFERENCES = ("copy_last", "ridge", "mean", "shuffled_actions")  # forecasts that errors are divided by
Measures = dict[tuple[str, str], Tensor]  # numbers (B, H, ...) of some windows, by forecast, or `truth`, and measure


class Readout(NamedTuple):
    """A probe, and the columns of a cache that it reads off standardised embeddings."""

    columns: tuple[str, ...]
    probe: Probe


class ForecastBatch(NamedTuple):
    """Some windows, what is forecast for them and what came; standardised."""

    past: Sequence
    """Raw embeddings (B, context, *tokens, D)."""
    future: Future
    forecasts: dict[str, Tensor]
    """(B, H, *tokens, D) by name: `model` is the believed forecast, `rollout` that of the bare network."""
    came: Tensor
    """(B, H, *tokens, D)"""


class Evaluation:
    """A predictor and how far to believe it, judged on windows of its context and the ticks that are forecast.

    Of each window `samples` futures are drawn; `readout` reads off forecasts; `seed` is that of samples and bootstrap.
    """

    def __init__(
        self, predictor: Predictor, calibration: Calibration, windows: Windows, *, samples: int = 0,
        readout: Readout | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.predictor, self.calibration, self.windows = predictor, calibration, windows
        self.samples, self.readout, self.seed = samples, readout, seed
        self.device = predictor.mean.device
        self.horizon = windows.length - predictor.config.context
        self.generator = torch.Generator(self.device).manual_seed(seed)
        # Of one video alone there are no other's actions.
        self.shuffles = bool(predictor.actions) and len({clip.key.source for clip in windows.cache.clips}) > 1
        frames = Windows(windows.cache, 1)
        some = require_finite(windows.cache, frames.take(frames.evenly(LIVE_FRAMES)))
        self.live = live_features(predictor.standardise(some.to(self.device)))

    @torch.no_grad()
    def run(self, *, most: int = 20_000, resamples: int = 1000) -> dict[str, Any]:
        """All that is said of the predictor, as JSON values; NaN where a number is not defined.

        At most so many windows are forecast, evenly over all. Raises `UserError` where embeddings are not finite or
        never change, or the cache lacks a column.
        """
        windows, fps, horizon = self.windows, self.predictor.fps, self.horizon
        indices = windows.evenly(most)
        draws = np.random.default_rng(self.seed)
        first = np.linspace(0, len(indices) - 1, min(DETAILED, len(indices))).astype(int)
        detailed, others = indices[first], np.delete(indices, first)
        # Each in one piece from the first: small arrays that stay, between large ones that go, break up free memory.
        measures: dict[tuple[str, str], np.ndarray] = {}
        for chosen, before in ((detailed, 0), (others, len(detailed))):
            batches = in_batches(windows, chosen, self.device, copies=10 + 4 * self.samples, doing="forecasting")
            for part, taken in batches:
                shuffled = windows.of_other_videos(chosen[part], draws) if self.shuffles else None
                batch = self.forecast(taken, None if shuffled is None else windows.actions(shuffled))
                errors = {(name, "mse"): squared_error(value, batch.came) for name, value in batch.forecasts.items()}
                details = self.measure_details(batch, chosen[part]) if chosen is detailed else {}
                for key, measured in (errors | details).items():
                    values = measured.cpu().numpy()
                    if key not in measures:
                        size = len(indices if key in errors else detailed)
                        measures[key] = np.empty((size, *values.shape[1:]), values.dtype)
                    measures[key][before + part.start :][: len(values)] = values
        require_changing(windows.cache, bool(measures["copy_last", "mse"].any()))
        groups, grouped_by = group_windows(windows, np.concatenate([detailed, others]))
        bootstrap = Bootstrap(groups, resamples, seed=self.seed)
        columns = self.readout.columns if self.readout else ()
        records = make_records(measures, bootstrap, fps=fps, columns=columns)
        truth, useful = records.pop("truth"), {}
        for name, rows in records.items():
            relative, high = ([row[f"relative_to_mean{end}"] for row in rows] for end in ("", "_high"))
            steps = useful_steps(np.array(relative), np.array(high))
            useful[name] = {"steps": steps, "time_s": steps / fps, "exceeds_longest": steps == horizon}
        read = self.inverse_dynamics() if self.predictor.actions else {}
        return {
            "fps": fps, "context": self.predictor.config.context, "windows": len(indices),
            "clips": len(windows.cache.clips), "interval": bootstrap.describe(grouped_by), "samples": self.samples,
            "probe_columns": list(columns), "useful_horizon": useful, "inverse_dynamics": read, "truth": truth,
            "predictors": records,
        }  # fmt: skip

    @torch.no_grad()
    def inverse_dynamics(self) -> dict[str, float]:
        """How well actions are read off two embeddings, one after the other: R² of what came, and of what is imagined.

        By regression on what came in other videos, of which it takes four; without them nothing.
        """
        windows, standardise = self.windows, self.predictor.standardise
        chosen, pairs, done = windows.evenly(READ_WINDOWS), {"true": list[Tensor](), "imagined": list[Tensor]()}, []
        videos = np.unique(windows.video_of(chosen), return_inverse=True)[1]
        if videos.max(initial=0) < 3:
            return {}
        for _, taken in in_batches(windows, chosen, self.device):
            batch = self.forecast(taken)
            for name, came in (("true", batch.came), ("imagined", batch.forecasts["rollout"])):
                way = torch.cat([standardise(batch.past.embeddings[:, -1:]), came], dim=1)
                pairs[name].append(torch.cat([way[:, :-1], way.diff(dim=1)], dim=-1).cpu())
            done.append(batch.future.actions.cpu())  # type: ignore[union-attr]
        groups = torch.from_numpy(videos).repeat_interleave(self.horizon)
        seen = {name: torch.cat(parts).flatten(0, 1) for name, parts in pairs.items()}
        actions = torch.cat(done).flatten(0, 1)
        missed = {name: torch.zeros(actions.shape[1], dtype=torch.float64) for name in seen}
        for half in (0, 1):
            mine = groups % 2 == half
            others = (seen["true"][~mine], actions[~mine], groups[~mine] // 2)
            probe = fit_probe([others], tuple(seen["true"].shape[1:]))
            for name, one in seen.items():
                missed[name] += (probe(one[mine]) - actions[mine]).square().sum(dim=0)
        total = (actions - actions.mean(dim=0)).square().sum(dim=0)
        return {name: float((1 - one / total)[total > 0].mean()) for name, one in missed.items()}

    @torch.no_grad()
    def forecast(self, windows: Sequence, others: Tensor | None = None) -> ForecastBatch:
        """Forecasts of windows (B, length); with other actions (B, length, A) also what these would lead to."""
        predictor, context, fps = self.predictor, self.predictor.config.context, self.predictor.fps
        past, future, came = windows.cut(context, fps)
        ticks, seen = (future.times * fps).to(came.device), past.embeddings
        rolled, ridged = expected_rollout(predictor, past, future), rollout(self.calibration.ridge, past, future)
        # As rollout(..., calibration=calibration), which would roll both out again.
        forecasts = {"model": self.calibration.believe(rolled, ridged, past, ticks), "rollout": rolled, "ridge": ridged}
        if others is not None:
            instead = replace(future, actions=others[:, context - 1 : -1].to(came.device))
            shuffled = expected_rollout(predictor, past, instead)
            forecasts["shuffled_actions"] = self.calibration.believe(shuffled, ridged, past, ticks)
        last, steps = seen[:, -1:], torch.arange(1, came.shape[1] + 1, device=came.device)
        forecasts["copy_last"] = last.expand_as(came)
        change = steps.view(1, -1, *[1] * (came.ndim - 2)) * (last - seen[:, -2:][:, :1])
        forecasts |= {"linear_extrapolation": last + change, "mean": predictor.mean.expand_as(came)}
        standardised = {name: predictor.standardise(value) for name, value in forecasts.items()}
        return ForecastBatch(past, future, standardised, predictor.standardise(came))

    def sample(self, batch: ForecastBatch) -> Tensor:
        """Futures (samples, B, H, *tokens, D), standardised; without a latent the forecast with Gaussian errors."""
        predictor, calibration, believed = self.predictor, self.calibration, batch.forecasts["model"]
        if predictor.latent_dimension:
            given = predictor, batch.past, batch.future, self.samples
            return predictor.standardise(rollout(*given, generator=self.generator, calibration=calibration))
        steps = torch.arange(believed.shape[1], device=self.device).clamp(max=calibration.horizon - 1)
        noise = torch.randn(self.samples, *believed.shape, generator=self.generator, device=self.device)
        roots = torch.linalg.inv(calibration.whitening[steps])  # (H, D, D)
        errors = torch.einsum("h d k, n b h ... k -> n b h ... d", roots, noise)
        usual = calibration.error_mean[steps].view(-1, *[1] * (believed.ndim - 3), believed.shape[-1])
        return believed + errors + usual

    def measure_details(self, batch: ForecastBatch, indices: np.ndarray) -> Measures:
        """Measures beside errors: how good sampled futures are, and moments of what is read off forecasts."""
        found: Measures = {}
        if self.samples:
            drawn = self.sample(batch)
            found["model", "energy_score"] = energy_score(drawn.flatten(3), batch.came.flatten(2))
            for share in (50, 90):
                inside = coverage(drawn[..., self.live], batch.came[..., self.live], share / 100)  # (B, H, *tokens)
                found["model", f"coverage_{share}"] = reduce(inside, "b h ... -> b h", "mean")
        if self.readout is not None:
            columns, probe = self.readout
            mean, std = probe.columns
            true = read_columns(self.windows, indices, columns)[:, -batch.came.shape[1] :].to(mean)
            known = true.isfinite().all(dim=2, keepdim=True).all(dim=1, keepdim=True)
            true = (true - mean) / std
            for name, value in (batch.forecasts | {"truth": batch.came}).items():
                moments = reading_moments((probe(value) - mean) / std, true)
                found[name, "moments"] = moments.where(known[..., None], 0)  # (B, H, C, 4)
        return found


def fit_readout(cache: EmbeddingCache, columns: tuple[str, ...], predictor: Predictor) -> Readout:
    """A probe of single frames, fitted on a cache. Raises `UserError` where it lacks a column, or says too little."""
    frames = Windows(cache, 1)
    indices = frames.evenly(PROBE_FRAMES)
    true = read_columns(frames, indices, columns)[:, 0]  # (N, C)
    known = true.isfinite().all(dim=1).numpy()
    indices, true = indices[known], true[known]
    shown = ", ".join(columns)
    require(len(true) >= FOLDS, f"{cache.folder}: only {len(true)} frames say {shown}, and {FOLDS} are needed")
    _, groups = np.unique(frames.video_of(indices), return_inverse=True)
    if groups.max() + 1 < FOLDS:  # of few videos parts, one after the other
        groups = np.arange(len(indices)) * FOLDS // len(indices)
    batches = (
        (predictor.standardise(taken.embeddings[:, 0]), true[part], torch.from_numpy(groups[part]))
        for part, taken in in_batches(frames, indices, predictor.mean.device)
    )
    return Readout(columns, fit_probe(batches, predictor.shape))


def read_columns(windows: Windows, indices: np.ndarray, columns: tuple[str, ...]) -> Tensor:
    """Columns on some windows, float64 (N, length, C); NaN where a table says nothing. Raises `UserError`."""
    columns = find_columns(windows.cache, columns)
    return torch.from_numpy(np.stack([windows.column(indices, name) for name in columns], axis=-1)).double()


def make_records(
    measures: dict[tuple[str, str], np.ndarray], bootstrap: Bootstrap, *, fps: float, columns: tuple[str, ...]
) -> dict[str, list[dict[str, float]]]:
    """Records by forecast, one for each horizon, with the ends of intervals as `_low` and `_high`."""
    ticks = range(1, measures["model", "mse"].shape[1] + 1)
    names = dict.fromkeys([*(name for name, _ in measures), "truth"])
    records = {name: [{"horizon": tick, "time_s": tick / fps} for tick in ticks] for name in names}

    def put(name: str, measure: str, point: np.ndarray, resampled: np.ndarray) -> None:
        low, high = bootstrap.interval(resampled)
        for end, values in (("", point), ("_low", low), ("_high", high)):
            for record, value in zip(records[name], values, strict=True):
                record[f"{measure}{end}"] = float(value)

    for (name, measure), values in measures.items():
        if measure == "moments":
            point, resampled = r2(values.sum(axis=0)), r2(bootstrap.sums(values))  # (H, C), (resamples, H, C)
            ends = [f"{column}{end}" for column in columns for end in ("_low", "_high")]
            for place, column in enumerate(apart(columns, ends)):
                put(name, f"probe_r2_{column}", point[:, place], resampled[..., place])
            means = divide(np.nansum(point, axis=1), np.isfinite(point).sum(axis=1))
            for record, value in zip(records[name], means, strict=True):
                record["probe_r2"] = float(value)
        else:
            point, resampled = values.mean(axis=0, dtype=float), bootstrap.means(values)
            put(name, measure, point, resampled)
            for to in REFERENCES if measure == "mse" else ():
                if (other := measures.get((to, "mse"))) is None:
                    continue
                relative = divide(resampled, bootstrap.means(other))
                put(name, f"relative_to_{to}", divide(point, other.mean(axis=0, dtype=float)), relative)
    return records


def group_windows(windows: Windows, indices: np.ndarray) -> tuple[np.ndarray, str]:
    """Groups of windows to be resampled together.

    Neighbouring frames are nearly equal; to count them one by one would flatter every result. So windows of a video
    are together or, where there are fewer than `ENOUGH_VIDEOS`, of a segment that is twice as long as a window. Returns
    int64 (N,), numbered from 0, and what they are: "videos" or "segments of 6 s".
    """
    names, videos = np.unique(windows.video_of(indices), return_inverse=True)
    if len(names) >= ENOUGH_VIDEOS:
        return videos, "videos"
    segment_s = 2 * windows.length / windows.cache.provenance.fps
    segments = windows.cache.take(windows.rows(indices)[:, 0], "times_s") // segment_s
    _, groups = np.unique(np.stack([videos, segments]), axis=1, return_inverse=True)
    return groups.ravel(), f"segments of {segment_s:.3g} s"
