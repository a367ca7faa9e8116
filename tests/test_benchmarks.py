"""What benchmarks work out themselves, beside what the pipelines report."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.driving import FPS, PREDICTOR, STRETCH_FRAMES, notice_reversals

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
