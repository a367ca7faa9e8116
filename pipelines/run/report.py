"""Tables and figures of what `pipelines.run.evaluation` finds."""

import csv
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from pipelines.run.command import counted
from pipelines.run.evaluation import shown_horizons

Results = dict[str, Any]
MEASURES = {
    "relative_to_copy_last": "error relative to copying the last embedding; how long it is better than the mean",
    "retrieval_at_1": "how often no frame is nearer than the one that came",
    "std": "standard deviation",
    "effective_rank": "effective rank",
    "energy_score": "energy score of sampled futures (lower is better)",
    "coverage_50": "share of what came inside the central 50 % of samples",
    "coverage_90": "share of what came inside the central 90 % of samples",
    "probe_r2": "R2 of true state read off embeddings, mean over columns",
}
"""Measures of the table, and what they are called."""
PANELS = {"retrieval_at_1": None, "std": 1.6, "effective_rank": None, "coverage_90": 1.0, "probe_r2": 1.03}
"""Measures of the figure beside skill, and the upper ends of their axes."""


def flat_metrics(results: Results) -> dict[str, float]:
    """The model's numbers without intervals, under flat keys such as `mse_at_5`."""
    metrics = {"useful_horizon_s": results["useful_horizon"]["model"]["time_s"]}
    for record in results["predictors"]["model"]:
        names = [name for name in record if not name.endswith(("_low", "_high", "time_s", "horizon"))]
        metrics |= {f"{name}_at_{record['horizon']}": record[name] for name in names}
    return metrics


def write_table(results: Results, path: Path) -> None:
    """A row of a CSV for each forecast and horizon, and of the truth what can be said of it; empty is undefined."""
    rows = [{"predictor": name} | record for name, records in _curves(results).items() for record in records]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows({key: "" if value != value else value for key, value in row.items()} for row in rows)


def table(results: Results) -> str:
    """The results on one screen."""
    fps, shown = results["fps"], shown_horizons(len(results["truth"]))
    heads = [f"{step} ({step / fps:.3g} s)" for step in shown]
    lines = [
        f"{counted(results['windows'], 'rollout')} in {counted(results['clips'], 'clip')}; horizon in steps (seconds)",
        _line("", [*heads, "useful for"]),
    ]
    if results["interval"].startswith("too few"):
        lines.insert(1, f"{results['interval']}: how long they are useful is by point estimates")
    for measure, title in MEASURES.items():
        rows = {name: records for name, records in _curves(results).items() if measure in records[0]}
        lines += [title] * bool(rows)
        for name, records in rows.items():
            cells = [f"{records[step - 1][measure]:.3f}" for step in shown]
            if measure == "relative_to_copy_last":
                useful = results["useful_horizon"][name]
                cells.append(f"{'> ' * useful['exceeds_longest']}{useful['time_s']:.3g} s")
            lines.append(_line(name, cells))
    return "\n".join(lines)


def _line(name: str, cells: list[str]) -> str:
    return f"  {name:21}" + "".join(f"{cell:>13}" for cell in cells)


def _curves(results: Results) -> dict[str, list[dict[str, float]]]:
    return {**results["predictors"], "truth": results["truth"]}


def draw(results: Results, path: Path) -> None:
    """Leave the picture of an evaluation in a file."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    draw_skill(results, parts[0].subplots())
    measures = [name for name in PANELS if name in {**results["truth"][0], **results["predictors"]["model"][0]}]
    for measure, axes in zip(measures, parts[1].subplots(1, len(measures)), strict=True):
        for name, records in _curves(results).items():
            points = [(record["time_s"], record[measure]) for record in records if measure in record]
            width = 2 if name == "model" else 1
            axes.plot([x for x, _ in points], [y for _, y in points], color=colours(results)[name], linewidth=width)
        axes.set_title("\n".join(textwrap.wrap(MEASURES[measure], 34)), fontsize=8)
        axes.set_xlabel("horizon in seconds")
        axes.set_ylim(-0.3 if measure == "probe_r2" else 0, PANELS[measure])
    figure.savefig(path, dpi=120)


def colours(results: Results) -> dict[str, str]:
    """The colour of each forecast: those that say least are grey."""
    others = [name for name in results["predictors"] if name not in ("copy_last", "mean")]
    return {"copy_last": "0.5", "mean": "0.2", "truth": "black"} | {
        name: f"C{place}" for place, name in enumerate(others)
    }


def draw_skill(results: Results, axes: Axes) -> None:
    """Errors relative to copy-last against the horizon in seconds, with confidence bands."""
    for name, records in results["predictors"].items():
        times_s, colour = [record["time_s"] for record in records], colours(results)[name]
        errors, low, high = (
            [record[f"relative_to_copy_last{end}"] for record in records] for end in ("", "_low", "_high")
        )
        width = 2.5 if name == "model" else 1.5
        axes.plot(times_s, errors, label=name.replace("_", " "), color=colour, linewidth=width)
        axes.fill_between(times_s, low, high, color=colour, alpha=0.2, linewidth=0)
    useful_s = results["useful_horizon"]["model"]["time_s"]
    axes.axvline(useful_s, color=colours(results)["model"], linewidth=1, linestyle=":")
    # Logarithmic: extrapolation and the mean are wrong by factors that would flatten the rest on a linear scale.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("horizon in seconds; dotted: the model is better than the mean until there")
    axes.set_ylabel("error relative to copying the last embedding")
    axes.set_title(f"{counted(results['windows'], 'rollout')}; {results['interval']}", fontsize=9)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
