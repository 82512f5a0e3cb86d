"""Open Images CSV: `ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,...`, corners as shares of the image.

A box with `IsGroupOf` 1 surrounds many objects and becomes `Ignore.CROWD`.
Format: https://storage.googleapis.com/openimages/web/download_v7.html#df-description
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from retinanet.data.collecting import Collector, Where
from retinanet.data.csv_files import folders_of, read_rows
from retinanet.data.dataset import Dataset
from retinanet.data.image_files import is_image_name
from retinanet.data.kinds import Kind
from retinanet.data.policies import decimal
from retinanet.data.rules import brief, name_fault, refuse_escape
from retinanet.errors import DataError
from retinanet.records import Classes, Ignore

NEEDED = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
GROUP = "IsGroupOf"  # which may be missing
DESCRIPTIONS = "class-descriptions*.csv"
PLACES = ("{split}", "images", "images/{split}", "{split}/images", "{split}/data", "")
ABSENT_SHOWN = 3


def read_open_images(
    csv_path: Path | str,
    *,
    split: str,
    image_root: Path | str | None = None,
    together: Sequence[Path] = (),
    folder: Path | str | None = None,
) -> Dataset:
    """Read one file of boxes as Open Images publishes them.

    Classes are the labels of the file and of those of the other splits, named by `class-descriptions*.csv` where it is
    beside them, sorted by name. Image ids are the file's, a box's id is the number of its line. The image `ID` is
    `{split}/ID.jpg`, `images/ID.jpg`, `images/{split}/ID.jpg`, `{split}/images/ID.jpg`, `{split}/data/ID.jpg` or
    `ID.jpg` in the CSV's folder or the one above. Images that are not there, as of a partial download, are one fault
    together. Sizes are read from the images, which the format cannot do without.

    Args:
        image_root: the folder that the images are looked for in, anywhere.
        together: the files of the other splits.
        folder: as of `read_csv`, for the descriptions of the classes.

    Raises:
        DataError: no sound CSV, a missing column, none of its images found, a path that leaves the folder.
    """
    source = Path(os.path.abspath(csv_path))
    named = _descriptions(source, folder)
    labels, wanted = set[str](), set[str]()
    for line in _lines(source):
        labels.add(line.label)
        wanted.add(line.image)
    for path in together:
        labels.update(line.label for line in _lines(path))
    classes, index = _classes(labels - {""}, named, source)
    bases = (
        [source.parent, source.parent.parent] if image_root is None else [Path(os.path.abspath(image_root))]
    )
    images = _Images(bases, split, source, wanted)
    gathered = Collector(images.root)
    for line in _lines(source):
        where = Where(source.name, f"line {line.number}")
        file = images.file(line.image, where, gathered)
        position = None if file is None else gathered.image(file, where)
        if position is not None:
            _take(line, position, index, where, gathered)
    images.name_absent(gathered)
    ids = [images.ids[file] for file in gathered.files]
    return gathered.finish(name=source.name, split=split, classes=classes, source=source, image_ids=ids)


def is_open_images(path: Path) -> bool:
    """Return whether a CSV file's first line names the columns of Open Images."""
    try:
        row = next(read_rows(path), None)
    except DataError:
        return False
    return row is not None and set(NEEDED) <= set(row.fields)


class _Line(NamedTuple):
    """A line of the file: its number, and what it says, as text."""

    number: int
    image: str
    label: str
    x1: str
    x2: str
    y1: str
    y2: str
    group: str


def _lines(path: Path) -> Iterator[_Line]:
    """Yield a file line by line, as it may be larger than memory; what is missing at a line's end is empty."""
    rows = read_rows(path)
    columns = next((row.fields for row in rows), [])
    missing = [name for name in NEEDED if columns and name not in columns]
    if missing:
        raise DataError(f"{path}: needs the columns {', '.join(NEEDED)}; {missing[0]} is missing")
    if not columns:
        return
    nowhere = [""] * (len(columns) + 1)  # also where a column stands that the file does not have
    pick = itemgetter(*(columns.index(name) if name in columns else -1 for name in (*NEEDED, GROUP)))
    for row in rows:
        fields = row.fields[: len(columns)]
        yield _Line(row.number, *pick(fields + nowhere[len(fields) :]))


