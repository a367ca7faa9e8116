r"""Three pictures of hidden parts, by one network: what comes next, frames missing in the middle, parts of every frame.

  python -m benchmarks.hidden_parts --runs runs/benchmarks/balls/seed_0 --seeds 0

Needs folders with caches, as `benchmarks/balls.py` leaves them. For each run and seed: trains a transformer that learns
to fill in, evaluates its rollouts, and on the test clips

- gaps of all lengths in the middle of its context: the error in the middle of the gap relative to that of the line
  across, beside ridge regression on the nearest four embeddings on both sides and copying the last before;
- half of the tokens of every observed frame hidden, others in each frame or (of a grid) the same in all of them: the
  error of the hidden ones in the last frame relative to holding what was last seen of each place, beside ridge
  regression on that; and the R² of what `--columns` say, at that frame and ahead, by rollouts from what was filled in.

Prints a table for each run in Markdown and leaves `results.json`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor

from benchmarks.common import (
    HORIZONS,
    SeedOptions,
    at_horizons,
    curves,
    evaluate,
    read_json,
    table_of_measures,
    train_on,
    write_results,
)  # fmt: skip
from data.cache import EmbeddingCache
from data.synthetic import STATE_COLUMNS
from data.windows import Windows
from jepa.baselines import Ridge
from jepa.bootstrap import r2, reading_moments
from jepa.calibration import Calibration
from jepa.config import PositiveInt
from jepa.predictor import Predictor
from jepa.probe import Probe
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence, line_across
from pipelines.run.command import run_command
from pipelines.run.evaluation import fit_readout, read_columns
from pipelines.run.models import load_predictor

NEAREST = 4
"""Visible embeddings on each side of a gap that ridge regression is shown."""
AHEAD = 10
"""Ticks of the rollouts from pasts of which half is hidden."""
MOST = {"train": 100_000, "val": 20_000, "test": 40_000}
"""Places of windows that ridge regression is fitted on and chosen by, and that all are judged on."""
PENALTIES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""On the squared weights of ridge regression, per sample."""


@dataclass(frozen=True, kw_only=True)
class Options(SeedOptions):
    """Hidden parts of embeddings, in the middle and everywhere."""

    runs: tuple[Path, ...]
    """Folders that hold `cache/train`, `cache/val` and `cache/test`."""
    context: PositiveInt = 18
    """Embeddings that the network looks at; the longest gap is half of them."""
    steps: PositiveInt = 1500
    """Optimiser steps."""
    options: str = ""
    """More options of `train_predictor`."""
    columns: tuple[str, ...] = STATE_COLUMNS
    """Columns of the caches to read off embeddings, if they have them."""
    output_dir: Path = Path("runs/benchmarks/hidden_parts")
    """Where all predictors and the results are left."""


def main(options: Options) -> None:
    """The story: train and measure each seed on each run, print."""
    results = {}
    for run in options.runs:
        found = [measure(run, seed, options) for seed in options.seeds]
        results[str(run)] = found
        print(f"\n{run}\n\n{table_of_measures({'': found})}")
    write_results(options.output_dir, results)


def measure(run: Path, seed: int, options: Options) -> dict[str, float]:
    """What one seed reaches on the test clips."""
    folder = options.output_dir / f"{run.parent.name}_{run.name}" / f"predictor_{seed}"
    given = {"predictor.kind": "transformer", "predictor.infill": True, "predictor.context": options.context}
    train_on(run / "cache", folder, given, {"steps": options.steps, "seed": seed}, options.options.split())
    caches = {split: EmbeddingCache(run / "cache" / split) for split in ("train", "val", "test")}
    columns = options.columns if {*options.columns} <= caches["test"].provenance.columns.keys() else ()
    read_off = {"probe-cache": run / "cache" / "train", "probe-columns": columns} if columns else {}
    evaluation = evaluate(run / "cache", folder, read_off)
    found = {"training: seconds": float(read_json(folder / "metrics.json")["seconds"])}
    for measured in ("relative_to_copy_last", *(["probe_r2"] if columns else [])):
        for name, curve in curves(evaluation, measured).items():
            if name in ("model", "ridge", "truth"):
                for horizon, value in zip(HORIZONS, at_horizons(curve), strict=False):
                    found[f"next, {measured}: {name}, {horizon} ahead"] = value
    return found | measure_hidden(*load_predictor(folder), caches, columns, seed=seed)


