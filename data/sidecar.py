"""True state beside a video: `clip.csv` next to `clip.mp4`, one row a frame, with a `time_s` column."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class SidecarError(Exception):
    """A CSV that cannot be used; the message names it and the reason."""


def read_sidecar(video: Path, times_s: np.ndarray, columns: Sequence[str], tolerance_s: float) -> np.ndarray:
    """The rows nearest in time to the given frames.

    Args:
        video: the CSV lies beside it, under the same name.
        times_s: (T,), seconds since the first displayed frame.
        columns: which columns.
        tolerance_s: a row must be at least this near.

    Returns:
        float64 (T, columns).

    Raises:
        SidecarError: the CSV or a column is missing, a value is not a number, or no row is near enough to a frame.
    """
    path = video.with_suffix(".csv")
    if not path.exists():
        raise SidecarError(f"{path}: there is no such file, and {video.name} has no state to probe for without it")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        known = reader.fieldnames or []
        for column in ("time_s", *columns):
            if column not in known:
                raise SidecarError(f"{path}: there is no column '{column}' among {', '.join(known)}")
        try:
            rows = np.array([[float(row["time_s"]), *(float(row[column]) for column in columns)] for row in reader])
        except (TypeError, ValueError) as error:
            raise SidecarError(f"{path}: a value is not a number ({error})") from error
    if not np.isfinite(rows).all():
        raise SidecarError(f"{path}: a value is not a number (row {int((~np.isfinite(rows)).any(axis=1).argmax())})")
    if len(rows) == 0:
        raise SidecarError(f"{path}: there are no rows in it")
    after = np.searchsorted(rows[:, 0], times_s).clip(1, max(1, len(rows) - 1)).clip(max=len(rows) - 1)
    before = np.maximum(after - 1, 0)
    nearer_before = np.abs(rows[before, 0] - times_s) <= np.abs(rows[after, 0] - times_s)
    nearest = np.where(nearer_before, before, after)
    distance_s = np.abs(rows[nearest, 0] - times_s)
    if distance_s.max() > tolerance_s:
        worst = int(distance_s.argmax())
        raise SidecarError(f"{path}: no row within {tolerance_s:.3f} s of the frame at {times_s[worst]:.3f} s")
    return rows[nearest, 1:]
