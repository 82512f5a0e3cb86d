"""CSV as keras-retinanet reads it: `path,x1,y1,x2,y2,class`, a line a box; `path,,,,,` is an image without objects.

Corners are pixels and continuous, x2 and y2 not included. Where the first line names the columns they may stand in any
order and among others (`filename,width,height,class,xmin,ymin,xmax,ymax`). A file `classes.csv` beside it, a line
`class,id` each, orders the classes.
Format: https://github.com/fizyr/keras-retinanet#csv-datasets
"""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from retinanet.data.collecting import Collector, Size, Where, clean_name
from retinanet.data.dataset import Dataset
from retinanet.data.finding import find_place, image_places
from retinanet.data.kinds import Kind
from retinanet.data.policies import decimal, whole
from retinanet.data.rules import ImageFiles, brief, name_fault, side
from retinanet.errors import DataError
from retinanet.records import Classes

CLASS_FILES = ("classes.csv", "class_mapping.csv", "class_mappings.csv", "mapping.csv")
ID_HEADERS = ("id", "classid", "categoryid", "labelid", "index", "classindex")  # in a class file
LONGEST_LINE = 2**16  # characters
COORDINATES = ("x1", "y1", "x2", "y2")
COLUMNS = ("path", *COORDINATES, "class")
# What each column is called where the first line names it, compared in small letters without "_", "-" and spaces.
CALLED = {
    "path": ("path", "filename", "filepath", "file", "image", "imagepath", "imagename", "imgpath", "imgname"),
    "x1": ("x1", "xmin", "left"),
    "y1": ("y1", "ymin", "top"),
    "x2": ("x2", "xmax", "right"),
    "y2": ("y2", "ymax", "bottom"),
    "class": ("class", "classname", "label", "category", "name"),
    "width": ("width", "imagewidth"),
    "height": ("height", "imageheight"),
}


class Row(NamedTuple):
    """A line of a table: its number, and its fields without the spaces around them."""

    number: int
    fields: list[str]


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the lines of a CSV file that are not empty, one at a time: the file may be larger than memory.

    Fields are separated by commas; where the first line has none, by semicolons or else tabs.

    Raises:
        DataError: not a file of text in UTF-8, a line of more than 65,536 characters, a quote without an end.
    """
    reader = None
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device would block or never end
            raise DataError(f"{path}: needs a file; it is a folder or a device")
        with path.open(encoding="utf-8-sig") as stream:
            first = stream.readline(LONGEST_LINE)
            separator = next((mark for mark in ",;\t" if mark in first), ",")
            stream.seek(0)
            reader = csv.reader(_lines(stream, path), delimiter=separator, strict=True)
            for fields in reader:
                if fields:
                    yield Row(reader.line_num, [field.strip() for field in fields])
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: needs text in UTF-8; {error}") from None
    except csv.Error as error:
        number = reader.line_num if reader else 1
        raise DataError(f"{path}: line {number}: needs sound CSV; {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(stream: TextIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), ""), 1):
        if len(line) > LONGEST_LINE:
            raise DataError(f"{path}: line {number}: needs at most {LONGEST_LINE:,} characters")
        yield line


def _plain(name: str) -> str:
    """Return a column's name in small letters, without what people put between words."""
    return "".join(c for c in name.lower() if c not in "_- ")


def columns_of(row: Row) -> dict[str, int] | None:
    """Return where each column stands, for a first line that names them all; None for any other line."""
    plain = [_plain(field) for field in row.fields]
    found = {
        column: next((plain.index(name) for name in names if name in plain), -1)
        for column, names in CALLED.items()
    }
    if min(found[column] for column in COLUMNS) < 0:
        return None
    return {column: place for column, place in found.items() if place >= 0}


