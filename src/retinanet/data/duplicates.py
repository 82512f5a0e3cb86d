"""What every reader does with sound boxes that contradict each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinanet.records import Float32Array, Int64Array


def drop_duplicates(
    images: Int64Array, labels: Int64Array, boxes: Float32Array, ignore: NDArray[Any]
) -> tuple[NDArray[np.bool_], Int64Array]:
    """Find boxes that stand twice: equal in image, class, all four corners and in being ignored. The first one counts.

    Args:
        images, labels: `[M]`.
        boxes: `[M, 4]` float32, finite.
        ignore: `[M]` values of `retinanet.records.Ignore`.

    Returns:
        `[M]` which boxes to keep, and `[M]` the first box that each is equal to (itself where it is kept).
    """
    count = len(boxes)
    firsts = np.arange(count)
    words = np.ascontiguousarray(boxes + np.float32(0), np.float32).view(np.uint32)  # + 0 makes -0.0 zero
    keys = _hash([images, labels, ignore, *words.T])
    order = np.argsort(keys, kind="stable")
    twice = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    seen: dict[tuple[float, ...], int] = {}
    for row in sorted(
        {*order[twice].tolist(), *order[twice + 1].tolist()}
    ):  # equal keys are nearly always equal boxes
        own = (int(images[row]), int(labels[row]), int(ignore[row]), *words[row].tolist())
        firsts[row] = seen.setdefault(own, row)
    return firsts == np.arange(count), firsts


def _hash(columns: list[NDArray[Any]]) -> NDArray[np.uint64]:
    """Mix integer columns into one of 64 bits, after the multiply-xorshift rounds of SplitMix64."""
    keys = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        keys = (keys ^ column.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        keys ^= keys >> np.uint64(29)
    return keys
