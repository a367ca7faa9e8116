"""Tables of what `pipelines.run.evaluation` finds."""

import csv
from pathlib import Path
from typing import Any

from pipelines.run.command import counted
from pipelines.run.files import to_json

Results = dict[str, Any]
MEASURES = {
    "relative_to_copy_last": "error relative to copying the last embedding; how long it is better than the mean",
    "energy_score": "energy score of sampled futures (lower is better)",
    "coverage_50": "share of what came inside the central 50 % of samples",
    "coverage_90": "share of what came inside the central 90 % of samples",
    "probe_r2": "R2 of true state read off embeddings, mean over columns",
}
"""Measures of the table, and what they are called."""


def write_table(results: Results, path: Path) -> None:
    """A row of a CSV for each forecast and horizon, and of the truth what can be said of it; empty is undefined."""
    named = results["predictors"] | {"truth": results["truth"]}
    rows = [{"predictor": name} | record for name, records in named.items() for record in records]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(to_json(rows))


def table(results: Results) -> str:
    """The results on one screen: five horizons at most, evenly, the first and the last among them."""
    fps, horizon = results["fps"], len(results["truth"])
    shown = sorted({1, *(-(-horizon * part // 4) for part in range(1, 5))})
    lines = [f"{counted(results['windows'], 'rollout')} in {counted(results['clips'], 'clip')}"]
    if results["interval"].startswith("too few"):
        lines.append(f"{results['interval']}: how long they are useful is by point estimates")
    lines.append(_line("horizon in steps", [*(f"{step} ({step / fps:.3g} s)" for step in shown), "useful for"]))
    named = results["predictors"] | {"truth": results["truth"]}
    for measure, title in MEASURES.items():
        rows = {name: records for name, records in named.items() if measure in records[0]}
        lines += [title] * bool(rows)
        for name, records in rows.items():
            values = to_json([records[step - 1][measure] for step in shown])
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            if measure == "relative_to_copy_last":
                useful = results["useful_horizon"][name]
                cells.append(f"{'> ' * useful['exceeds_longest']}{useful['time_s']:.3g} s")
            lines.append(_line(name, cells))
    if read := results["inverse_dynamics"]:
        said = ", ".join(f"{one} {r2:.3f}" for one, r2 in read.items())
        lines.append(f"R² of actions read off two embeddings: {said}")
    return "\n".join(lines)


def _line(name: str, cells: list[str]) -> str:
    return f"  {name:21}" + "".join(f"{cell:>13}" for cell in cells)
