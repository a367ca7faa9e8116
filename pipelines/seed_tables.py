"""What several seeds reached, as tables in Markdown: each cell is the mean over seeds, and their range."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def over_seeds(values: Sequence[float]) -> str:
    """One cell."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def print_by_horizon(runs: Sequence[dict[str, Any]], horizons: Sequence[int]) -> None:
    """Two tables: of `forecasts`, figures by name at each horizon, and of `measures`, single ones by name.

    A measure that some runs lack is that of the others: only what ran from the beginning is timed.
    """
    print("| steps ahead | " + " | ".join(map(str, horizons)) + " |\n| --- |" + " --- |" * len(horizons))
    for name in runs[0]["forecasts"]:
        cells = [over_seeds([run["forecasts"][name][at] for run in runs]) for at in range(len(horizons))]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| measure | |\n| --- | --- |")
    for name in dict.fromkeys(name for run in runs for name in run["measures"]):
        print(f"| {name} | {over_seeds([run['measures'][name] for run in runs if name in run['measures']])} |")


def print_by_contestant(runs: dict[str, list[dict[str, float]]], names: Sequence[str]) -> None:
    """A table of the named figures, a column for each contestant, of whose runs there is one for each seed."""
    print(f"| measure | {' | '.join(runs)} |\n| --- |{' --- |' * len(runs)}")
    for name in names:
        cells = [over_seeds([run[name] for run in of_seeds]) for of_seeds in runs.values()]
        print(f"| {name} | {' | '.join(cells)} |")
