"""Work in threads, a little ahead of whoever uses the results; decoding releases Python's lock.

`workers` is the number of threads, one a usable core by default.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, TypeVar

import joblib

Item = TypeVar("Item")
Result = TypeVar("Result")
_ENDED: Any = object()


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
    function: Callable[[Item], Iterable[Result]], items: Iterable[Item], *, workers: int | None = None
) -> Iterator[Result]:
    """Results of a generator called with several items side by side: as they come, an item's own in order.

    One result of each is prepared ahead; more items are begun than there are threads, so that no thread waits.
    """
    workers = workers or joblib.cpu_count()
    streams = (iter(function(item)) for item in items)
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(next, stream, _ENDED): stream for stream in islice(streams, 2 * workers)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stream, result = running.pop(future), future.result()
                following = next(streams, None) if result is _ENDED else stream
                if following is not None:
                    running[pool.submit(next, following, _ENDED)] = following
                if result is not _ENDED:
                    yield result
