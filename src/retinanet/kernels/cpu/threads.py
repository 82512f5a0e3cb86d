"""Sharing a kernel's work between threads.

Not numba's own threads: its OpenMP layer aborts in a forked child, its `workqueue` layer breaks when two threads
call it at once, and both keep spinning while torch wants the cores. Kernels leave the interpreter's lock, so
ordinary threads do: they sleep when there is nothing to do, and a forked child starts its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

import torch

T = TypeVar("T")

_lock = Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def in_parallel(work: Callable[[int, int, int], T], count: int, *, least: int) -> list[T]:
    """Call `work(part, start, stop)` for equal parts of range(count), one a thread, and return the results in order.

    There are as many parts as torch has threads, fewer where a part would have less than `least` items. The
    last runs in the calling thread. What `work` raises is raised here, after all parts have ended.
    """
    parts = max(1, min(torch.get_num_threads(), count // max(1, least)))
    edges = [count * part // parts for part in range(parts + 1)]
    if parts == 1:
        return [work(0, 0, count)]
    pool = _threads(parts - 1)
    others = [pool.submit(work, part, edges[part], edges[part + 1]) for part in range(parts - 1)]
    try:
        last = work(parts - 1, edges[-2], edges[-1])
    finally:
        failures = [other.exception() for other in others]  # waits
    for failure in failures:
        if failure is not None:
            raise failure
    return [*(other.result() for other in others), last]


def _threads(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < size:
            # A smaller one ends by itself once its work is done and nobody holds it.
            _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="kernel"), size
        return _pool


def _forget_threads() -> None:
    """Start anew in a forked child: threads do not survive a fork, and the lock may have been held."""
    global _lock, _pool, _pool_size
    _lock, _pool, _pool_size = Lock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
