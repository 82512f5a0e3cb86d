"""Memory for results and for scratch, used again from call to call."""

from __future__ import annotations

import os
from dataclasses import dataclass
from threading import Lock
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class _Kept:
    memory: NDArray[np.uint8]
    # The view of it that the last tensor was made from: it lives as long as a tensor shares its storage.
    lease: ref[NDArray[np.uint8]]


_lock = Lock()
_results: list[_Kept] = []
# Apart, because convolutions of many shapes come between one step's results and the next's.
_scratch: list[_Kept] = []


def recycled(shape: torch.Size, dtype: torch.dtype, *, scratch: bool = False) -> Tensor:
    """Return an uninitialised tensor, in memory of an earlier one that nobody holds any more if it fits.

    The system zeroes the pages that it hands out; for ten million logits that takes longer than their loss.
    What is kept between steps is one step's gradients: where nothing fits, all that is unused is let go.

    Args:
        scratch: for memory that is let go before the caller returns.
    """
    kept_here = _scratch if scratch else _results
    size = shape.numel() * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    with _lock:
        unused = [kept for kept in kept_here if kept.lease() is None]
        fitting = [kept for kept in unused if size <= len(kept.memory) <= 2 * size]
        if fitting:
            memory = min(fitting, key=lambda kept: len(kept.memory)).memory
        else:
            memory = np.empty(size, np.uint8)  # NumPy asks for huge pages, torch does not
            kept_here[:] = [kept for kept in kept_here if kept.lease() is not None]
        kept_here[:] = [kept for kept in kept_here if kept.memory is not memory]
        lease = memory[:size]
        kept_here.append(_Kept(memory, ref(lease)))
        return torch.from_numpy(lease).view(dtype).view(shape)


def kept_bytes() -> int:
    """Return how much memory is held, in use or not."""
    with _lock:
        return sum(len(kept.memory) for kept in (*_results, *_scratch))


def _renew_lock() -> None:
    """A forked child has not the thread that may have held it."""
    global _lock
    _lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
