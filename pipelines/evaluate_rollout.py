r"""Stage 4: by how much does the predictor beat the trivial guesses, and how far into the future?

  python pipelines/evaluate_rollout.py --cache cache/test --predictor runs/predictor/predictor \
      --output-dir runs/evaluation

Leaves `rollout.json` and `rollout.csv` (for each predictor and horizon: error, confidence interval, error relative to
copying the last embedding, to ridge regression and to the mean, retrieval, spread; for each predictor its useful
horizon), `rollout.png`, `metrics.json` and `config.json`. Where clips are long, `adapting_model` and `adapting_ridge`
learn, as they go, from how their earlier forecasts came out (`jepa.adaptation`). With --probe-cache and
--probe-columns, also how well true state (a CSV beside each video) can be read off the imagined embeddings.
"""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor
from tqdm import tqdm

from data.decoder import Damage, VideoError
from data.embedding_cache import CachedClip, EmbeddingCache
from data.groups import group_windows, stretch_for
from data.sidecar import read_states
from data.video import probe_video, read_frames_at
from data.windows import Windows
from jepa.adaptation import ADVICE, adapt, count_known
from jepa.baselines import Shrunk
from jepa.bootstrap import Bootstrap
from jepa.predictor import Predictor
from jepa.probe import Probe, ProbeKind, fit_probe, measure_agreement
from jepa.skill import Skill, as_advised, imagine_unshrunk, measure_skill, spread_by_horizon
from pipelines.artefacts import (
    load_predictor,
    require_calibrated,
    require_changing,
    require_finite,
    require_no_video_in_both,
    require_several,
)
from pipelines.probe_embeddings import label_windows, require_enough
from pipelines.stage import RunFolder, counted, readable_bytes, require, run_stage, write_json

PROBE_FRAMES = 20_000
"""A probe is fitted on at most so many frames: neighbouring ones are nearly equal."""
MOST_MEMORY = 4_000_000_000
"""Bytes that rollouts may take."""
IMAGINED_AT_ONCE = 9
"""The model and five guesses, two that adapt, and one more while it is made."""
SHOWN_HORIZONS = 5


@dataclass(frozen=True)
class Options:
    """Evaluate rollouts against copy-last, linear extrapolation, ridge regression and the mean."""

    cache: Path = Path("cache/test")
    """Embeddings of videos that were used neither for training nor for choosing the model."""
    predictor: Path = Path("runs/predictor/predictor")
    """The trained predictor."""
    output_dir: Path = Path("runs/evaluation")
    """Where the results are left."""
    horizon: int = 20
    """Steps into the future."""
    stride: int = 1
    """Steps between the beginnings of rollouts."""
    probe_cache: Path | None = None
    """Fit probes on these embeddings, from the CSV beside each of their videos."""
    probe_columns: tuple[str, ...] = ()
    """Columns of the CSVs to probe for."""
    probe_kind: ProbeKind = "ridge"
    """What reads them off: ridge regression, a small MLP, or the nearest neighbours."""
    resamples: int = 1000
    """Bootstrap resamples for the confidence intervals."""
    seed: int = 0
    """Of the bootstrap."""
    overwrite: bool = False
    """Replace the results in the output folder."""


