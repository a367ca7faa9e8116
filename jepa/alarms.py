"""Alarms: events above a threshold that ordinary video passes as rarely as is asked."""

from collections.abc import Iterable, Iterator, Sequence
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


class Moment(NamedTuple):
    """A moment of a video, how surprising it was, and its place in the timeline."""

    energy: float
    time_s: float
    place: int


class Event(NamedTuple):
    """Moments that belong together."""

    first: Moment
    last: Moment
    peak: Moment


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
    moments = map(Moment, energies[loud].tolist(), times_s[loud].tolist(), loud.tolist())
    stretches = {stretch.first: stretch for stretch in follow_events(moments, threshold) if stretch}
    return [stretch for stretch in stretches.values() if stretch.peak.energy >= threshold]


def follow_events(moments: Iterable[Moment], threshold: float) -> Iterator[Event | None]:
    """Events while moments come: at each the stretch so far that is, or may yet become, one; None where it is quiet."""
    stretch: Event | None = None
    for moment in moments:
        if stretch and moment.time_s - stretch.last.time_s > PATIENCE_S:
            stretch = None
        if moment.energy >= RELEASE * threshold:
            first, _, peak = stretch or Event(moment, moment, moment)
            stretch = Event(first, moment, moment if moment.energy > peak.energy else peak)
        yield stretch


def hours_of(timelines: Sequence[Timeline]) -> float:
    """Hours that are watched, gaps left out."""
    steps_s = np.concatenate([np.diff(times_s) for _, times_s in timelines])
    return float(steps_s[steps_s <= PATIENCE_S].sum() / 3600)


def choose_threshold(timelines: Sequence[Timeline], per_hour: float) -> Alarm:
    """The lowest threshold from which on ordinary videos have at most so many events an hour, and at least one.

    Raises `ValueError` where there is too little video for that rate; the message says how much it takes.
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

    # From the highest down, where there is one event: below some energy it is never quiet, and all of a video is one.
    candidates = np.unique(np.concatenate([energies for energies, _ in timelines]))[::-1]
    good, bad = 0, 1
    while bad < len(candidates) and events_at(candidates[bad]) <= allowed:
        good, bad = bad, 2 * bad
    bad = min(bad, len(candidates))
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if events_at(candidates[middle]) <= allowed else (good, middle)
    return Alarm(float(candidates[good]), events_at(candidates[good]), hours)
