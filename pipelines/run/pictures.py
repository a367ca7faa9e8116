"""Pictures of what is surprising in a video: its curves, and its peaks among the frames around them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.cache import EmbeddingCache
from pipelines.run.stills import read_pictures

SHOWN_FRAMES, HEIGHT = 5, 120
"""Frames shown of a peak, itself in the middle; and their height in pixels."""
CURVE_POINTS, SPANS = 4000, 60
"""Points of a curve, and spans whose mean change cosine is shown, at most."""


@dataclass(frozen=True)
class Scores:
    """What was found in one video; arrays (N,), a value for each frame with enough past."""

    video: Path
    rows: np.ndarray
    """int64, rows in the cache."""
    ticks: np.ndarray
    times_s: np.ndarray
    energies: np.ndarray
    percentiles: np.ndarray
    cosines: np.ndarray
    level: float
    """Percentile of its ordinary level among ordinary videos."""
    reach: int
    """Ticks within which a peak is the highest."""

    def as_text(self, place: int) -> list[str]:
        """Time in seconds, energy, percentile and change cosine as tables have them."""
        values = (self.times_s, 3), (self.energies, 4), (self.percentiles, 1), (self.cosines, 3)
        return [f"{value[place]:.{digits}f}" for value, digits in values]


def draw_surprise(scores: Scores, peaks: Sequence[int], path: Path) -> None:
    """Energy over time, the peaks marked, and the mean change cosine of each span below."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    draw_energy(scores, peaks, upper)
    upper.set_title(plain(scores.video), fontsize=9)
    parts = np.array_split(np.arange(len(scores.rows)), min(SPANS, len(scores.rows)))
    lower.axhline(0, color="0.6", linewidth=1, linestyle="--")
    lower.plot([scores.times_s[part].mean() for part in parts], [scores.cosines[part].mean() for part in parts], ".-")
    lower.set_ylim(-1, 1)
    lower.set_ylabel("change cosine")
    lower.set_xlabel("time in seconds")
    figure.savefig(path, dpi=120)


def draw_energy(scores: Scores, peaks: Sequence[int], axes: Axes) -> None:
    """Energy over time; of a long video the highest of neighbours."""
    pool = -(-len(scores.rows) // CURVE_POINTS)
    starts = np.arange(0, len(scores.rows), pool)
    axes.plot(scores.times_s[starts], np.maximum.reduceat(scores.energies, starts), linewidth=1)
    axes.axhline(1, color="0.6", linewidth=1, linestyle="--", label="mean of ordinary video")
    axes.plot(scores.times_s[list(peaks)], scores.energies[list(peaks)], "o", color="C3", markersize=4)
    axes.set_ylim(0, 1.25 * max(1.0, float(scores.energies.max())))  # room for the legend
    axes.set_ylabel("energy")
    axes.legend(frameon=False, loc="upper right")


def draw_peaks(scores: Scores, peaks: Sequence[int], cache: EmbeddingCache, path: Path) -> None:
    """A contact sheet: a row for each peak, the most surprising one first, its frames in the order of time.

    Raises:
        VideoError: the video is gone, or cannot be decoded any more.
    """
    beside = np.arange(SHOWN_FRAMES) - SHOWN_FRAMES // 2
    around = [np.unique((peak + beside).clip(0, len(scores.rows) - 1)) for peak in peaks]
    frames = iter(read_pictures(cache, scores.rows[np.concatenate(around)], height=HEIGHT))
    figure = Figure(figsize=(9, 0.4 + 1.9 * len(peaks)), layout="constrained")
    figure.suptitle(plain(scores.video), fontsize=9)
    for row, peak, places in zip(figure.subplots(len(peaks), SHOWN_FRAMES, squeeze=False), peaks, around, strict=True):
        for axes in row[len(places) :]:
            axes.set_axis_off()
        for axes, place in zip(row, places.tolist(), strict=False):
            draw_frame(next(frames), axes, caption=caption(scores, place), is_peak=place == peak)
    figure.savefig(path, dpi=120)


def draw_frame(frame: np.ndarray, axes: Axes, *, caption: str, is_peak: bool) -> None:
    """A frame uint8 (H, W, 3) and what is known of it; a peak is framed."""
    axes.imshow(frame)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(caption, fontsize=8)
    axes.spines[:].set(visible=is_peak, color="C3", linewidth=3)


def caption(scores: Scores, place: int) -> str:
    """Time, energy and percentile of a frame."""
    energy, percentile = scores.energies[place], scores.percentiles[place]
    return f"{scores.times_s[place]:.3f} s\nenergy {energy:.1f}, percentile {percentile:.1f}"


def plain(video: Path) -> str:
    """A path as a title: no mathematics, no control characters."""
    text = str(video).encode(errors="backslashreplace").decode()
    return "".join(letter if letter.isprintable() else "?" for letter in text).replace("$", r"\$")
