r"""Stage 3: train a predictor of the next embedding on cached embeddings.

  accelerate launch --quiet --config_file accelerate_config.yaml pipelines/train_predictor.py \
      --train-cache cache/train --validation-cache cache/val --output-dir runs/predictor

Leaves `predictor/` (the best on validation clips) and `calibration/` (how far to believe it; `calibrate.py` fits it
anew), each `model.safetensors` and `config.json`, `metrics.json`, `curve.jsonl` and tracker logs. Ctrl-C saves; the
same command with --resume goes on.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.cache import EmbeddingCache
from data.windows import Windows
from jepa.baselines import Ridge, fit_ridge, ridge_context
from jepa.calibration import Forecasts, cross_fit_blend, hold_out
from jepa.config import NotNegative, PositiveInt
from jepa.diagnostics import floor_std, prediction_alarms, sequence_stats
from jepa.metrics import energy_score
from jepa.networks import MLPConfig, PredictorConfig
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence
from pipelines.calibrate import calibrate, forecast_windows, ordinary_clips
from pipelines.run.command import LAUNCH, run_command
from pipelines.run.models import require_changing, require_finite, require_no_video_in_both, save_calibration
from pipelines.run.options import OptimizerOptions, RunOptions
from pipelines.run.run import Run, step_generator, summary

GROWTH = 0.5
"""Share of the training during which the horizon of rollouts grows."""
RIDGE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
VALIDATION_NUMBERS, VALIDATION_WINDOWS = 16_000_000, 1024
"""Size of the windows that each validation goes through, and their most."""
RIDGE_SAMPLES = 200_000
"""Windows that ridge regression is fitted on at most, evenly spread, each token counted."""
CHOSEN_BY = "validation_relative_to_copy_last"


@dataclass(frozen=True)
class Options(RunOptions):
    """Train a predictor of the next embedding on cached embeddings."""

    train_cache: Path = Path("cache/train")
    """Embeddings to train on."""
    validation_cache: Path = Path("cache/val")
    """Embeddings of other videos: the best model is chosen and calibrated on them."""
    output_dir: Path = Path("runs/predictor")
    """Where the predictor, its calibration, its metrics and its logs are left."""
    steps: PositiveInt = 800
    """Optimiser steps."""
    batch_size: PositiveInt = 128
    """Windows in a batch, on each process."""
    rollout_steps: PositiveInt = 8
    """Steps of the rollouts that are trained on, through the predictor's own predictions."""
    input_noise: NotNegative = 0.1
    """Gaussian noise on the past while training, in units of the typical change from tick to tick."""
    validation_horizon: PositiveInt = 20
    """Steps of the rollouts on validation clips, by which the model is chosen and calibrated."""
    predictor: PredictorConfig = field(default_factory=MLPConfig)
    optimizer: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(weight_decay=1e-2))


def main(options: Options) -> None:
    """Measure the embeddings, train, keep the best on validation clips, calibrate, save."""
    run = Run(options, "train_predictor", ("predictor", "calibration"))
    train, validation = EmbeddingCache(options.train_cache), EmbeddingCache(options.validation_cache)
    provenance = train.provenance
    validation.require_same_space(provenance.encoder_fingerprint, provenance.fps, str(options.train_cache))
    require_no_video_in_both(train, validation)
    predictor = Predictor(
        options.predictor, train.shape, fps=provenance.fps, encoder_fingerprint=provenance.encoder_fingerprint
    )
    measure_embeddings(predictor, train)
    context = options.predictor.context
    windows = Windows(train, context + options.rollout_steps)
    held_out = Windows(validation, context + options.validation_horizon)
    ridge = fit_ridge_on(train, held_out, predictor)
    clips = {"train": train, "validation": validation}
    run.begin(
        {"provenance": provenance, **{name: summary([clip.key for clip in cache.clips]) for name, cache in clips.items()}},
        f"{len(windows):,} windows, validated on {len(validation.clips)} clips",
    )
    losses = run.prepare(Losses(predictor, copying_error(windows, predictor)), options.optimizer, clip_norm=1.0)
    judge = Judge(predictor, ridge, held_out)
    best = run.keep_best(predictor, CHOSEN_BY)

    for step, batch in run.steps(lambda place: draw_batches(windows, options, rank=run.rank, place=place)):
        if not best.metrics:
            best.consider(0, *judge())  # copying, before the first step
        noise = options.input_noise * predictor.change_std * predictor.std * batch.noise
        past = batch.windows[:, :context] + noise
        reached = growing_horizon(step, options)
        terms = losses(past, batch.windows[:, context : context + reached], run.generator(step))
        run.update(terms["rollout_loss"] + terms["one_step_loss"], terms, batch.videos)
        if run.due:
            metrics, alarms = judge()
            best.consider(step + 1, metrics, alarms)
            run.log(metrics, alarms, show=("one_step_loss", CHOSEN_BY))

    artefacts = {}
    if run.is_main:
        best.restore()
        calibration, said = calibrate(predictor, ridge, validation, horizon=options.validation_horizon)
        print(said)
        artefacts = {"predictor": ("predictor", predictor.description(), predictor)}
        save_calibration(calibration, predictor, options.output_dir)
    run.finish(
        {**best.metrics, "collapsed": best.collapsed, "best_step": best.step},
        artefacts,
        following=f"python pipelines/evaluate_rollout.py --cache cache/test --predictor {options.output_dir} "
        "--output-dir runs/evaluation",
    )


