"""Images that are the same or look alike, found among a hundred thousand by their digests and difference hashes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from retinanet.data.auditing import ImageFacts

NEAR = 4  # of 64 bits: the same picture saved again, scaled or slightly brightened
FLAT_BITS = 8  # a difference hash with fewer bits of either kind belongs to a flat picture and tells nothing
BLOCK = 1024, 8192  # images of b and of a that are compared at a time: 32 MiB


class NearPair(NamedTuple):
    """Two images that look alike: positions in their data sets, byte-equal or not, differing bits of 64."""

    a: int
    b: int
    equal: bool
    distance: int


def near_duplicates(
    facts_a: Sequence[ImageFacts | None], facts_b: Sequence[ImageFacts | None], *, distance: int = NEAR
) -> list[NearPair]:
    """Find, for each image of b, the image of a that is equal to it or looks most like it.

    Byte-equal files come before files that only look alike: those whose difference hashes differ in at most
    `distance` of 64 bits. Flat pictures, whose hash tells nothing, are compared by their bytes only. Of equals the
    first of a is given.

    Returns:
        At most one pair an image of b, in the order of b.
    """
    a, b = ([fact for fact in facts if fact is not None] for facts in (facts_a, facts_b))
    first: dict[str, int] = {}
    for place, fact in enumerate(a):
        first.setdefault(fact.digest, place)
    pairs: dict[int, NearPair] = {}
    for place, fact in enumerate(b):
        twin = first.get(fact.digest)
        if twin is not None:
            pairs[place] = NearPair(a[twin].index, fact.index, True, 0)
    open_b = np.array(
        [i for i, fact in enumerate(b) if i not in pairs and not _is_flat(fact.dhash)], np.int64
    )
    open_a = np.array([i for i, fact in enumerate(a) if not _is_flat(fact.dhash)], np.int64)
    signs_a, signs_b = (
        _signs([side[i].dhash for i in places]) for side, places in ((a, open_a), (b, open_b))
    )
    nearest = _nearest(signs_a, signs_b, open_a)
    for place, (twin, bits) in zip(open_b.tolist(), nearest, strict=True):
        if bits <= distance:
            pairs[place] = NearPair(a[twin].index, b[place].index, False, bits)
    return [pairs[place] for place in sorted(pairs)]


def equal_files(facts: Sequence[ImageFacts | None]) -> list[tuple[int, int]]:
    """Find byte-equal files in one data set: (the first, another one), in the order of the latter."""
    first: dict[str, int] = {}
    return [
        (known, fact.index)
        for fact in facts
        if fact is not None and (known := first.setdefault(fact.digest, fact.index)) != fact.index
    ]


def _is_flat(dhash: int) -> bool:
    return not FLAT_BITS <= dhash.bit_count() <= 64 - FLAT_BITS


def _signs(hashes: Sequence[int]) -> NDArray[np.float32]:
    """Return `[N, 64]`, the bits of hashes as -1 and 1, whose products count agreement."""
    octets = np.array(hashes, ">u8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1).astype(np.float32) * 2 - 1


def _nearest(
    a: NDArray[np.float32], b: NDArray[np.float32], places_a: NDArray[np.int64]
) -> list[tuple[int, int]]:
    """Return (place in a, differing bits) for each row of b, 65 bits where there is none to compare with.

    A matrix product a block: every pair is compared, so nothing that a user brings makes it slower.
    """
    best, who = np.full(len(b), -66, np.float32), np.zeros(len(b), np.int64)
    for row in range(0, len(b), BLOCK[0]):
        rows = slice(row, row + BLOCK[0])
        for column in range(0, len(a), BLOCK[1]):
            columns = slice(column, column + BLOCK[1])
            agreement = b[rows] @ a[columns].T  # 64 - 2 x differing bits, exact in float32
            top = agreement.argmax(axis=1)
            value = agreement[np.arange(len(top)), top]
            better = value > best[rows]
            best[rows][better] = value[better]
            who[rows][better] = places_a[columns][top[better]]
    return list(zip(who.tolist(), ((64 - best) / 2).astype(np.int64).tolist(), strict=True))
