"""Hugging Face data sets on disk, with a column `objects` of boxes and classes: parquet files, or `save_to_disk`.

Boxes may be xyxy or xywh: nothing in the files says which. It has to be told, or to be proven by the boxes: where one
reading turns at least one in a hundred around or out of its image and the other none.
Format: https://huggingface.co/docs/datasets/object_detection, https://huggingface.co/docs/datasets/loading#parquet
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from retinanet.data.arrow_files import hugging_face_splits, read_batches, read_class_names
from retinanet.data.collecting import Collector, Size, Where, clean_name
from retinanet.data.dataset import Dataset
from retinanet.data.image_files import suffix_of
from retinanet.data.kinds import Kind
from retinanet.data.policies import TRUE
from retinanet.data.rules import Box, Fence, ImageFiles, brief, number, side
from retinanet.errors import DataError, DiskError
from retinanet.folders import cache_folder, write_bytes
from retinanet.records import Classes, Ignore

BoxFormat: TypeAlias = Literal["auto", "xyxy", "xywh"]

BOXES = ("bbox", "bboxes", "boxes", "box")
LABELS = ("category", "categories", "label", "labels", "category_id", "class", "class_id")
# Of all boxes; fewer may be wrong themselves, while the wrong reading contradicts about half of them.
PROVING_SHARE = 0.01
SLACK = 1.0  # pixels that a box may reach beyond its image and prove nothing
LARGEST_IMAGE = 2**28  # bytes of one file


class _Row(NamedTuple):
    """One image: its file relative to the root, its size where it is known, and its objects."""

    number: int
    id: Any
    file: str | None
    reason: str
    size: Size | None
    boxes: list[Any]
    labels: list[Any]
    extra: dict[str, list[Any]]


@dataclass
class Evidence:
    """How many boxes contradict each reading of four numbers: reversed, or more than a pixel outside the image."""

    boxes: int = 0
    against_xyxy: int = 0
    against_xywh: int = 0
    largest: float = 0.0

    def take(self, values: Sequence[float], size: Size | None) -> None:
        """Hold a box of finite numbers against both readings.

        >>> evidence = Evidence(); evidence.take((30, 5, 20, 10), (60, 40)); evidence.proven()
        'xywh'
        """
        a, b, c, d = values
        width, height = size or (math.inf, math.inf)
        self.boxes += 1
        self.largest = max(self.largest, *map(abs, values))
        self.against_xyxy += c < a or d < b or c > width + SLACK or d > height + SLACK
        self.against_xywh += c < 0 or d < 0 or a + c > width + SLACK or b + d > height + SLACK

    def proven(self) -> Literal["xyxy", "xywh"] | None:
        """Return the one reading that no box contradicts, where a share of them contradict the other."""
        against = max(self.against_xyxy, self.against_xywh)
        if min(self.against_xyxy, self.against_xywh) or against == 0 or against < PROVING_SHARE * self.boxes:
            return None
        return "xywh" if self.against_xyxy else "xyxy"


def read_hugging_face(
    source: Path | str,
    *,
    split: str,
    images: ImageFiles = "required",
    image_root: Path | str | None = None,
    box_format: BoxFormat = "auto",
) -> Dataset:
    """Read one split of a parquet file, a folder of them, or a folder that `datasets` saved to disk.

    `objects` holds lists of boxes (`bbox`, `bboxes`, `boxes`) and classes (`category`, `categories`, `label` ...), or
    is a list of such records; `area` and `iscrowd` count where they are there. Classes are named by the
    features in the file; else they are the values in all splits, sorted. Image ids are those of `image_id`, else row
    numbers. Images in the file itself are written, each once and named by its content, into the cache folder
    `images` (see `folders.cache_folder`): nothing is written into the data set. Images given by path are relative to
    `image_root`, else to the folder.

    Args:
        box_format: "auto" takes the reading that the boxes of all splits prove.
        images: "absent" looks at no image; a missing size is then the smallest that holds the boxes.

    Raises:
        MissingExtraError: pyarrow is not installed.
        DataError: the files cannot be read, have no `objects`, no class or no usable image, or the boxes prove nothing.
    """
    source = Path(os.path.abspath(source))
    splits = hugging_face_splits(source)
    key = split if split in splits else ""
    if key not in splits:
        raise DataError(f"{source}: has no split {split!r}; there are: {', '.join(splits) or 'none'}")
    folder = source if source.is_dir() else source.parent
    fence = Fence(folder)
    for path in (path for paths in splits.values() for path in paths):
        if not fence.holds_file(path):
            raise DataError(f"{path}: needs a file of the data set; it is not there")
    evidence, values, names = Evidence(), set[Any](), None
    for name, paths in splits.items():
        for path in paths:
            names = names or read_class_names(path, LABELS)
            sized = images == "absent" or name != key
            for row in _rows(path, with_images=False):
                values.update(label for label in row.labels if type(label) in (int, str))
                # Without a size here, boxes of the split asked for are held against its images below.
                if sized or row.size:
                    _take_evidence(evidence, row, row.size)
    classes, index = _classes(names, values, source)
    root = folder if image_root is None else Path(os.path.abspath(image_root))
    reader = _Reader(source, root, images)
    for path in splits[key]:
        reader.read(path, evidence)
    form = _decide(box_format, evidence, source)
    reader.take_boxes(form, index, classes)
    return reader.gathered.finish(
        name=source.name, split=split, classes=classes, source=source, image_ids=reader.image_ids()
    )


def _classes(names: list[str] | None, values: set[Any], source: Path) -> tuple[Classes, dict[Any, int]]:
    """Return the classes, and the index of each value that an object's class may have."""
    try:
        if names:
            classes = Classes(tuple(names))
            return classes, {**{name: i for i, name in enumerate(names)}, **{i: i for i in range(len(names))}}
        words = sorted(value for value in values if isinstance(value, str) and value.strip())
        numbers = sorted(value for value in values if type(value) is int and 0 <= value < 2**31)
        if bool(words) == bool(numbers):
            got = "both" if words else "none"
            raise DataError(f"the classes of objects need to be all text or all whole numbers; got {got}")
        if words:
            return Classes(tuple(words)), {word: i for i, word in enumerate(words)}
        return Classes(tuple(map(str, numbers)), tuple(numbers)), {
            value: i for i, value in enumerate(numbers)
        }
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def _decide(told: BoxFormat, evidence: Evidence, source: Path) -> BoxFormat:
    if evidence.boxes and evidence.largest <= 1:
        raise DataError(
            f"{source}: needs boxes in pixels; all {evidence.boxes:,} lie between 0 and 1, as shares of their images. "
            "Multiply them by width and height"
        )
    form = evidence.proven() if told == "auto" else told
    if form is None and evidence.boxes:
        raise DataError(
            f"{source}: nothing says whether boxes are xyxy or xywh: of {evidence.boxes:,}, {evidence.against_xyxy:,} "
            f"contradict xyxy and {evidence.against_xywh:,} contradict xywh. Tell it: box_format='xywh' (as COCO's) "
            f"or 'xyxy'; on the command line, `retinanet data convert {source} OUT --format coco --box-format xywh`"
        )
    return form or "xyxy"


