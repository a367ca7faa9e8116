"""Data sets in LeRobot's layout, v2.1 and v3: tables of what was done, and where episodes begin, beside their videos.

A set has `meta/info.json`. In v2.1 an episode has a table (parquet) and, for each camera, a video; in v3 tables and
videos hold several episodes, and `meta/episodes` says from when to when. Numbers of the table are columns, a list of
them `action_0`, `action_1`, ... A row belongs to the frame of its `frame_index`: the table's own `timestamp` may be the
recorder's clock, by which the video was not written.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.decoder import Damage
from data.errors import DataError
from data.files import read_json
from data.video import open_video

INFO = Path("meta", "info.json")


class DataSetError(DataError):
    """A data set that cannot be read; the message names it and the reason."""


class Episode(NamedTuple):
    """An episode in a video: its number, its table, and from when to when it is shown."""

    number: int
    table: Path
    begin_s: float
    end_s: float


def find_set(video: Path) -> Path | None:
    """The folder of the data set that a video is in, if any."""
    for folder in video.absolute().parents:
        if (folder / INFO).is_file() and (folder / "videos") in video.absolute().parents:
            return folder
    return None


def episodes_in(video: Path) -> list[Episode]:
    """Episodes of a video in the order of time; none if it is in no data set. Raises `DataSetError`."""
    root = find_set(video)
    if root is None:
        return []
    here = video.absolute().relative_to(root).as_posix()
    return sorted((episode for path, episode in _promised(root)[1] if path == here), key=lambda one: one.begin_s)


def read_table(video: Path) -> tuple[list[str], np.ndarray] | None:
    """Names and values, float64 (rows, 1 + columns), first `time_s` in the video; None if it is in no data set.

    Raises `DataSetError`, or `OSError` or `ValueError` where a table is missing or damaged, or longer than its episode.
    """
    root, names, parts = find_set(video), list[str](), list[np.ndarray]()
    if root is None:
        return None
    fps = _promised(root)[0]
    with open_video(video, Damage(), fps) as decoder:
        if not 0.98 < decoder.average_fps / fps < 1.02:
            raise ValueError(f"{root / INFO} says {fps:g} frames a second, and the video {decoder.average_fps:g}")
    for episode in episodes_in(video):
        names, values = _read_numbers(episode.table, episode.number)
        times_s = episode.begin_s + values[:, names.index("frame_index"), None] / fps
        if len(times_s) == 0 or times_s.max() > episode.end_s - 0.5 / fps:
            raise ValueError(f"{episode.table}: episode {episode.number} has {len(values)} rows, not one a frame")
        parts.append(np.concatenate([times_s, values], axis=1))
    if not parts:
        raise ValueError(f"{root / INFO} knows no episode of {video.name}")
    return ["time_s", *names], np.concatenate(parts)


def missing_files(videos: Iterable[Path]) -> list[Path]:
    """Videos and tables that the data sets of some videos promise, and that are not there. Raises `DataSetError`."""
    roots = dict.fromkeys(filter(None, map(find_set, videos)))
    promised = [file for root in roots for path, one in _promised(root)[1] for file in (root / path, one.table)]
    return [path for path in dict.fromkeys(promised) if not path.exists()]


@cache
def _promised(root: Path) -> tuple[float, list[tuple[str, Episode]]]:
    """Frames a second of a data set, and each episode of each camera with the path of its video in it."""
    try:
        info = read_json(root / INFO)
        if not 0 < info["fps"] < 1e6 or re.search(r":[^}]*(\d{4}|{)", f"{info['data_path']}{info['video_path']}"):
            raise ValueError(f"fps {info['fps']} is none, or its paths are filled up to more than a name's length")
        episodes = list(_all_episodes(root, info))
        for path, episode in episodes:
            if ".." in Path(path).parts + episode.table.parts or not episode.table.is_relative_to(root):
                raise ValueError(f"{path} or {episode.table} leads out of it")
        return float(info["fps"]), episodes
    except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise DataSetError(f"{root}: cannot be read as a LeRobot data set ({error!r})") from error


def _all_episodes(root: Path, info: dict[str, Any]) -> Iterator[tuple[str, Episode]]:
    """Each episode of each camera, and the path of its video in the data set."""
    cameras = [name for name, feature in info["features"].items() if feature.get("dtype") == "video"]
    if (listed := root / "meta" / "episodes.jsonl").is_file():
        for line in listed.read_text().splitlines():
            row = json.loads(line)
            index, chunk = row["episode_index"], row["episode_index"] // info.get("chunks_size", 1000)
            at = {"episode_index": index, "episode_chunk": chunk, "chunk_index": chunk}
            episode = Episode(index, root / info["data_path"].format(**at), 0.0, row["length"] / info["fps"])
            yield from ((info["video_path"].format(video_key=camera, **at), episode) for camera in cameras)
        return
    for path in sorted((root / "meta" / "episodes").rglob("*.parquet")):
        for row in _parquet(path).to_pylist():
            at = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
            for camera in cameras:
                own = f"videos/{camera}/"
                of = {name.removeprefix(own): value for name, value in row.items() if name.startswith(own)}
                video = info["video_path"].format(video_key=camera, **of)
                table = root / info["data_path"].format(**at)
                yield video, Episode(row["episode_index"], table, of["from_timestamp"], of["to_timestamp"])


def _read_numbers(path: Path, episode: int) -> tuple[list[str], np.ndarray]:
    """Columns of numbers of an episode in the order of time, lists flattened."""
    table, found = _parquet(path), list[tuple[str, np.ndarray]]()
    chosen = np.flatnonzero(table["episode_index"].to_numpy() == episode)
    chosen = chosen[np.argsort(table["frame_index"].to_numpy()[chosen], kind="stable")]
    for name in table.column_names:
        if not re.match(r"(.*list|int|uint|.*float|double)", str(table.schema.field(name).type)):
            continue
        with suppress(TypeError, ValueError):  # lists of several lengths, or of words
            values = np.array(table[name].to_pylist(), dtype=np.float64)[chosen]
            columns = values.T if values.ndim == 2 else [values] * (values.ndim == 1)
            found += [(f"{name}_{n}" if values.ndim == 2 else name, column) for n, column in enumerate(columns)]
    return [name for name, _ in found], np.stack([column for _, column in found], axis=1)


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("LeRobot's tables take pyarrow: pip install 'video-jepa[parquet]'") from error
    return pyarrow.parquet.read_table(path)
