"""Sharing a kernel's work between threads, of torch's own team where that can be had.

Threads that have worked for torch spin for milliseconds in wait of more, and whoever else then wants their core gets
half of it: a kernel on threads of its own takes twice as long after any torch operation as alone. So kernels are
handed to the same OpenMP runtime. They leave the interpreter's lock, and so a Python function on each thread of the
team will do to start them.

Not numba's threads: its OpenMP layer aborts in a forked child, and its `workqueue` breaks when two threads call it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_lock = Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_in_forked_child = False

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def in_parallel(work: Callable[[int, int, int], T], count: int, *, least: int) -> list[T]:
    """Call `work(part, start, stop)` for equal parts of range(count), one a thread, and return the results in order.

    There are as many parts as torch has threads, fewer where a part would have less than `least` items. What
    `work` raises is raised here, after all parts have ended.
    """
    parts = max(1, min(torch.get_num_threads(), count // max(1, least)))
    edges = [count * part // parts for part in range(parts + 1)]
    if parts == 1:
        return [work(0, 0, count)]
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def run(part: int) -> None:
        try:
            results[part] = work(part, edges[part], edges[part + 1])
        except BaseException as failure:
            failures.append(failure)

    runtime = None if _in_forked_child else _openmp()
    if runtime is not None:
        _on_team(runtime, run, parts)
    else:
        others = [_threads(parts - 1).submit(run, part) for part in range(parts - 1)]
        run(parts - 1)
        for other in others:
            other.result()
    if failures:
        raise failures[0]
    if len(results) < parts:
        # What a signal raises before a part has begun is printed by ctypes and dropped, and the part with it.
        raise KeyboardInterrupt("a kernel was interrupted")
    return [results[part] for part in range(parts)]


@functools.cache
def _openmp() -> Any:
    """Return GNU's OpenMP runtime if this process has it loaded, as torch's usual builds for Linux do."""
    if not torch.backends.openmp.is_available() or not hasattr(os, "RTLD_NOLOAD"):
        return None
    try:
        runtime = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        runtime.GOMP_parallel.argtypes = (_Callback, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        runtime.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None
    return runtime


def _on_team(runtime: Any, run: Callable[[int], None], parts: int) -> None:
    def of_thread(_: int | None) -> None:
        # The team may be smaller than asked for.
        for part in range(runtime.omp_get_thread_num(), parts, runtime.omp_get_num_threads()):
            run(part)

    runtime.GOMP_parallel(_Callback(of_thread), None, parts, 0)


def _threads(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < size:
            # A smaller one ends by itself once its work is done and nobody holds it.
            _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="kernel"), size
        return _pool


def _start_anew() -> None:
    """Forget what does not survive a fork: threads, a lock that was held, and OpenMP, which would wait for its own."""
    global _lock, _pool, _pool_size, _in_forked_child
    _lock, _pool, _pool_size, _in_forked_child = Lock(), None, 0, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