@torch.no_grad()
def measure_hidden(
    predictor: Predictor, calibration: Calibration, caches: dict[str, EmbeddingCache], columns: tuple[str, ...], *,
    seed: int,
) -> dict[str, float]:  # fmt: skip
    """What a predictor makes of gaps, and of half of everything."""
    context, places = predictor.config.context, math.prod(predictor.shape[:-1])
    windows = {split: Windows(cache, context + AHEAD) for split, cache in caches.items()}
    chosen = {split: windows[split].evenly(max(100, MOST[split] // places)) for split in windows}
    pasts = {split: predictor.standardise(windows[split].take(chosen[split])[:, :context]) for split in windows}
    found: dict[str, float] = {}
    for length in range(1, context // 2 + 1):
        gap = slice((context - length) // 2, (context - length) // 2 + length)
        hidden = {split: torch.zeros(past.shape[:-1], dtype=torch.bool) for split, past in pasts.items()}
        for mask in hidden.values():
            mask[:, gap] = True
        sides = (torch.arange(gap.start), torch.arange(gap.stop, context).flip(0))
        errors = relative_errors(predictor, pasts, hidden, at=gap.start + length // 2, sides=sides)
        found |= {f"gap of {length}, of the line: {name}": error for name, error in errors.items()}
    for kind in ("others in each frame", "the same in all frames") if places > 1 else ("others in each frame",):
        generator = torch.Generator().manual_seed(seed)
        hidden = {split: draw_half(past.shape[:-1], kind, generator) for split, past in pasts.items()}
        errors = relative_errors(predictor, pasts, hidden, at=context - 1, sides=(torch.arange(context),))
        found |= {f"half hidden, {kind}, of holding: {name}": error for name, error in errors.items()}
        if columns:
            true = read_columns(windows["test"], chosen["test"], columns)
            readout = fit_readout(caches["train"], columns, predictor)
            line, _ = line_across(pasts["test"], hidden["test"])
            filled = {"nothing hidden": pasts["test"], "model": fill(predictor, pasts["test"], hidden["test"])}
            for name, past in (filled | {"holding": line}).items():
                future = forecast(predictor, calibration, past)
                for ticks, embeddings in ((0, past[:, -1]), (AHEAD, future)):
                    read = positions_r2(readout.probe, embeddings, true[:, context - 1 + ticks])
                    found[f"half hidden, {kind}: R² {ticks} ahead, {name}"] = read
    return found


def draw_half(shape: torch.Size, kind: str, generator: torch.Generator) -> Tensor:
    """Half of the tokens of every frame, bool (N, T, *tokens); of vectors half of the frames."""
    chance = torch.rand(shape, generator=generator)
    chance = chance[:, :1].expand_as(chance) if kind == "the same in all frames" else chance
    if len(shape) == 2:
        return chance < 0.5
    order = chance.flatten(2).argsort(dim=2).argsort(dim=2)
    return (order < order.shape[2] // 2).view(shape)


def relative_errors(
    predictor: Predictor, pasts: dict[str, Tensor], hidden: dict[str, Tensor], *, at: int, sides: tuple[Tensor, ...]
) -> dict[str, float]:
    """Squared errors of what is hidden in one frame, of the line's, on test windows.

    Args:
        predictor: the predictor.
        pasts: standardised, (N, T, *tokens, D), of each split.
        hidden: bool (N, T, *tokens), likewise.
        at: the frame.
        sides: the steps that ridge regression may look back on, each towards the frame.
    """
    given, missing = {}, {}
    like = Ridge(predictor.fps, NEAREST, mean=torch.zeros(predictor.shape[-1]), std=torch.ones(predictor.shape[-1]),
                 on_grid=len(predictor.shape) == 3)  # fmt: skip
    for split, past in pasts.items():
        line, _ = line_across(past, hidden[split])
        mask = hidden[split][:, at].flatten()
        looked_at = [like.inputs(line[:, side]) for side in sides]
        given[split] = functional.pad(torch.cat(looked_at, dim=1)[mask].double(), (0, 1), value=1.0)
        missing[split] = (past - line)[:, at].flatten(0, -2)[mask].double()
    ridge = fit(given["train"], missing["train"], held_out=(given["val"], missing["val"]))
    past, mask = pasts["test"], hidden["test"][:, at]
    copied = line_across(past, hidden["test"] | (torch.arange(past.shape[1]) > at).view(-1, *[1] * (mask.ndim - 1)))[0]
    guesses = {
        "model": (fill(predictor, past, hidden["test"]) - past)[:, at][mask],
        "ridge": given["test"] @ ridge - missing["test"],
        "copying": (copied - past)[:, at][mask],
    }
    of_line = missing["test"].square().mean()
    return {name: float(error.double().square().mean() / of_line) for name, error in guesses.items()}


def fit(given: Tensor, missing: Tensor, *, held_out: tuple[Tensor, Tensor]) -> Tensor:
    """Ridge regression (F, D) from float64 (M, F) to (M, D), its penalty chosen on what is held out."""
    gram, moment = given.mT @ given / len(given), given.mT @ missing / len(given)
    fitted = [torch.linalg.solve(gram + penalty * torch.eye(len(gram)).double(), moment) for penalty in PENALTIES]
    errors = [float((held_out[0] @ weights - held_out[1]).square().mean()) for weights in fitted]
    return fitted[errors.index(min(errors))]


def in_parts(predictor: Predictor, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some windows at a time, so that memory holds what a network makes of them."""
    return zip(*(part.split(max(16, 8192 // math.prod(predictor.shape[:-1]))) for part in parts), strict=True)


def fill(predictor: Predictor, past: Tensor, hidden: Tensor) -> Tensor:
    """Standardised embeddings (N, T, *tokens, D), what is hidden filled in by the network."""
    filled = [
        predictor.fill(Sequence.on_clock(predictor.unstandardise(part), predictor.fps, hidden=mask)).embeddings
        for part, mask in in_parts(predictor, past, hidden)
    ]
    return predictor.standardise(torch.cat(filled))


def forecast(predictor: Predictor, calibration: Calibration, past: Tensor) -> Tensor:
    """The believed forecast `AHEAD` ticks from standardised pasts, (N, *tokens, D), standardised."""
    future = Future.ticks(AHEAD, predictor.fps)
    found = []
    for (part,) in in_parts(predictor, past):
        sequence = Sequence.on_clock(predictor.unstandardise(part), predictor.fps)
        found.append(rollout(predictor, sequence, future, calibration=calibration)[:, -1])
    return predictor.standardise(torch.cat(found))


def positions_r2(probe: Probe, embeddings: Tensor, true: Tensor) -> float:
    """R² of what a probe reads off standardised embeddings (N, *tokens, D), mean over columns (N, C)."""
    mean, std = probe.columns
    moments = reading_moments((probe(embeddings) - mean) / std, (true - mean) / std)
    return float(r2(moments.sum(dim=0).numpy()).mean())


if __name__ == "__main__":
    run_command(main, Options)
