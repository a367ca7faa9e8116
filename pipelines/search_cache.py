r"""Search in a cache: what is like a moment, which videos are the same, and what is like nothing else.

  video-jepa search neighbours --of VIDEO.mp4@12.5 --cache cache/train
  video-jepa search duplicates --cache cache/train
  video-jepa search outliers --cache cache/train

Leaves `found.csv`, the first the nearest, the surest or the farthest, and `found.png`, the frames of its first lines.
neighbours: the embedding nearest to that of a moment, of each other video. duplicates: pairs of videos with most frames
of the shorter one nearest to the other's at one shift in time, be they encoded anew, cut, or cropped a little; `score`
is their share. outliers: the moment of each video that is farthest from all others. Distances are Euclidean, each
feature in units of its standard deviation, of duplicates around each video's mean; all is compared with all.
"""

import csv
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from tyro.conf import Positional

from data.cache import EmbeddingCache
from data.errors import DataError, printable
from data.frames import fitting_size, read_frames
from jepa.config import Bounded
from pipelines.run.caches import clips_in_short
from pipelines.run.command import UserError, counted, require, run_command
from pipelines.run.folder import RunFolder
from pipelines.run.searching import Search

FEW, FEWER = 8, 2
"""Neighbours in other videos that are asked for, of outliers and of duplicates."""
LEAST_SHARE, LEAST_FRAMES = 0.5, 5
"""Of the shorter of two videos, so many frames, and so large a share of them, make a duplicate."""
SHOWN, THUMBNAIL = 40, 128
"""Lines on the sheet, and the longer side of a frame there in pixels."""

Found = tuple[np.ndarray, np.ndarray]
"""Scores (N,), the first the nearest, surest or farthest, and rows (N, M) whose frames show each."""


@dataclass(frozen=True)
class Options(Bounded):
    """Search in a cache."""

    what: Positional[Literal["neighbours", "duplicates", "outliers"]]
    """What is looked for."""
    cache: Path = Path("cache/train")
    """Embeddings that are searched."""
    of: str = ""
    """VIDEO@SECONDS, a moment of a video in the cache, the end of whose path is enough; for neighbours."""
    output_dir: Path | None = None
    """Where the list and the sheet are left. None: runs/ and what is looked for."""
    overwrite: bool = False
    """Replace the list in the output folder."""


