"""Scores how surprising each moment of a video is, in a cache or as it comes."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

from data.cache import EmbeddingCache
from data.picture import read_picture
from data.windows import Windows
from jepa.alarms import Event, Timeline
from jepa.calibration import Calibration, Ordinary
from jepa.metrics import change_cosine
from jepa.predictor import Predictor
from jepa.rivals import Rival, Rivals
from jepa.rollout import rollout
from jepa.sequence import Sequence
from pipelines.run.caches import MOST_NUMBERS, MOST_WINDOWS
from pipelines.run.command import require
from pipelines.run.models import in_batches, windows_for

DIGITS = {"time_s": 3, "energy": 4, "percentile": 1, "change_cosine": 3}
"""What is said of a moment, with how many decimals."""
SPAN = ("begin_s", "end_s", "peak_s", "energy")
PLACE, BOX = ("row", "column"), ("first_row", "first_column", "last_row", "last_column")
"""What is said of an event and, of a grid, of the highest cell and of the box around an event's."""


@dataclass(frozen=True)
class Scorer:
    """How surprising a moment is, from the embeddings around it.

    From each past so much future is forecast as the farthest horizon needs; the moment lies in the middle of them.
    """

    predictor: Predictor
    calibration: Calibration
    horizons: tuple[int, ...]
    ignored: Tensor | None = None
    """Places that count for nothing, bool (*tokens): their neighbours' forecasts see the mean there, always."""
    smoothing_s: float = 0.0
    """Seconds up to a moment that its energy is the mean of; percentile, cosine and places are the moment's own."""

    @property
    def length(self) -> int:
        """Embeddings that it takes."""
        return self.predictor.config.context + max(self.horizons)

    @property
    def moment(self) -> int:
        """Which of them is the moment's."""
        return self.predictor.config.context + round(sum(self.horizons) / len(self.horizons)) - 1

    @cached_property
    def ordinary(self) -> Ordinary:
        """What is ordinary of its energies."""
        return self.calibration.ordinary(self.horizons)

    @torch.no_grad()
    def __call__(self, windows: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Energies (B,), change cosines (B,) and energies of places (B, *tokens) of windows (B, length)."""
        predictor, context = self.predictor, self.predictor.config.context
        ahead = torch.tensor(self.horizons).to(windows.embeddings.device)
        if self.ignored is not None:
            seen = torch.where(self.ignored[..., None], predictor.mean, windows.embeddings)
            windows = replace(windows, embeddings=seen)
        past, future, came = windows.cut(context, predictor.fps)
        believed = rollout(predictor, past, future, calibration=self.calibration)
        maps = self.calibration.energy_map(believed[:, ahead - 1], came[:, ahead - 1], ahead, self.ignored)
        at = slice(self.moment - context, self.moment - context + 1)
        expected, seen, last = map(predictor.standardise, (believed[:, at], came[:, at], past.embeddings[:, -1]))
        energies = self.calibration.of_moments(maps, ahead).mean(dim=1)
        return energies, change_cosine(expected, seen, last)[:, 0], maps.mean(dim=1)


def box_of(loudest: np.ndarray) -> list[int]:
    """First row and column, and last ones, of the cells (*tokens) that are half as high as the highest."""
    cells = np.argwhere(loudest >= loudest.max() / 2)  # (cells, 2)
    return [int(side) for side in (*cells.min(axis=0), *cells.max(axis=0))]


@dataclass(frozen=True)
class Scores:
    """What was found in one video; arrays (N,), a value for each moment with enough past, in the order of time."""

    video: Path
    times_s: np.ndarray
    energies: np.ndarray
    percentiles: np.ndarray
    cosines: np.ndarray
    maps: np.ndarray
    """Energies of places (N, *tokens), where there are any."""
    level: float
    """Percentile of its ordinary level among ordinary videos."""
    reach_s: float
    """Seconds within which a peak is the highest."""
    beside: dict[str, np.ndarray] = field(default_factory=dict)
    """Simple scores and columns of the cache by name, (N,) each."""

    @property
    def timeline(self) -> Timeline:
        """Energies and times."""
        return self.energies, self.times_s

    def as_text(self, place: int) -> list[str]:
        """Time in seconds, energy, percentile, change cosine and, of a grid, the highest cell, as tables have them."""
        values = zip((self.times_s, self.energies, self.percentiles, self.cosines), DIGITS.values(), strict=True)
        cell = np.unravel_index(self.maps[place].argmax(), self.maps.shape[1:]) if self.maps.ndim > 1 else ()
        return [*(f"{value[place]:.{digits}f}" for value, digits in values), *map(str, cell)]

    def event_as_text(self, event: Event) -> list[str]:
        """When it begins, ends and is highest, how high and, of a grid, the box of the cells that are half as high."""
        times, stretch = [f"{moment.time_s:.3f}" for moment in event], slice(event.first.place, event.last.place + 1)
        box = box_of(self.maps[stretch].max(axis=0)) if self.maps.ndim > 1 else []
        return [*times, f"{event.peak.energy:.4f}", *map(str, box)]

    def peaks(self, most: int) -> list[int]:
        """Moments of more energy than all within `reach_s`, the most surprising first.

        So long after an event a frame may be forecast from a past that it is part of, and echo it.
        """
        far_s, found = self.reach_s + 1e-3, list[int]()
        begins, ends = (self.times_s.searchsorted(self.times_s + shift_s) for shift_s in (-far_s, far_s))
        for place in np.argsort(-self.energies, kind="stable").tolist():
            if len(found) == most:
                break
            if self.energies[place] >= self.energies[begins[place] : ends[place]].max():
                found.append(place)
        return found


def score_videos(
    scorer: Scorer, windows: Windows, rivals: Rivals | None = None, *, columns: dict[str, str] | None = None
) -> Iterator[Scores]:
    """The scores of each video, one after the other, in memory that does not depend on their number.

    Beside them are those of rivals, and columns of the cache by what they are called there.
    """
    cache, device = windows.cache, scorer.predictor.mean.device
    numbers = np.arange(len(windows))
    by_video = np.split(numbers, np.flatnonzero(np.diff(windows.video_of(numbers))) + 1)  # clips are in their order
    for chosen in tqdm(by_video, desc="scoring", unit="video", leave=False):
        rows = windows.rows(chosen)[:, scorer.moment]
        times_s = cache.take(rows, "times_s")
        chosen, rows, times_s = (part[times_s.argsort(kind="stable")] for part in (chosen, rows, times_s))
        parts = []
        for _, taken in in_batches(windows, chosen, device):
            simple = rivals(scorer.predictor.standardise(taken.embeddings)) if rivals else {}
            parts.append([part.cpu() for part in (*scorer(taken), *simple.values())])
        energies, cosines, maps, *others = (torch.cat(part) for part in zip(*parts, strict=True))
        named = zip(rivals.names if rivals else (), others, strict=True)
        beside = {name: trailing_mean(value.numpy(), times_s, scorer.smoothing_s) for name, value in named}
        yield Scores(
            windows.videos(chosen)[0], times_s, trailing_mean(energies.double().numpy(), times_s, scorer.smoothing_s),
            percentiles=scorer.ordinary.percentile(energies).numpy(), cosines=cosines.double().numpy(),
            maps=maps.numpy(), level=scorer.ordinary.level(energies.double()),
            reach_s=(windows.length - 1) / scorer.predictor.fps + scorer.smoothing_s,
            beside=beside | {shown: cache.take(rows, name) for shown, name in (columns or {}).items()},
        )  # fmt: skip


def trailing_mean(values: np.ndarray, times_s: np.ndarray, seconds: float) -> np.ndarray:
    """The mean of the values (N,) of so many seconds up to each, itself included; times ascend."""
    ends = np.arange(1, len(values) + 1)
    begins = np.minimum(times_s.searchsorted(times_s - seconds + 1e-3), ends - 1)
    sums = np.concatenate([np.zeros(1), values.cumsum(dtype=np.float64)])
    return (sums[ends] - sums[begins]) / (ends - begins)


def fit_rivals(names: tuple[Rival, ...], scorer: Scorer, ordinary: EmbeddingCache) -> Rivals:
    """Simple scores, by what is usual in a cache of ordinary videos."""
    windows, predictor = windows_for(ordinary, scorer.predictor, scorer.length), scorer.predictor
    numbers = windows.length * int(np.prod(predictor.shape))
    chosen = windows.evenly(min(MOST_WINDOWS, max(64, MOST_NUMBERS // numbers)))
    parts = [predictor.standardise(taken.embeddings) for _, taken in in_batches(windows, chosen, predictor.mean.device)]
    context = predictor.config.context
    return Rivals(names, torch.cat(parts), context=context, ahead=scorer.horizons, ignored=scorer.ignored)


def ignored_places(picture: Path, predictor: Predictor) -> Tensor:
    """Places of a grid, bool (rows, columns), that are white in a picture of the whole frame for the most part.

    Raises `VideoError` where it cannot be read, `UserError` where it leaves nothing or all, or there are no places.
    """
    require(len(predictor.shape) == 3, f"--ignore-region {picture}: embeddings without places have no region to ignore")
    rows, columns = predictor.shape[:2]
    white = read_picture(picture, "--ignore-region").mean(axis=2) > 127  # (height, width)
    height, width = white.shape
    said = f"--ignore-region {picture}: {height} x {width} pixels"
    is_enough = height >= rows and width >= columns
    require(is_enough, f"{said} are fewer than the {rows} x {columns} places: draw on a frame")
    ignored = adaptive_avg_pool2d(torch.from_numpy(white)[None].float(), (rows, columns))[0] > 0.5
    share = f"cover {int(ignored.sum())} of {ignored.numel()} places for the most part"
    require(0 < int(ignored.sum()) < ignored.numel(), f"{said} {share}: white is what is ignored")
    return ignored.to(predictor.mean.device)
