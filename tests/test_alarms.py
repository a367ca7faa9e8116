"""Alarms: events with a beginning and an end, as many on ordinary video as was said."""

import numpy as np
import pytest

from jepa.alarms import Alarm, choose_threshold, find_events, hours_of

STEP_S = 0.4


def ordinary(seed, minutes, videos=1, step_s=STEP_S):
    """Noise that lasts: neighbouring moments have much in common."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(videos):
        moments = int(60 * minutes / step_s)
        noise = np.convolve(generator.normal(size=moments + 4), np.ones(5) / 5**0.5, "valid")
        found.append((np.exp(0.5 * noise), np.arange(moments) * step_s))
    return found


def places(timeline, threshold):
    return [tuple(moment.place for moment in event) for event in find_events(timeline, threshold)]


@pytest.mark.parametrize(
    ("energies", "events"),
    [
        ([1, 1, 5, 1, 1], [(2, 2, 2)]),
        ([1, 4.5, 6, 4.5, 1], [(1, 3, 2)]),  # above four fifths of 5 it goes on
        ([1, 5, 1, 6, 1], [(1, 3, 3)]),  # quiet for less than a second
        ([5, 1, 1, 1, 1, 6], [(0, 0, 0), (5, 5, 5)]),
        ([4.9, 4.9, 4.9], []),
        ([1, 1, 1], []),
    ],
)
def test_an_event_begins_above_the_threshold_and_ends_when_it_is_quiet(energies, events):
    assert places((np.array(energies), np.arange(len(energies)) * STEP_S), 5) == events


def test_a_gap_in_the_video_ends_an_event_and_is_not_watched():
    timeline = np.full(4, 9.0), np.array([0, 1, 100, 101.0])
    assert [event[:2] for event in places(timeline, 5)] == [(0, 1), (2, 3)]
    assert hours_of([timeline]) == pytest.approx(2 / 3600)


@pytest.mark.parametrize("per_hour", [2, 6, 20])
def test_false_alarms_are_as_many_as_was_said(per_hour):
    inside, rates = 0, []
    for seed in range(20):
        alarm = choose_threshold(ordinary(seed, 30.1, videos=4), per_hour)
        assert alarm.hours == pytest.approx(2, rel=0.01)
        new = ordinary(1000 + seed, 60, videos=3)
        found = sum(len(find_events(timeline, alarm.threshold)) for timeline in new)
        low, high = alarm.expected(3)
        inside += low <= found <= high
        rates.append(found / 3)
    assert inside >= 17  # of 20, by 95 %
    assert np.mean(rates) == pytest.approx(per_hour, rel=0.35)


def test_a_threshold_is_high_where_low_ones_would_make_all_of_a_video_one_event():
    videos = ordinary(0, 60, videos=4, step_s=0.1)  # never quiet for a second below the median
    alarm = choose_threshold(videos, 1)
    assert len(find_events(videos[0], np.quantile(videos[0][0], 0.1))) == 1
    assert alarm.threshold > np.quantile(np.concatenate([energies for energies, _ in videos]), 0.999)
    assert sum(len(find_events(one, alarm.threshold)) for one in videos) == alarm.events <= 4


@pytest.mark.parametrize(("minutes", "per_hour"), [(4.25, 2), (1, 10), (29, 2)])
def test_too_little_ordinary_video_for_a_rate_is_refused(minutes, per_hour):
    with pytest.raises(ValueError, match=f"at least {60 / per_hour:.0f} minutes"):
        choose_threshold(ordinary(0, minutes), per_hour)


def test_what_is_expected_grows_with_the_hours():
    alarm = Alarm(2.0, events=5, hours=2.5)
    assert alarm.expected(0.1)[0] == 0
    low, high = alarm.expected(100)
    assert low < 200 < high
