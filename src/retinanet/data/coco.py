"""COCO JSON: `{"images": [...], "annotations": [...], "categories": [...]}`, boxes as [x, y, width, height].

Format: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np

from retinanet.data.dataset import Annotation, Dataset, Fault
from retinanet.data.rules import (
    LONGEST_SIDE,
    Box,
    Fence,
    ImageFiles,
    brief,
    clip_box,
    name_fault,
    number,
    read_bytes,
    refuse_escape,
    side,
    smallest_size,
)
from retinanet.errors import DataError, ImageError
from retinanet.images import read_size
from retinanet.records import Classes, GroundTruth, Ignore

LARGEST_ID = int(np.iinfo(np.int64).max)
LONGEST_ID = 200  # characters
LARGEST_AREA = float(np.finfo(np.float32).max)


def read_coco(
    json_path: Path | str,
    *,
    split: str,
    image_root: Path | str | None = None,
    images: ImageFiles = "required",
) -> Dataset:
    """Read one COCO JSON file.

    Classes are ordered by category id, gaps in the ids are kept. Images keep the order of the file; those
    without boxes count. Ids may be whole numbers or text and are compared as text. A missing `area` is the
    box's. `iscrowd: 1` becomes `Ignore.CROWD`.

    File names are relative to `image_root` or, when not given, to the first of these places that holds the
    first image that is found at all: for the JSON's folder and then its parent, the folder itself,
    `images`, `{split}`, `images/{split}`, `{split}/images`, and the same with `{split}2017`, `{split}2014`.

    Args:
        split: recorded in the result, and a part of the places above.
        images: "absent" looks at no image file; a missing size is then the smallest that holds the boxes.

    Raises:
        DataError: the file is not COCO JSON, an id is given twice, no image file is found, or a path is
            absolute, has ".." or leaves the folder by a symbolic link.
    """
    source = Path(json_path)
    document = _load(source)
    reader = _Reader(source)
    classes = reader.classes(document["categories"])
    entries = reader.entries(document["images"], needs_file=images == "required")
    root = Path(os.path.abspath(source.parent if image_root is None else image_root))
    if images == "required":
        root = reader.find_files(entries, _places(root, split) if image_root is None else [(root, root)])
    annotations = reader.annotations(document["annotations"], entries, classes)
    kept = [entry for entry in entries if entry.kept]
    return Dataset.build(
        name=source.name,
        split=split,
        root=root,
        classes=classes,
        files=[entry.file for entry in kept],
        image_ids=reader.image_ids(kept),
        sizes=reader.sizes(kept, annotations),
        annotations=annotations,
        faults=reader.faults,
    )


def write_coco(
    path: Path | str,
    *,
    classes: Classes,
    files: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    ground_truths: Sequence[GroundTruth],
    image_ids: Sequence[int] | Sequence[str] | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write a COCO JSON file, whole or not at all; `read_coco` gives back equal boxes, areas and classes.

    Annotations and, without `image_ids`, images are numbered from 1, categories keep `classes.ids`. Every
    ignored box is written as `iscrowd: 1`, the only way that COCO has to say it.

    Args:
        files: one path an image, relative to the JSON's folder or another place where `read_coco` looks.
        sizes: (width, height) in pixels.
        image_ids: one an image, distinct.
        info: plain values about the data set, which COCO keeps under `info`; left out when None.

    Raises:
        DataError: lengths differ, a file name, size or label is impossible, or the disk refuses.
    """
    ids = range(1, len(files) + 1) if image_ids is None else image_ids
    if not len(files) == len(sizes) == len(ground_truths) == len(ids):
        raise DataError(
            "write_coco needs one size and one ground truth a file; "
            f"got {len(files)} files, {len(sizes)} sizes, {len(ground_truths)} ground truths, {len(ids)} ids"
        )
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for own_id, file, (width, height), truth in zip(ids, files, sizes, ground_truths, strict=True):
        where = f"write_coco, files[{len(images)}]"
        if fault := name_fault(file):
            raise DataError(f"{where}: {fault}")
        refuse_escape(file, where)
        if not (side(width) and side(height)):
            raise DataError(f"{where}: needs sides of 1 to {LONGEST_SIDE} pixels; got {width} x {height}")
        if len(truth) and truth.classes.max() >= len(classes):
            raise DataError(
                f"{where}: needs class indices 0..{len(classes) - 1}; got {int(truth.classes.max())}"
            )
        images.append({"id": own_id, "file_name": file, "width": int(width), "height": int(height)})
        rows = zip(truth.boxes.tolist(), truth.classes, truth.areas.tolist(), truth.ignore, strict=True)
        for (x1, y1, x2, y2), label, area, ignore in rows:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": own_id,
                    "category_id": classes.ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": int(ignore != Ignore.NO),
                }
            )
    categories = [{"id": i, "name": name} for i, name in zip(classes.ids, classes.names, strict=True)]
    document: dict[str, Any] = {"images": images, "annotations": annotations, "categories": categories}
    if info is not None:
        document = {"info": dict(info), **document}
    _write_whole(Path(path), json.dumps(document, separators=(",", ":"), allow_nan=False))


