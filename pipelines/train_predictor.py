r"""Stage 3: train a predictor of the next embedding on cached embeddings.

  accelerate launch --quiet --config_file accelerate_config.yaml pipelines/train_predictor.py \
      --train-cache cache/train --validation-cache cache/val --output-dir runs/predictor

Leaves `predictor/{model.safetensors,config.json}` (the best on validation clips), `metrics.json`, `config.json` and
tracker logs. Ctrl-C saves; the same command with --resume goes on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from data.embedding_cache import EmbeddingCache
from data.map_ahead import stream_ahead
from data.windows import Windows
from jepa.baselines import Baseline, Ridge, changes, fit_ridge
from jepa.diagnostics import floor_std, prediction_alarms, sequence_spread
from jepa.energy import calibrate_energy, prediction_errors
from jepa.predictor import Predictor, PredictorConfig
from jepa.rollout import rollout
from jepa.sampling import calibrate_samples, draw_latents, expected_future
from jepa.scoring import energy_score
from jepa.shrinkage import fit_shrinkage, shrink
from pipelines.artefacts import load_predictor, require_changing, require_finite, require_no_video_in_both
from pipelines.checkpoints import CheckpointConfig, Checkpoints
from pipelines.compute import ComputeConfig, MemoryEstimate, describe_devices, start_accelerator
from pipelines.guards import FiniteGuard, Heartbeat, memory_advice, require_agreement, summary
from pipelines.optimizer import OptimizerConfig, clip_length, lr_at, make_optimizer, moving_average, set_learning_rate
from pipelines.stage import RunFolder, readable_bytes, require, run_stage, to_json
from pipelines.trackers import start_trackers
from pipelines.training import (
    Best,
    Progress,
    Rates,
    feed,
    on_main,
    require_all_steps_trained,
    save_artefact,
    step_generator,
)

GROWTH = 0.5
"""Share of the training during which the horizon of rollouts grows."""
RIDGE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
VALIDATION_WINDOWS = 1024
ENERGY_HORIZON = 8
"""Steps ahead for which usual errors are measured, if validation looks so far."""
ENERGY_WINDOWS = 8192
"""Most windows that they are measured on, spread evenly."""
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
    parts, and train an ensemble: for each part members that do without it, on which they are validated, and members
    that learn from all parts."""
    members: int = 1
    """Networks whose predictions are averaged; with --folds, so many for each part, and so many that learn from all."""
    initial_predictor: Path | None = None
    """Go on from this trained predictor of the same encoder, as train_jointly leaves one, not from new weights; with
    --steps 0 it is only calibrated on the caches, its statistics of embeddings measured anew."""
    output_dir: Path = Path("runs/predictor")
    """Where the predictor, its metrics and its logs are left."""
    steps: int = 800
    """Optimiser steps."""
    batch_size: int = 128
    """Windows in a batch, on each process."""
    rollout_steps: int = 8
    """Train on rollouts of this many steps, through the predictor's own predictions; 1 for the next step alone."""
    rollout_error: Literal["relative", "squared"] = "relative"
    """`relative`: relative to copying for as long, so that the near future matters as much as the far one, and the
    horizon grows from 1 over the first half of the training. `squared`: as they are, at all steps from the start, so
    that the far future matters most: for few and noisy videos, whose next steps can hardly be known."""
    longest_gap: int = 1
    """Train on futures at irregular times too: half of the rollouts leap from step to step by up to this many ticks, so
    that a future may be asked for at given times. 1 for the clock alone."""
    input_noise: float = 0.1
    """Gaussian noise on the past while training, in units of the typical change from tick to tick."""
    validation_horizon: int = 20
    """Rollout steps on validation clips: the model is chosen by its mean error relative to copy-last over them, and
    how far its rollouts are to be trusted is measured for each of them (the last stands for all later ones)."""
    log_every: int = 100
    """Steps between two validations, each with a check for collapse."""
    tracker: tuple[str, ...] = ("tensorboard",)
    """Where curves go, one or several: tensorboard, csv, wandb, mlflow; or none."""
    seed: int = 0
    """Of the weights, the windows and the noise."""
    resume: bool = False
    """Go on with the unfinished run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(weight_decay=1e-2, warmup_steps=100, clip_norm=1.0)
    )
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def main(options: Options) -> None:
    """The story: check, build, train, keep the best on validation clips, calibrate, save."""
    for name in ("batch_size", "rollout_steps", "longest_gap", "members", "validation_horizon", "log_every"):
        value = getattr(options, name)
        require(value > 0, f"--{name.replace('_', '-')} is {value}: it must be positive")
    least = 0 if options.initial_predictor else 1
    require(options.steps >= least, f"--steps is {options.steps}: it must be at least {least}")
    options.optimizer.check()
    options.checkpoints.check()
    output = RunFolder(options.output_dir, ("predictor", "training_state", "logs"))
    accelerator = start_accelerator(options.compute, options.tracker, options.output_dir / "logs")
    heartbeat = Heartbeat(accelerator)
    is_main, device = accelerator.is_main_process, accelerator.device
    require(
        accelerator.distributed_type != DistributedType.FSDP,
        "predictors are small and not split over GPUs: use configs/accelerate/multi_gpu.yaml instead of fsdp.yaml",
    )
    set_seed(options.seed)
    require_agreement(accelerator, options=options)

    train_cache = EmbeddingCache(options.train_cache)
    provenance = train_cache.provenance
    if options.folds:
        splits = hold_out_in_turn(train_cache, options.folds)
    else:
        validation_cache = EmbeddingCache(options.validation_cache)
        validation_cache.require_same_space(provenance.encoder_fingerprint, provenance.fps, str(options.train_cache))
        # Also without a step: errors on videos that it learned from are no usual errors.
        require_no_video_in_both(train_cache, "--train-cache", validation_cache, "--validation-cache")
        splits = [Split(train_cache, validation_cache)]
    # Those validated by splits come first; beside them, some that nothing was held out from.
    learned_from = [split.train for split in splits] + ([train_cache] if options.folds else [])
    members = len(learned_from) * options.members
    initial = None if options.initial_predictor is None else load_initial_predictor(options, train_cache, members)
    if initial is not None:
        options = replace(options, predictor=initial.config)
    context, horizon = options.predictor.context, options.validation_horizon
    predictor = Predictor(
        options.predictor, provenance.embedding_dimension, provenance.fps, provenance.encoder_fingerprint, members,
        min(ENERGY_HORIZON, horizon),
        max(options.longest_gap if options.steps else 1, initial.longest_gap if initial is not None else 1),
    )  # fmt: skip
    if options.steps:
        require_all_steps_trained(predictor, options.rollout_steps)
    if initial is not None:
        predictor.members.load_state_dict(initial.members.state_dict())
    measure_embeddings(predictor, train_cache)
    windows = [Windows(cache, context + options.longest_gap * options.rollout_steps) for cache in learned_from]
    held_out = [hold_out(split, predictor, context + horizon, VALIDATION_WINDOWS // len(splits)) for split in splits]
    require_changing(splits[-1].validation, [part.windows for part in held_out], "copying it")
    fit_ridge_on(splits, held_out, predictor)

    clips = [clip.key for split in splits for cache in (split.train, split.validation) for clip in cache.clips]
    require_agreement(accelerator, provenance=provenance, clips=summary(clips))
    inputs = {"provenance": provenance}
    on_main(accelerator, lambda: output.prepare(options, options.overwrite, options.resume, inputs))
    unit = error_unit(splits, predictor, options)
    losses: nn.Module = Losses(predictor, unit, on_clock=options.longest_gap == 1)
    global_batch = options.batch_size * accelerator.num_processes
    memory = MemoryEstimate.of(losses, example_inputs(predictor, options.rollout_steps), 2, accelerator)
    peak = options.optimizer.peak_learning_rate(global_batch)
    if is_main:
        print(
            f"training {options.predictor.kind} ({sum(p.numel() for p in predictor.parameters()):,} weights) on "
            f"{describe_devices(accelerator)}: global batch {global_batch}, learning rate {peak:g}, about "
            f"{readable_bytes(memory.total(options.batch_size))} of tensors on each; {len(windows[-1]):,} "
            f"windows, validated on {sum(len(split.validation.clips) for split in splits)} clips"
            + (f", an ensemble of {members} members" if members > 1 else "")
        )

    averaged = moving_average(predictor.to(device), options.optimizer, buffers=False)
    judged: Predictor = predictor if averaged is None else averaged.module  # type: ignore[assignment]
    if options.compute.compile:
        for member in predictor.members:
            member.compile()
    losses, optimizer = accelerator.prepare(losses, make_optimizer(losses, options.optimizer))
    best = Best(judged, "validation_relative_to_copy_last")
    for state in (best, averaged):
        if state is not None:
            accelerator.register_for_checkpointing(state)
    held_out = [HeldOut(*(tensor.to(device) for tensor in part)) for part in held_out]

    progress, rates = Progress(), Rates(device)
    states = options.output_dir / "training_state"
    guard = FiniteGuard(accelerator, states)
    checkpoints = Checkpoints(accelerator, states, options.checkpoints, progress, guard.settle, heartbeat.stop)
    step = checkpoints.load_newest() if options.resume else None
    if step is None:
        best.consider(0, *validate(judged, held_out, options.members))
        checkpoints.save(step := 0)
    start_trackers(accelerator, "train_predictor", to_json(options), step)
    checkpoints.listen()

    drawn = draw_batches(windows, options, accelerator.process_index, step)
    batches = stream_ahead(lambda drawn: feed(drawn, device), [drawn], workers=1, ahead=2)
    bar = tqdm(total=options.steps, initial=step, unit="step", desc="predictor", disable=not is_main)
    rates.start()
    while step < options.steps:
        batch = rates.wait_for(batches, global_batch)
        set_learning_rate(optimizer, lr_at(step, options.steps, options.optimizer.warmup_steps, peak))
        with memory_advice(
            memory, options.batch_size, "--batch-size", "lower it to {samples}, with --overwrite", device
        ):
            window = predictor.standardise(batch.windows)
            noisy = window + options.input_noise * predictor.change_std * batch.noise
            reached = growing_horizon(step, options)
            chance = step_generator(options.seed, step, accelerator.process_index, device)
            terms = losses(
                noisy[:, :, :context], window[:, :, : context + reached], batch.times_s[:, :, :reached], chance
            )
            accelerator.backward(sum(terms.values()))
            gradient_norm = accelerator.clip_grad_norm_(losses.parameters(), clip_length(options.optimizer))
            guard.watch(step, batch.videos, terms["rollout_loss"], gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
        if averaged is not None:
            averaged.update_parameters(predictor)
        progress.add(terms)
        step += 1
        bar.update()

        if step % options.log_every == 0 or step == options.steps:
            speed = rates.report(progress)
            metrics, alarms = validate(judged, held_out, options.members)
            metrics |= progress.take_means(accelerator)
            best.consider(step, metrics, alarms)
            bar.set_postfix({
                "loss": f"{metrics['one_step_loss']:.4f}",
                "of copy": f"{metrics['validation_relative_to_copy_last']:.3f}",
            })  # fmt: skip
            progress.report(metrics, alarms, step, bar)
            guard.check_scale(step)
            extra = {"gradient_norm": gradient_norm.item(), "learning_rate": optimizer.param_groups[0]["lr"]}
            accelerator.log({**metrics, **extra, **speed}, step=step)
            rates.start()
        checkpoints.after_step(step)
    bar.close()
    checkpoints.save(step)

    if is_main:
        judged.load_state_dict(best.weights)
        judged.eval()
        calibrate_energy(judged, validation_errors(splits, judged, options.members))
        if judged.config.latent_dimension:
            calibrate_samples(judged, held_out[0].windows[:, :context], held_out[0].windows[:, context:])
        save_artefact(judged, options.output_dir / "predictor")
        output.finish(
            {
                **best.metrics,
                **progress.verdict(),
                "collapsed": best.collapsed,
                "best_step": best.step,
                "steps": step,
                "windows_per_second": step * global_batch / max(progress.seconds, 1e-9),
                "encoder_fingerprint": provenance.encoder_fingerprint,
            }
        )
        print(
            f"wrote {options.output_dir}/predictor (best at step {best.step}) and metrics.json. "
            "Next, with a cache of videos never seen before in cache/test:\n"
            f"  python pipelines/evaluate_rollout.py --cache cache/test --predictor {options.output_dir}/predictor "
            "--output-dir runs/evaluation"
        )
    heartbeat.stop()
    accelerator.end_training()


def load_initial_predictor(options: Options, cache: EmbeddingCache, members: int) -> Predictor:
    """The predictor to go on from. Raises `UserError`."""
    assert options.initial_predictor is not None
    initial = load_predictor(options.initial_predictor)
    cache.require_same_space(initial.encoder_fingerprint, initial.fps, str(options.initial_predictor))
    require(
        options.predictor in (PredictorConfig(), initial.config),
        f"{options.initial_predictor} was built with other --predictor options: leave them out, they come with it",
    )
    require(
        members == len(initial.members),
        f"{options.initial_predictor} has {len(initial.members)} members, not {members}: change --members or --folds",
    )
    return initial


class Batch(NamedTuple):
    """What a step learns from."""

    windows: Tensor
    """float32 (members, B, context + rollout steps, D), as cached."""
    times_s: Tensor
    """float32 (members, B, rollout steps): seconds from the last embedding of the past to each of the future."""
    noise: Tensor
    """float32 (members, B, T, D), standard normal."""
    videos: tuple[Path, ...]
    """Those that the windows are from, each once."""


def draw_batches(windows: list[Windows], options: Options, rank: int, step: int) -> Iterator[Batch]:
    """From this step on, windows of what each member learns from; each batch a function of seed, step and rank."""
    context = options.predictor.context
    for at in range(step, options.steps):
        generator = step_generator(options.seed, at, rank, torch.device("cpu"))
        drawn = [part.sample(options.batch_size, generator) for part in windows for _ in range(options.members)]
        stacked = torch.stack([taken for taken, _ in drawn])  # (members, B, context + longest gap x rollout steps, D)
        gaps = draw_gaps((*stacked.shape[:2], options.rollout_steps), options.longest_gap, generator)
        ticks = gaps.cumsum(dim=2)
        places = torch.cat([torch.arange(1 - context, 1).expand(*ticks.shape[:2], -1), ticks], dim=2) + context - 1
        chosen = stacked.gather(2, places[..., None].expand(-1, -1, -1, stacked.shape[3]))
        videos = sorted({Path(clip.key.source) for _, clips in drawn for clip in clips})
        noise = torch.randn(chosen.shape, generator=generator)
        yield Batch(chosen, ticks / windows[0].cache.provenance.fps, noise, tuple(videos))


def draw_gaps(shape: tuple[int, int, int], longest: int, generator: torch.Generator) -> Tensor:
    """Ticks from step to step, int (members, B, steps): 1 for half of the rollouts, from 1 to `longest` for others."""
    if longest == 1:
        return torch.ones(shape, dtype=torch.int64)
    leaping = torch.rand((*shape[:2], 1), generator=generator) < 0.5
    return torch.where(leaping, torch.randint(1, longest + 1, shape, generator=generator), 1)


def growing_horizon(step: int, options: Options) -> int:
    """Rollout steps at this point of the training: what is far cannot be learned before what is near."""
    if options.rollout_error == "squared":
        return options.rollout_steps
    grown = min(1.0, step / max(1, GROWTH * options.steps))
    return 1 + int(grown * (options.rollout_steps - 1))


class Losses(nn.Module):
    """The predictor and its losses as one module, so that one call does all that ranks must agree on.

    Args:
        predictor: what is trained.
        unit: (ticks,), what squared errors after so many ticks are relative to: those of copying the last embedding,
            or 1.
        on_clock: all times are ticks of the clock, one after the other.
    """

    unit: Tensor

    def __init__(self, predictor: Predictor, unit: Tensor, on_clock: bool = True) -> None:
        super().__init__()
        self.predictor, self.on_clock = predictor, on_clock
        self.register_buffer("unit", unit)

    def forward(self, past: Tensor, window: Tensor, times_s: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Errors of the first step of a rollout, and of all its steps, in units of `unit`.

        Relative to copying, all horizons matter alike: the near ones, where little changes, would be nothing beside the
        far ones.

        Each member sees windows of its own; the losses are the members' means. The error is the squared error; with a
        latent the energy score of two samples, which has its least value where they are as far from each other as
        from what came (Pacchiardi et al. 2024, arXiv:2112.08217).

        Args:
            past: (members, B, context, D), with noise.
            window: (members, B, context + steps, D), without.
            times_s: (members, B, steps), see `Batch`.
            generator: draws the latent.
        """
        future = window[:, :, past.shape[2] :]  # (members, B, steps, D)
        unit = self.unit[(times_s * self.predictor.fps).round().long() - 1]  # (members, B, steps)
        steps = future.shape[2]
        if size := self.predictor.config.latent_dimension:
            latents = draw_latents((2 * past.shape[1], steps, size), generator).to(past.device)
            twice = self.imagine(self.predictor, past[0].repeat(2, 1, 1), times_s[0].repeat(2, 1), latents)
            error = energy_score(twice.unflatten(0, (2, -1)), future[0]) / unit[0].sqrt()  # (B, steps)
            return {"one_step_loss": error[:, 0].mean(), "rollout_loss": error.mean()}
        members = [self.predictor.only([member]) for member in range(len(past))]
        imagined = [self.imagine(*seen) for seen in zip(members, past, times_s, strict=True)]
        error = (torch.stack(imagined) - future).square().mean(dim=3) / unit
        return {"one_step_loss": error[:, :, 0].mean(), "rollout_loss": error.mean()}

    def imagine(self, predictor: Predictor, past: Tensor, times_s: Tensor, latents: Tensor | None = None) -> Tensor:
        """Rollouts of (B, context, D) at (B, steps) seconds, (B, steps, D); without looking at times on the clock."""
        if self.on_clock:
            return rollout(predictor, past, times_s.shape[1], latents=latents)
        return rollout(predictor, past, times_s=times_s, latents=latents)


