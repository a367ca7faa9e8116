r"""Stage 3: train a predictor of the next embedding on cached embeddings.

  accelerate launch --quiet --config_file accelerate_config.yaml pipelines/train_predictor.py \
      --train-cache cache/train --validation-cache cache/val --output-dir runs/predictor

Leaves `predictor/{model.safetensors,config.json}` (the best on validation clips), `metrics.json`, `config.json` and
tracker logs. Ctrl-C saves; the same command with --resume goes on.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from data.embedding_cache import EmbeddingCache
from data.windows import Windows
from jepa.diagnostics import prediction_alarms, sequence_spread
from jepa.energy import calibrate_energy, prediction_errors
from jepa.predictor import Predictor, PredictorConfig, Ridge, changes, fit_ridge
from jepa.rollout import rollout
from jepa.shrinkage import fit_shrinkage, shrink
from pipelines.stage import RunFolder, require, run_stage
from pipelines.training import Checkpoints, Interruption, lr_at, save_artefact, start_accelerator, step_generator

RIDGE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
VALIDATION_WINDOWS = 1024
RIDGE_WINDOWS = 200_000
"""Most windows that ridge regression is fitted on, spread evenly."""


@dataclass(frozen=True)
class Options:
    """Train a predictor of the next embedding on cached embeddings."""

    train_cache: Path = Path("cache/train")
    """Embeddings to train on."""
    validation_cache: Path = Path("cache/val")
    """Embeddings of other videos, to choose the best model by. Not read with --folds."""
    folds: int = 0
    """For a handful of videos, of which none can be spared for validation: divide the training videos into this many
    parts, and train an ensemble whose members do each without one part, on which they are validated."""
    members: int = 1
    """Networks whose predictions are averaged; with --folds, for each part."""
    output_dir: Path = Path("runs/predictor")
    """Where the predictor, its metrics and its logs are left."""
    steps: int = 800
    """Optimiser steps."""
    batch_size: int = 128
    """Windows in a batch, on each process."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 1e-2
    """Weight decay of AdamW."""
    warmup_steps: int = 100
    """Steps of linear warm-up before the cosine."""
    rollout_steps: int = 5
    """Train on rollouts of this many steps, through the predictor's own predictions; 1 for the next step alone."""
    input_noise: float = 0.2
    """Gaussian noise on the past while training, in units of the typical change from tick to tick."""
    validation_horizon: int = 20
    """Rollout steps on validation clips: the model is chosen by its mean error relative to copy-last over them, and
    how far its rollouts are to be trusted is measured for each of them (the last stands for all later ones)."""
    log_every: int = 100
    """Steps between two validations, each with a check for collapse."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    tracker: str = "tensorboard"
    """Where curves go: tensorboard, wandb, mlflow, ..., or none."""
    seed: int = 0
    """Of the weights, the windows and the noise."""
    resume: bool = False
    """Go on with the unfinished run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""
    predictor: PredictorConfig = field(default_factory=PredictorConfig)


