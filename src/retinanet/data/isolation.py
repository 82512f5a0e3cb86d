"""Apply a function to many files in processes that may crash: the file that did it is named, the rest goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import TypeAlias, TypeVar

from retinanet.errors import ConfigError

T = TypeVar("T")
Items: TypeAlias = list[tuple[int, str]]
Task: TypeAlias = tuple[Items, "Future[list[T]] | None"]

CHUNK = 16  # files a task
AHEAD = 4  # tasks a worker that wait or are done: memory is bounded, whatever the number of files


def each(
    function: Callable[[str], T],
    items: Mapping[int, str],
    workers: int,
    *,
    crashed: Callable[[str], T],
) -> Iterator[tuple[int, T]]:
    """Yield (key, result) for every item, in order.

    Args:
        function: a module's own function (it travels to the workers by its name).
        workers: processes, which end with this one, however it ends; 0 calls the function here, where a crash is the
            end.
        crashed: gives the result of an item that ended its process.

    Raises:
        ConfigError: no worker comes up, as in a script that does not guard what it runs.
    """
    if workers < 1:
        yield from ((key, function(item)) for key, item in items.items())
        return
    pending: Iterator[Task[T]] = ((chunk, None) for chunk in _chunks(items))
    proven = False
    while left := (yield from _until_a_crash(function, pending, workers, proven=proven)):
        proven = True
        # Tasks begin in order, so one of the first that are not done did it; what is done is not done again.
        undone = [place for place, (_, task) in enumerate(left) if task is None]
        suspects = undone[:workers]
        last = suspects[-1] + 1
        for chunk, task in left[:last]:
            results = task.result() if task else _one_by_one_if_it_crashes(function, chunk, crashed)
            yield from _keyed(chunk, results)
        pending = chain(left[last:], pending)


def _chunks(items: Mapping[int, str]) -> Iterator[Items]:
    rest = iter(items.items())
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def _until_a_crash(
    function: Callable[[str], T], pending: Iterator[Task[T]], workers: int, *, proven: bool
) -> Generator[tuple[int, T], None, list[Task[T]]]:
    """Yield results until all items are done or a process dies; return the tasks that were then under way, those that
    are done with their results.
    """
    tasks: deque[tuple[Items, Future[list[T]]]] = deque()
    pool = _pool(workers)
    try:
        if not proven:
            _require_a_worker(pool)
        while True:
            while len(tasks) < AHEAD * workers and (given := next(pending, None)):
                chunk, done = given
                try:
                    tasks.append((chunk, done or pool.submit(_all, function, [item for _, item in chunk])))
                except BrokenProcessPool:
                    return [*_finished(tasks), (chunk, None)]
            if not tasks:
                return []
            chunk, task = tasks[0]
            try:
                results = task.result()
            except BrokenProcessPool:
                return _finished(tasks)
            tasks.popleft()
            yield from _keyed(chunk, results)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(tasks: Iterable[tuple[Items, Future[list[T]]]]) -> list[Task[T]]:
    """Return tasks of a broken pool: with what holds their results, or without."""
    return [
        (chunk, None if isinstance(task.exception(), BrokenProcessPool) else task) for chunk, task in tasks
    ]


def _one_by_one_if_it_crashes(
    function: Callable[[str], T], chunk: Items, crashed: Callable[[str], T]
) -> list[T]:
    with _pool(1) as pool:
        try:
            return pool.submit(_all, function, [item for _, item in chunk]).result()
        except BrokenProcessPool:
            pass
    results: list[T] = []
    while len(results) < len(chunk):  # a process does them one after the other, until one of them ends it
        with _pool(1) as pool:
            for _, item in chunk[len(results) :]:
                try:
                    results.append(pool.submit(function, item).result())
                except BrokenProcessPool:
                    results.append(crashed(item))
                    break
    return results


def _keyed(chunk: Items, results: list[T]) -> Iterator[tuple[int, T]]:
    return zip((key for key, _ in chunk), results, strict=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not forked: a fork copies the locks of torch's and numba's threads without the threads.
    return ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_the_parent
    )


def _require_a_worker(pool: ProcessPoolExecutor) -> None:
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool:
        raise ConfigError(
            "worker processes end before they begin. Each imports the script that starts them: what that script runs "
            'needs to stand under `if __name__ == "__main__":`. Or ask for workers=0'
        ) from None


def _end_with_the_parent() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: killed, it cannot tell its workers to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_its_end, daemon=True).start()


def _wait_for_its_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _all(function: Callable[[str], T], items: list[str]) -> list[T]:
    return [function(item) for item in items]
