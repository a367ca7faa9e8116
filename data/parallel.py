"""Work in threads, a little ahead of whoever uses the results; decoding releases Python's lock.

`workers` is the number of threads, one a usable core by default.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import joblib

Item = TypeVar("Item")
Result = TypeVar("Result")
_NONE_LEFT: Any = object()


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None = None
) -> Iterator[Result]:
    """`map` in threads, results in order."""
    pool = ThreadPoolExecutor(workers or joblib.cpu_count())
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for a video of hours


class _Ended(NamedTuple):
    """The last message of a thread, with the error that ended it."""

    error: BaseException | None = None


def stream_ahead(
    function: Callable[[Item], Iterable[Result]], items: Iterable[Item], *, workers: int | None = None, ahead: int = 8
) -> Iterator[Result]:
    """Results of a generator called with several items side by side: as they come, an item's own in order.

    At most `ahead` results wait to be used.
    """
    waiting, lock = iter(items), threading.Lock()
    results: queue.Queue[Result | _Ended] = queue.Queue(ahead)
    stop = threading.Event()

    def put(result: Result | _Ended) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                results.put(result, timeout=0.1)
                return

    def work() -> None:
        try:
            while True:
                with lock:
                    item = next(waiting, _NONE_LEFT)
                if item is _NONE_LEFT:
                    break
                for result in function(item):
                    put(result)
                    if stop.is_set():
                        return
            put(_Ended())
        except BaseException as error:
            put(_Ended(error))

    # Daemons: if a stream is left half used, the process can still end.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers or joblib.cpu_count())]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            result = results.get()
            if not isinstance(result, _Ended):
                yield result
            elif result.error is not None:
                raise result.error
            else:
                running -= 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