def main(options: Options) -> None:
    """The story: load, imagine, measure, draw, print."""
    require(options.horizon > 0, f"--horizon is {options.horizon}: it must be positive")
    require(options.stride > 0, f"--stride is {options.stride}: it must be positive")
    require(options.resamples > 0, f"--resamples is {options.resamples}: it must be positive")
    require(
        bool(options.probe_cache) == bool(options.probe_columns),
        "--probe-cache and --probe-columns belong together: give both or neither",
    )
    output = RunFolder(options.output_dir, ("rollout.json", "rollout.csv", "rollout.png"))
    output.require_unfinished(options.overwrite)
    predictor = load_predictor(options.predictor)
    require_calibrated(predictor, options.predictor)
    cache = EmbeddingCache(options.cache)
    cache.require_same_space(predictor.encoder_fingerprint, predictor.fps, str(options.predictor))
    trials = lay_out_trials(cache, predictor, options.horizon, options.stride)
    readout = None
    if options.probe_cache:
        probe_cache = EmbeddingCache(options.probe_cache)
        probe_cache.require_same_space(predictor.encoder_fingerprint, predictor.fps, str(options.predictor))
        require_no_video_in_both(cache, "--cache", probe_cache, "--probe-cache")
        true_states = torch.from_numpy(read_states(cache, options.probe_columns)[trials.future_rows])
        for column, values in zip(options.probe_columns, true_states.unbind(dim=2), strict=True):
            require(bool(values.std() > 0), f"--probe-columns {column}: it never changes beside {options.cache}")
        probe = fit_probe_on(probe_cache, options.probe_columns, predictor, options.probe_kind, options.seed)
        readout = Readout(options.probe_columns, probe, true_states)
    # What an interrupted evaluation left can go: there is nothing in it to go on from.
    output.prepare(options, overwrite=True, inputs={"provenance": cache.provenance})

    imagined = imagine_all(predictor, trials)
    results = measure(trials, imagined, predictor, options.seed, options.resamples, readout)
    write_json(options.output_dir / "rollout.json", results)
    write_table(results, options.output_dir / "rollout.csv")
    draw(results, options.output_dir / "rollout.png")
    output.finish(flat_metrics(results))
    print(table(results))
    print(
        f"wrote {options.output_dir}/rollout.json, rollout.csv and rollout.png. Next:\n"
        f"  python pipelines/score_surprise.py --videos VIDEO --encoder runs/encoder/encoder "
        f"--predictor {options.predictor} --output-dir runs/surprise"
    )


@dataclass(frozen=True)
class Trials:
    """Every window of a cache as a trial: the past that predictors are shown, and the future that came."""

    windows: Windows
    past: Tensor
    """(N, context, D), standardised."""
    future: Tensor
    """(N, horizon, D), standardised."""
    future_rows: np.ndarray
    """int64 (N, horizon): rows of the future in the cache."""
    bank: Tensor
    """(frames, D), standardised: all frames of the cache, among which the one that came is searched."""
    bank_rows: np.ndarray
    """int64 (frames,): rows of the bank in the cache."""


def lay_out_trials(cache: EmbeddingCache, predictor: Predictor, horizon: int, stride: int = 1) -> Trials:
    """All windows of a context and `horizon` steps, their beginnings `stride` steps apart.

    Raises:
        CacheError: no clip is long enough for a single window.
        UserError: there is one window alone, or there are too many; embeddings are not finite, or never change.
    """
    context = predictor.config.context
    windows = Windows(cache, context + horizon, stride)
    require_several(windows)
    require_memory(windows, horizon, stride, len(predictor.mean))
    bank_rows = np.concatenate(cache.unbroken_runs())
    bank = torch.from_numpy(cache.take(bank_rows))
    require_finite(cache, [bank])
    sequences = windows.take(np.arange(len(windows)))
    require_changing(cache, [sequences[:, context - 1 :]], "copying it")
    sequences = predictor.standardise(sequences)
    return Trials(
        windows=windows,
        past=sequences[:, :context],
        future=sequences[:, context:],
        future_rows=windows.rows(np.arange(len(windows)))[:, context:],
        bank=predictor.standardise(bank),
        bank_rows=bank_rows,
    )


def require_memory(windows: Windows, horizon: int, stride: int, dimension: int) -> None:
    """All that is imagined is held at once. Raises `UserError`, with the stride that fits, where that is too much."""
    needed = 4 * len(windows) * dimension * (windows.length + IMAGINED_AT_ONCE * horizon)
    advised = math.ceil(stride * needed / MOST_MEMORY)
    require(
        needed <= MOST_MEMORY,
        f"--stride is {stride}: {len(windows):,} rollouts of {horizon} steps take about {readable_bytes(needed)}, more "
        f"than {readable_bytes(MOST_MEMORY)}: take fewer of them with --stride {advised}, or lower --horizon",
    )