def read_csv(
    csv_path: Path | str,
    *,
    split: str,
    image_root: Path | str | None = None,
    images: ImageFiles = "required",
    together: Sequence[Path] = (),
    folder: Path | str | None = None,
) -> Dataset:
    """Read one CSV file of boxes.

    Classes are those of a class file beside it, with its ids; else the names in the file and in those of the other
    splits, sorted, so that all splits agree. Images keep the order of the file; their ids are those of
    `collecting.ids_of`, a box's id is the number of its line. Paths are relative to `image_root` or, when not given, to
    the first of the CSV's folder, `images`, `{split}` and the others of `finding.image_places` there and in the folder
    above that holds the first image that is found at all. Sizes are those of the columns `width` and `height`, else of
    the images.

    Args:
        images: "absent" needs no image file; a size that neither the table nor a file gives is then the smallest
            that holds the boxes.
        together: the files of the other splits.
        folder: the data set's own, which may have the class file in it where the CSV lies in a folder below; not given,
            the CSV's folder.

    Raises:
        DataError: no sound CSV, columns that are not known, no class, no image found, a path that leaves the folder.
    """
    source = Path(os.path.abspath(csv_path))
    table = _Table(source)
    listed = _class_file(source, folder)
    classes = (
        _listed_classes(listed) if listed else _named_classes([table, *(_Table(path) for path in together)])
    )
    root = source.parent if image_root is None else Path(os.path.abspath(image_root))
    choices = image_places(root, split) if image_root is None else [(root, root)]
    named = ((row.fields[table.columns["path"]], row.number) for row in table.named())
    files = (clean_name(name, root, f"{source}: line {number}") for name, number in named)
    try:
        place, fence = find_place(files, choices, source)
    except DataError:
        if images == "required":
            raise
        place, fence = root, root
    gathered = Collector(place, fence=fence, images=images)
    _Taker(table, classes, listed, root, gathered).take_rows()
    return gathered.finish(name=source.name, split=split, classes=classes, source=source)


def is_table_of_boxes(path: Path) -> bool:
    """Return whether a file's first line is one of this format: six columns, or their names."""
    try:
        row = next(read_rows(path), None)
    except DataError:
        return False
    if row is None:
        return False
    _cut(row, len(COLUMNS))
    numbers = [decimal(field) is not None or not field for field in row.fields[1:5]]
    return columns_of(row) is not None or (len(row.fields) == len(COLUMNS) and all(numbers))


def _cut(row: Row, width: int) -> None:
    """Take empty fields off the end of a row that has too many."""
    while len(row.fields) > width and not row.fields[-1]:
        row.fields.pop()