def main(options: Options) -> None:
    """Search, list, show."""
    require((options.what == "neighbours") == bool(options.of), "--of VIDEO@SECONDS belongs to neighbours")
    folder = options.output_dir or Path("runs", options.what)
    options = replace(options, output_dir=folder)
    output, cache = RunFolder(options, "search_cache", ("found.csv", "found.png")), EmbeddingCache(options.cache)
    search = Search.within(cache)
    require(search.videos[-1] > 0, f"{cache.folder} holds one video, and others are searched: cache more")
    looking = {"duplicates": duplicates, "outliers": outliers}
    scores, rows = neighbours(search, find_row(cache, options.of)) if options.of else looking[options.what](search)
    output.begin({"provenance": cache.provenance, "clips": clips_in_short(cache)})
    lines = [["score", "video", "time_s", "other_video", "other_time_s"][: 1 + 2 * rows.shape[1]]]
    for score, line in zip(scores.tolist(), rows, strict=True):
        videos = [cache.clips[clip].key.source for clip in cache.clip_of(line)]
        moments = zip(videos, cache.take(line, "times_s").tolist(), strict=True)
        lines.append([f"{score:.4f}", *(text for video, at_s in moments for text in (printable(video), f"{at_s:.3f}"))])
    with (folder / "found.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    if len(rows):
        show(cache, rows[:SHOWN], folder / "found.png")
    output.finish({"found": len(scores)})
    print("\n".join("  " + ", ".join(line) for line in lines[1:6]))
    shown = ", and found.png, the first of them" if len(scores) else ": none is found"
    print(f"wrote {folder}/found.csv, {counted(len(scores), 'line')}{shown}")


def find_row(cache: EmbeddingCache, moment: str) -> int:
    """The row nearest to VIDEO@SECONDS. Raises `UserError`."""
    name, _, seconds = moment.rpartition("@")
    clips = [clip for clip in cache.clips if f"/{clip.key.source}".endswith(f"/{name.lstrip('/')}")]
    try:
        rows = np.concatenate([clip.rows for clip in clips])
        away_s = np.abs(cache.take(rows, "times_s") - float(seconds))
        return int(rows[np.nanargmin(np.where(away_s <= 1 / cache.provenance.fps, away_s, np.nan))])
    except ValueError as error:
        known = f"{cache.clips[0].key.source}@{cache.take(cache.rows[:1], 'times_s')[0]:.2f}"
        raise UserError(f"--of {moment} is no moment of a video in {cache.folder}: write such as {known}") from error


def best_of_each(search: Search, scores: np.ndarray) -> np.ndarray:
    """Places of the highest score of each video, the highest first, where scores (N,) are finite."""
    order = np.lexsort((-scores, search.videos))
    chosen = order[np.unique(search.videos[order], return_index=True)[1]]
    return chosen[np.argsort(-scores[chosen], kind="stable")][: np.isfinite(scores[chosen]).sum()]


def neighbours(search: Search, row: int) -> Found:
    """The nearest embedding of each other video, after the moment itself."""
    moment = search.standardise(torch.from_numpy(search.cache.take(np.array([row]))))
    distances = np.concatenate([torch.cdist(moment, block)[0].numpy() for block, _, _ in search.blocks("searching")])
    distances[search.videos == search.videos[search.rows == row]] = np.inf
    found = best_of_each(search, -distances)
    return distances[found], np.stack([np.full(len(found), row), search.rows[found]], axis=1)


def outliers(search: Search) -> Found:
    """Of each video the moment that is farthest from the nearest of other videos, the last of a few."""
    far = [np.where(rows < 0, -np.inf, distances).max(axis=1) for _, distances, rows in search.to_others(FEW)]
    found = best_of_each(search, scores := np.concatenate(far))
    return scores[found], search.rows[found, None]


def duplicates(search: Search) -> Found:
    """Pairs of videos with most frames of the shorter one among the nearest of the other's, at one shift in time.

    Around each video's mean: what is cropped, or encoded worse, is so in all frames alike.
    """
    search.centre()
    fps, frames, rows = search.cache.provenance.fps, np.bincount(search.videos), search.rows
    place = np.zeros(rows.max() + 1, int)
    place[rows] = np.arange(len(rows))
    times_s, votes = search.cache.take(rows, "times_s"), Counter[tuple[int, int, int]]()
    for part, _, near in search.to_others(FEWER):
        query, rank = np.nonzero(near >= 0)
        one, other = part[query], place[near[query, rank]]
        shift = np.rint((times_s[other] - times_s[one]) * fps).astype(int)
        # Ticks of the one may lie between those of the other: a frame has a say about the shifts around, once for each.
        said = [np.stack([search.videos[one], search.videos[other], shift + more, one], axis=1) for more in (-1, 0, 1)]
        keys, counts = np.unique(np.unique(np.concatenate(said), axis=0)[:, :3], axis=0, return_counts=True)
        votes.update(dict(zip(map(tuple, keys[counts > 1].tolist()), counts[counts > 1].tolist(), strict=True)))
    found = dict[frozenset[int], tuple[float, list[int]]]()
    for (first, second, shift), count in votes.items():
        share, pair = min(1.0, count / min(frames[first], frames[second])), frozenset((first, second))
        if count >= LEAST_FRAMES and share >= max(LEAST_SHARE, found.get(pair, (0.0, []))[0]):
            ours, theirs = (np.flatnonzero(search.videos == video) for video in (first, second))
            at = ours[np.abs(times_s[ours] + shift / fps - times_s[theirs].mean()).argmin()]
            meets = theirs[np.abs(times_s[theirs] - times_s[at] - shift / fps).argmin()]
            found[pair] = share, [rows[at], rows[meets]]
    best = sorted(found.values(), key=lambda one: -one[0])
    return np.array([share for share, _ in best]), np.array([pair for _, pair in best], int).reshape(-1, 2)


def show(cache: EmbeddingCache, rows: np.ndarray, path: Path) -> None:
    """The frames of each line, rows (N, M), side by side, two lines beside each other."""
    rows = np.concatenate([rows, rows[len(rows) - len(rows) % 2 :]])  # the last one twice, if they are odd
    try:
        first = Path(cache.clips[cache.clip_of(rows[0])[0]].key.source)
        size = fitting_size(first, cache.provenance, (THUMBNAIL, THUMBNAIL))
        frames = read_frames(cache, rows, size, keep_shape=True)
    except (DataError, OSError) as error:  # the list is there, all the same
        print(printable(f"no pictures: {error}"))
    else:
        Image.fromarray(rearrange(frames, "(n two) m c h w -> (n h) (two m w) c", two=2)).save(path)


if __name__ == "__main__":
    run_command(main, Options)
