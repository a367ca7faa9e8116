"""Tables and figures of what `pipelines.run.evaluation` finds, and pictures of the frames behind a cache."""

import csv
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from data.cache import CachedClip, EmbeddingCache
from data.decoder import VideoError
from data.video import probe_video, read_frames_at
from pipelines.run.command import counted
from pipelines.run.evaluation import shown_horizons

Record = dict[str, Any]
MEASURES = {
    "relative_to_copy_last": "error relative to copying the last embedding (below 1 is skill)",
    "relative_to_ridge": "error relative to ridge regression",
    "retrieval_at_1": "how often no frame is nearer than the one that came",
    "std": "standard deviation",
    "effective_rank": "effective rank",
    "energy_score": "energy score of sampled futures (lower is better)",
    "best_of": "squared error of the best sampled future",
    "coverage_50": "share of what came inside the central 50 % of samples",
    "coverage_90": "share of what came inside the central 90 % of samples",
    "probe_r2": "R2 of true state read off embeddings",
}
"""Measures of the table, and what they are called."""
PANELS = {
    "retrieval_at_1": (0, None),
    "std": (0, 1.6),
    "effective_rank": (1, None),
    "coverage_90": (0, 1),
    "probe_r2": (-0.3, 1.03),
}
"""Measures of the figure beside skill, and the limits of their axes."""


def flat_record(record: Record, columns: Sequence[str] = ()) -> Record:
    """A record of plain numbers: intervals as `_low` and `_high`, what probes read under the columns' names."""
    flat: Record = {}
    for name, value in record.items():
        stem = name.removesuffix("_interval")
        parts = (
            {f"{stem}_{column}": value[place] for place, column in enumerate(columns)}
            if "probe_" in name
            else {stem: value}
        )
        for key, part in parts.items():
            flat |= {key: part} if name == stem else {f"{key}_low": part[0], f"{key}_high": part[1]}
    return flat


def flat_metrics(results: Record) -> Record:
    """The model's numbers without intervals, under flat keys such as `mse_at_5`."""
    metrics = {"useful_horizon_s": results["useful_horizon"]["model"]["time_s"]}
    for record in results["predictors"]["model"]:
        plain = {name: value for name, value in record.items() if not name.endswith(("_interval", "time_s", "horizon"))}
        for name, value in flat_record(plain, results["probe_columns"]).items():
            metrics[f"{name}_at_{record['horizon']}"] = value
    return metrics


