"""The section `annotations`: columns of numbers, checked as columns; words only for what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retinanet.data.coco.document import AnnotationRecord, Document, Fields
from retinanet.data.coco.listing import LARGEST_ID, Entry, id_of, whole
from retinanet.data.duplicates import drop_duplicates
from retinanet.data.faults import FaultLog
from retinanet.data.kinds import Kind
from retinanet.data.policies import TRUE, in_words
from retinanet.data.rules import LONGEST_SIDE, Box, brief, clip_box, clip_boxes, number
from retinanet.records import Classes, Float32Array, Ignore, Int8Array, Int64Array

LARGEST_AREA = float(np.finfo(np.float32).max)
NOWHERE, GONE = -1, -2  # instead of an image's position: there is none; it was dropped and named itself
NO_BOX = (math.nan,) * 4
WRONG_AREA = -1.0

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


class Boxes(NamedTuple):
    """The sound boxes of a file: positions of their images, and the other columns of a `Dataset`."""

    owners: Int64Array
    labels: Int64Array
    boxes: Float32Array
    areas: Float32Array
    ignore: Int8Array
    ids: Int64Array


class _Columns(NamedTuple):
    """What some records say, `[n]` or `[n, 4]`."""

    image: Int64Array  # position among the kept images, NOWHERE or GONE
    label: Int64Array  # -1 where the class is unknown
    box: Float64Array  # x, y, width, height; NaN where they are not four numbers
    area: Float64Array  # NaN where none is given, WRONG_AREA where it is no area
    crowd: BoolArray
    id: Int64Array
    numbered: BoolArray


class _Checked(NamedTuple):
    """The records of a chunk that passed: columns of those, with their places in the section."""

    places: Int64Array
    owners: Int64Array
    labels: Int64Array
    boxes: Float32Array
    areas: Float32Array
    crowd: BoolArray
    ids: Int64Array
    numbered: BoolArray


# Every fault of an annotation, in the order in which those of one record are named.
_Finding = Literal[
    "image", "class", "numbers", "infinite", "click", "empty", "reversed", "outside", "flat", "cut", "area"
]
_FINDINGS: dict[_Finding, tuple[Literal["repaired", "dropped"], Kind]] = {
    "image": ("dropped", Kind.ORPHAN_ANNOTATION),
    "class": ("dropped", Kind.UNKNOWN_CLASS),
    "numbers": ("dropped", Kind.NOT_A_NUMBER),
    "infinite": ("dropped", Kind.NOT_FINITE),
    "click": ("dropped", Kind.EQUAL_CORNERS),
    "empty": ("dropped", Kind.EMPTY_BOX),
    "reversed": ("repaired", Kind.REVERSED_BOX),
    "outside": ("dropped", Kind.OUTSIDE_IMAGE),
    "flat": ("dropped", Kind.EMPTY_BOX),
    "cut": ("repaired", Kind.OUTSIDE_IMAGE),
    "area": ("repaired", Kind.INVALID_AREA),
}


class BoxReader:
    """Reads the annotations of one file for images and classes that are known."""

    def __init__(self, document: Document, entries: Sequence[Entry], classes: Classes, log: FaultLog) -> None:
        self.document = document
        self.log = log
        self.kept = [entry for entry in entries if entry.kept]
        self.sizes = np.array([entry.size or (LONGEST_SIDE, LONGEST_SIDE) for entry in self.kept], np.int64)
        places = {id(entry): position for position, entry in enumerate(self.kept)}
        self.images = _keys((entry.id, places.get(id(entry.same or entry), GONE)) for entry in entries)
        self.labels = _keys((category, label) for label, category in enumerate(classes.ids))

    def read(self) -> Boxes:
        """Return the sound boxes; the others are named in the log."""
        parts = []
        for start, records in self.document.chunks("annotations", AnnotationRecord):
            typed = [item if isinstance(item, AnnotationRecord) else _as_record(item) for item in records]
            columns = self._columns(typed)
            parts.append(self._check(start, columns))
        if not parts:
            parts = [self._check(0, self._columns([]))]
        found = _Checked._make(np.concatenate(columns) for columns in zip(*parts, strict=True))
        found = self._once(found)
        ids = found.ids
        if not found.numbered.all() or len(np.unique(ids)) != len(ids):
            reason = "ids need distinct whole numbers; they became the places in the list"
            self.log.repair(self.document.source.name, "annotations", reason, Kind.DUPLICATE_ID)
            ids = found.places
        ignore = np.where(found.crowd, np.int8(Ignore.CROWD), np.int8(Ignore.NO))
        return Boxes(found.owners, found.labels, found.boxes, found.areas, ignore, ids)

    def _columns(self, records: list[AnnotationRecord]) -> _Columns:
        count = len(records)
        ids, images, labels, boxes, areas, crowds = (
            list(map(attrgetter(name), records)) for name in AnnotationRecord.__struct_fields__
        )
        if set(map(type, ids)) != {int} or max(ids) > LARGEST_ID or min(ids) < -LARGEST_ID:
            ids = [None if value is None else whole(value) for value in ids]
        flat = chain.from_iterable(NO_BOX if box is None else box for box in boxes)
        return _Columns(
            image=np.fromiter(map(self.images.get, images, repeat(NOWHERE)), np.int64, count),
            label=np.fromiter(map(self.labels.get, labels, repeat(-1)), np.int64, count),
            box=np.fromiter(flat, np.float64, 4 * count).reshape(-1, 4),
            area=np.array(areas, np.float64),  # None becomes NaN
            crowd=np.fromiter((value in TRUE for value in crowds), bool, count),
            id=np.array([0 if value is None else value for value in ids], np.int64),
            numbered=np.array([value is not None for value in ids], bool),
        )

    def _check(self, start: int, given: _Columns) -> _Checked:
        """Check the records from `start`; return those that can be used."""
        here = given.image >= 0
        live = here & (given.label >= 0)
        finite = np.isfinite(given.box).all(axis=1)
        x, y, width, height = np.where((live & finite)[:, None], given.box, (0.0, 0.0, 1.0, 1.0)).T
        click, empty = (width == 0) & (height == 0), (width == 0) | (height == 0)
        with np.errstate(over="ignore"):  # far beyond any image; cut below
            right, bottom = x + width, y + height
            corners = np.stack(
                [np.minimum(x, right), np.minimum(y, bottom), np.maximum(x, right), np.maximum(y, bottom)],
                axis=1,
            )
            sizes = self.sizes[np.where(here, given.image, 0)]
            boxes, outside, flat, reached = clip_boxes(corners, sizes)
        reversed_ = (width < 0) | (height < 0)
        sound = live & finite & ~empty
        kept = sound & ~outside & ~flat
        wrong_area = ~np.isnan(given.area) & ~((given.area >= 0) & (given.area <= LARGEST_AREA))
        self._name(
            start,
            {
                "image": given.image == NOWHERE,
                "class": here & (given.label < 0),
                "numbers": live & np.isnan(given.box).any(axis=1),
                "infinite": live & np.isinf(given.box).any(axis=1),
                "click": live & finite & click,
                "empty": live & finite & empty & ~click,
                "reversed": kept & reversed_,
                "outside": sound & outside,
                "flat": sound & flat,
                "cut": kept & reached & ~reversed_,
                "area": kept & wrong_area,
            },
            given,
        )
        own = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        areas = np.where(wrong_area | np.isnan(given.area), own, given.area)
        return _Checked(
            places=start + np.flatnonzero(kept),
            owners=given.image[kept],
            labels=given.label[kept],
            boxes=boxes[kept].astype(np.float32),
            areas=areas[kept].astype(np.float32),
            crowd=given.crowd[kept],
            ids=given.id[kept],
            numbered=given.numbered[kept],
        )

    def _name(self, start: int, found: dict[_Finding, BoolArray], given: _Columns) -> None:
        """Put what is wrong into the log, by record; word it only as long as the log keeps words."""
        rows = np.concatenate([np.flatnonzero(mask) for mask in found.values()])
        codes = np.repeat(np.arange(len(found)), [int(mask.sum()) for mask in found.values()])
        order = np.lexsort((codes, rows))
        names = list(found)
        for step, place in enumerate(order.tolist()):
            if not self.log.room:
                for code, number in enumerate(np.bincount(codes[order[step:]]).tolist()):
                    self.log.count(*_FINDINGS[names[code]], number)
                return
            row, finding = int(rows[place]), names[codes[place]]
            self._word(start + row, int(given.image[row]), finding)

    def _word(self, place: int, image: int, finding: _Finding) -> None:
        record = self.document.plain("annotations", place)
        fields = record if isinstance(record, dict) else {}
        entry = self.kept[image] if image >= 0 else None
        where = self._where(place, fields, entry)
        reason, kind = self._reason(finding, fields, entry), _FINDINGS[finding][1]
        add = self.log.drop if _FINDINGS[finding][0] == "dropped" else self.log.repair
        add(self.document.source.name, where, reason, kind)

    def _where(self, place: int, fields: Fields, entry: Entry | None) -> str:
        own_id = id_of(fields.get("id"))
        where = f"annotations[{place}]" if own_id is None else f"annotations[{place}] (id {own_id})"
        return where if entry is None else f"{where} of {entry.file}"

    def _reason(self, finding: _Finding, fields: Fields, entry: Entry | None) -> str:
        bbox = fields.get("bbox")
        if finding == "image":
            return f"image_id needs the id of an image; got {brief(fields.get('image_id'))}"
        if finding == "class":
            return f"category_id needs the id of a category; got {brief(fields.get('category_id'))}"
        if finding == "area":
            return f"area needs a number from 0; got {brief(fields.get('area'))}; it became the box's"
        if finding in ("numbers", "infinite"):
            return f"bbox needs four finite numbers [x, y, width, height]; got {brief(bbox)}"
        if finding == "click":
            return f"bbox {brief(bbox)} has equal corners: a click, not a box"
        if finding == "empty":
            return f"bbox needs a width and height above 0; got {brief(bbox)}"
        size = entry.size if entry is not None and entry.size is not None else (LONGEST_SIDE, LONGEST_SIDE)
        box, cut = clip_box(_corners(bbox), *size)
        if finding == "reversed" and box is not None:
            taken = in_words((box[0], box[1], box[2] - box[0], box[3] - box[1]))
            return f"bbox {brief(bbox)} is reversed, its width or height below 0; taken as {taken}"
        return f"bbox {brief(bbox)} {cut}"

    def _once(self, found: _Checked) -> _Checked:
        """Drop boxes that stand twice."""
        kept, firsts = drop_duplicates(found.owners, found.labels, found.boxes, found.crowd)
        if kept.all():
            return found
        doubles, worded = np.flatnonzero(~kept), self.log.room
        for row in doubles[:worded].tolist():
            place, first = int(found.places[row]), int(found.places[firsts[row]])
            record = self.document.plain("annotations", place)
            where = self._where(place, record, self.kept[int(found.owners[row])])
            reason = f"is the box of annotations[{first}] again, of the same class; it counts once"
            self.log.drop(self.document.source.name, where, reason, Kind.DUPLICATE_BOX)
        self.log.count("dropped", Kind.DUPLICATE_BOX, max(0, len(doubles) - worded))
        return _Checked._make(column[kept] for column in found)


def _keys(items: Iterator[tuple[int | str, int]]) -> Mapping[Any, int]:
    """Map ids to positions so that 7, 7.0 and "7" are one id."""
    found: dict[int | str, int] = {}
    for own_id, position in items:
        text = str(own_id)
        found[text] = position
        digits = text.removeprefix("-")
        if isinstance(own_id, int) or (digits.isdecimal() and len(digits) < 20 and str(int(text)) == text):
            found[int(text)] = position
    return found


def _as_record(record: Fields) -> AnnotationRecord:
    """Return what plain fields say as far as it can be used."""
    area = number(record.get("area"))
    return AnnotationRecord(
        id=id_of(record.get("id")),
        image_id=id_of(record.get("image_id")),
        category_id=id_of(record.get("category_id")),
        bbox=_numbers(record.get("bbox")),
        area=WRONG_AREA if area is None and record.get("area") is not None else area,
        iscrowd=record.get("iscrowd") in TRUE,
    )


def _numbers(value: Any) -> Box | None:
    numbers = [number(item) for item in value] if isinstance(value, list) and len(value) == 4 else []
    found = [item for item in numbers if item is not None]
    return (found[0], found[1], found[2], found[3]) if len(found) == 4 else None


def _corners(bbox: Any) -> Box:
    x, y, width, height = _numbers(bbox) or NO_BOX
    return min(x, x + width), min(y, y + height), max(x, x + width), max(y, y + height)
