"""Per-class greedy non-maximum suppression."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinanet.kernels.cpu.compiled import compiled

# Kept boxes that a candidate is compared with at once, before it is asked whether one of them suppresses it.
BLOCK = 64

f32 = np.float32
MOST, LEAST = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
INFINITE = np.int32(0x7F800000)  # bits of infinity; above it are those of NaN


@torch.compiler.disable
def nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_kept: int | None) -> Tensor:
    """Return what `plain_nms` returns. boxes float32 `[N, 4]`, scores float32 `[N]`, labels int64 `[N]`."""
    b, s, classes = boxes.contiguous().numpy(), scores.numpy(), labels.numpy()
    order = by_score(s)
    if len(order) and (classes.min() < 0 or classes.max() >= len(classes)):
        classes = np.unique(classes, return_inverse=True)[1]  # room is made for each of 0 .. the largest
    most = len(order) if max_kept is None else min(max_kept, len(order))
    return torch.from_numpy(_nms(b, classes, order, f32(threshold), most))


def by_score(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the order by score descending, then index ascending; NaN last, as `argsort` has it."""
    key = np.empty(len(scores), np.int64)
    _keys(np.ascontiguousarray(scores).view(np.int32), key)
    # Every key is different, and so any sort is a stable one: NumPy's for integers is several times faster than its
    # stable one for floats.
    key.sort()
    key &= 0xFFFFFFFF
    return key


@compiled()
def _keys(bits, key):
    """Write integers that sort by score descending, each with its index in the lower half.

    Bits of the negated scores, those of negative numbers turned over, have the order of the numbers.
    """
    for i in range(len(bits)):
        negated = np.int32(bits[i] ^ LEAST)
        ordered = np.int32(negated ^ (np.int32(negated >> np.int32(31)) & MOST))
        magnitude = np.int32(bits[i] & MOST)
        ordered = np.int32(0) if magnitude == 0 else (MOST if magnitude > INFINITE else ordered)
        key[i] = (np.int64(ordered) << np.int64(32)) | np.int64(i)


@compiled()
def _nms(boxes, classes, order, threshold, most):
    count = len(order)
    # Kept boxes by class, as columns: class c has room from start[c] on.
    used = np.zeros(count + 1, np.int64)
    for i in range(count):
        used[classes[i]] += 1
    start = np.empty(count + 1, np.int64)
    at = 0
    for c in range(count + 1):
        start[c] = at
        at += used[c]
        used[c] = 0
    columns = np.empty((5, count), np.float32)
    x1, y1, x2, y2, area = columns[0], columns[1], columns[2], columns[3], columns[4]
    kept = np.empty(most, np.int64)
    number = 0
    for position in range(count):
        if number == most:
            break
        i = order[position]
        c = classes[i]
        a, b, d, e = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        own = (d - a) * (e - b)
        first, end = start[c], start[c] + used[c]
        suppressed = False
        while first < end and not suppressed:
            last = min(first + BLOCK, end)
            suppressed = _suppresses(
                x1[first:last], y1[first:last], x2[first:last], y2[first:last], area[first:last],
                a, b, d, e, own, threshold,
            )  # fmt: skip
            first = last
        if not suppressed:
            x1[end], y1[end], x2[end], y2[end], area[end] = a, b, d, e, own
            used[c] += 1
            kept[number] = i
            number += 1
    return kept[:number]


@compiled(inline=True)
def _suppresses(x1, y1, x2, y2, area, a, b, c, d, own, threshold):
    """Return whether one of the kept boxes has IoU > threshold with a candidate; the quotient itself is compared."""
    number = 0
    for k in range(len(x1)):
        width = (x2[k] if x2[k] < c else c) - (x1[k] if x1[k] > a else a)
        height = (y2[k] if y2[k] < d else d) - (y1[k] if y1[k] > b else b)
        shared = (width if width > 0 else f32(0)) * (height if height > 0 else f32(0))
        union = area[k] + own - shared
        overlap = shared / union if union > 0 else f32(0)
        number += overlap > threshold
    return number > 0