def write_table(results: Record, path: Path) -> None:
    """A row of a CSV for each forecast and horizon, and of the truth what can be said of it; empty is undefined."""
    rows = [
        {"predictor": name} | flat_record(record, results["probe_columns"])
        for name, records in {**results["predictors"], "truth": results["truth"]}.items()
        for record in records
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows({key: "" if value != value else value for key, value in row.items()} for row in rows)


def table(results: Record) -> str:
    """The results on one screen."""
    fps, curves = results["fps"], _curves(results)
    shown = shown_horizons(len(results["truth"]))
    heads = [f"{step} ({step / fps:.3g} s)" for step in shown]
    lines = [f"{summary(results)}; {results['interval']}; horizon in steps (seconds)", _line("", heads)]
    for measure, title in MEASURES.items():
        rows = {name: records for name, records in curves.items() if measure in records[0]}
        lines += [title] * bool(rows)
        for name, records in rows.items():
            lines.append(_line(name, [f"{np.mean(records[step - 1][measure]):.3f}" for step in shown]))
    useful = results["useful_horizon"].items()
    lines.append("better than the mean" + " by point estimates" * results["interval"].startswith("too few"))
    lines += [_line(name, [f"{'> ' * one['exceeds_longest']}{one['time_s']:.3g} s"]) for name, one in useful]
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"  {name:21}" + "".join(f"{cell:>13}" for cell in cells)


def _curves(results: Record) -> dict[str, list[Record]]:
    return {**results["predictors"], "truth": results["truth"]}


def summary(results: Record) -> str:
    """How much was measured."""
    probes = f", R2 of {', '.join(results['probe_columns'])}" if results["probe_columns"] else ""
    samples = f", {results['samples']} samples of each" if results["samples"] else ""
    return f"{counted(results['windows'], 'rollout')} in {counted(results['clips'], 'clip')}{samples}{probes}"


def draw(results: Record, path: Path) -> None:
    """Leave the picture of an evaluation in a file."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    draw_skill(results, parts[0].subplots())
    curves = _curves(results)
    there = [measure for measure in PANELS if any(measure in records[0] for records in curves.values())]
    for measure, axes in zip(there, np.ravel(parts[1].subplots(1, len(there))), strict=True):
        axes.set_title("\n".join(textwrap.wrap(MEASURES[measure], 34)), fontsize=8)
        axes.set_xlabel("horizon in seconds")
        for name, records in curves.items():
            points = [(record["time_s"], float(np.mean(record.get(measure, np.nan)))) for record in records]
            times_s, values = np.array([point for point in points if np.isfinite(point[1])]).reshape(-1, 2).T
            axes.plot(times_s, values, color=colours(results)[name], linewidth=2 if name == "model" else 1)
        axes.set_ylim(*PANELS[measure])
    figure.savefig(path, dpi=120)


def colours(results: Record) -> dict[str, str]:
    """The colour of each forecast: those that say least are grey."""
    others = [name for name in results["predictors"] if name not in ("copy_last", "mean")]
    return {"copy_last": "0.5", "mean": "0.2", "truth": "black"} | {
        name: f"C{place}" for place, name in enumerate(others)
    }


def draw_skill(results: Record, axes: Axes) -> None:
    """Errors relative to copy-last against the horizon in seconds, with confidence bands."""
    for name, records in results["predictors"].items():
        times_s, width = [record["time_s"] for record in records], 2.5 if name == "model" else 1.5
        errors = [record["relative_to_copy_last"] for record in records]
        colour = colours(results)[name]
        axes.plot(times_s, errors, label=name.replace("_", " "), color=colour, linewidth=width)
        intervals = np.array([record["relative_to_copy_last_interval"] for record in records])
        axes.fill_between(times_s, *intervals.T, color=colour, alpha=0.2, linewidth=0)
    useful_s = results["useful_horizon"]["model"]["time_s"]
    axes.axvline(useful_s, color=colours(results)["model"], linewidth=1, linestyle=":")
    # Logarithmic: extrapolation and the mean are wrong by factors that would flatten the rest on a linear scale.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("horizon in seconds; dotted: the model is better than the mean until there")
    axes.set_ylabel("error relative to copying the last embedding")
    axes.set_title(f"{summary(results)}; {results['interval']}", fontsize=9)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def clip_of_row(cache: EmbeddingCache, row: int) -> CachedClip:
    """The clip that a row of a cache belongs to."""
    return next(clip for clip in cache.clips if clip.start <= row < clip.start + clip.frames)


def read_pictures(cache: EmbeddingCache, rows: Sequence[int] | np.ndarray, *, height: int = 144) -> list[np.ndarray]:
    """The frames behind rows of a cache, decoded again from their videos, for people to look at.

    Args:
        cache: its clips say where the videos lie.
        rows: int (N,).
        height: of the pictures in pixels; their width follows the shape of the video.

    Returns:
        For each row, uint8 (height, width, 3).

    Raises:
        VideoError: a video is gone, cannot be decoded, or has no frame there any more.
    """
    fps, image_fps = cache.provenance.fps, cache.provenance.image_fps
    sources = [clip_of_row(cache, int(row)).key.source for row in rows]
    pictures: dict[int, np.ndarray] = {}
    for source in dict.fromkeys(sources):  # each video is opened once
        places = [place for place, other in enumerate(sources) if other == source]
        video = probe_video(Path(source), image_fps)
        size = (height, max(1, round(height * video.width / video.height)))
        times_s = cache.take(np.asarray(rows)[places], "times_s")
        frames, found_s = read_frames_at(video.path, size, times_s=times_s, image_fps=image_fps)
        if (off := np.abs(found_s - times_s) > 0.5 / fps).any():
            gone_s = times_s[off][0]
            raise VideoError(f"{source}: there is no frame at {gone_s:.2f} s: was it changed since it was cached?")
        pictures |= {place: frame.transpose(1, 2, 0) for place, frame in zip(places, frames, strict=True)}
    return [pictures[place] for place in range(len(sources))]
