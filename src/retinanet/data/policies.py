"""What becomes of a box or number that is not as it should be: one judgement for every format.

COCO's reader keeps the same rules on columns, VOC's in its own coordinates. A box has one fault: that it was dropped,
else that it was reversed, else that it was cut.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import numpy as np

from retinanet.data.kinds import Kind
from retinanet.data.rules import Box, clip_box

LONGEST_NUMBER = 64  # characters; what is longer is no coordinate


TRUE = (1, "1")  # what marks an object, as a crowd for one: 1, 1.0, true or "1"


class Verdict(NamedTuple):
    """A box as it is to be used (None: not at all), and what was wrong with it (no `kind`: nothing)."""

    box: Box | None
    kind: Kind | None = None
    reason: str = ""
    fix: str = ""


def judge_box(corners: Box, width: int, height: int) -> Verdict:
    """Judge a box in an image of that size, all in pixels.

    Repaired, because it has one meaning: reversed corners are those of one rectangle all the same, and a box that
    reaches beyond its image is cut to it. Dropped, because it has none: corners that are not finite, equal (a click),
    a side of 0, a box outside its image. Within `rules.ROUNDING` of the border a box is cut and nothing is said.
    """
    if fault := _fault(corners):
        kind, reason, fix = fault
        return Verdict(None, kind, f"{_box(corners)} {reason}", fix)
    x1, y1, x2, y2 = corners
    upright = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    box, cut = clip_box(upright, width, height)
    if box is None:
        kind = Kind.OUTSIDE_IMAGE if "outside" in (cut or "") else Kind.EMPTY_BOX
        return Verdict(None, kind, f"{_box(corners)} {cut}")
    if upright != corners:
        fix = "swap its corners; where most boxes are so, the numbers are in another order"
        return Verdict(box, Kind.REVERSED_BOX, f"{_box(corners)} is reversed; taken as {in_words(box)}", fix)
    if cut is not None:
        fix = "correct the box, or the size of the image it was drawn on"
        return Verdict(box, Kind.OUTSIDE_IMAGE, f"{_box(corners)} {cut}", fix)
    return Verdict(box)


def _box(corners: Box) -> str:
    return f"box {in_words(corners)} (x1, y1, x2, y2)"


def _fault(corners: Box) -> tuple[Kind, str, str] | None:
    """Return kind, reason and fix of four numbers that are no box."""
    x1, y1, x2, y2 = corners
    if not all(math.isfinite(value) for value in corners):
        return Kind.NOT_FINITE, "needs finite numbers", "remove the box or draw it again"
    if (x1, y1) == (x2, y2):
        return Kind.EQUAL_CORNERS, "has equal corners: a click, not a box", "remove it or draw the box"
    if x2 == x1 or y2 == y1:
        return Kind.EMPTY_BOX, "has no area; x2 > x1 and y2 > y1 are required", "remove it or draw the box"
    return None


def in_words(corners: Box) -> str:
    """Return four numbers for a message.

    >>> in_words((1.0, 2.5, 3.0, 40.0))
    '[1, 2.5, 3, 40]'
    """
    return f"[{', '.join(f'{value:g}' for value in corners)}]"


def decimal(text: str) -> float | None:
    """Return the number that a field of a text file holds (it may be infinite or NaN), None where it is none."""
    try:
        return None if len(text) > LONGEST_NUMBER or "_" in text else float(text)  # Python would read 1_000
    except ValueError:
        return None


def whole(text: str) -> int | None:
    """Return the whole number from 0 that a field holds, 7 for "7" and for "7.0", None where it is none."""
    value = decimal(text)
    return int(value) if value is not None and 0 <= value < 2**31 and value.is_integer() else None


def shortest(value: np.float32) -> str:
    """Return the shortest decimal number that is this one in single precision, whole ones without a point.

    >>> shortest(np.float32(0.1)), shortest(np.float32(12))
    ('0.1', '12')
    """
    return str(value).removesuffix(".0")


class Distinct:
    """Tells whether an image has a box already: of the same class, equal in single precision."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def adds(self, image: int, box: Box, label: int, ignore: int) -> bool:
        """Return whether the box is new, and remember it."""
        count = len(self._seen)
        self._seen.add(struct.pack("<qqbffff", image, label, ignore, *box))
        return len(self._seen) > count
