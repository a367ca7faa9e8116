"""What benchmarks work out themselves, beside what the pipelines report."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.driving import FPS, PREDICTOR, STRETCH_FRAMES, notice_reversals
from pipelines.seed_tables import print_by_contestant, print_by_horizon

REVERSED_S = 40.0
SEEING_A_SEAM = PREDICTOR["predictor.context"]


@pytest.mark.parametrize(("seams", "inside", "expected"), [(5.0, 1.0, 0.5), (1.0, 5.0, 1.0), (5.0, 5.0, 1.0)])
def test_a_reversed_stretch_is_noticed_by_its_inside_and_not_by_its_seams(seams, inside, expected):
    times_s = np.arange(0, 100, 1 / FPS)
    values = np.ones(len(times_s))
    start = round(REVERSED_S * FPS)
    values[start : start + STRETCH_FRAMES] = inside
    for seam in (start, start + STRETCH_FRAMES):
        values[seam : seam + SEEING_A_SEAM] = seams
    found = notice_reversals({"video.mp4": np.stack([times_s, values], axis=1)}, {Path("video.mp4"): REVERSED_S})
    assert found == {"moments": expected, "10 s": expected}


def test_tables_hold_means_and_ranges_of_seeds(capsys):
    runs = [
        {"forecasts": {"model": [0.1, 0.2]}, "measures": {"seconds": 9.0, "rank": 1.0}},
        {"forecasts": {"model": [0.3, 0.6]}, "measures": {"rank": 2.0}},  # which was not run from the beginning
    ]
    print_by_horizon(runs, (1, 5))
    print_by_contestant({"one": [{"error": 1.0}, {"error": 2.0}], "other": [{"error": 3.0}] * 2}, ["error"])
    assert capsys.readouterr().out.splitlines() == [
        "| steps ahead | 1 | 5 |",
        "| --- | --- | --- |",
        "| model | 0.200 (0.100 to 0.300) | 0.400 (0.200 to 0.600) |",
        "",
        "| measure | |",
        "| --- | --- |",
        "| seconds | 9.000 (9.000 to 9.000) |",
        "| rank | 1.500 (1.000 to 2.000) |",
        "| measure | one | other |",
        "| --- | --- | --- |",
        "| error | 1.500 (1.000 to 2.000) | 3.000 (3.000 to 3.000) |",
    ]
