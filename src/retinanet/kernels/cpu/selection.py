"""The best candidates of a level: threshold and top-k on logits, in one pass that mostly only compares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinanet.kernels.cpu.compiled import compiled
from retinanet.kernels.cpu.threads import in_parallel
from retinanet.kernels.cpu.values import as_float32, flat_array

# Logits compared at once; most blocks hold none above the threshold and are left at that.
BLOCK = 128
# Logits that are worth a second thread.
LEAST = 1 << 18

f32 = np.float32


@torch.compiler.disable
def select(levels: Sequence[Tensor], thresholds: Sequence[float], top_k: int) -> list[Tensor]:
    """Return for each level `[N, K]` of logits the flat indices, int64 ascending, of what is kept.

    Kept are the `top_k` largest logits above the level's threshold; of equal ones the first.
    """
    flat = [flat_array(level) for level in levels]
    limits = [f32(threshold) for threshold in thresholds]
    total = max(1, sum(len(values) for values in flat))

    def work(part: int, start: int, stop: int) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        # Every thread takes the same share of every level.
        return [
            _best(values, len(values) * start // total, len(values) * stop // total, limit, top_k)
            for values, limit in zip(flat, limits, strict=True)
        ]

    parts = in_parallel(work, total, least=LEAST)
    kept = []
    for found in zip(*parts, strict=True):
        indices, values = (np.concatenate(pieces) for pieces in zip(*found, strict=True))
        if len(indices) > top_k:
            indices = indices[: _prune(indices, values, len(indices), top_k)]
        kept.append(torch.from_numpy(indices))
    return kept


@compiled()
def _best(values, start, stop, threshold, top_k):
    """Return indices and logits of the best of values[start:stop], in order of index.

    When the room is full, the best `top_k` stay and the smallest of them becomes the threshold: what comes later
    and equals it would lose by its index.
    """
    room = min(stop - start, 4 * top_k) + BLOCK
    indices, logits = np.empty(room, np.int64), np.empty(room, np.float32)
    widened = np.empty(BLOCK, np.float32)
    count = 0
    for first in range(start, stop, BLOCK):
        block = as_float32(values[first : min(first + BLOCK, stop)], widened)
        if _any_above(block, threshold):
            if count + BLOCK > room:
                count = _prune(indices, logits, count, top_k)
                threshold = max(threshold, _smallest(logits[:count]))
            for k in range(len(block)):
                indices[count] = first + k
                logits[count] = block[k]
                count += block[k] > threshold
    if count > top_k:
        count = _prune(indices, logits, count, top_k)
    return indices[:count].copy(), logits[:count].copy()


@compiled()
def _any_above(block, threshold):
    above = 0
    for k in range(len(block)):
        above += block[k] > threshold
    return above > 0


@compiled()
def _smallest(values):
    least = values[0]
    for k in range(len(values)):
        least = min(least, values[k])
    return least


@compiled()
def _prune(indices, logits, count, top_k):
    """Move the `top_k` largest to the front, order kept, of equal ones the first; return how many there are."""
    limit = np.partition(logits[:count], count - top_k)[count - top_k]
    room = top_k
    for k in range(count):
        room -= logits[k] > limit
    kept = 0
    for k in range(count):
        if logits[k] > limit or (logits[k] == limit and room > 0):
            room -= logits[k] == limit
            indices[kept] = indices[k]
            logits[kept] = logits[k]
            kept += 1
    return kept
