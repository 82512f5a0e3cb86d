"""The sections `categories` and `images`: classes, and one entry an image."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from retinanet.data.coco.document import Document, ImageRecord
from retinanet.data.faults import FaultLog
from retinanet.data.finding import files_there, find_place
from retinanet.data.kinds import Kind
from retinanet.data.rules import Fence, brief, name_fault, refuse_escape, side
from retinanet.errors import DataError, ImageError
from retinanet.images import read_size
from retinanet.records import Classes, Float32Array, Int64Array

LARGEST_ID = int(np.iinfo(np.int64).max)
LONGEST_ID = 200  # characters


def whole(value: Any) -> int | None:
    """Return an id that is a whole number; 7.0, as table programs write it, is 7."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) <= LARGEST_ID else None


def id_of(value: Any) -> int | str | None:
    """Return an id, a whole number or short text; None for what is neither."""
    if isinstance(value, str):
        return value if 0 < len(value) <= LONGEST_ID and value.isprintable() else None
    return whole(value)


def _is_digits(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value.isdecimal() and len(value) < 20


@dataclass(slots=True)
class Entry:
    """One record of `images`."""

    record: str
    id: int | str
    file: str
    size: tuple[int, int] | None
    kept: bool = True
    same: Entry | None = None  # an earlier record of the same file, which has this one's boxes as well


def read_classes(document: Document) -> Classes:
    """Return the classes, ordered by id; gaps in the ids are kept.

    Raises:
        DataError: one lacks an id or a name, or has those of another.
    """
    names: dict[int, str] = {}
    for index in range(len(document["categories"])):
        where = f"{document.source}: categories[{index}]"
        record = document.plain("categories", index)
        fields = record if isinstance(record, dict) else {}
        name, given = fields.get("name"), fields.get("id")
        category = whole(int(given)) if _is_digits(given) else whole(given)
        if category is None or not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}: needs a whole number 'id' and a text 'name'; got {brief(record)}")
        if category in names:
            raise DataError(f"{where}: needs an id of its own; {category} is {brief(names[category])} too")
        names[category] = name
    ids = sorted(names)
    try:
        return Classes(names=tuple(names[i] for i in ids), ids=tuple(ids))
    except DataError as error:
        raise DataError(f"{document.source}: categories: {error}") from None


def read_entries(document: Document, log: FaultLog, *, needs_file: bool) -> list[Entry]:
    """Return the images in the order of the file, those without a usable file name marked as not kept.

    Raises:
        DataError: an id is given twice, a path leaves the folder, or no record is usable.
    """
    source = document.source
    found: dict[str, Entry] = {}
    by_file: dict[str, Entry] = {}
    for start, records in document.chunks("images", ImageRecord):
        for index, record in enumerate(records, start):
            given, file, width, height = _fields(record)
            image_id = id_of(given)
            if image_id is None and not log.room:
                log.count("dropped", Kind.MISSING_ID, 1)
                continue
            if image_id is None:
                reason = f"id needs a whole number or text; got {brief(given)}"
                log.drop(source.name, f"images[{index}]", reason, Kind.MISSING_ID)
                continue
            key, where = str(image_id), f"images[{index}] (id {image_id})"
            if key in found:
                raise DataError(
                    f"{source}: {where}: needs an id of its own; {found[key].record} has the same"
                )
            if file is None and not needs_file:
                file = key
            sides = side(width), side(height)
            entry = Entry(where, image_id, "", (sides[0], sides[1]) if sides[0] and sides[1] else None)
            found[key] = entry
            fault = name_fault(file)
            if fault is not None:
                entry.kept = False
                log.drop(source.name, where, f"file_name {fault}", Kind.BAD_FILE_NAME)
                continue
            refuse_escape(file, f"{source}: {where}: file_name")
            entry.file = file.replace("\\", "/")  # as written on Windows
            if not needs_file:  # nothing but names: results are compared by the ids of all records
                continue
            entry.same = by_file.setdefault(posixpath.normpath(entry.file), entry)
            if entry.same is entry:
                entry.same = None
                continue
            entry.kept = False
            reason = f"is the file of {entry.same.record} again; it counts once, with the boxes of both"
            log.repair(source.name, where, reason, Kind.DUPLICATE_LISTING)
    if not any(entry.kept for entry in found.values()):
        count = len(document["images"])
        raise DataError(
            f"{source}: needs at least one usable record in 'images'; got {count} records"
            + (f". {log.kept[0]}" if log.kept else "")
        )
    return list(found.values())


def _fields(record: ImageRecord | dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    if isinstance(record, ImageRecord):
        return record.id, record.file_name, record.width, record.height
    return record.get("id"), record.get("file_name"), record.get("width"), record.get("height")


def find_files(
    source: Path, entries: Sequence[Entry], places: Sequence[tuple[Path, Path]], log: FaultLog
) -> Path:
    """Choose the folder of the images; drop entries without a file; fill in missing sizes.

    Raises:
        DataError: no image file is found or usable, or one leaves the data folder.
    """
    named = [entry for entry in entries if entry.kept]
    place, base = find_place([entry.file for entry in named], places, source)
    there = files_there(place, Fence(base), [entry.file for entry in named])
    for entry, is_there in zip(named, there.tolist(), strict=True):
        if not is_there:
            entry.kept = False
            reason = f"there is no image file {place / entry.file}"
            log.drop(source.name, entry.record, reason, Kind.MISSING_IMAGE)
        elif entry.size is None:
            try:
                entry.size = read_size(place / entry.file)
            except ImageError as error:
                entry.kept = False
                reason = f"width and height are missing and cannot be read: {error}"
                log.drop(source.name, entry.record, reason, Kind.UNREADABLE_IMAGE)
    if not any(entry.kept for entry in named):
        raise DataError(f"{source}: none of its {len(named)} images is usable. {log.kept[-1]}")
    return place


def image_ids(source: Path, entries: Sequence[Entry], log: FaultLog) -> list[int] | list[str]:
    """Return the ids as given, all as text where some are."""
    numbers = [entry.id for entry in entries if isinstance(entry.id, int)]
    if len(numbers) == len(entries):
        return numbers
    if numbers:
        reason = "ids need to be all whole numbers or all text; they became text"
        log.repair(source.name, "images", reason, Kind.MIXED_IDS)
    return [str(entry.id) for entry in entries]


def image_sizes(
    source: Path, entries: Sequence[Entry], owners: Int64Array, boxes: Float32Array, log: FaultLog
) -> NDArray[np.int32]:
    """Return `[N, 2]` widths and heights; one that nothing tells is the least that holds the image's boxes."""
    sizes = np.array([entry.size or (0, 0) for entry in entries], np.int32)
    unknown = np.flatnonzero(sizes[:, 0] == 0)
    if len(unknown):
        least = np.ones_like(sizes)
        np.maximum.at(least, owners, np.ceil(boxes[:, 2:]).astype(np.int32))
        sizes[unknown] = least[unknown]
    for index in unknown.tolist():
        became = f"{sizes[index, 0]} x {sizes[index, 1]}, the least that holds the boxes"
        reason = f"width and height are missing; they became {became}"
        log.repair(source.name, entries[index].record, reason, Kind.MISSING_SIZE)
    return sizes
