r"""Do sampled futures know what cannot be known? For predictors trained with --predictor.latent-dimension.

  python pipelines/evaluate_samples.py --cache cache/test --validation-cache cache/val \
      --predictor runs/predictor/predictor --output-dir runs/samples

Draws futures for each moment of a cache and measures, at each horizon, their energy score (proper: best for those who
are as certain as they should be), how often what came lies in their central 50 % and 90 % intervals, and the error of
the best of them: beside equally many samples of a plain Gaussian around a point forecast, as wide as its errors on
validation clips. Leaves `samples.json`, `samples.png`, `metrics.json` and `config.json`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from data.embedding_cache import EmbeddingCache
from data.groups import group_windows
from jepa.bootstrap import Bootstrap, interval
from jepa.predictor import Predictor
from jepa.sampling import SHARES, GaussianFutures, sample
from jepa.scoring import best_of, coverage, energy_score, live_features
from jepa.skill import imagine
from pipelines.artefacts import load_predictor, require_calibrated, require_no_video_in_both
from pipelines.evaluate_rollout import Trials, lay_out_trials
from pipelines.stage import RunFolder, UserError, require, run_stage, write_json

LEAST_SAMPLES = 19
"""Of fewer, the least and the greatest lie closer together than a central 90 %."""
WINDOWS_AT_ONCE = 256


@dataclass(frozen=True)
class Options:
    """Measure sampled futures against samples of a plain Gaussian around a point forecast."""

    cache: Path = Path("cache/test")
    """Embeddings of videos that were used neither for training nor for choosing the model."""
    validation_cache: Path = Path("cache/val")
    """Embeddings on which the width of the Gaussian is measured."""
    predictor: Path = Path("runs/predictor/predictor")
    """The trained predictor, with a latent dimension."""
    point_predictor: Path | None = None
    """Put the Gaussian around the rollouts of this predictor; otherwise, around the mean of the samples."""
    output_dir: Path = Path("runs/samples")
    """Where the results are left."""
    horizon: int = 20
    """Steps into the future."""
    samples: int = 32
    """Futures drawn for each moment."""
    stride: int = 1
    """Steps between the moments."""
    resamples: int = 1000
    """Bootstrap resamples for the confidence intervals."""
    seed: int = 0
    """Of the samples and of the bootstrap."""
    overwrite: bool = False
    """Replace the results in the output folder."""


def main(options: Options) -> None:
    """The story: load, measure how wide the Gaussian is, draw and score both, print."""
    for name in ("horizon", "stride", "resamples"):
        require(getattr(options, name) > 0, f"--{name} is {getattr(options, name)}: it must be positive")
    require(
        options.samples >= LEAST_SAMPLES,
        f"--samples is {options.samples}: a central interval of 90 % takes at least {LEAST_SAMPLES}",
    )
    output = RunFolder(options.output_dir, ("samples.json", "samples.png"))
    output.require_unfinished(options.overwrite)
    predictor = load_predictor(options.predictor)
    require_calibrated(predictor, options.predictor)
    if not predictor.config.latent_dimension:
        raise UserError(
            f"{options.predictor} knows one future only: train one with --predictor.latent-dimension 16, or judge its "
            "rollouts with pipelines/evaluate_rollout.py"
        )
    point = None if options.point_predictor is None else load_point_predictor(options.point_predictor, predictor)
    cache, validation = EmbeddingCache(options.cache), EmbeddingCache(options.validation_cache)
    for one in (cache, validation):
        one.require_same_space(predictor.encoder_fingerprint, predictor.fps, str(options.predictor))
    require_no_video_in_both(cache, "--cache", validation, "--validation-cache")
    trials = lay_out_trials(cache, predictor, options.horizon, options.stride)
    usual = lay_out_trials(validation, predictor, options.horizon, options.stride)
    live = live_features(trials.future)
    require(
        bool(live.any()), f"{options.cache}: embeddings hardly change, so nothing can be foretold: bring moving video"
    )
    output.prepare(options, overwrite=True, inputs={"provenance": cache.provenance})

    generator = torch.Generator().manual_seed(options.seed)

    def in_batches(some: Trials, what: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Samples (n, B, horizon, D), the guess that the Gaussian is put around, and what came (B, horizon, D)."""
        batches = list(zip(some.past.split(WINDOWS_AT_ONCE), some.future.split(WINDOWS_AT_ONCE), strict=True))
        for past, future in tqdm(batches, desc=what, unit="batch", leave=False):
            drawn = sample(predictor, past, options.horizon, options.samples, generator)
            yield drawn, drawn.mean(dim=0) if point is None else imagine(point, past, options.horizon), future

    guesses = torch.cat([guess for _, guess, _ in in_batches(usual, "measuring the Gaussian")])
    gaussian = GaussianFutures(guesses, usual.future)
    measured: dict[str, list[dict[str, Tensor]]] = {"model": [], "gaussian": []}
    for drawn, guess, future in in_batches(trials, "drawing futures"):
        measured["model"].append(score(drawn, future, live))
        measured["gaussian"].append(score(gaussian.sample(guess, options.samples, generator), future, live))

    groups, grouped_by = group_windows(trials.windows)
    bootstrap = Bootstrap(groups, options.resamples, options.seed)
    results = {
        "fps": predictor.fps,
        "samples": options.samples,
        "windows": len(trials.windows),
        "interval": bootstrap.describe(grouped_by),
        **bootstrap.claim(summarise(measured, bootstrap, predictor.fps)),
    }
    write_json(options.output_dir / "samples.json", results)
    draw(results, options.output_dir / "samples.png")
    output.finish(
        {
            f"{name}_{record['horizon']}_{measure}": record[measure]
            for name in measured
            for record in results[name]
            for measure in ("energy_score", "best_of", *(f"coverage_{share:.0%}" for share in SHARES))
        }
    )
    print(table(results))
    print(f"wrote {options.output_dir}/samples.json and samples.png")


