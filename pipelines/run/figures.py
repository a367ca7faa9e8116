"""Figures of plotly.js, as what JSON knows: curves of a training, skill, and the timeline of a video's surprise."""

import re
from collections.abc import Sequence
from typing import Any

Figure = dict[str, Any]
COLOURS = ("#2f7ed8", "#e07b00", "#2a9d55", "#a855c8", "#c9484a", "#8a8f98")
"""Seen against white and against black."""
CURVES = {
    "Loss and its weighted terms": r"loss|\w+_loss|weighted_\w+",
    "Standard deviation: 0 is collapse": r"\w+_std",
    "Effective rank: 1 is collapse": r"\w+_rank",
    "Validation error relative to copying": r"validation_\w+",
}
"""Figures of a training, and the entries of its log that they show."""


def curve_figures(curve: list[dict[str, Any]], collapsed_at: int | None) -> list[Figure]:
    """The log of a training over its steps, a figure for each kind of entry."""
    steps = [entry["step"] for entry in curve]
    names = list(dict.fromkeys(name for entry in curve for name in entry))
    figures = []
    for title, pattern in CURVES.items():
        shown = [name for name in names if re.fullmatch(pattern, name)]
        lines = [
            {"x": steps, "y": [entry.get(name) for entry in curve], "name": name.replace("_", " "), "mode": "lines"}
            for name in shown
        ]
        marks: list[Figure] = [_upright(collapsed_at, COLOURS[4])] if collapsed_at is not None else []
        figures += [_figure(f"{title}, over steps", lines, marks)] if lines else []
    return figures


def skill_figure(results: dict[str, Any]) -> Figure:
    """Errors relative to copy-last over the horizon, each with its interval."""
    lines: list[Figure] = []
    for place, (name, records) in enumerate(results["predictors"].items()):
        times_s, colour = [record["time_s"] for record in records], COLOURS[place % len(COLOURS)]
        errors, low, high = (
            [record[f"relative_to_copy_last{end}"] for record in records] for end in ("", "_low", "_high")
        )
        same = {"legendgroup": name, "name": name.replace("_", " "), "mode": "lines"}
        line = {"color": colour, "width": 3 if name == "model" else 1.5}
        lines.append(same | {"x": times_s, "y": errors, "line": line})
        area = {"x": times_s + times_s[::-1], "y": high + low[::-1], "fill": "toself", "fillcolor": f"{colour}2e"}
        lines.append(same | area | {"line": {"width": 0}, "hoverinfo": "skip", "showlegend": False})
    figure = _figure("Error relative to copying the last embedding, by horizon", lines)
    figure["layout"]["xaxis"]["ticksuffix"] = " s"
    ticks = [round(one * 10.0**power, 3) for power in range(-3, 4) for one in (1, 2, 5)]
    figure["layout"]["yaxis"] = {"type": "log", "tickvals": ticks}  # the worst rivals would flatten the rest
    return figure


def timeline_figure(
    moments: list[dict[str, float]], peaks: list[dict[str, float]], events: list[dict[str, float]],
    threshold: float | None,
) -> Figure:  # fmt: skip
    """Energy and percentile over time, peaks marked, events behind; the first shape is the moment that is shown."""
    times_s, tops_s = ([row["time_s"] for row in rows] for rows in (moments, peaks))
    marked = {"mode": "markers", "marker": {"color": COLOURS[4], "size": 9}, "hoverinfo": "skip"}
    lines: list[Figure] = [
        {"x": times_s, "y": [row["percentile"] for row in moments], "name": "percentile", "yaxis": "y2", "opacity": 0.5,
         "mode": "lines", "line": {"color": COLOURS[5], "width": 1}},
        {"x": times_s, "y": [row["energy"] for row in moments], "name": "energy", "mode": "lines",
         "line": {"color": COLOURS[0], "width": 2}},
        {"x": tops_s, "y": [row["energy"] for row in peaks], "name": "peaks", **marked},
    ]  # fmt: skip
    shapes: list[Figure] = [_upright(times_s[0], COLOURS[1])]
    for event in events:
        span = {"type": "rect", "yref": "paper", "x0": event["begin_s"], "x1": event["end_s"], "y0": 0, "y1": 1}
        shapes.append(span | {"fillcolor": COLOURS[4], "opacity": 0.18, "line": {"width": 0}, "layer": "below"})
    if threshold is not None:
        level = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": threshold, "y1": threshold}
        shapes.append(level | {"line": {"color": COLOURS[4], "width": 1, "dash": "dash"}})
    figure = _figure("", lines, shapes)
    figure["layout"]["xaxis"]["ticksuffix"] = " s"
    figure["layout"]["yaxis"] |= {"title": {"text": "energy"}, "rangemode": "tozero"}
    right = {"overlaying": "y", "side": "right", "range": [0, 101], "tickvals": [0, 50, 90, 100], "showgrid": False}
    figure["layout"]["yaxis2"] = right | {"title": {"text": "percentile"}}
    return figure


def _figure(title: str, lines: list[Figure], shapes: Sequence[Figure] = ()) -> Figure:
    axes: Figure = {"xaxis": {}, "yaxis": {}, "shapes": list(shapes), "colorway": COLOURS}
    return {"title": title, "data": lines, "layout": axes | {"hovermode": "x unified", "legend": {"orientation": "h"}}}


def _upright(place: float, colour: str) -> Figure:
    ends = {"type": "line", "yref": "paper", "x0": place, "x1": place, "y0": 0, "y1": 1}
    return ends | {"line": {"color": colour, "width": 2}}
