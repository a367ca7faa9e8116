r"""Train a predictor of the next embedding on cached embeddings.

  video-jepa train --train-cache cache/train --validation-cache cache/val --output-dir runs/predictor

Leaves `predictor/` (the best on validation clips) and `calibration/` (how far to believe it; `video-jepa calibrate`
fits it anew), each `model.safetensors` and `config.json`, `metrics.json`, `curve.jsonl` and tracker logs. Ctrl-C saves;
the same command with --resume goes on.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.cache import EmbeddingCache
from data.windows import Windows
from jepa.config import NotNegative, NotNegativeInt, PositiveInt
from jepa.networks import MLPConfig, PredictorConfig
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.samples import energy_score
from jepa.sequence import Future, Sequence, line_across
from pipelines.run.caches import learned_from
from pipelines.run.command import run_command
from pipelines.run.judging import CHOSEN_BY, calibrate, copying_error, fit_ridge_on, judge, measure_embeddings
from pipelines.run.memory import require_memory
from pipelines.run.models import calibration_artefact, find_columns, open_cache, windows_for
from pipelines.run.run import Run
from pipelines.run.training import OptimizerOptions, RunOptions

GROWTH = 0.5  # share of the training during which the horizon of rollouts grows
CROP = 8  # rows and columns of a grid that a window is cropped to for training, at most
MOST_HIDDEN = 0.75  # share of the tokens of a past that is hidden for training, at most


@dataclass(frozen=True)
class Options(RunOptions):
    """Train a predictor of the next embedding on cached embeddings."""

    train_cache: Path = Path("cache/train")
    """Embeddings to train on."""
    validation_cache: Path = Path("cache/val")
    """Embeddings of other videos: the best model is chosen and calibrated on them."""
    output_dir: Path = Path("runs/predictor")
    """Where the predictor, its calibration, its metrics and its logs are left."""
    actions: tuple[str, ...] = ()
    """Columns of both caches that are actions, by name or pattern such as `action_*`; none: video alone."""
    slow_dimension: NotNegativeInt = 0
    """Numbers of an embedding, its last ones, that are copied, not predicted: those that `pretrain` made slow."""
    steps: PositiveInt = 800
    """Optimiser steps."""
    batch_size: PositiveInt = 128
    """Windows in a batch, on each process; of grids cropped ones, each place counted."""
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
    train = EmbeddingCache(options.train_cache)
    provenance, encoder = train.provenance, train.provenance.encoder_fingerprint
    predictor = Predictor(
        options.predictor, train.shape, fps=provenance.fps, encoder_fingerprint=encoder,
        actions=find_columns(train, options.actions), slow=options.slow_dimension,
    )  # fmt: skip
    validation = open_cache(options.validation_cache, predictor)
    inputs, sources = learned_from(train, validation)
    measure_embeddings(predictor, train)
    context = options.predictor.context
    windows = windows_for(train, predictor, context + options.rollout_steps)
    held_out = windows_for(validation, predictor, context + options.validation_horizon)
    network, crop = options.predictor, [min(CROP, side) for side in train.shape[:-1]]
    rollouts = max(options.batch_size, math.prod(crop)) * options.rollout_steps
    require_memory(8 * rollouts * network.width * network.depth, f"--batch-size {options.batch_size}")
    ridge = fit_ridge_on(train, held_out, predictor)
    seen = f"{len(windows):,} windows of {len(train.clips)} clips, validated on {len(validation.clips)} clips"
    run.begin(inputs, seen, sources=sources)
    losses = run.prepare(Losses(predictor, copying_error(windows, predictor)), options.optimizer, clip_norm=1.0)
    best = run.keep_best(predictor, CHOSEN_BY)
    if not best.metrics:
        best.consider(0, judge(predictor, ridge, held_out)[0])  # copying and ridge regression, before the first step

    for step, batch in run.draws(partial(draw_batch, windows, options.batch_size, crop)):
        chance, (past, future) = run.generator(step), batch.windows.tensor_split([context], dim=1)
        noise = torch.randn(past.shape, generator=chance, device=past.device)
        past = past + options.input_noise * predictor.change_std * predictor.std * noise
        hidden = draw_hidden(past.shape[:-1], chance) if getattr(options.predictor, "infill", False) else None
        terms = losses(past, future[:, : growing_horizon(step, options)], chance, actions=batch.actions, hidden=hidden)
        loss = terms["rollout_loss"] + terms["one_step_loss"] + terms.get("infill_loss", 0.0)
        run.update(loss, terms, batch.videos)
        if run.due:
            run.log(*judge(predictor, ridge, held_out), show=("one_step_loss", CHOSEN_BY))

    artefacts = {}
    if run.is_main:
        best.restore()
        if best.step == 0:
            print("no step was better on validation clips than none: the forecast is that of the simple guesses")
        calibration, said = calibrate(predictor, ridge, validation, horizon=options.validation_horizon)
        print(said)
        artefacts = {
            "predictor": ("predictor", predictor.description(), predictor),
            "calibration": calibration_artefact(calibration, predictor, inputs["validation"]),
        }
    evaluate = "video-jepa evaluate --cache CACHE_OF_TEST --output-dir runs/evaluation --predictor"
    run.finish({"encoder_fingerprint": encoder}, artefacts, next=f"{evaluate} {options.output_dir}")


class Batch(NamedTuple):
    """What a step learns from."""

    windows: Tensor
    """float32 (B, context + rollout steps, *tokens, D), as cached, of grids a part."""
    actions: Tensor | None
    """float32 (B, context + rollout steps, A), where the predictor takes any."""
    videos: tuple[Path, ...]
    """Videos that the windows are from, each once."""


def draw_batch(windows: Windows, size: int, crop: list[int], generator: torch.Generator) -> Batch:
    """Windows drawn uniformly; of grids fewer, each cropped, so that places of all together are `size`."""
    chosen = windows.sample(max(1, size // math.prod(crop)), generator)
    taken = windows.take(chosen)
    for axis, side in enumerate(crop, start=2):
        first = torch.randint(taken.shape[axis] - side + 1, (), generator=generator)
        taken = taken.narrow(axis, int(first), side)
    return Batch(taken, windows.actions(chosen), windows.videos(chosen))


def draw_hidden(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """What is hidden of a past, bool (B, T, *tokens): frames in a row, or some share of all tokens.

    These are others in each frame or, of a grid, the same in all of them.
    """
    batch, length, *tokens = shape
    room, gap, kind, share, same = torch.rand(
        5, batch, 1, *[1] * len(tokens), generator=generator, device=generator.device
    )
    chance = torch.rand(shape, generator=generator, device=generator.device)
    longest, at = length // 2, torch.arange(length, device=chance.device).view(-1, *[1] * len(tokens))
    gap = 1 + (gap * longest).long()
    first = 1 + (room * (length - 1 - gap)).long()
    chance = torch.where(same < 0.5, chance[:, :1], chance) if tokens else chance
    return torch.where(kind < 0.5, (at >= first) & (at < first + gap), chance < MOST_HIDDEN * share)


def growing_horizon(step: int, options: Options) -> int:
    """Rollout steps at this point of the training: what is far cannot be learned before what is near."""
    grown = min(1.0, step / max(1, GROWTH * options.steps))
    return 1 + int(grown * (options.rollout_steps - 1))


class Losses(nn.Module):
    """The predictor and its losses as one module, so that one call does all that ranks must agree on.

    The unit, (steps,), is the standardised squared error of copying for so many ticks. Relative to it all horizons
    matter alike: the near ones, where little changes, would be nothing beside the far ones.
    """

    unit: Tensor

    def __init__(self, predictor: Predictor, unit: Tensor) -> None:
        super().__init__()
        self.predictor = predictor
        self.register_buffer("unit", unit)

    def forward(
        self, past: Tensor, future: Tensor, generator: torch.Generator, *,
        actions: Tensor | None = None, hidden: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Errors of the first step of a rollout, of all its steps, and of what is hidden, relative to copying.

        The error is the squared error; with a latent, which the generator draws, the energy score of two samples: it
        is least where they are as far from each other as from what came (Pacchiardi et al. 2024, arXiv:2112.08217).
        The past (B, context, *tokens, D) has noise, the future (B, steps, *tokens, D) has none.
        Actions are (B, at least context + steps, A).
        """
        context, steps, fps = past.shape[1], future.shape[1], self.predictor.fps
        known, done = (None, None) if actions is None else (actions[:, :context], actions[:, context - 1 :])
        sequence, ticks = Sequence.on_clock(past, fps, known), Future.ticks(steps, fps, done)
        came = self.predictor.standardise(future)
        if self.predictor.latent_dimension:
            drawn = self.predictor.standardise(rollout(self.predictor, sequence, ticks, 2, generator=generator))
            error = energy_score(drawn.flatten(3), came.flatten(2)) / self.unit[:steps].sqrt()  # (B, steps)
        else:
            rolled = self.predictor.standardise(rollout(self.predictor, sequence, ticks))
            error = (rolled - came).square().flatten(2).mean(dim=2) / self.unit[:steps]  # (B, steps)
        terms = {"one_step_loss": error[:, 0].mean(), "rollout_loss": error.mean()}
        if hidden is not None:  # relative to copying the nearest visible embedding of the place
            filled, (_, away) = self.predictor.fill(replace(sequence, hidden=hidden)), line_across(past, hidden)
            missed = ((filled.embeddings - past) / self.predictor.std).square().mean(dim=-1)
            relative = missed / self.unit[(away - 1).clamp(0, len(self.unit) - 1)]
            terms["infill_loss"] = relative.sum() / hidden.sum().clamp_min(1)
        return terms


if __name__ == "__main__":
    run_command(main, Options)