def example_inputs(predictor: Predictor, steps: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """What `Losses` takes, for two samples on the clock and as long as they get."""
    members, context = len(predictor.members), predictor.config.context
    window = torch.zeros(members, 2, context + steps, len(predictor.mean))
    times_s = (torch.arange(steps) + 1.0).expand(members, 2, -1) / predictor.fps
    return window[:, :, :context], window, times_s, torch.Generator()


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
    def of(cls, predictors: Sequence[Predictor | Baseline], held_out: list[HeldOut], context: int) -> "Trial":
        """Each predictor on what was held out from it."""
        windows = torch.cat([part.windows for part in held_out])
        horizon = windows.shape[1] - context
        imagined = [
            expected_future(one, part.windows[:, :context], horizon)
            for one, part in zip(predictors, held_out, strict=True)
        ]
        means = [part.mean.expand(len(part.windows), -1) for part in held_out]
        return cls(torch.cat(imagined), windows[:, context - 1], windows[:, context:], torch.cat(means))


@torch.no_grad()
def validate(predictor: Predictor, held_out: list[HeldOut], members: int) -> tuple[dict[str, float], list[str]]:
    """How far to trust the rollouts, into the predictor; then their errors relative to copy-last, and alarms.

    Members are judged on the windows that were held out from them; nothing was from those that learn from everything,
    so that neither their errors nor their spread are seen here. The spread of the predictions is reported beside that
    of the truth.
    """
    predictor.eval()
    by_split = members_by_split(predictor, len(held_out), members)
    trial = Trial.of(by_split, held_out, predictor.config.context)
    predictor.shrinkage.copy_(fit_shrinkage(*trial))
    horizon = trial.future.shape[1]
    shrunk = shrink(trial.imagined, trial.last, predictor.shrinkage, trial.mean)
    error = (shrunk - trial.future).square().mean(dim=(0, 2))
    copied = (trial.last[:, None] - trial.future).square().mean(dim=(0, 2)).clamp_min(1e-12)
    relative = error / copied  # (horizon,)
    # Some of the windows are enough to see a collapse.
    some = [part.windows[::4] for part in held_out]
    predicted = torch.cat([one(part[:, :-1], horizon) for one, part in zip(by_split, some, strict=True)])
    true = torch.cat(some)[:, -horizon:]
    predictor.train()
    metrics = {
        "validation_relative_to_copy_last": float(relative.mean()),
        **{
            f"validation_relative_to_copy_last_{h}": float(relative[h - 1])
            for h in sorted({1, 5, horizon})
            if h <= horizon
        },
    }
    for name, value in (("predicted", predicted), ("true", true)):
        for over, spread in sequence_spread(value)._asdict().items():
            metrics |= {f"{name}_{over}_std": spread.std, f"{name}_{over}_rank": spread.rank}
    return metrics, prediction_alarms(predicted, true) if horizon > 1 else []


def measure_embeddings(predictor: Predictor, cache: EmbeddingCache) -> None:
    """Mean and standard deviation of the training embeddings, and of their changes, into the predictor's buffers."""
    runs = [torch.from_numpy(cache.take(run)).double() for run in cache.unbroken_runs()]
    require_finite(cache, runs)
    require_changing(cache, runs, "copying it")
    count = sum(len(run) for run in runs)
    mean = torch.stack([run.sum(dim=0) for run in runs]).sum(dim=0) / count
    variance = torch.stack([(run - mean).square().sum(dim=0) for run in runs]).sum(dim=0) / count
    predictor.mean.copy_(mean)
    predictor.std.copy_(floor_std(variance.sqrt()))
    squares = torch.stack([changes(predictor.standardise(run)[None])[0].square().sum(dim=0) for run in runs]).sum(dim=0)
    predictor.change_std.copy_(floor_std((squares / max(1, count - len(runs))).sqrt()))


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


def members_by_split(predictor: Predictor, splits: int, members: int) -> list[Predictor]:
    """For each split, in order, its `members`, which learned from it; the last, that learned from all, are left out."""
    return [predictor.only(range(split * members, (split + 1) * members)) for split in range(splits)]


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
    taken = windows.take(spaced)
    require_finite(cache, [taken])
    return predictor.standardise(taken.to(predictor.mean.device))


def error_unit(splits: list[Split], predictor: Predictor, options: Options) -> Tensor:
    """Squared error of copying the last embedding for 1, 2, ... ticks, on training windows; or ones: (ticks,)."""
    if options.rollout_error == "squared":
        return torch.ones(options.longest_gap * options.rollout_steps, device=predictor.mean.device)
    length = options.predictor.context + options.longest_gap * options.rollout_steps
    most = VALIDATION_WINDOWS // len(splits)
    windows = torch.cat([spread_windows(split.train, predictor, length, most) for split in splits])
    last, future = windows[:, options.predictor.context - 1, None], windows[:, options.predictor.context :]
    return (future - last).square().mean(dim=(0, 2)).clamp_min(1e-12)


def validation_errors(splits: list[Split], predictor: Predictor, members: int) -> Tensor:
    """Errors (n, N, energy horizon, D) of members on what was held out from them.

    With folds they are those of single members: nothing was held out from all, whose mean is scored and errs less.
    """
    context, most = predictor.config.context, ENERGY_WINDOWS // len(splits)
    if predictor.config.latent_dimension:
        most //= 4  # there are `LATENTS` errors of each
    errors = []
    for own, split in zip(members_by_split(predictor, len(splits), members), splits, strict=True):
        windows = spread_windows(split.validation, predictor, context + predictor.energy_horizon, most)
        for part in windows.split(1024):
            errors.append(prediction_errors(own, part[:, :context], part[:, context:]))
    return torch.cat(errors, dim=1)


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
