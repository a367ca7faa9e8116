"""Work in threads, a little ahead of whoever uses the results."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import joblib

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """`map` in threads, in order, two items a thread ahead: items may be many and results large.

    Args:
        function: decoding releases Python's lock, so threads run side by side.
        items: what it is called with.
        workers: threads, one a usable core by default.
    """
    workers = workers or joblib.cpu_count()
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for a video of hours


def stream_ahead(
    function: Callable[[Item], Iterable[Result]], items: Iterable[Item], workers: int | None = None, ahead: int = 8
) -> Iterator[Result]:
    """What a function yields for each item, from several items side by side: as it comes, an item's own in order.

    Args:
        function: a generator; decoding releases Python's lock, so threads run side by side.
        items: what it is called with.
        workers: threads, one a usable core by default.
        ahead: results that wait at most.
    """
    workers = workers or joblib.cpu_count()
    results: queue.Queue[Result | _Done] = queue.Queue(ahead)
    stop = threading.Event()
    waiting, taking = iter(items), threading.Lock()

    def put(result: Result | _Done) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                results.put(result, timeout=0.1)
                break

    def work() -> None:
        try:
            while not stop.is_set():
                with taking:
                    item = next(waiting, _NOTHING)
                if isinstance(item, _Nothing):
                    break
                for result in function(item):
                    put(result)
                    if stop.is_set():
                        break
        except BaseException as error:
            put(_Done(error))
        else:
            put(_Done(None))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        running = workers
        while running:
            result = results.get()
            if not isinstance(result, _Done):
                yield result
            elif result.error is not None:
                raise result.error
            else:
                running -= 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()


class _Nothing:
    """There is no further item."""


_NOTHING = _Nothing()


@dataclass(frozen=True)
class _Done:
    """A thread has ended."""

    error: BaseException | None
