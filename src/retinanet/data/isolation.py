"""Apply a function to many files in processes that may crash: the file that did it is named, the rest goes on."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Items: TypeAlias = list[tuple[int, str]]

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
        workers: processes; 0 calls the function here, where a crash is the end.
        crashed: gives the result of an item that ended its process.
    """
    if workers < 1:
        yield from ((key, function(item)) for key, item in items.items())
        return
    pending = iter(items.items())
    while lost := (yield from _until_a_crash(function, pending, workers)):
        for key, item in lost:  # one of them did it: each gets a process of its own
            yield key, _alone(function, item, crashed)


def _until_a_crash(
    function: Callable[[str], T], pending: Iterator[tuple[int, str]], workers: int
) -> Generator[tuple[int, T], None, Items]:
    """Yield results until all items are done or a process dies; return the items that were then under way."""
    tasks: deque[tuple[Items, Future[list[T]]]] = deque()
    pool = _pool(workers)
    try:
        while True:
            while len(tasks) < AHEAD * workers and (chunk := list(islice(pending, CHUNK))):
                try:
                    tasks.append((chunk, pool.submit(_all, function, [item for _, item in chunk])))
                except BrokenProcessPool:
                    return [pair for given, _ in tasks for pair in given] + chunk
            if not tasks:
                return []
            chunk, task = tasks[0]
            try:
                results = task.result()
            except BrokenProcessPool:
                return [pair for given, _ in tasks for pair in given]
            tasks.popleft()
            yield from zip((key for key, _ in chunk), results, strict=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _alone(function: Callable[[str], T], item: str, crashed: Callable[[str], T]) -> T:
    with _pool(1) as pool:
        try:
            return pool.submit(function, item).result()
        except BrokenProcessPool:
            return crashed(item)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not forked: a fork copies the locks of torch's and numba's threads without the threads.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _all(function: Callable[[str], T], items: list[str]) -> list[T]:
    return [function(item) for item in items]