class _Table:
    """A file whose columns are known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        first = next(read_rows(path), None)
        if first is None:
            raise DataError(f"{path}: needs lines of {','.join(COLUMNS)}; the file is empty")
        _cut(first, len(COLUMNS))
        columns = columns_of(first)
        self.has_header = columns is not None
        self.columns = columns or {column: place for place, column in enumerate(COLUMNS)}
        self.width = len(first.fields) if columns else len(COLUMNS)
        if columns is None and not any(
            decimal(field) is not None or not field for field in first.fields[1:5]
        ):
            raise DataError(
                f"{path}: line {first.number}: needs {','.join(COLUMNS)}, as values or as names of columns; got "
                f"{brief(','.join(first.fields))}"
            )

    def rows(self) -> Iterator[Row]:
        """Yield the rows of boxes; fields that are empty and too many at the end are cut off."""
        for place, row in enumerate(read_rows(self.path)):
            if place == 0 and self.has_header:
                continue
            _cut(row, self.width)
            yield row

    def named(self) -> Iterator[Row]:
        """Yield the rows that can be used: of as many columns as required, with a possible file name."""
        for row in self.rows():
            if len(row.fields) == self.width and name_fault(row.fields[self.columns["path"]]) is None:
                yield row


class _Taker:
    """Gives a table's images and boxes to the data set, or names what is wrong with them."""

    def __init__(
        self, table: _Table, classes: Classes, listed: Path | None, root: Path, gathered: Collector
    ) -> None:
        self.table = table
        self.listed = listed.name if listed else CLASS_FILES[0]
        self.root = root
        self.gathered = gathered
        self.labels = {name: label for label, name in enumerate(classes.names)}
        self.files: dict[str, str] = {}  # as given, and cleaned: most rows name the image of the row before
        self.path = table.columns["path"]
        self.values = [table.columns[column] for column in (*COORDINATES, "class")]
        self.sides = [table.columns[column] for column in ("width", "height") if column in table.columns]

    def take_rows(self) -> None:
        for row in self.table.rows():
            self._row(row.fields, row.number)

    def _row(self, fields: list[str], number: int) -> None:
        where = Where(self.table.path.name, f"line {number}")
        if len(fields) != self.table.width:
            reason = f"needs {self.table.width} columns; got {len(fields)}: {brief(','.join(fields))}"
            self.gathered.drop(
                where, Kind.WRONG_COLUMNS, reason, "a name with a comma needs quotes around it"
            )
            return
        given = fields[self.path]
        if given not in self.files:
            if fault := name_fault(given):
                self.gathered.drop(where, Kind.BAD_FILE_NAME, fault, "give the image's file name")
                return
            self.files[given] = clean_name(given, self.root, f"{self.table.path}: line {number}")
        image = self.gathered.image(self.files[given], where, self._size(fields))
        values = [fields[place] for place in self.values]
        if image is not None and any(values):  # a line without box and class is an image without objects
            self._box(image, values, where, number)

    def _box(self, image: int, values: list[str], where: Where, number: int) -> None:
        label = self.labels.get(values[4])
        corners = [corner for text in values[:4] if (corner := decimal(text)) is not None]
        if not all(values):
            reason = f"needs {','.join(COLUMNS)}; got {brief(','.join(values))}"
            fix = "fill in all of them, or none for an image without objects"
            self.gathered.drop(where, Kind.INCOMPLETE_ROW, reason, fix)
        elif len(corners) < 4:
            reason = f"needs four numbers; got {brief(values[:4])}"
            self.gathered.drop(where, Kind.NOT_A_NUMBER, reason, "correct them")
        elif label is None:
            reason = f"needs a class of the class file; got {brief(values[4])}"
            fix = f"add {brief(values[4])} to {self.listed}, or correct the name"
            self.gathered.drop(where, Kind.UNKNOWN_CLASS, reason, fix)
        else:
            x1, y1, x2, y2 = corners
            self.gathered.box(image, (x1, y1, x2, y2), label, where, own_id=number)

    def _size(self, fields: list[str]) -> Size | None:
        sides = [length for place in self.sides if (length := side(decimal(fields[place])))]
        return (sides[0], sides[1]) if len(sides) == 2 else None


def folders_of(source: Path, folder: Path | str | None) -> list[Path]:
    """Return where files about a CSV file lie: its folder, and the one above where the data set's folder holds that."""
    above = source.parent.parent
    inside = folder is not None and above.is_relative_to(os.path.abspath(folder))
    return [source.parent, above] if inside else [source.parent]


def _class_file(source: Path, folder: Path | str | None) -> Path | None:
    places = (place / name for place in folders_of(source, folder) for name in CLASS_FILES)
    return next((place for place in places if place.is_file()), None)


def _listed_classes(path: Path) -> Classes:
    ids: dict[int, str] = {}
    for place, row in enumerate(read_rows(path)):
        name, number = row.fields if len(row.fields) == 2 else ("", "")
        category = whole(number)
        if place == 0 and _plain(number) in ID_HEADERS:
            continue
        if category is None or not name or category in ids:
            raise DataError(
                f"{path}: line {row.number}: needs `class,id`, the id a whole number from 0 and its own; "
                f"got {brief(','.join(row.fields))}"
            )
        ids[category] = name
    return _ordered(ids, path)


def _named_classes(tables: Sequence[_Table]) -> Classes:
    names = {row.fields[table.columns["class"]] for table in tables for row in table.named()}
    return _ordered(dict(enumerate(sorted(names - {""}))), tables[0].path)


def _ordered(names: dict[int, str], path: Path) -> Classes:
    ids = sorted(names)
    try:
        return Classes(tuple(names[number] for number in ids), tuple(ids))
    except DataError as error:
        raise DataError(f"{path}: classes: {error}") from None