def _take(line: _Line, image: int, index: dict[str, int], where: Where, gathered: Collector) -> None:
    label = index.get(line.label)
    if label is None:
        gathered.drop(
            where, Kind.UNKNOWN_CLASS, "needs a LabelName; it is empty", "fill it in, or remove the line"
        )
        return
    texts = [line.x1, line.y1, line.x2, line.y2]
    values = [value for value in map(decimal, texts) if value is not None]
    if len(values) < 4:
        reason = f"XMin, YMin, XMax, YMax need four numbers from 0 to 1; got {brief(texts)}"
        gathered.drop(where, Kind.NOT_A_NUMBER, reason, "correct them")
        return
    width, height = gathered.sizes[image] or (1, 1)
    x1, y1, x2, y2 = values
    box = (x1 * width, y1 * height, x2 * width, y2 * height)
    ignore = Ignore.CROWD if line.group == "1" else Ignore.NO
    gathered.box(image, box, label, where, ignore=ignore, own_id=line.number)


def _classes(labels: set[str], named: dict[str, str], source: Path) -> tuple[Classes, dict[str, int]]:
    """Return the classes and the index of each label; two labels of one name keep the label behind it."""
    if not labels:
        raise DataError(f"{source}: needs a box with a LabelName; there is none")
    names = [named.get(label, label) for label in labels]
    shown = {
        label: f"{name} ({label})" if names.count(name) > 1 else name
        for label, name in zip(labels, names, strict=True)
    }
    order = sorted(labels, key=lambda label: (shown[label], label))
    try:
        classes = Classes(tuple(shown[label] for label in order))
    except DataError as error:
        raise DataError(f"{source}: classes: {error}") from None
    return classes, {label: place for place, label in enumerate(order)}


def _descriptions(source: Path, home: Path | str | None) -> dict[str, str]:
    """Return the name of each label, from the file of descriptions for boxes where there are several."""
    for folder in folders_of(source, home):
        files = sorted(folder.glob(DESCRIPTIONS), key=lambda path: ("box" not in path.name, path.name))
        if files:
            rows = [row.fields for row in read_rows(files[0]) if len(row.fields) == 2]
            return {label: name for label, name in rows if name and label != "LabelName"}
    return {}


class _Images:
    """Finds the file of an id, and remembers the ids without one."""

    def __init__(self, bases: Sequence[Path], split: str, source: Path, wanted: set[str]) -> None:
        splits = dict.fromkeys([split, {"val": "validation"}.get(split, split)])
        inside = list(dict.fromkeys(place.format(split=name) for place in PLACES for name in splits))
        self.source = source
        self.tried = [base / place for base in bases for place in inside]
        self.absent: dict[str, Where] = {}
        self.ids: dict[str, str] = {}  # by file
        self.root, self.present = bases[0], dict[str, str]()
        for base in bases:
            present = _images_in(base, inside)
            if wanted & present.keys():
                self.root, self.present = base, present
                break

    def file(self, image_id: str, where: Where, gathered: Collector) -> str | None:
        """Return an image's path relative to the root."""
        found = self.present.get(image_id)
        if found is not None:
            self.ids[found] = image_id
            return found
        if fault := name_fault(image_id):
            gathered.drop(where, Kind.BAD_FILE_NAME, f"ImageID {fault}", "fill it in, or remove the line")
            return None
        refuse_escape(image_id, f"{self.source}: {where.record}: ImageID")
        self.absent.setdefault(image_id, where)
        return None

    def name_absent(self, gathered: Collector) -> None:
        """Make one fault of all the images that are not there, or a `DataError` where none is."""
        if not self.absent:
            return
        shown = ", ".join(list(self.absent)[:ABSENT_SHOWN])
        more = f" and {len(self.absent) - ABSENT_SHOWN:,} more" if len(self.absent) > ABSENT_SHOWN else ""
        if not self.present:
            tried = ", ".join(str(place) for place in self.tried)
            raise DataError(
                f"{self.source}: none of its images was found, {shown}{more}. Tried ID.jpg in: {tried}"
            )
        reason = f"{len(self.absent):,} listed images are not there: {shown}{more}"
        fix = "download them, or leave it so: the others are used"
        gathered.drop(Where(self.source.name, "ImageID"), Kind.MISSING_IMAGE, reason, fix)


def _images_in(base: Path, inside: Sequence[str]) -> dict[str, str]:
    """Return the image files of some folders by their names without ending, relative to the base."""
    present: dict[str, str] = {}
    for place in inside:
        names = sorted(os.listdir(base / place)) if os.path.isdir(base / place) else []
        for name in names:
            stem = os.path.splitext(name)[0]
            if is_image_name(name):
                present.setdefault(stem, f"{place}/{name}" if place else name)
    return present