def main(options: Options) -> None:
    """The story: check, build, train, keep the best on validation clips, calibrate, save."""
    for name in (
        "steps",
        "batch_size",
        "rollout_steps",
        "members",
        "validation_horizon",
        "log_every",
        "checkpoint_every",
    ):
        value = getattr(options, name)
        require(value > 0, f"--{name.replace('_', '-')} is {value}: it must be positive")
    output = RunFolder(options.output_dir, ("predictor", "training_state", "logs"))
    accelerator = start_accelerator(options.tracker, options.output_dir / "logs")
    is_main = accelerator.is_main_process
    set_seed(options.seed)

    train_cache = EmbeddingCache(options.train_cache)
    provenance = train_cache.provenance
    if options.folds:
        splits = hold_out_in_turn(train_cache, options.folds)
    else:
        validation_cache = EmbeddingCache(options.validation_cache)
        validation_cache.require_same_space(provenance.encoder_fingerprint, provenance.fps, str(options.train_cache))
        splits = [Split(train_cache, validation_cache)]
    context, horizon = options.predictor.context, options.validation_horizon
    members = len(splits) * options.members
    predictor = Predictor(
        options.predictor, provenance.embedding_dimension, provenance.fps, provenance.encoder_fingerprint, members
    )
    measure_embeddings(predictor, train_cache)
    windows = [Windows(split.train, context + options.rollout_steps) for split in splits]
    held_out = [hold_out(split, predictor, context + horizon, VALIDATION_WINDOWS // len(splits)) for split in splits]
    fit_ridge_on(splits, held_out, predictor)

    if is_main:
        output.prepare(options, options.overwrite, options.resume, {"provenance": provenance})
        print(
            f"training {options.predictor.kind} ({sum(p.numel() for p in predictor.parameters()):,} weights) on "
            f"{accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}: "
            f"{sum(map(len, windows)):,} windows, validated on {sum(len(split.validation.clips) for split in splits)} "
            "clips" + (f", an ensemble of {members} members" if members > 1 else "")
        )
    accelerator.wait_for_everyone()

    optimizer = torch.optim.AdamW(predictor.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    losses, optimizer = accelerator.prepare(Losses(predictor), optimizer)
    best = Best(predictor)
    accelerator.register_for_checkpointing(best)
    checkpoints = Checkpoints(accelerator, options.output_dir / "training_state")
    step = checkpoints.load_newest() if options.resume else 0
    interruption = Interruption(accelerator)
    accelerator.init_trackers("train_predictor")
    held_out = [HeldOut(*(tensor.to(accelerator.device) for tensor in part)) for part in held_out]
    if step == 0:
        best.consider(0, validate(predictor, held_out))

    started = time.monotonic()
    bar = tqdm(total=options.steps, initial=step, unit="step", desc="predictor", disable=not is_main)
    while step < options.steps:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, options.steps, options.warmup_steps, options.learning_rate)
        draws = step_generator(options.seed, step, accelerator.process_index, torch.device("cpu"))
        drawn = torch.stack(
            [part.sample(options.batch_size, draws) for part in windows for _ in range(options.members)]
        )  # (members, B, T, D)
        window = predictor.standardise(drawn.to(accelerator.device))
        noise = torch.randn(window.shape, generator=draws).to(accelerator.device)
        noisy = window + options.input_noise * predictor.change_std * noise
        with accelerator.autocast():
            terms = losses(noisy, window)
        optimizer.zero_grad()
        accelerator.backward(sum(terms.values()))
        accelerator.clip_grad_norm_(predictor.parameters(), 1.0)
        optimizer.step()
        step += 1
        bar.update()

        if step % options.log_every == 0 or step == options.steps:
            metrics = validate(predictor, held_out)
            metrics |= {name: value.item() for name, value in terms.items()}
            best.consider(step, metrics)
            bar.set_postfix({
                "loss": f"{metrics['one_step_loss']:.4f}",
                "of copy": f"{metrics['validation_relative_to_copy_last']:.3f}",
            })  # fmt: skip
            accelerator.log({**numbers(metrics), "learning_rate": optimizer.param_groups[0]["lr"]}, step=step)
            best.report(metrics["alarms"], step, bar, is_main)
        if step == options.steps:
            break
        if step % options.checkpoint_every == 0:
            checkpoints.save(step)
        interruption.save_and_stop(checkpoints, step)
    bar.close()

    if is_main:
        predictor.load_state_dict(best.weights)
        calibrate_energy(predictor, validation_errors(splits, predictor))
        save_artefact(predictor, options.output_dir / "predictor")
        output.finish(
            {
                **numbers(best.metrics),
                "best_step": best.step,
                "collapsed": bool(best.metrics["alarms"]),
                "collapse_alarms": best.alarms,
                "first_collapse_step": best.first_alarm_step,
                "steps": step,
                "seconds": time.monotonic() - started,
                "encoder_fingerprint": provenance.encoder_fingerprint,
            }
        )
        print(
            f"wrote {options.output_dir}/predictor (best at step {best.step}) and metrics.json. "
            "Next, with a cache of videos never seen before in cache/test:\n"
            f"  python pipelines/evaluate_rollout.py --cache cache/test --predictor {options.output_dir}/predictor "
            "--output-dir runs/evaluation"
        )
    accelerator.end_training()


class Losses(nn.Module):
    """The predictor and its losses as one module, so that one call does all that ranks must agree on."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, noisy: Tensor, window: Tensor) -> dict[str, Tensor]:
        """Mean squared errors of the first step of a rollout, and of all its steps.

        Each member sees windows of its own, (members, B, context + steps, D); the losses are the members' means.
        """
        context = self.predictor.config.context
        steps = window.shape[2] - context
        imagined = [
            rollout(self.predictor.only([member]), past, steps) for member, past in enumerate(noisy[:, :, :context])
        ]
        error = (torch.stack(imagined) - window[:, :, context:]).square()  # (members, B, steps, D)
        return {"one_step_loss": error[:, :, 0].mean(), "rollout_loss": error.mean()}


class HeldOut(NamedTuple):
    """Windows that members were not trained on."""

    windows: Tensor
    """(N, context + horizon, D), standardised."""
    mean: Tensor
    """(D,), of the embeddings that they were trained on, standardised by all: not quite 0 if some are held out."""


class Trial(NamedTuple):
    """Rollouts on windows that were held out, and what came."""

    imagined: Tensor
    """(N, horizon, D)."""
    last: Tensor
    """(N, D), what the rollouts started from."""
    future: Tensor
    """(N, horizon, D)."""
    mean: Tensor
    """(N, D), of what the predictor was trained on."""

    @classmethod
    @torch.no_grad()
    def of(cls, predictors: Sequence[nn.Module], held_out: list[HeldOut], context: int) -> "Trial":
        """Each predictor on what was held out from it."""
        windows = torch.cat([part.windows for part in held_out])
        horizon = windows.shape[1] - context
        imagined = [
            rollout(one, part.windows[:, :context], horizon) for one, part in zip(predictors, held_out, strict=True)
        ]
        means = [part.mean.expand(len(part.windows), -1) for part in held_out]
        return cls(torch.cat(imagined), windows[:, context - 1], windows[:, context:], torch.cat(means))


@torch.no_grad()
def validate(predictor: Predictor, held_out: list[HeldOut]) -> dict[str, Any]:
    """How far to trust the rollouts, into the predictor; then their errors relative to copy-last, and alarms.

    Members are judged on the windows that were held out from them. The spread of the predictions is reported beside
    that of the truth.
    """
    predictor.eval()
    by_split = members_by_split(predictor, len(held_out))
    trial = Trial.of(by_split, held_out, predictor.config.context)
    predictor.shrinkage.copy_(fit_shrinkage(*trial))
    horizon = trial.future.shape[1]
    shrunk = shrink(trial.imagined, trial.last, predictor.shrinkage, trial.mean)
    error = (shrunk - trial.future).square().mean(dim=(0, 2))
    copied = (trial.last[:, None] - trial.future).square().mean(dim=(0, 2)).clamp_min(1e-12)
    relative = error / copied  # (horizon,)
    # Some of the windows are enough to see a collapse.
    some = [part.windows[::4] for part in held_out]
    predicted = torch.cat([members(part[:, :-1], horizon) for members, part in zip(by_split, some, strict=True)])
    true = torch.cat(some)[:, -horizon:]
    predictor.train()
    metrics: dict[str, Any] = {
        "validation_relative_to_copy_last": float(relative.mean()),
        **{
            f"validation_relative_to_copy_last_{h}": float(relative[h - 1])
            for h in sorted({1, 5, horizon})
            if h <= horizon
        },
        "alarms": prediction_alarms(predicted, true) if horizon > 1 else [],
    }
    for name, value in (("predicted", predicted), ("true", true)):
        for over, spread in sequence_spread(value)._asdict().items():
            metrics |= {f"{name}_{over}_std": spread.std, f"{name}_{over}_rank": spread.rank}
    return metrics


class Best:
    """The weights with the lowest validation error so far; step 0, which copies the last embedding, included."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.step, self.metrics, self.weights = 0, dict[str, Any](), dict[str, Tensor]()
        self.alarms: list[str] = []
        self.first_alarm_step: int | None = None

    def consider(self, step: int, metrics: dict[str, Any]) -> None:
        """Keep the present weights if they are the best."""
        name = "validation_relative_to_copy_last"
        if not self.metrics or metrics[name] < self.metrics[name]:
            self.step, self.metrics = step, metrics
            self.weights = copy.deepcopy(self.predictor.state_dict())

    def report(self, alarms: list[str], step: int, bar: "tqdm[None]", is_main: bool) -> None:
        """Say loudly, once, that the predictions have collapsed."""
        if alarms and self.first_alarm_step is None:
            self.first_alarm_step, self.alarms = step, alarms
            if is_main:
                bar.write(f"COLLAPSE at step {step}: {'; '.join(alarms)}")

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        names = ("step", "metrics", "weights", "alarms", "first_alarm_step")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        vars(self).update(state)


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The entries that a tracker can plot."""
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def measure_embeddings(predictor: Predictor, cache: EmbeddingCache) -> None:
    """Mean and standard deviation of the training embeddings, and of their changes, into the predictor's buffers."""
    runs = [torch.from_numpy(cache.take(run)).double() for run in cache.unbroken_runs()]
    count = sum(len(run) for run in runs)
    mean = torch.stack([run.sum(dim=0) for run in runs]).sum(dim=0) / count
    variance = torch.stack([(run - mean).square().sum(dim=0) for run in runs]).sum(dim=0) / count
    predictor.mean.copy_(mean)
    predictor.std.copy_(variance.sqrt().clamp_min(1e-6))
    squares = torch.stack([changes(predictor.standardise(run)[None])[0].square().sum(dim=0) for run in runs]).sum(dim=0)
    predictor.change_std.copy_((squares / max(1, count - len(runs))).sqrt().clamp_min(1e-6))


class Split(NamedTuple):
    """What members learn from, and what they are validated on."""

    train: EmbeddingCache
    validation: EmbeddingCache


def hold_out_in_turn(cache: EmbeddingCache, folds: int) -> list[Split]:
    """Divide the videos of a cache into parts, and hold each part out once.

    Raises:
        UserError: there are fewer than two parts, or fewer videos than parts.
    """
    # In the order of their names: what was recorded together often stands together, and is held out together.
    sources = sorted({clip.key.source for clip in cache.clips})
    require(folds > 1, f"--folds is {folds}: at least 2 parts are needed, or 0 for none")
    require(
        folds <= len(sources),
        f"--folds is {folds}, but {cache.folder} holds {len(sources)} videos: lower it, or bring more videos",
    )
    parts = [set(part.tolist()) for part in np.array_split(np.array(sources), folds)]
    return [Split(cache.only(set(sources) - part), cache.only(part)) for part in parts]


def members_by_split(predictor: Predictor, splits: int) -> list[Predictor]:
    """For each split, in order, those members that learned from it."""
    return [predictor.only(part.tolist()) for part in np.split(np.arange(len(predictor.members)), splits)]


def hold_out(split: Split, predictor: Predictor, length: int, most: int) -> HeldOut:
    """Windows spread evenly over the validation clips, standardised (N, length, D), beside the training mean."""
    total, frames = torch.zeros_like(predictor.mean), 0
    for clip in split.train.clips:
        embeddings = predictor.standardise(torch.from_numpy(split.train.clip_embeddings(clip)))
        total, frames = total + embeddings.sum(dim=0), frames + len(embeddings)
    return HeldOut(spread_windows(split.validation, predictor, length, most), total / frames)


def spread_windows(cache: EmbeddingCache, predictor: Predictor, length: int, most: int) -> Tensor:
    """At most `most` windows, spread evenly over a cache, standardised (N, length, D)."""
    windows = Windows(cache, length)
    spaced = np.linspace(0, len(windows) - 1, min(most, len(windows))).astype(int)
    return predictor.standardise(windows.take(spaced))


def validation_errors(splits: list[Split], predictor: Predictor) -> Tensor:
    """One-step errors (N, D) of members on all that was held out from them."""
    context = predictor.config.context
    errors = []
    for members, split in zip(members_by_split(predictor, len(splits)), splits, strict=True):
        for run in split.validation.unbroken_runs():
            if len(run) > context:
                embeddings = torch.from_numpy(split.validation.take(run)).to(predictor.mean.device)
                sequence = predictor.standardise(embeddings)[None]
                with torch.no_grad():
                    errors.append(prediction_errors(members, sequence, context)[0])
    return torch.cat(errors)


def fit_ridge_on(splits: list[Split], held_out: list[HeldOut], predictor: Predictor) -> None:
    """Ridge regression on all training windows, into the predictor, and how far its rollouts are to be trusted.

    Its penalty is chosen by one-step error on what was held out, its trust measured there.
    """
    context = predictor.config.context

    def windows(cache: EmbeddingCache) -> Tensor:
        return spread_windows(cache, predictor, context + 1, RIDGE_WINDOWS)

    fitted = [fit_ridge(windows(split.train), context, RIDGE_PENALTIES) for split in splits]  # [split][penalty]
    by_penalty = [list(ridges) for ridges in zip(*fitted, strict=True)]  # [penalty][split]

    def error(ridges: list[Ridge]) -> float:
        one_step = Trial.of(ridges, [HeldOut(part.windows[:, : context + 1], part.mean) for part in held_out], context)
        return float((one_step.imagined - one_step.future).square().mean())

    chosen = min(range(len(RIDGE_PENALTIES)), key=lambda index: error(by_penalty[index]))
    predictor.ridge_shrinkage.copy_(fit_shrinkage(*Trial.of(by_penalty[chosen], held_out, context)))
    if len(splits) == 1:
        predictor.ridge = by_penalty[chosen][0]
    else:
        everything = torch.cat([windows(split.validation) for split in splits])  # each clip is held out once
        (predictor.ridge,) = fit_ridge(everything, context, (RIDGE_PENALTIES[chosen],))


if __name__ == "__main__":
    run_stage(main, Options)