def imagine_all(predictor: Predictor, trials: Trials) -> dict[str, Tensor]:
    """Rollouts (N, horizon, D) of the predictor, under the name `model`, and of each of its baselines.

    Where clips are long enough for a typical forecast to learn from `ADVICE` earlier ones of its own clip, also
    `adapting_model` and `adapting_ridge`, which do so (`jepa.adaptation`).
    """
    predictors = {"model": predictor, **predictor.baselines()}
    horizon, windows = trials.future.shape[1], trials.windows
    begun = torch.from_numpy(windows.starts)
    of_clips = windows.by_clip()
    known = torch.cat([count_known(begun[clip], horizon) for clip in of_clips])
    learns = bool(known.median() >= ADVICE)
    imagined, adapting = dict[str, Tensor](), dict[str, Tensor]()
    for name, one in tqdm(predictors.items(), desc="imagining", unit="predictor", leave=False):
        unshrunk = imagine_unshrunk(one, trials.past, horizon)
        imagined[name] = as_advised(one, unshrunk, trials.past)
        if learns and isinstance(one, Predictor | Shrunk):
            adapting[f"adapting_{name.removeprefix('shrunk_')}"] = torch.cat(
                [
                    adapt(unshrunk[clip], trials.past[clip], trials.future[clip], begun[clip], one.shrinkage)
                    for clip in tqdm(of_clips, desc="adapting", unit="clip", leave=False)
                ]
            )
    return imagined | adapting


class Readout(NamedTuple):
    """What reads true state off imagined embeddings, and what it should read."""

    columns: Sequence[str]
    probe: Probe
    true: Tensor
    """float64 (N, horizon, columns)."""


def fit_probe_on(
    cache: EmbeddingCache, columns: Sequence[str], predictor: Predictor, kind: ProbeKind = "ridge", seed: int = 0
) -> Probe:
    """A probe from standardised embeddings of single frames to state, fitted on a cache with a CSV beside each video.

    Raises:
        SidecarError: a CSV cannot be used.
        UserError: there is too little to fit it on.
    """
    frames = label_windows(cache, columns, 1, PROBE_FRAMES, stretch_for(cache, 2))
    require_enough(frames, cache, groups=2)
    return fit_probe(kind, predictor.standardise(frames.inputs[:, 0]), frames.states, frames.groups, seed)


def measure(
    trials: Trials,
    imagined: dict[str, Tensor],
    predictor: Predictor,
    seed: int = 0,
    resamples: int = 1000,
    readout: Readout | None = None,
) -> dict[str, Any]:
    """What is written to `rollout.json`: a record for each predictor and horizon, and what they were measured on."""
    cache, bank_rows = trials.windows.cache, trials.bank_rows
    place = np.empty(bank_rows.max() + 1, dtype=np.int64)
    place[bank_rows] = np.arange(len(bank_rows))
    true_rows = torch.from_numpy(place[trials.future_rows])
    groups, grouped_by = group_windows(trials.windows)
    bootstrap = Bootstrap(groups, resamples, seed)
    skills = measure_skill(imagined, trials.future, bootstrap, trials.bank, true_rows)
    fps, horizon = predictor.fps, trials.future.shape[1]
    records = {name: by_horizon(skill, fps) for name, skill in skills.items()}
    truth = [spread._asdict() for spread in spread_by_horizon(trials.future)]
    results: dict[str, Any] = {
        "fps": fps,
        "context": predictor.config.context,
        "windows": len(trials.windows),
        "clips": len(cache.clips),
        "frames": len(trials.bank),
        "interval": bootstrap.describe(grouped_by),
        "useful_horizon": {
            name: {
                "steps": skill.useful_steps,
                "time_s": skill.useful_steps / fps,
                "exceeds_longest": skill.useful_steps == horizon,
                "by_point_estimate": not bootstrap.enough,
            }
            for name, skill in skills.items()
        },
        "predictors": records,
        "truth": [{"horizon": step, "time_s": step / fps, **record} for step, record in enumerate(truth, 1)],
    }
    if readout is not None:
        results["probe_columns"] = list(readout.columns)
        for name, embeddings in {**imagined, "truth": trials.future}.items():
            agreement = measure_agreement(readout.probe(embeddings), readout.true, bootstrap)
            for step, record in enumerate(results["truth"] if name == "truth" else records[name]):
                for field, value in vars(agreement).items():
                    record[f"probe_{field}"] = value[step].tolist()
    return dict(bootstrap.claim(results))


def by_horizon(skill: Skill, fps: float) -> list[dict[str, Any]]:
    """One flat record for each horizon."""
    records = []
    for step in range(len(skill.mse)):
        record: dict[str, Any] = {
            "horizon": step + 1,
            "time_s": (step + 1) / fps,
            "mse": float(skill.mse[step]),
            "mse_interval": skill.mse_interval[step].tolist(),
        }
        for to, value in skill.relative.items():
            record[f"relative_to_{to}"] = float(value[step])
            record[f"relative_to_{to}_interval"] = skill.relative_interval[to][step].tolist()
        record["retrieval_at_1"] = float(skill.retrieval_at_1[step])
        records.append(record | skill.spread[step]._asdict())
    return records