def _write_whole(target: Path, text: str) -> None:
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        try:
            with draft.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror}") from None


def _load(source: Path) -> dict[str, list[Any]]:
    def refuse(literal: str) -> NoReturn:
        raise ValueError(f"{literal} is not a number in JSON")

    content = read_bytes(source)
    try:
        document = json.loads(content, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}: needs JSON; line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except RecursionError:
        raise DataError(f"{source}: needs COCO JSON; its brackets are nested too deeply for that") from None
    except ValueError as error:  # NaN, a number of thousands of digits, bytes that are not UTF-8
        raise DataError(f"{source}: needs JSON; {error}") from None
    if isinstance(document, list):
        raise DataError(
            f"{source}: needs COCO ground truth, an object with images, annotations and categories; "
            "got a list, the form of detections"
        )
    found: dict[str, list[Any]] = document if isinstance(document, dict) else {}
    for key in ("images", "annotations", "categories"):
        if not isinstance(found.get(key), list):
            came = brief(found[key]) if key in found else f"keys {', '.join(map(brief, found)) or 'none'}"
            raise DataError(f"{source}: needs COCO JSON, an object with a list {key!r}; got {came[:200]}")
    return found


def _places(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Where images may lie, in order: (the folder they are in, the folder that they may not leave)."""
    names = ["", "images", split, f"images/{split}", f"{split}/images"]
    names += [place.format(split + year) for year in ("2017", "2014") for place in ("{}", "images/{}")]
    return [(base / name, base) for base in (folder, folder.parent) for name in names]


def _whole(value: Any) -> int | None:
    """Return an id that is a whole number; 7.0, as table programs write it, is 7."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) <= LARGEST_ID else None


def _is_digits(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value.isdecimal() and len(value) < 20


def _id(value: Any) -> int | str | None:
    if isinstance(value, str) and 0 < len(value) <= LONGEST_ID and value.isprintable():
        return value
    return _whole(value)


def _numbers(value: Any) -> Box | None:
    numbers = [number(item) for item in value] if isinstance(value, list) and len(value) == 4 else []
    finite = [item for item in numbers if item is not None and math.isfinite(item)]
    return (finite[0], finite[1], finite[2], finite[3]) if len(finite) == 4 else None


@dataclass
class _Entry:
    """One record of `images`."""

    record: str
    id: int | str
    file: str
    size: tuple[int, int] | None
    kept: bool = True


class _Reader:
    """Reads the records of one file and keeps what was wrong with them."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.faults: list[Fault] = []

    def drop(self, record: str, reason: str) -> None:
        self.faults.append(Fault(self.source.name, record, reason, "dropped"))

    def repair(self, record: str, reason: str) -> None:
        self.faults.append(Fault(self.source.name, record, reason, "repaired"))

    def classes(self, records: list[Any]) -> Classes:
        names: dict[int, str] = {}
        for index, record in enumerate(records):
            where = f"{self.source}: categories[{index}]"
            fields = record if isinstance(record, dict) else {}
            name, given = fields.get("name"), fields.get("id")
            category = _whole(int(given)) if _is_digits(given) else _whole(given)
            if category is None or not isinstance(name, str) or not name.strip():
                raise DataError(f"{where}: needs a whole number 'id' and a text 'name'; got {brief(record)}")
            if category in names:
                raise DataError(
                    f"{where}: needs an id of its own; {category} is {brief(names[category])} too"
                )
            names[category] = name
        ids = sorted(names)
        try:
            return Classes(names=tuple(names[i] for i in ids), ids=tuple(ids))
        except DataError as error:
            raise DataError(f"{self.source}: categories: {error}") from None

    def entries(self, records: list[Any], *, needs_file: bool) -> list[_Entry]:
        found: dict[str, _Entry] = {}
        for index, record in enumerate(records):
            where = f"images[{index}]"
            fields = record if isinstance(record, dict) else {}
            image_id, file = _id(fields.get("id")), fields.get("file_name")
            if image_id is None:
                self.drop(where, f"id needs a whole number or text; got {brief(fields.get('id'))}")
                continue
            key, where = str(image_id), f"{where} (id {image_id})"
            if key in found:
                raise DataError(
                    f"{self.source}: {where}: needs an id of its own; {found[key].record} has the same"
                )
            if file is None and not needs_file:
                file = key
            width, height = side(fields.get("width")), side(fields.get("height"))
            entry = found[key] = _Entry(where, image_id, "", (width, height) if width and height else None)
            if not isinstance(file, str) or name_fault(file):
                entry.kept = False
                self.drop(where, f"file_name {name_fault(file)}")
                continue
            refuse_escape(file, f"{self.source}: {where}: file_name")
            entry.file = file.replace("\\", "/")  # as written on Windows
        if not any(entry.kept for entry in found.values()):
            raise DataError(
                f"{self.source}: needs at least one usable record in 'images'; got {len(records)} records"
                + (f". {self.faults[0]}" if self.faults else "")
            )
        return list(found.values())

    def find_files(self, entries: list[_Entry], places: list[tuple[Path, Path]]) -> Path:
        """Choose the folder of the images; drop entries without a file; fill in missing sizes."""
        named = [entry for entry in entries if entry.kept]
        folders = [(place, base) for place, base in places if os.path.isdir(place)]
        chosen = ((p, b) for entry in named for p, b in folders if os.path.isfile(p / entry.file))
        place, base = next(chosen, (None, None))
        if place is None or base is None:
            tried = ", ".join(str(place) for place, _ in places)
            raise DataError(
                f"{self.source}: none of its {len(named)} image files was found, {brief(named[0].file)} for "
                f"one. Tried: {tried}. Put them in one of these places or give their folder as image_root"
            )
        fence = Fence(base)
        for entry in named:
            if not fence.holds_file(place / entry.file):
                entry.kept = False
                self.drop(entry.record, f"there is no image file {place / entry.file}")
            elif entry.size is None:
                try:
                    entry.size = read_size(place / entry.file)
                except ImageError as error:
                    entry.kept = False
                    self.drop(entry.record, f"width and height are missing and cannot be read: {error}")
        if not any(entry.kept for entry in named):
            raise DataError(f"{self.source}: none of its {len(named)} images is usable. {self.faults[-1]}")
        return place

    def annotations(self, records: list[Any], entries: list[_Entry], classes: Classes) -> list[Annotation]:
        owners: dict[str, tuple[int, _Entry]] = {}
        kept = 0
        for entry in entries:
            owners[str(entry.id)] = (kept, entry)
            kept += entry.kept
        labels = {str(category): label for label, category in enumerate(classes.ids)}
        found, numbered = [], []
        for index, record in enumerate(records):
            fields = record if isinstance(record, dict) else {}
            own_id, image_id, category = (_id(fields.get(key)) for key in ("id", "image_id", "category_id"))
            where = f"annotations[{index}]" if own_id is None else f"annotations[{index}] (id {own_id})"
            if str(image_id) not in owners or image_id is None:
                self.drop(where, f"image_id needs the id of an image; got {brief(fields.get('image_id'))}")
                continue
            position, entry = owners[str(image_id)]
            if not entry.kept:  # went with its image, whose fault is named
                continue
            where = f"{where} of {entry.file}"
            if str(category) not in labels or category is None:
                given = brief(fields.get("category_id"))
                self.drop(where, f"category_id needs the id of a category; got {given}")
                continue
            box = self._box(where, fields.get("bbox"), entry)
            if box is None:
                continue
            area = self._area(where, fields.get("area"), box)
            ignore = Ignore.CROWD if fields.get("iscrowd") == 1 else Ignore.NO
            found.append(Annotation(position, box, labels[str(category)], area, ignore, index))
            numbered.append(own_id)
        ids = [own_id for own_id in numbered if isinstance(own_id, int)]
        if len(set(ids)) == len(found):
            return [item._replace(id=own_id) for item, own_id in zip(found, ids, strict=True)]
        self.repair("annotations", "ids need distinct whole numbers; they became the places in the list")
        return found

    def _box(self, where: str, bbox: Any, entry: _Entry) -> Box | None:
        numbers = _numbers(bbox)
        if numbers is None:
            self.drop(where, f"bbox needs four finite numbers [x, y, width, height]; got {brief(bbox)}")
            return None
        x, y, width, height = numbers
        if width <= 0 or height <= 0:
            self.drop(where, f"bbox needs a width and height above 0; got {brief(bbox)}")
            return None
        box, reason = clip_box((x, y, x + width, y + height), *(entry.size or (LONGEST_SIDE, LONGEST_SIDE)))
        if reason is not None:
            (self.drop if box is None else self.repair)(where, f"bbox {brief(bbox)} {reason}")
        return box

    def _area(self, where: str, given: Any, box: Box) -> float:
        area = number(given)
        if area is not None and 0 <= area <= LARGEST_AREA:
            return area
        if given is not None:
            self.repair(where, f"area needs a number from 0; got {brief(given)}; it became the box's")
        return (box[2] - box[0]) * (box[3] - box[1])

    def image_ids(self, entries: list[_Entry]) -> list[int] | list[str]:
        numbers = [entry.id for entry in entries if isinstance(entry.id, int)]
        if len(numbers) == len(entries):
            return numbers
        if numbers:
            self.repair("images", "ids need to be all whole numbers or all text; they became text")
        return [str(entry.id) for entry in entries]

    def sizes(self, entries: list[_Entry], annotations: list[Annotation]) -> list[tuple[int, int]]:
        boxes: dict[int, list[Box]] = {i: [] for i, entry in enumerate(entries) if entry.size is None}
        for annotation in annotations:
            if annotation.image in boxes:
                boxes[annotation.image].append(annotation.box)
        for index, own in boxes.items():
            width, height = entries[index].size = smallest_size(own)
            became = f"{width} x {height}, the least that holds the boxes"
            self.repair(entries[index].record, f"width and height are missing; they became {became}")
        return [entry.size for entry in entries if entry.size is not None]
