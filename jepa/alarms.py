"""Alarms: events above a threshold that ordinary video passes as rarely as is asked."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RELEASE = 0.8
"""Share of the threshold below which an event ends (hysteresis)."""
PATIENCE_S = 1.0
"""Seconds for which it may be quieter and go on."""
CERTAINTY = 0.95

Timeline = tuple[np.ndarray, np.ndarray]
"""Energies of the moments of a video and their times in seconds, ascending, (N,) each."""


class Event(NamedTuple):
    """Moments that belong together, by their places in a timeline."""

    first: int
    last: int
    peak: int


class Alarm(NamedTuple):
    """A threshold, and the ordinary video that it was chosen on."""

    threshold: float
    events: int
    """Events in that video."""
    hours: float

    def expected(self, hours: float) -> tuple[int, int]:
        """How many false alarms so many hours of ordinary video will have, in 95 of 100 cases: least and most.

        The threshold is the peak of one of the ordinary events; how many others pass it is negative binomial, as long
        as events come independently and new video is like that one.
        """
        tail = (1 - CERTAINTY) / 2
        low, high = stats.nbinom.ppf([tail, 1 - tail], self.events, self.hours / (self.hours + hours))
        return int(low), int(high)


def find_events(timeline: Timeline, threshold: float) -> list[Event]:
    """Events of a video in the order of time: they begin above the threshold, and end when it is quiet for a while."""
    energies, times_s = timeline
    loud = np.flatnonzero(energies >= RELEASE * threshold)
    stretches = np.split(loud, np.flatnonzero(np.diff(times_s[loud]) > PATIENCE_S) + 1) if len(loud) else []
    peaks = [part[energies[part].argmax()] for part in stretches]
    events = [Event(int(part[0]), int(part[-1]), int(peak)) for part, peak in zip(stretches, peaks, strict=True)]
    return [event for event in events if energies[event.peak] >= threshold]


def hours_of(timelines: Sequence[Timeline]) -> float:
    """Hours that are watched, gaps left out."""
    steps_s = np.concatenate([np.diff(times_s) for _, times_s in timelines])
    return float(steps_s[steps_s <= PATIENCE_S].sum() / 3600)


def choose_threshold(timelines: Sequence[Timeline], per_hour: float) -> Alarm:
    """The lowest threshold at which ordinary videos have at most so many events an hour, and at least one.

    Raises:
        ValueError: there is too little video for that rate; the message says how much it takes.
    """
    hours = hours_of(timelines)
    allowed = int(per_hour * hours)
    if allowed < 1:
        raise ValueError(
            f"{60 * hours:.1f} minutes of ordinary video say nothing of {per_hour:g} alarms an hour: bring at least "
            f"{60 / per_hour:.0f} minutes, or allow at least {1 / max(hours, 1e-9):.0f} an hour"
        )

    def events_at(threshold: float) -> int:
        return sum(len(find_events(timeline, threshold)) for timeline in timelines)

    candidates = np.unique(np.concatenate([energies for energies, _ in timelines]))  # ascending
    low, high = 0, len(candidates) - 1  # at the highest there is one event
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if events_at(candidates[middle]) <= allowed else (middle + 1, high)
    return Alarm(float(candidates[low]), events_at(candidates[low]), hours)