def flat_record(record: dict[str, Any], probe_columns: Sequence[str] = ()) -> dict[str, float | None]:
    """A record with plain numbers alone: intervals as `_low` and `_high`, what probes read under their columns."""
    flat: dict[str, float | None] = {}
    for name, value in record.items():
        stem = name.removesuffix("_interval")
        parts = {stem: value}
        if name.startswith("probe_"):
            values = [None] * len(probe_columns) if value is None else value
            parts = {f"{stem}_{column}": part for column, part in zip(probe_columns, values, strict=True)}
        for key, part in parts.items():
            if name == stem:
                flat[key] = part
            else:
                flat[f"{key}_low"], flat[f"{key}_high"] = part or (None, None)
    return flat


def flat_metrics(results: dict[str, Any]) -> dict[str, float | None]:
    """The model's final values under flat keys."""
    metrics = {"useful_horizon_s": results["useful_horizon"]["model"]["time_s"]}
    for record in results["predictors"]["model"]:
        for name, value in flat_record(record, results.get("probe_columns", ())).items():
            if not name.endswith(("_low", "_high")) and name not in ("horizon", "time_s"):
                metrics[f"{name}_at_{record['horizon']}"] = value
    return metrics


def write_table(results: dict[str, Any], path: Path) -> None:
    """A row for each predictor and horizon; of the truth what can be said of it."""
    columns = results.get("probe_columns", ())
    rows = [
        {"predictor": name, **flat_record(record, columns)}
        for name, records in {**results["predictors"], "truth": results["truth"]}.items()
        for record in records
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def summary(results: dict[str, Any]) -> str:
    """How much was measured."""
    return f"{counted(results['windows'], 'rollout')} in {counted(results['clips'], 'clip')}"


def shown_horizons(horizon: int) -> list[int]:
    """A few horizons to show, evenly, the first and the last among them."""
    return sorted({1, *(math.ceil(horizon * part / (SHOWN_HORIZONS - 1)) for part in range(1, SHOWN_HORIZONS))})


def table(results: dict[str, Any]) -> str:
    """The results on one screen."""
    predictors, with_truth = results["predictors"], {**results["predictors"], "truth": results["truth"]}
    shown = shown_horizons(len(results["truth"]))

    def block(title: str, rows: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> list[str]:
        lines = (f"  {name:21}" + "".join(f"{cell(rows[name][h - 1]):>13}" for h in shown) for name in rows)
        return [title, *lines]

    heads = [f"{h} ({h / results['fps']:.3g} s)" for h in shown]
    skill = block(
        "error relative to copying the last embedding (below 1 is skill); how long it is better than the mean",
        predictors,
        lambda record: f"{record['relative_to_copy_last']:.3f}",
    )
    for index, useful in enumerate(results["useful_horizon"].values(), 1):
        at_least = "> " if useful["exceeds_longest"] else ""
        skill[index] += f"{at_least + format(useful['time_s'], '.3g'):>9} s"
    lines = [
        f"{summary(results)}; horizon in steps (seconds)",
        f"  {'':21}" + "".join(f"{head:>13}" for head in heads) + f"{'useful for':>11}",
        *skill,
        *block(
            "how often the nearest of all frames is the one that came",
            predictors,
            lambda record: f"{record['retrieval_at_1']:.3f}",
        ),
        *block(
            "spread of the embeddings: standard deviation, effective rank",
            with_truth,
            lambda record: f"{record['std']:.2f} {record['rank']:5.1f}",
        ),
    ]
    if results["useful_horizon"]["model"]["by_point_estimate"]:
        lines.insert(1, f"{results['interval']}: how long they are better than the mean is by point estimates")
    if "adapting_model" in predictors:
        lines.insert(1, "adapting: learns, as it goes, from how its earlier forecasts of the same clip came out")
    if "probe_columns" in results:
        lines += block(
            f"R2 of {', '.join(results['probe_columns'])}",
            with_truth,
            lambda record: f"{np.mean(record['probe_r2']):.3f}",
        )
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Leave the picture of the skill in a file."""
    probed = "probe_columns" in results
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    upper, lower = parts
    draw_skill(results, upper.subplots())
    panels = dict(zip(("retrieval", "spread", "probe"), lower.subplots(1, 3 if probed else 2), strict=False))
    colours = colour_of(results)
    truth = results["truth"]
    times_s = [record["time_s"] for record in truth]
    for name, records in results["predictors"].items():
        look: dict[str, Any] = {"color": colours[name], "linewidth": 2 if name == "model" else 1.2}
        panels["retrieval"].plot(times_s, [record["retrieval_at_1"] for record in records], **look)
        for field, style in (("std", "-"), ("rank", ":")):
            share = [record[field] / true[field] for record, true in zip(records, truth, strict=True)]
            panels["spread"].plot(times_s, share, style, **look)
        if probed:
            panels["probe"].plot(times_s, [np.mean(record["probe_r2"]) for record in records], **look)
    panels["retrieval"].set_title("how often the nearest frame is the one that came", fontsize=9)
    panels["spread"].set_title("std (lines) and rank (dots) as a share of the truth's", fontsize=9)
    panels["spread"].set_ylim(0, 1.6)
    if probed:
        panels["probe"].plot(times_s, [np.mean(record["probe_r2"]) for record in truth], color="black", linewidth=1)
        panels["probe"].set_title("R² of true state; black: read off what came", fontsize=9)
        panels["probe"].set_ylim(-0.3, 1.03)
    for axes in panels.values():
        axes.set_xlabel("horizon in seconds")
    figure.savefig(path, dpi=120)


def colour_of(results: dict[str, Any]) -> dict[str, str]:
    """The colour of each predictor: the guesses that say least are grey."""
    others = [name for name in results["predictors"] if name not in ("copy_last", "mean")]
    return {"copy_last": "0.5", "mean": "0.2"} | {name: f"C{index % 10}" for index, name in enumerate(others)}


def draw_skill(results: dict[str, Any], axes: Axes) -> None:
    """Error relative to copy-last against the horizon in seconds, with confidence bands."""
    colours = colour_of(results)
    for name, records in results["predictors"].items():
        time_s = [record["time_s"] for record in records]
        axes.plot(
            time_s,
            [record["relative_to_copy_last"] for record in records],
            label=name.replace("_", " "),
            color=colours[name],
            linewidth=2.5 if name == "model" else 1.5,
        )
        intervals = [record["relative_to_copy_last_interval"] for record in records]
        if None not in intervals:
            axes.fill_between(time_s, *np.transpose(intervals), color=colours[name], alpha=0.2, linewidth=0)
    useful = results["useful_horizon"]["model"]
    axes.axvline(useful["time_s"], color=colours["model"], linewidth=1, linestyle=":")
    # Logarithmic: extrapolation and the mean are wrong by factors that would flatten the rest on a linear scale.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("horizon in seconds; dotted: the model is better than the mean until there")
    axes.set_ylabel("error relative to copying the last embedding")
    axes.set_title(f"{summary(results)}; {results['interval']}", fontsize=9)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def read_pictures(cache: EmbeddingCache, rows: Sequence[int] | np.ndarray, height: int = 144) -> list[np.ndarray]:
    """Decode the frames behind rows of a cache once more from their videos, for people to look at.

    Args:
        cache: its clips say where the videos lie.
        rows: int (N,).
        height: of the pictures in pixels; their width follows the shape of the video.

    Returns:
        For each row, uint8 (height, width, 3).

    Raises:
        VideoError: a video is gone, cannot be decoded, or has no frame there any more.
    """
    pictures = []
    fps, image_fps = cache.provenance.fps, cache.provenance.image_fps
    for row in rows:
        video = probe_video(Path(clip_of_row(cache, int(row)).key.source), image_fps)
        size = (height, max(1, round(height * video.width / video.height)))
        time_s = float(cache.times_s[row])
        frames, found_s = read_frames_at(video.path, size, [time_s], Damage(), image_fps)
        if abs(found_s[0] - time_s) > 0.5 / fps:
            raise VideoError(f"{video.path}: there is no frame at {time_s:.2f} s: was it changed since it was cached?")
        pictures.append(frames[0].transpose(1, 2, 0))
    return pictures


def clip_of_row(cache: EmbeddingCache, row: int) -> CachedClip:
    """The clip that a row of a cache belongs to."""
    return next(clip for clip in cache.clips if clip.start <= row < clip.start + clip.frames)


if __name__ == "__main__":
    run_stage(main, Options)