class Batch(NamedTuple):
    """What a step learns from."""

    windows: Tensor
    """float32 (B, context + rollout steps, *tokens, D), as cached."""
    noise: Tensor
    """float32 (B, context, *tokens, D), standard normal."""
    videos: tuple[Path, ...]
    """Videos that the windows are from, each once."""
    place: dict[str, int]
    """Where the next batch begins."""


def draw_batches(windows: Windows, options: Options, *, rank: int, place: dict[str, int]) -> Iterator[Batch]:
    """Endless windows drawn uniformly; each batch is a function of seed, step and rank."""
    for step in count(place.get("step", 0)):
        generator = step_generator(options.seed, step, rank, torch.device("cpu"))
        chosen = windows.sample(options.batch_size, generator)
        taken = windows.take(chosen)
        noise = torch.randn((len(taken), options.predictor.context, *taken.shape[2:]), generator=generator)
        yield Batch(taken, noise, windows.videos(chosen), {"step": step + 1})


def growing_horizon(step: int, options: Options) -> int:
    """Rollout steps at this point of the training: what is far cannot be learned before what is near."""
    grown = min(1.0, step / max(1, GROWTH * options.steps))
    return 1 + int(grown * (options.rollout_steps - 1))


class Losses(nn.Module):
    """The predictor and its losses as one module, so that one call does all that ranks must agree on.

    Args:
        predictor: what is trained.
        unit: (steps,), squared error of copying for so many ticks, standardised. Relative to it all horizons matter
            alike: the near ones, where little changes, would be nothing beside the far ones.
    """

    unit: Tensor

    def __init__(self, predictor: Predictor, unit: Tensor) -> None:
        super().__init__()
        self.predictor = predictor
        self.register_buffer("unit", unit)

    def forward(self, past: Tensor, future: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Errors of the first step of a rollout, and of all its steps, relative to copying.

        The error is the squared error; with a latent the energy score of two samples, which has its least value where
        they are as far from each other as from what came (Pacchiardi et al. 2024, arXiv:2112.08217).

        Args:
            past: (B, context, *tokens, D), with noise.
            future: (B, steps, *tokens, D), without.
            generator: draws the latent.
        """
        steps, fps = future.shape[1], self.predictor.fps
        sequence, ticks = Sequence.on_clock(past, fps), Future.ticks(steps, fps)
        came = self.predictor.standardise(future)
        if self.predictor.latent_dimension:
            drawn = self.predictor.standardise(rollout(self.predictor, sequence, ticks, 2, generator=generator))
            error = energy_score(drawn, came).flatten(2).mean(dim=2) / self.unit[:steps].sqrt()  # (B, steps)
        else:
            rolled = self.predictor.standardise(rollout(self.predictor, sequence, ticks))
            error = (rolled - came).square().flatten(2).mean(dim=2) / self.unit[:steps]  # (B, steps)
        return {"one_step_loss": error[:, 0].mean(), "rollout_loss": error.mean()}


class Judge:
    """Judges a predictor by rollouts on validation windows; those of ridge regression are made once."""

    def __init__(self, predictor: Predictor, ridge: Ridge, windows: Windows) -> None:
        self.predictor, self.ridge, self.windows = predictor, ridge, windows
        numbers = windows.length * int(np.prod(predictor.shape))
        self.chosen = windows.evenly(min(VALIDATION_WINDOWS, max(32, VALIDATION_NUMBERS // numbers)))
        self.folds = hold_out(ordinary_clips(windows, self.chosen)[0])

    def __call__(self) -> tuple[dict[str, float], list[str]]:
        """Errors relative to copying, of the believed forecast and of the bare rollout, and alarms.

        What is believed is blended by weights that were fitted on other clips.
        """
        self.predictor.eval()
        forecasts, _ = forecast_windows(self.predictor, self.ridge, self.windows, self.chosen)
        horizon = forecasts.came.shape[1]
        relative, bare = np.empty(horizon), np.empty(horizon)
        for step in range(horizon):
            errors = forecasts.errors(step)
            _, left = cross_fit_blend(errors, self.folds)
            rolled, _, copied, _ = errors.square().mean(dim=(1, 2, 3)).clamp_min(1e-12).tolist()
            relative[step], bare[step] = float(left.square().mean()) / copied, rolled / copied
        metrics = {CHOSEN_BY: float(relative.mean()), "validation_rollout_relative_to_copy_last": float(bare.mean())}
        metrics |= {f"{CHOSEN_BY}_{h}": float(relative[h - 1]) for h in sorted({1, 5, horizon}) if h <= horizon}
        alarms = self.watch(forecasts, metrics)
        self.predictor.train()
        return metrics, alarms

    @torch.no_grad()
    def watch(self, forecasts: Forecasts, metrics: dict[str, float]) -> list[str]:
        """Collapse of one-step predictions beside what they predict; their spread goes into the metrics."""
        horizon = forecasts.came.shape[1]
        if horizon < 2:
            return []
        some = self.windows.take(self.chosen[:: max(1, len(self.chosen) // 256)]).to(self.predictor.mean.device)
        predicted = self.predictor(Sequence.on_clock(some[:, :-1], self.predictor.fps), last=horizon)
        predicted, true = (self.predictor.standardise(part).cpu() for part in (predicted, some[:, -horizon:]))
        for name, value in (("predicted", predicted), ("true", true)):
            for over, stats in sequence_stats(value)._asdict().items():
                metrics |= {f"{name}_{over}_std": stats.std, f"{name}_{over}_rank": stats.effective_rank}
        return prediction_alarms(predicted, true)


def measure_embeddings(predictor: Predictor, cache: EmbeddingCache) -> None:
    """Mean and standard deviation of embeddings, and of their changes, into the predictor's buffers; clip by clip."""
    sums = [torch.zeros(predictor.shape[-1], dtype=torch.float64) for _ in range(3)]
    total, square, changed = sums
    origin, counts, changing = None, [0, 0], False
    for clip in tqdm(cache.clips, desc="measuring", unit="clip", leave=False):
        for run in cache.unbroken_runs(clip):
            embeddings = torch.from_numpy(cache.take(np.arange(run[0], run[0] + len(run)))).double()
            require_finite(cache, clip, embeddings)
            # Around the first mean: sums of squares around 0 would cancel where the mean is large.
            origin = embeddings.flatten(0, -2).mean(dim=0) if origin is None else origin
            changes = embeddings.diff(dim=0).flatten(0, -2)
            flat = embeddings.flatten(0, -2) - origin  # (T x places, D)
            total += flat.sum(dim=0)
            square += flat.square().sum(dim=0)
            changed += changes.square().sum(dim=0)
            counts = [counts[0] + len(flat), counts[1] + len(changes)]
            changing = changing or bool(changes.any())
    require_changing(cache, changing)
    assert origin is not None
    mean = total / counts[0]
    predictor.mean.copy_(origin + mean)
    predictor.std.copy_(floor_std((square / counts[0] - mean.square()).clamp_min(0).sqrt()))
    predictor.change_std.copy_(floor_std((changed / max(1, counts[1])).sqrt() / predictor.std))


def copying_error(windows: Windows, predictor: Predictor) -> Tensor:
    """Squared error of copying the last embedding for 1, 2, ... ticks, standardised, on training windows; (steps,)."""
    context = predictor.config.context
    numbers = windows.length * int(np.prod(predictor.shape))
    taken = predictor.standardise(windows.take(windows.evenly(min(1024, max(32, VALIDATION_NUMBERS // numbers)))))
    return (taken[:, context:] - taken[:, context - 1, None]).square().flatten(2).mean(dim=(0, 2)).clamp_min(1e-12)


def fit_ridge_on(train: EmbeddingCache, held_out: Windows, predictor: Predictor) -> Ridge:
    """Ridge regression on training windows, its penalty chosen by one-step errors on validation windows."""
    context, places = ridge_context(predictor.config.context, predictor.shape[-1]), int(np.prod(predictor.shape[:-1]))
    windows = Windows(train, context + 1)
    chosen = windows.evenly(max(1000, RIDGE_SAMPLES // places))
    parts = np.array_split(chosen, -(-len(chosen) * places // 8192))
    batches = (windows.take(part) for part in tqdm(parts, desc="ridge regression", unit="batch", leave=False))
    empty = Ridge(predictor.fps, context, mean=predictor.mean, std=predictor.std)
    fitted = fit_ridge(batches, empty, RIDGE_PENALTIES)
    seen = held_out.take(held_out.evenly(max(32, VALIDATION_WINDOWS // places)))[:, : predictor.config.context + 1]
    errors = [(predictor.standardise(ridge(seen[:, :-1]) - seen[:, -1:])).square().mean() for ridge in fitted]
    return fitted[int(torch.stack(errors).argmin())]


if __name__ == "__main__":
    run_command(main, Options)
