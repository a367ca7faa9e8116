import threading
import time
from itertools import count

import pytest

from data.parallel import map_ahead, stream_ahead


def test_results_come_in_order_whoever_is_done_first():
    def slow_first(item):
        time.sleep(0.05 if item == 0 else 0)
        return 10 * item

    assert list(map_ahead(slow_first, range(20), workers=3)) == [10 * item for item in range(20)]


def test_an_error_comes_in_its_place_and_nothing_more_is_begun():
    begun = []

    def fail(item):
        begun.append(item)
        time.sleep(0.01)
        if item == 2:
            raise ValueError("the third")
        return item

    results = map_ahead(fail, range(1000), workers=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(results)
    assert len(begun) < 20


def count_up(item):
    for number in range(5):
        yield item, number


@pytest.mark.parametrize("at_once", [1, 2, 5, 7])
def test_streams_run_side_by_side_each_in_its_order(at_once):
    results = list(stream_ahead(count_up, range(30), workers=4, at_once=at_once))
    assert sorted(results) == [(item, number) for item in range(30) for number in range(5)]
    for item in range(30):
        assert [number for other, number in results if other == item] == list(range(5))


def test_a_stream_is_only_a_result_ahead_and_its_threads_end_with_it():
    given = []

    def endless(start):
        for number in count(start):
            given.append(number)
            yield number

    before = set(threading.enumerate())
    results = stream_ahead(endless, [0], workers=1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.2)
    assert len(given) <= 4
    results.close()
    assert set(threading.enumerate()) <= before


def test_an_error_in_a_stream_is_raised_after_the_results_before_it():
    def fail(item):
        yield item
        raise ValueError("no more")

    results = stream_ahead(fail, [7], workers=1)
    assert next(results) == 7
    with pytest.raises(ValueError, match="no more"):
        next(results)
