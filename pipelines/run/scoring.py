"""Scores how surprising each moment of the videos of a cache is."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.windows import Windows
from jepa.alarms import Event, Timeline
from jepa.calibration import Calibration
from jepa.metrics import change_cosine
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence
from pipelines.run.models import in_batches


@dataclass(frozen=True)
class Scores:
    """What was found in one video; arrays (N,), a value for each moment with enough past, in the order of time."""

    video: Path
    times_s: np.ndarray
    energies: np.ndarray
    percentiles: np.ndarray
    cosines: np.ndarray
    maps: np.ndarray
    """Energies of places (N, *tokens), each with its neighbours, where there are any."""
    level: float
    """Percentile of its ordinary level among ordinary videos."""
    reach_s: float
    """Seconds within which a peak is the highest."""

    @property
    def timeline(self) -> Timeline:
        """Energies and times."""
        return self.energies, self.times_s

    def as_text(self, place: int) -> list[str]:
        """Time in seconds, energy, percentile, change cosine and, of a grid, the highest cell, as tables have them."""
        values = (self.times_s, 3), (self.energies, 4), (self.percentiles, 1), (self.cosines, 3)
        cell = np.unravel_index(self.maps[place].argmax(), self.maps.shape[1:]) if self.maps.ndim > 1 else ()
        return [f"{value[place]:.{digits}f}" for value, digits in values] + [str(number) for number in cell]

    def event_as_text(self, event: Event) -> list[str]:
        """When it begins, ends and is highest, how high and, of a grid, the box of the cells that are half as high."""
        times = [f"{self.times_s[place]:.3f}" for place in event]
        box: list[int] = []
        if self.maps.ndim > 1:
            loudest = self.maps[event.first : event.last + 1].max(axis=0)
            cells = np.argwhere(loudest >= loudest.max() / 2)  # (cells, 2)
            box = [*cells.min(axis=0), *cells.max(axis=0)]
        return [*times, f"{self.energies[event.peak]:.4f}", *map(str, box)]

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


@torch.no_grad()
def score_videos(
    predictor: Predictor, calibration: Calibration, windows: Windows, horizons: tuple[int, ...]
) -> Iterator[Scores]:
    """The scores of each video, one after the other, in memory that does not depend on their number.

    From each past so much future is forecast as its window has; its moment lies in the middle of the horizons.
    """
    cache, device, context = windows.cache, predictor.mean.device, predictor.config.context
    ordinary, middle = calibration.ordinary(horizons), round(sum(horizons) / len(horizons))
    ahead, future = torch.tensor(horizons).to(device), Future.ticks(windows.length - context, predictor.fps)
    numbers = np.arange(len(windows))
    by_video = np.split(numbers, np.flatnonzero(np.diff(windows.video_of(numbers))) + 1)  # clips are in their order
    for chosen in tqdm(by_video, desc="scoring", unit="video", leave=False):
        rows = windows.rows(chosen)[:, context + middle - 1]
        times_s = cache.take(rows, "times_s")
        chosen, rows = (part[times_s.argsort(kind="stable")] for part in (chosen, rows))
        parts = []
        for _, embeddings in in_batches(windows, chosen, device):
            past, came = Sequence.on_clock(embeddings[:, :context], predictor.fps), embeddings[:, context:]
            believed = rollout(predictor, past, future, calibration=calibration)
            maps = calibration.energy_map(believed[:, ahead - 1], came[:, ahead - 1], ahead)
            at = slice(middle - 1, middle)
            expected, seen, last = map(predictor.standardise, (believed[:, at], came[:, at], past.embeddings[:, -1]))
            found = calibration.highest(maps, ahead).mean(dim=1), change_cosine(expected, seen, last)[:, 0]
            parts.append([part.cpu() for part in (*found, maps.mean(dim=1))])
        energies, cosines, maps = (torch.cat(part) for part in zip(*parts, strict=True))
        yield Scores(
            video=windows.videos(chosen)[0],
            times_s=cache.take(rows, "times_s"),
            energies=energies.double().numpy(),
            percentiles=ordinary.percentile(energies).numpy(),
            cosines=cosines.double().numpy(),
            maps=maps.numpy(),
            level=ordinary.level(energies.double()),
            reach_s=(windows.length - 1) / predictor.fps,
        )
