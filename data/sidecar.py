"""State and actions beside a video: `clip.csv` next to `clip.mp4`, a row for each frame or for each of some moments.

The column `time_s` says when, in seconds since the first displayed frame; without it, `frame` says which decoded frame
of the video, counted from 0 in presentation order. All other columns are values.

A table may begin late, end early or pause, as a recording may: where it says nothing, a tick gets NaN. One that says
nothing about any tick of a clip, or hardly anything, is an error: its times are in another unit, or of another video.
So is one that says several things of one moment: its clock has begun again.
Without one, the tables of a data set in LeRobot's layout are read, where the video is in one.
"""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data.decoder import Damage
from data.errors import DataError
from data.files import matching
from data.lerobot import read_table
from data.picture import IMAGE_FPS
from data.video import open_video


class SidecarError(DataError):
    """A CSV that cannot be used; the message names it and the reason."""


def table_beside(video: Path) -> Path:
    """Where a video's table lies: `clip.csv`, or `clip.CSV`, for a file `clip.mp4`; `a.01.csv` for a folder `a.01`."""
    path = video.with_name(f"{video.name}.csv") if video.is_dir() else video.with_suffix(".csv")
    capital = path.with_suffix(".CSV")  # cameras shout
    return capital if os.path.exists(capital) and not os.path.lexists(path) else path


def read_sidecar(
    video: Path, times_s: np.ndarray, *, columns: Sequence[str], tolerance_s: float, image_fps: float = IMAGE_FPS
) -> np.ndarray:
    """Values, float64 (T, columns), of the rows nearest to times, (T,) seconds since the first displayed frame.

    NaN where no row is within `tolerance_s`; half a tick leaves no frame between two rows out. Raises `SidecarError`
    where the table or a column is missing, a value is no number, the video has no such frame, or no row is near enough;
    `VideoError` where frames are counted, and the video cannot be opened.
    """
    path = table_beside(video)
    (clock, *_), rows = _read_table(video, columns)
    if clock == "frame":
        with open_video(video, damage := Damage(), image_fps) as decoder:  # headers lie about times and order
            shown_s = np.array([time_s for _, time_s in decoder])
        is_lost = damage.corrupt_frames > 0 or (decoder.at_image_fps and len(np.unique(np.diff(shown_s).round(6))) > 1)
        if is_lost or not all(reason.startswith(("ends", "times jump")) for reason in damage.breaks):
            lost = str(damage) or "images are missing"
            raise SidecarError(f"{path}: it counts frames, and {video.name} has lost some ({lost}): give time_s")
        unknown = rows[~np.isin(rows[:, 0], np.arange(len(shown_s))), 0]
        if len(unknown):
            raise SidecarError(
                f"{path}: there is no frame {unknown[0]:g} in {video.name}: it has {len(shown_s)}, counted from 0"
            )
        rows[:, 0] = shown_s[rows[:, 0].astype(int)]
    rows = rows[rows[:, 0].argsort(kind="stable")]
    if (twice := (np.diff(rows[:, 0]) == 0) & (np.diff(rows, axis=0) != 0).any(axis=1)).any():
        said = f"says several things of {rows[1:][twice][0, 0]:.3f} s in {video.name}"
        raise SidecarError(f"{path}: {said}: does its clock begin again? One table is of one recording")
    nearest = np.searchsorted((rows[1:, 0] + rows[:-1, 0]) / 2, times_s)  # by the middles between rows
    is_near = np.abs(rows[nearest, 0] - times_s) <= tolerance_s
    is_inside = np.abs(rows[:, 0] - (times_s.min() + times_s.max()) / 2) <= np.ptp(times_s) / 2 + tolerance_s
    if not is_near.any() or max(is_near.mean(), is_inside.mean()) < 0.05:  # both are few
        raise SidecarError(
            f"{path}: no row within {tolerance_s:.3f} s of {'most frames' if is_near.any() else 'any frame'}: its rows "
            f"are from {rows[0, 0]:.3f} to {rows[-1, 0]:.3f} s, frames {times_s.min():.3f} to {times_s.max():.3f} s"
        )
    return np.where(is_near[:, None], rows[nearest, 1:], np.nan)


def columns_beside(videos: Iterable[Path], patterns: Sequence[str]) -> tuple[str, ...]:
    """Columns of the first table that has all those, by name or pattern, that are asked for.

    Raises the first video's `SidecarError` where none has.
    """
    errors = []
    for video in videos:
        try:
            return _read_table(video, patterns)[0][1:]
        except SidecarError as error:
            errors.append(error)
    raise errors[0]


def _read_table(video: Path, patterns: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The column that says when and those that are asked for, and their rows, float64 (rows, 1 + columns)."""
    path = table_beside(video)
    try:
        if not os.path.lexists(path) and (table := read_table(video)):
            names, numbers = table
            chosen = ("time_s", *_chosen(patterns, names[1:]))
            return chosen, numbers[:, [names.index(name) for name in chosen]]
        if path.exists() and not path.is_file():
            raise OSError("it is no file")  # a pipe would be waited for
        # "-sig": spreadsheets put an invisible mark before the name of the first column.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            known = reader.fieldnames or []
            if other := len(known) == 1 and sorted({";", "\t"} & {*known[0]}):
                raise ValueError(f"its columns are parted by {other[-1]!r}: save it with commas, and points in numbers")
            if not (clock := next((name for name in ("time_s", "frame") if name in known), "")):
                raise ValueError(f"there is no column 'time_s' or 'frame' among {', '.join(known)}")
            values = [name for name in known if name not in ("time_s", "frame")]
            found = tuple(_chosen((clock, *patterns), values, known))
            rows = [
                [float(cell) for cell in (*map(row.get, found), *filter(None, row.get(None, ())))] for row in reader
            ]
        if {*map(len, rows)} != {len(found)} or not np.isfinite(rows).all():
            raise ValueError("it has no rows, a value that is not a number, or a row of more cells than columns")
    except (OSError, csv.Error, LookupError, TypeError, ValueError) as error:
        raise SidecarError(f"{path}: cannot be read as a table of numbers in UTF-8 ({error})") from error
    return found, np.array(rows)


def _chosen(patterns: Sequence[str], values: Sequence[str], known: Sequence[str] = ()) -> list[str]:
    """Columns among values by name or pattern, others by name. Raises `ValueError` where one is not there."""
    found = list[str]()
    for pattern in patterns:
        if not (names := matching(pattern, known if pattern in known else values)):
            raise ValueError(f"there is no column '{pattern}' among {', '.join(known or values)}")
        found += names
    if twice := [name for name in found if max(values.count(name), known.count(name)) > 1]:
        raise ValueError(f"there are several columns '{twice[0]}'")
    return list(dict.fromkeys(found))