def _take_evidence(evidence: Evidence, row: _Row, size: Size | None) -> None:
    for box in row.boxes:
        values = _values(box)
        if values is not None and all(math.isfinite(value) for value in values):
            evidence.take(values, size)


def _values(box: Any) -> Box | None:
    values = [number(value) for value in box] if isinstance(box, list) and len(box) == 4 else []
    found = [value for value in values if value is not None]
    return (found[0], found[1], found[2], found[3]) if len(found) == 4 else None


def _rows(path: Path, *, with_images: bool) -> Iterator[_Row]:
    """Yield the rows of a file; an image's bytes are in the cache when its row comes."""

    def wanted(names: Sequence[str]) -> list[str]:
        if "objects" not in names:
            raise DataError(
                f"{path}: needs a column 'objects'; there are: {', '.join(map(brief, names[:12]))}"
            )
        images = [name for name in ("image", "img") if name in names][:1] if with_images else []
        return ["objects", *images, *(name for name in ("image_id", "width", "height") if name in names)]

    place = 0
    for columns in read_batches(path, wanted):
        image = next((columns[name] for name in ("image", "img") if name in columns), None)
        for offset, objects in enumerate(columns["objects"]):
            own = {name: columns[name][offset] for name in ("image_id", "width", "height") if name in columns}
            width, height = side(own.get("width")), side(own.get("height"))
            file, reason = _image(image[offset]) if image else (None, "there is no column 'image'")
            boxes, labels, extra = _objects(objects)
            size = (width, height) if width and height else None
            yield _Row(place, own.get("image_id"), file, reason, size, boxes, labels, extra)
            place += 1


def _objects(given: Any) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
    """Return boxes, classes and what else is known of each object, from a table of lists or a list of tables."""
    if isinstance(given, list):
        records = [item for item in given if isinstance(item, dict)]
        given = {name: [record.get(name) for record in records] for name in (records[0] if records else {})}
    fields = given if isinstance(given, dict) else {}
    table = {name: column for name, column in fields.items() if isinstance(column, list)}
    boxes = next((table[name] for name in BOXES if name in table), [])
    labels = next((table[name] for name in LABELS if name in table), [])
    extra = {name: table[name] for name in ("area", "iscrowd", "is_crowd") if name in table}
    return boxes, labels, {name: column for name, column in extra.items() if len(column) == len(boxes)}