def load_point_predictor(folder: Path, predictor: Predictor) -> Predictor:
    """What the Gaussian is put around, on the same embeddings. Raises `UserError`."""
    point = load_predictor(folder)
    require_calibrated(point, folder)
    require(
        point.encoder_fingerprint == predictor.encoder_fingerprint and torch.equal(point.mean, predictor.mean),
        f"{folder} was trained on other embeddings than the predictor: give predictors trained on one cache",
    )
    require(
        point.config.context == predictor.config.context,
        f"{folder} has a context of {point.config.context}, the predictor of {predictor.config.context}: give "
        "predictors that are shown the same past",
    )
    return point


def score(drawn: Tensor, future: Tensor, live: Tensor) -> dict[str, Tensor]:
    """Samples (n, B, horizon, D) against what came (B, horizon, D): measures by window and horizon, (B, horizon).

    Coverage is of the features that move, bool (D,).
    """
    return {
        "energy_score": energy_score(drawn, future),
        "best_of": best_of(drawn, future),
        **{f"coverage_{share:.0%}": coverage(drawn[..., live], future[..., live], share) for share in SHARES},
    }


def summarise(measured: dict[str, list[dict[str, Tensor]]], bootstrap: Bootstrap, fps: float) -> dict[str, Any]:
    """A record for each horizon, of the model and of the Gaussian: each measure with its confidence interval."""
    values = {
        name: {measure: torch.cat([part[measure] for part in parts]).double().numpy() for measure in parts[0]}
        for name, parts in measured.items()
    }
    resampled = {name: bootstrap.means(of["energy_score"]) for name, of in values.items()}
    relative = interval(resampled["model"] / resampled["gaussian"])  # (horizon, 2)
    records: dict[str, Any] = {}
    for name, of in values.items():
        records[name] = [{"horizon": step + 1, "time_s": (step + 1) / fps} for step in range(len(relative))]
        for measure, found in of.items():
            for step, (mean, ends) in enumerate(zip(found.mean(0), interval(bootstrap.means(found)), strict=True)):
                records[name][step] |= {measure: float(mean), f"{measure}_interval": ends.tolist()}
    for ours, plain, ends in zip(records["model"], records["gaussian"], relative, strict=True):
        ours["energy_score_relative_to_gaussian"] = ours["energy_score"] / plain["energy_score"]
        ours["energy_score_relative_to_gaussian_interval"] = ends.tolist()
    return records


def table(results: dict[str, Any]) -> str:
    """What fits on a screen: horizons 1, 2, 5, 10, 20, ..."""
    shown = [h for h in (1, 2, 5, 10, 20, 50, 100) if h <= len(results["model"])]
    heads = [f"{h} ({h / results['fps']:.1f} s)" for h in shown]
    lines = [f"{results['samples']} futures for each of {results['windows']:,} moments; horizon in steps (seconds)"]
    if results["model"][0]["energy_score_interval"] is None:
        lines.append(results["interval"])
    titles = {
        "energy_score": "energy score (lower is better)",
        "best_of": f"squared error of the best of {results['samples']}",
        "coverage_50%": "share of what came in the central 50 %",
        "coverage_90%": "share of what came in the central 90 %",
    }
    for measure, title in titles.items():
        lines.append(f"{title:42}" + "".join(f"{head:>14}" for head in heads))
        for name in ("model", "gaussian"):
            lines.append(f"  {name:40}" + "".join(f"{results[name][h - 1][measure]:>14.3f}" for h in shown))
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Leave the picture in a file: energy score and coverage against the horizon."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    draw_energy_score(results, left)
    draw_coverage(results, right)
    figure.savefig(path, dpi=120)


def draw_energy_score(results: dict[str, Any], axes: Axes) -> None:
    """Energy score with its confidence band."""
    for name, colour in (("model", "C0"), ("gaussian", "0.5")):
        time_s = [record["time_s"] for record in results[name]]
        axes.plot(time_s, [record["energy_score"] for record in results[name]], color=colour, label=name)
        intervals = [record["energy_score_interval"] for record in results[name]]
        if None not in intervals:
            axes.fill_between(time_s, *np.transpose(intervals), color=colour, alpha=0.2, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("horizon in seconds")
    axes.set_ylabel("energy score")
    axes.set_title(f"{results['samples']} samples; {results['interval']}", fontsize=9)
    axes.legend(frameon=False)


def draw_coverage(results: dict[str, Any], axes: Axes) -> None:
    """How often what came lies in the central intervals."""
    for name, colour in (("model", "C0"), ("gaussian", "0.5")):
        time_s = [record["time_s"] for record in results[name]]
        for share, style in zip(SHARES, ("-", "--"), strict=True):
            covered = [record[f"coverage_{share:.0%}"] for record in results[name]]
            axes.plot(time_s, covered, style, color=colour, label=f"{name}, central {share:.0%}")
    for share in SHARES:
        axes.axhline(share, color="C3", linewidth=1, linestyle=":")
    axes.set_ylim(0, 1)
    axes.set_xlabel("horizon in seconds")
    axes.set_ylabel("share of what came inside")
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    run_stage(main, Options)
