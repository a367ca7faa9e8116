"""Work in threads, a little ahead of whoever uses the results; decoding releases Python's lock.

`workers` is the number of threads, one a usable core by default.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

import joblib

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None
) -> Iterator[Result]:
    """`map` in threads, results in order."""
    pool = ThreadPoolExecutor(workers or joblib.cpu_count())
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for a video of hours


def stream_ahead(
    function: Callable[[Item], Iterable[Result]], items: Iterable[Item], *, workers: int | None = None, at_once: int = 1
) -> Iterator[Result]:
    """Results of a generator called with several items side by side: as they come, an item's own in order.

    `at_once` results of each are prepared ahead; more items are begun than there are threads, so that no thread waits.
    """
    workers = workers or joblib.cpu_count()
    streams = (iter(function(item)) for item in items)
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(list, islice(one, at_once)): one for one in islice(streams, 2 * workers)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stream, results = running.pop(future), future.result()
                following = stream if len(results) == at_once else next(streams, None)
                if following is not None:
                    running[pool.submit(list, islice(following, at_once))] = following
                yield from results