def _image(given: Any) -> tuple[str | None, str]:
    """Return where an image is: an absolute path in the cache, or a path as given; or None and why."""
    content, path = given, given
    if isinstance(given, dict):
        content, path = given.get("bytes"), given.get("path")
    if isinstance(content, bytes):
        if not 0 < len(content) <= LARGEST_IMAGE:
            return None, f"needs an image of 1 to {LARGEST_IMAGE:,} bytes; got {len(content):,}"
        return str(_cached(content)), ""
    return (path, "") if isinstance(path, str) and path else (None, f"needs an image; got {brief(given)}")


def _cached(content: bytes) -> Path:
    name = hashlib.sha256(content).hexdigest()
    path = cache_folder("images") / name[:2] / f"{name}{suffix_of(content)}"
    try:
        if not (path.is_file() and path.stat().st_size == len(content)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)
    except (OSError, DiskError) as error:
        raise DataError(
            f"{path}: an image cannot be kept in the cache: {error}; set RETINANET_CACHE"
        ) from None
    return path


class _Reader:
    """Reads the rows of one split, keeps what is wrong with them, and takes their boxes once their form is known."""

    def __init__(self, source: Path, root: Path, images: ImageFiles) -> None:
        self.source = source
        self.images = images
        self.root = root
        self.gathered = Collector(root, images=images)
        self.kept: list[tuple[str, _Row]] = []

    def read(self, path: Path, evidence: Evidence) -> None:
        """Take the images of a file; hold its boxes against their sizes where the file has no sizes."""
        name = os.path.relpath(path, self.source) if self.source.is_dir() else path.name
        for row in _rows(path, with_images=self.images == "required"):
            where = Where(name, f"row {row.number}")
            if self.images == "absent":
                file: str | None = f"row-{row.number}"
            else:
                file = self._file(row, where)
            position = None if file is None else self.gathered.another_image(file, where, row.size)
            if position is None:
                continue
            self.kept.append((name, row._replace(file=None)))
            if row.size is None and self.images == "required":
                _take_evidence(evidence, row, self.gathered.sizes[position])

    def _file(self, row: _Row, where: Where) -> str | None:
        if row.file is None:
            self.gathered.drop(
                where, Kind.MISSING_IMAGE, row.reason, "put the image there, or remove the row"
            )
            return None
        cache = cache_folder("images")
        embedded = Path(row.file).is_relative_to(cache)
        if embedded and not self.gathered.files:
            self.gathered.root, self.gathered.fence = cache, Fence(cache)
        root = self.gathered.root
        if embedded != (root == cache):
            reason = "needs its image in the file, or as a path, as the other rows"
            self.gathered.drop(where, Kind.MISSING_IMAGE, reason, "give all images in one way")
            return None
        return clean_name(row.file, root, f"{self.source}: {where.file}: {where.record}")

    def take_boxes(self, form: BoxFormat, index: dict[Any, int], classes: Classes) -> None:
        for position, (name, row) in enumerate(self.kept):
            if len(row.boxes) != len(row.labels):
                reason = f"needs one class a box; got {len(row.boxes)} boxes and {len(row.labels)} classes"
                where = Where(name, f"row {row.number}")
                self.gathered.drop(where, Kind.UNKNOWN_CLASS, reason, "correct the row's objects")
                continue
            for place, (box, label) in enumerate(zip(row.boxes, row.labels, strict=True)):
                where = Where(name, f"row {row.number}, object {place}")
                values = _values(box)
                known = index.get(label) if type(label) in (int, str) else None
                if values is None:
                    reason = f"needs four numbers; got {brief(box)}"
                    self.gathered.drop(where, Kind.NOT_A_NUMBER, reason, "correct the box")
                elif known is None:
                    reason = f"needs one of {len(classes)} classes; got {brief(label)}"
                    self.gathered.drop(where, Kind.UNKNOWN_CLASS, reason, "correct the class")
                else:
                    a, b, c, d = values
                    corners = (a, b, a + c, b + d) if form == "xywh" else values
                    crowd = any(
                        row.extra.get(key, [0] * (place + 1))[place] in TRUE
                        for key in ("iscrowd", "is_crowd")
                    )
                    ignore = Ignore.CROWD if crowd else Ignore.NO
                    area = number(row.extra["area"][place]) if "area" in row.extra else None
                    usable = area if area is not None and 0 <= area < 2**40 else None
                    self.gathered.box(position, corners, known, where, ignore=ignore, area=usable)

    def image_ids(self) -> list[int] | list[str]:
        """Return the rows' own ids where they are distinct whole numbers or words, else their places."""
        ids = [row.id for _, row in self.kept]
        if len(set(map(str, ids))) == len(ids):
            if all(type(value) is int and abs(value) < 2**63 for value in ids):
                return ids
            if all(isinstance(value, str) and value.isprintable() and 0 < len(value) <= 200 for value in ids):
                return ids
        return list(range(len(ids)))
