r"""Stage 3: train a predictor of the next embedding on cached embeddings.

  accelerate launch --quiet --config_file accelerate_config.yaml pipelines/train_predictor.py \
      --train-cache cache/train --validation-cache cache/val --output-dir runs/predictor

Leaves `predictor/{model.safetensors,config.json}` (the best on validation clips), `metrics.json`, `config.json` and
tracker logs. Ctrl-C saves; the same command with --resume goes on.
"""

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from data.embedding_cache import EmbeddingCache
from data.windows import Windows
from jepa.diagnostics import prediction_alarms, sequence_spread
from jepa.energy import calibrate_energy
from jepa.predictor import CopyLast, Predictor, PredictorConfig, Ridge, changes, fit_ridge
from jepa.rollout import rollout
from jepa.skill import imagine
from pipelines.stage import RunFolder, require, run_stage
from pipelines.training import Checkpoints, Interruption, lr_at, save_artefact, start_accelerator, step_generator

RIDGE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
VALIDATION_WINDOWS = 2048


@dataclass(frozen=True)
class Options:
    """Train a predictor of the next embedding on cached embeddings."""

    train_cache: Path = Path("cache/train")
    """Embeddings to train on."""
    validation_cache: Path = Path("cache/val")
    """Embeddings of other videos, to choose the best model by."""
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
    targets: int = 1
    """One-step predictions in each window."""
    rollout_steps: int = 5
    """Also train on rollouts of this many steps, through the predictor's own predictions; 0 for none."""
    input_noise: float = 0.2
    """Gaussian noise on the past while training, in units of the typical change from tick to tick."""
    validation_horizon: int = 10
    """The model is chosen by its mean error relative to copy-last over this many rollout steps."""
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
    for name in ("steps", "batch_size", "targets", "validation_horizon", "log_every", "checkpoint_every"):
        value = getattr(options, name)
        require(value > 0, f"--{name.replace('_', '-')} is {value}: it must be positive")
    output = RunFolder(options.output_dir, ("predictor", "training_state", "logs"))
    accelerator = start_accelerator(options.tracker, options.output_dir / "logs")
    is_main = accelerator.is_main_process
    set_seed(options.seed)

    train_cache, validation_cache = EmbeddingCache(options.train_cache), EmbeddingCache(options.validation_cache)
    provenance = train_cache.provenance
    validation_cache.require_same_space(provenance.encoder_fingerprint, provenance.fps, str(options.train_cache))
    context = options.predictor.context
    windows = Windows(train_cache, context + max(options.targets, options.rollout_steps))
    validation = Windows(validation_cache, context + options.validation_horizon)
    predictor = Predictor(
        options.predictor, provenance.embedding_dimension, provenance.fps, provenance.encoder_fingerprint
    )
    measure_embeddings(predictor, train_cache)
    spaced = np.linspace(0, len(validation) - 1, min(VALIDATION_WINDOWS, len(validation))).astype(int)
    validation_windows = predictor.standardise(validation.take(spaced))  # (N, context + horizon, D)
    predictor.ridge = fit_ridge_on(train_cache, validation_windows, predictor, context)

    if is_main:
        output.prepare(options, options.overwrite, options.resume, {"provenance": provenance})
        print(
            f"training {options.predictor.kind} ({sum(p.numel() for p in predictor.parameters()):,} weights) on "
            f"{accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}: "
            f"{len(windows):,} windows of {len(train_cache.clips)} clips, validated on {len(validation_cache.clips)}"
        )
    accelerator.wait_for_everyone()

    optimizer = torch.optim.AdamW(predictor.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    losses, optimizer = accelerator.prepare(Losses(predictor, options.targets, options.rollout_steps), optimizer)
    best = Best(predictor)
    accelerator.register_for_checkpointing(best)
    checkpoints = Checkpoints(accelerator, options.output_dir / "training_state")
    step = checkpoints.load_newest() if options.resume else 0
    interruption = Interruption(accelerator)
    accelerator.init_trackers("train_predictor")
    validation_windows = validation_windows.to(accelerator.device)
    if step == 0:
        best.consider(0, validate(predictor, validation_windows, context))

    started = time.monotonic()
    bar = tqdm(total=options.steps, initial=step, unit="step", desc="predictor", disable=not is_main)
    while step < options.steps:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, options.steps, options.warmup_steps, options.learning_rate)
        draws = step_generator(options.seed, step, accelerator.process_index, torch.device("cpu"))
        window = predictor.standardise(windows.sample(options.batch_size, draws).to(accelerator.device))
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
            metrics = validate(predictor, validation_windows, context)
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
        calibrate_energy(predictor, list(clip_sequences(validation_cache, predictor)))
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


