"""Pictures of what is surprising in a video: its curves, and its peaks among the frames around them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.cache import Provenance
from data.frames import read_again
from data.video import probe_video
from pipelines.run.files import SIGNED
from pipelines.run.scoring import Scores

SHOWN_FRAMES = 5
"""Frames shown of a peak, itself in the middle."""
CURVE_POINTS, SPANS = 4000, 60
"""Points of a curve, and spans whose mean change cosine is shown, at most."""


def draw_surprise(scores: Scores, peaks: Sequence[int], path: Path) -> None:
    """Energy over time, the peaks marked, and the mean change cosine of each span below."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    draw_energy(scores, peaks, upper)
    upper.set_title(plain(str(scores.video)), fontsize=9, parse_math=False)
    parts = np.array_split(np.arange(len(scores.times_s)), min(SPANS, len(scores.times_s)))
    lower.axhline(0, color="0.6", linewidth=1, linestyle="--")
    lower.plot([scores.times_s[part].mean() for part in parts], [scores.cosines[part].mean() for part in parts], ".-")
    lower.set_ylim(-1, 1)
    lower.set_ylabel("change cosine")
    lower.set_xlabel("time in seconds")
    figure.savefig(path, dpi=120, metadata=SIGNED)


def draw_energy(scores: Scores, peaks: Sequence[int], axes: Axes) -> None:
    """Energy over time; of a long video the highest of neighbours."""
    starts = np.arange(0, len(scores.times_s), -(-len(scores.times_s) // CURVE_POINTS))
    axes.plot(scores.times_s[starts], np.maximum.reduceat(scores.energies, starts), linewidth=1)
    axes.axhline(1, color="0.6", linewidth=1, linestyle="--", label="mean of ordinary video")
    axes.plot(scores.times_s[list(peaks)], scores.energies[list(peaks)], "o", color="C3", markersize=4)
    axes.set_ylim(0, 1.25 * max(1.0, float(scores.energies.max())))  # room for the legend
    axes.set_ylabel("energy")
    axes.legend(frameon=False, loc="upper right")


def draw_peaks(scores: Scores, peaks: Sequence[int], provenance: Provenance, path: Path) -> None:
    """A contact sheet: a row for each peak, the most surprising one first, its frames in the order of time.

    Raises:
        VideoError: the video is gone, or cannot be decoded any more.
    """
    starts = (np.array(peaks) - SHOWN_FRAMES // 2).clip(0, max(0, len(scores.times_s) - SHOWN_FRAMES))
    around = np.add.outer(starts, np.arange(SHOWN_FRAMES)).clip(max=len(scores.times_s) - 1).ravel()
    frames = read_pictures(scores.video, scores.times_s[around], provenance)
    figure = Figure(figsize=(9, 0.4 + 1.9 * len(peaks)), layout="constrained")
    figure.suptitle(plain(str(scores.video)), fontsize=9, parse_math=False)
    grid = figure.subplots(len(peaks), SHOWN_FRAMES, squeeze=False)
    for axes, frame, place in zip(grid.flat, frames, around.tolist(), strict=True):
        draw_frame(frame, scores, place, axes, is_peak=place in peaks)
    figure.savefig(path, dpi=120, metadata=SIGNED)


def draw_frame(frame: np.ndarray, scores: Scores, place: int, axes: Axes, *, is_peak: bool) -> None:
    """A frame uint8 (H, W, 3) and what is known of it; a peak is framed."""
    height, width, _ = frame.shape
    axes.imshow(frame)
    if scores.maps.ndim > 1:  # around what is half, and three quarters, as surprising as the video ever is
        rows, columns = scores.maps.shape[1:]
        x, y = ((np.arange(cells) + 0.5) * side / cells for cells, side in ((columns, width), (rows, height)))
        share = scores.maps[place] / scores.maps.max()
        axes.contour(x, y, share, levels=[0.5, 0.75], colors=["gold", "red"], linewidths=1.2)
    axes.set_xticks([])
    axes.set_yticks([])
    energy, percentile = scores.energies[place], scores.percentiles[place]
    text = f"{scores.times_s[place]:.3f} s\nenergy {energy:.1f}, percentile {percentile:.1f}"
    axes.set_xlabel(text, fontsize=8)
    axes.spines[:].set(visible=is_peak, color="C3", linewidth=3)


def plain(text: str) -> str:
    """A text without what cannot be printed, such as line ends and bytes that are no letters."""
    return "".join(letter if letter.isprintable() else "_" for letter in text)


def read_pictures(video: Path, times_s: np.ndarray, provenance: Provenance, *, height: int = 144) -> np.ndarray:
    """The frames behind embeddings of a video, whose width follows its shape, uint8 (T, height, width, 3).

    Raises:
        VideoError: the video is gone, cannot be decoded, or has no frame there any more.
    """
    shape = probe_video(video, provenance.image_fps)
    size = (height, max(1, round(height * shape.width / shape.height)))
    return read_again(video, times_s, size, provenance).transpose(0, 2, 3, 1)
