r"""Train an infiller: it predicts embeddings that are missing in the middle of a clip, from those on both sides.

  accelerate launch --quiet --config_file accelerate_config.yaml pipelines/train_infiller.py \
      --train-cache cache/train --validation-cache cache/val --test-cache cache/test --output-dir runs/infiller

Leaves `infiller/{model.safetensors,config.json}` (the best on validation clips), what it is worth on test clips in
`infilling.json` and `infilling.png` (for each length of a gap and each place in it: error, confidence interval, error
relative to linear interpolation, beside ridge regression and copying), `metrics.json`, `config.json` and tracker logs.
Ctrl-C saves; the same command with --resume goes on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import DistributedType, set_seed
from matplotlib.figure import Figure
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from tqdm import tqdm

from data.embedding_cache import EmbeddingCache
from data.groups import group_windows
from data.map_ahead import stream_ahead
from data.windows import Windows
from jepa.bootstrap import Bootstrap, interval
from jepa.infilling import (
    NEAREST,
    Infiller,
    InfillerConfig,
    copy_last,
    draw_gaps,
    fit_trust,
    least_squares_trust,
    linear_interpolation,
    measure_windows,
    middle_gap,
)
from pipelines.artefacts import require_changing, require_finite, require_no_video_in_both, require_several
from pipelines.checkpoints import CheckpointConfig, Checkpoints
from pipelines.compute import ComputeConfig, describe_devices, start_accelerator
from pipelines.guards import FiniteGuard, Heartbeat, require_agreement, summary
from pipelines.optimizer import OptimizerConfig, clip_length, lr_at, make_optimizer, moving_average, set_learning_rate
from pipelines.stage import LAUNCH, RunFolder, counted, require, run_stage, to_json, write_json
from pipelines.trackers import start_trackers
from pipelines.training import Best, Progress, Rates, feed, on_main, save_artefact, step_generator

MEASURED_WINDOWS = 8192
"""Most training windows that statistics and ridge regression are taken from, spread evenly."""
VALIDATION_WINDOWS = 512
RIDGE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Per sample; chosen on validation windows."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Options:
    """Train an infiller on cached embeddings, and judge it against linear interpolation."""

    train_cache: Path = Path("cache/train")
    """Embeddings to train on."""
    validation_cache: Path = Path("cache/val")
    """Embeddings of other videos, to choose the best model by."""
    test_cache: Path = Path("cache/test")
    """Embeddings of videos that are used for neither, to judge it on."""
    output_dir: Path = Path("runs/infiller")
    """Where the infiller, the results and the logs are left."""
    steps: int = 1500
    """Optimiser steps."""
    batch_size: int = 64
    """Windows in a batch, on each process, with one gap in each."""
    log_every: int = 200
    """Steps between two validations."""
    tracker: tuple[str, ...] = ("tensorboard",)
    """Where curves go, one or several: tensorboard, csv, wandb, mlflow; or none."""
    seed: int = 0
    """Of the weights, the windows, the gaps and the bootstrap."""
    resume: bool = False
    """Go on with the unfinished run in the output folder."""
    overwrite: bool = False
    """Replace the run in the output folder."""
    infiller: InfillerConfig = field(default_factory=InfillerConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(weight_decay=1e-2, warmup_steps=100, clip_norm=1.0)
    )
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


def main(options: Options) -> None:
    """The story: check, build, train, keep the best on validation clips, judge it on test clips."""
    for name in ("steps", "batch_size", "log_every"):
        value = getattr(options, name)
        require(value > 0, f"--{name.replace('_', '-')} is {value}: it must be positive")
    options.optimizer.check()
    options.checkpoints.check()
    output = RunFolder(options.output_dir, ("infiller", "training_state", "logs", "infilling.json", "infilling.png"))
    accelerator = start_accelerator(options.compute, options.tracker, options.output_dir / "logs")
    heartbeat = Heartbeat(accelerator)
    is_main, device = accelerator.is_main_process, accelerator.device
    require(
        accelerator.distributed_type != DistributedType.FSDP,
        "infillers are small and not split over GPUs: use configs/accelerate/multi_gpu.yaml instead of fsdp.yaml",
    )
    set_seed(options.seed)
    require_agreement(accelerator, options=options)

    train, validation, test = map(EmbeddingCache, (options.train_cache, options.validation_cache, options.test_cache))
    provenance = train.provenance
    for other in (validation, test):
        other.require_same_space(provenance.encoder_fingerprint, provenance.fps, str(options.train_cache))
    named = {"--train-cache": train, "--validation-cache": validation, "--test-cache": test}
    for (name, one), (other_name, other) in combinations(named.items(), 2):
        require_no_video_in_both(one, name, other, other_name)
    infiller = Infiller(
        options.infiller, provenance.embedding_dimension, provenance.fps, provenance.encoder_fingerprint
    )
    windows, validation_windows, test_windows = (
        Windows(cache, options.infiller.window) for cache in (train, validation, test)
    )
    measured = spread(windows, MEASURED_WINDOWS)
    measure_windows(infiller, measured)
    held_out = infiller.standardise(spread(validation_windows, VALIDATION_WINDOWS)).to(device)
    spread(test_windows, VALIDATION_WINDOWS)  # what it refuses is refused now, not after the training
    require_agreement(
        accelerator,
        provenance=provenance,
        clips=summary([clip.key for cache in (train, validation, test) for clip in cache.clips]),
    )
    on_main(accelerator, lambda: output.prepare(options, options.overwrite, options.resume, {"provenance": provenance}))
    global_batch = options.batch_size * accelerator.num_processes
    peak = options.optimizer.peak_learning_rate(global_batch)
    if is_main:
        print(
            f"training an infiller ({sum(p.numel() for p in infiller.parameters()):,} weights) on "
            f"{describe_devices(accelerator)}: global batch {global_batch}, learning rate {peak:g}; "
            f"{len(windows):,} windows, validated on {len(validation.clips)} clips"
        )

    averaged = moving_average(infiller.to(device), options.optimizer, buffers=False)
    judged: Infiller = infiller if averaged is None else averaged.module  # type: ignore[assignment]
    loss: nn.Module = Loss(infiller)
    if options.compute.compile:
        loss.compile()
    loss, optimizer = accelerator.prepare(loss, make_optimizer(loss, options.optimizer))
    best = Best(judged, JUDGED_BY)
    for state in (best, averaged):
        if state is not None:
            accelerator.register_for_checkpointing(state)

    progress, rates = Progress(), Rates(device)
    states = options.output_dir / "training_state"
    guard = FiniteGuard(accelerator, states)
    checkpoints = Checkpoints(accelerator, states, options.checkpoints, progress, guard.settle, heartbeat.stop)
    step = checkpoints.load_newest() if options.resume else None
    if step is None:
        best.consider(0, validate(judged, held_out))
        checkpoints.save(step := 0)
    start_trackers(accelerator, "train_infiller", to_json(options), step)
    checkpoints.listen()

    drawn = draw_batches(windows, options, accelerator.process_index, step)
    batches = stream_ahead(lambda drawn: feed(drawn, device), [drawn], workers=1, ahead=2)
    bar = tqdm(total=options.steps, initial=step, unit="step", desc="infiller", disable=not is_main)
    rates.start()
    while step < options.steps:
        batch = rates.wait_for(batches, global_batch)
        set_learning_rate(optimizer, lr_at(step, options.steps, options.optimizer.warmup_steps, peak))
        error = loss(infiller.standardise(batch.windows), batch.hidden)
        accelerator.backward(error)
        gradient_norm = accelerator.clip_grad_norm_(loss.parameters(), clip_length(options.optimizer))
        guard.watch(step, batch.videos, error, gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        if averaged is not None:
            averaged.update_parameters(infiller)
        progress.add({"loss": error})
        step += 1
        bar.update()

        if step % options.log_every == 0 or step == options.steps:
            speed = rates.report(progress)
            metrics = validate(judged, held_out) | progress.take_means(accelerator)
            best.consider(step, metrics)
            bar.set_postfix({"of linear": f"{metrics[JUDGED_BY]:.3f}"})
            guard.check_scale(step)
            accelerator.log({**metrics, **speed, "gradient_norm": gradient_norm.item()}, step=step)
            rates.start()
        checkpoints.after_step(step)
    bar.close()
    checkpoints.save(step)

    if is_main:
        judged.load_state_dict(best.weights)
        save_artefact(judged, options.output_dir / "infiller")
        judged.cpu().eval()
        results = evaluate(judged, judged.standardise(measured), held_out.cpu(), test_windows, options.seed)
        write_json(options.output_dir / "infilling.json", results)
        draw(results, options.output_dir / "infilling.png")
        output.finish(
            {
                **best.metrics,
                **flat_metrics(results),
                "best_step": best.step,
                "steps": step,
                "seconds": progress.seconds,
                "encoder_fingerprint": provenance.encoder_fingerprint,
            }
        )
        print(table(results))
        print(
            f"wrote {options.output_dir}/infiller (best at step {best.step}), infilling.json, infilling.png and "
            "metrics.json. Next, from the past alone:\n"
            f"  {LAUNCH} pipelines/train_predictor.py --train-cache {options.train_cache} "
            f"--validation-cache {options.validation_cache} --output-dir runs/predictor"
        )
    heartbeat.stop()
    accelerator.end_training()


class Batch(NamedTuple):
    """What a step learns from."""

    windows: Tensor
    """float32 (B, window, D), as cached."""
    hidden: Tensor
    """bool (B, window), a gap in each."""
    videos: tuple[Path, ...]
    """Those that the windows are from, each once."""


def draw_batches(windows: Windows, options: Options, rank: int, step: int) -> Iterator[Batch]:
    """From this step on; each batch a function of seed, step and rank."""
    for at in range(step, options.steps):
        generator = step_generator(options.seed, at, rank, torch.device("cpu"))
        taken, clips = windows.sample(options.batch_size, generator)
        hidden = draw_gaps(options.batch_size, options.infiller, generator)
        yield Batch(taken, hidden, tuple(sorted({Path(clip.key.source) for clip in clips})))


def spread(windows: Windows, most: int) -> Tensor:
    """At most so many windows, spread evenly over a cache, raw (N, window, D).

    Raises:
        UserError: there is nothing to learn or to judge by: there is one window alone, or embeddings are not finite, or
            never change.
    """
    require_several(windows)
    taken = windows.take(np.linspace(0, len(windows) - 1, min(most, len(windows))).astype(int))
    require_finite(windows.cache, [taken])
    require_changing(windows.cache, [taken], "a straight line")
    return taken


class Loss(nn.Module):
    """The infiller's loss as a module, which is what several processes can share."""

    def __init__(self, infiller: Infiller) -> None:
        super().__init__()
        self.infiller = infiller

    def forward(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        return self.infiller.loss(embeddings, hidden)


JUDGED_BY = "validation_relative_to_linear"


def validate(infiller: Infiller, held_out: Tensor) -> dict[str, float]:
    """How far to trust the infiller, into the infiller; then its error relative to linear interpolation."""
    infiller.eval()
    relative = fit_trust(infiller, held_out)
    infiller.train()
    by_length = {f"{JUDGED_BY}_gap_{length}": float(value) for length, value in enumerate(relative, start=1)}
    return {JUDGED_BY: float(relative.mean()), **by_length}


def evaluate(infiller: Infiller, train: Tensor, held_out: Tensor, windows: Windows, seed: int) -> dict[str, Any]:
    """What is written to `infilling.json`: a record for each guess, length of a gap and place in it.

    All lengths are judged on the same windows, with the gap in the middle.

    Args:
        infiller: in evaluation mode, on the CPU.
        train: standardised training windows, (M, window, D), for ridge regression.
        held_out: likewise of validation clips.
        windows: of test clips.
        seed: of the bootstrap.
    """
    test = infiller.standardise(spread(windows, len(windows)))
    groups, grouped_by = group_windows(windows)
    bootstrap = Bootstrap(groups, RESAMPLES, seed)
    guesses: dict[str, list[dict[str, Any]]] = {}
    for length in tqdm(range(1, infiller.config.longest_gap + 1), desc="judging", unit="length", leave=False):
        gap = middle_gap(length, infiller.config)
        filled = fill_all(infiller, train, held_out, test, gap)
        errors = {name: (value - test[:, gap]).square().mean(dim=2).double().numpy() for name, value in filled.items()}
        for name, error in errors.items():  # (N, length)
            guesses.setdefault(name, []).append(
                {
                    "gap": length,
                    **judge(error.mean(axis=1), errors["linear_interpolation"].mean(axis=1), bootstrap),
                    "places": judge(error, errors["linear_interpolation"], bootstrap),
                }
            )
    return {
        "fps": infiller.fps,
        "windows": len(windows),
        "clips": len(windows.cache.clips),
        "interval": bootstrap.describe(grouped_by),
        "guesses": bootstrap.claim(guesses),
    }


@torch.no_grad()
def fill_all(infiller: Infiller, train: Tensor, held_out: Tensor, test: Tensor, gap: Tensor) -> dict[str, Tensor]:
    """What the infiller, named `model`, and the simple guesses put into a gap; standardised (N, gap, D) each.

    Args:
        infiller: in evaluation mode.
        train: standardised training windows, (M, window, D), to fit ridge regression on.
        held_out: likewise of validation clips, to choose how.
        test: standardised, (N, window, D).
        gap: bool (window,).
    """

    def fill(windows: Tensor, guess: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return guess(windows, gap.expand(len(windows), -1))[:, gap]

    return {
        "model": torch.cat([fill(part, infiller) for part in test.split(1024)]),
        "linear_interpolation": fill(test, linear_interpolation),
        "copy_last": fill(test, copy_last),
        "ridge": fit_ridge(train, held_out, gap)(test),
    }


def fit_ridge(train: Tensor, held_out: Tensor, gap: Tensor) -> Callable[[Tensor], Tensor]:
    """Ridge regression from what each place in a gap is shown: the nearest embeddings on both sides.

    It gets what the infiller gets: it is chosen, here by its penalty, and trusted beyond the line across, as far as
    validation clips advise.

    Args:
        train: standardised training windows, (M, window, D).
        held_out: likewise of validation clips.
        gap: bool (window,).

    Returns:
        Fills the gap: standardised windows (N, window, D) -> (N, gap, D).
    """
    places = torch.arange(len(gap))
    first, last = places[gap][0], places[gap][-1]
    seen = ~gap & (places >= first - NEAREST) & (places <= last + NEAREST)

    def across(windows: Tensor) -> Tensor:
        return linear_interpolation(windows, gap.expand(len(windows), -1))[:, gap]

    def fitted(penalty: float) -> Callable[[Tensor], Tensor]:
        ridge = Ridge(penalty * len(train))
        ridge.fit(train[:, seen].flatten(1).double().numpy(), train[:, gap].flatten(1).double().numpy())

        def fill(windows: Tensor) -> Tensor:
            predicted = torch.from_numpy(ridge.predict(windows[:, seen].flatten(1).double().numpy()))
            return predicted.float().unflatten(1, (-1, windows.shape[2]))

        return fill

    def error(fill: Callable[[Tensor], Tensor]) -> float:
        return float((fill(held_out) - held_out[:, gap]).square().mean())

    chosen = min(map(fitted, RIDGE_PENALTIES), key=error)
    line = across(held_out)
    trust = least_squares_trust(chosen(held_out) - line, held_out[:, gap] - line)
    return lambda windows: across(windows).lerp(chosen(windows), trust)


def judge(error: np.ndarray, of_linear: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """Means over the first dimension of squared errors (N, ...), and relative to those of linear interpolation."""
    resampled, resampled_of_linear = bootstrap.means(error), bootstrap.means(of_linear)
    return {
        "mse": error.mean(axis=0).tolist(),
        "mse_interval": interval(resampled).tolist(),
        "relative_to_linear": (error.mean(axis=0) / of_linear.mean(axis=0)).tolist(),
        "relative_to_linear_interval": interval(resampled / resampled_of_linear).tolist(),
    }


def flat_metrics(results: dict[str, Any]) -> dict[str, float]:
    """The infiller's values on test clips under flat keys."""
    return {
        f"{name}_in_gap_{record['gap']}": record[name]
        for record in results["guesses"]["model"]
        for name in ("mse", "relative_to_linear")
    }


def table(results: dict[str, Any]) -> str:
    """The results on one screen."""
    guesses = results["guesses"]
    heads = "".join(f"{record['gap']:>8}" for record in guesses["model"])
    lines = [
        f"{counted(results['windows'], 'window')} of {counted(results['clips'], 'test clip')}; gaps of so many steps:"
    ]
    middle = "in the middle of the gap: error relative to linear interpolation (below 1 is skill)"
    lines += [middle, f"  {'':22}{heads}"]
    for name, records in guesses.items():
        cells = [record["places"]["relative_to_linear"][(record["gap"] - 1) // 2] for record in records]
        lines.append(f"  {name:22}" + "".join(f"{cell:>8.3f}" for cell in cells))
    lines += ["over the whole gap", f"  {'':22}{heads}"]
    for name, records in guesses.items():
        lines.append(f"  {name:22}" + "".join(f"{record['relative_to_linear']:>8.3f}" for record in records))
    intervals = [record["relative_to_linear_interval"] for record in guesses["model"]]
    if None in intervals:
        return "\n".join([*lines, f"  {results['interval']}"])
    for name, bounds in zip(("model, 95 % from", "model, 95 % to"), zip(*intervals, strict=True), strict=True):
        lines.append(f"  {name:22}" + "".join(f"{bound:>8.3f}" for bound in bounds))
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Leave a picture: error relative to linear interpolation by length of the gap, and by place in it."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    by_length, by_place = figure.subplots(1, 2, sharey=True)
    for name, records in results["guesses"].items():
        lengths = [record["gap"] for record in records]
        by_length.plot(lengths, [record["relative_to_linear"] for record in records], label=name.replace("_", " "))
        intervals = [record["relative_to_linear_interval"] for record in records]
        if None not in intervals:
            by_length.fill_between(lengths, *np.transpose(intervals), alpha=0.2, linewidth=0)
    by_length.set(
        xlabel="gap in steps", ylabel="error relative to linear interpolation", yscale="log",
        title=f"{results['windows']:,} windows; {results['interval']}",
    )  # fmt: skip
    for record in results["guesses"]["model"]:
        middle = (record["gap"] + 1) / 2
        places = np.arange(1, record["gap"] + 1) - middle
        by_place.plot(places, record["places"]["relative_to_linear"], marker="o", markersize=3, label=record["gap"])
    by_place.set(xlabel="place, in steps from the middle of the gap", title="model, by length of the gap")
    by_length.yaxis.set_major_formatter("{x:g}")
    figure.legend(handles=by_length.lines, loc="outside lower center", ncols=len(results["guesses"]), frameon=False)
    by_place.legend(frameon=False, ncols=3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_stage(main, Options)