class Losses(torch.nn.Module):
    """The predictor and its losses as one module, so that one call does all that ranks must agree on."""

    def __init__(self, predictor: Predictor, targets: int, rollout_steps: int) -> None:
        super().__init__()
        self.predictor, self.targets, self.rollout_steps = predictor, targets, rollout_steps

    def forward(self, noisy: Tensor, window: Tensor) -> dict[str, Tensor]:
        """Mean squared errors of one-step predictions, and of a rollout if asked for; windows (B, T, D)."""
        context = self.predictor.config.context
        predicted = self.predictor(noisy[:, : context + self.targets - 1], self.targets)
        terms = {"one_step_loss": (predicted - window[:, context : context + self.targets]).square().mean()}
        if self.rollout_steps:
            imagined = rollout(self.predictor, noisy[:, :context], self.rollout_steps)
            terms["rollout_loss"] = (imagined - window[:, context : context + self.rollout_steps]).square().mean()
        return terms


@torch.no_grad()
def validate(predictor: Predictor, windows: Tensor, context: int) -> dict[str, Any]:
    """Rollout errors relative to copy-last, spread of the predictions beside that of the truth, and alarms."""
    predictor.eval()
    past, future = windows[:, :context], windows[:, context:]
    horizon = future.shape[1]
    error = (imagine(predictor, past, horizon) - future).square().mean(dim=(0, 2))
    copied = (imagine(CopyLast(), past, horizon) - future).square().mean(dim=(0, 2)).clamp_min(1e-12)
    relative = error / copied  # (horizon,)
    predicted = torch.cat([predictor(part[:, :-1], horizon) for part in windows.split(4096)])
    predictor.train()
    metrics: dict[str, Any] = {
        "validation_relative_to_copy_last": float(relative.mean()),
        **{
            f"validation_relative_to_copy_last_{h}": float(relative[h - 1])
            for h in sorted({1, 5, horizon})
            if h <= horizon
        },
        "alarms": prediction_alarms(predicted, future) if horizon > 1 else [],
    }
    for name, value in (("predicted", predicted), ("true", future)):
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


def clip_sequences(cache: EmbeddingCache, predictor: Predictor) -> list[Tensor]:
    """Standardised unbroken sequences (1, T, D) of all clips that are longer than the context."""
    return [
        predictor.standardise(torch.from_numpy(cache.take(run)).to(predictor.mean.device))[None]
        for run in cache.unbroken_runs()
        if len(run) > predictor.config.context
    ]


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


def fit_ridge_on(cache: EmbeddingCache, validation_windows: Tensor, predictor: Predictor, context: int) -> Ridge:
    """Ridge regression on all training windows, its penalty chosen by one-step error on validation windows."""
    windows = Windows(cache, context + 1)
    spaced = np.linspace(0, len(windows) - 1, min(200_000, len(windows))).astype(int)
    inputs = predictor.standardise(windows.take(spaced))
    candidates = fit_ridge(inputs, context, RIDGE_PENALTIES)

    def error(ridge: Ridge) -> float:
        predicted = ridge(validation_windows[:, :context])[:, 0]
        return float((predicted - validation_windows[:, context]).square().mean())

    return min(candidates, key=error)


if __name__ == "__main__":
    run_stage(main, Options)
