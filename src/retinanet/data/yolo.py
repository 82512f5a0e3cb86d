"""YOLO: `data.yaml` beside folders of images and of label files, a line a box: `class xc yc width height`.

Numbers are shares of the image's sides, 0 to 1, centre first; classes count from 0. A line of a class and three or
more points is a polygon and becomes its bounding box. The labels of `images/train/a.jpg` stand in
`labels/train/a.txt`: the last folder called `images` is replaced; where there is none, they stand beside the image.
No label file, or an empty one, means an image without objects.
Format: https://docs.ultralytics.com/datasets/detect/
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from retinanet.data.collecting import Collector, Where, clean_name
from retinanet.data.dataset import Dataset, Fault
from retinanet.data.image_files import is_image_name, list_files
from retinanet.data.policies import decimal, whole
from retinanet.data.rules import Box, Fence, brief, name_fault, read_bytes
from retinanet.data.yaml_files import Plain, read_yaml
from retinanet.errors import DataError
from retinanet.records import Classes

NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
SPLITS = ("train", "val", "valid", "validation", "test")
OTHER_KEYS = ("path", "names", "nc", "category_ids", "download", "kpt_shape", "flip_idx", "roboflow")
CLASSES = ("classes.txt", "labels/classes.txt", "obj.names")
LARGEST_LABELS = 8 * 2**20  # bytes of one image's labels; some 200,000 boxes
LARGEST_LIST = 64 * 2**20
LONGEST_LINE = 2**20  # characters
EXAMPLE = "data.yaml with the lines `train: images/train`, `val: images/val` and `names: [first class, second class]`"


@dataclass(frozen=True)
class YoloSet:
    """What stands in `data.yaml`.

    Args:
        source: the file it was read from.
        root: the folder that the splits are relative to, and that nothing may leave.
        splits: folders of images or lists of them, relative to `root`, by name; one named "" is a whole set.
        labels: the class index of each class number in the label files.
        absent: splits that are named but not there, with the path that was looked for.
        keypoints: lines hold a box and then key points, which are not read.
    """

    source: Path
    root: Path
    classes: Classes
    labels: dict[int, int]
    splits: dict[str, tuple[str, ...]]
    absent: dict[str, Path]
    keypoints: bool
    faults: tuple[Fault, ...] = ()


def read_yolo(source: Path | str, *, split: str, image_root: Path | str | None = None) -> Dataset:
    """Read one split of a YOLO data set.

    `names` is a list, or a table of class numbers, which become the ids. `path` is relative to the file; one that
    leads elsewhere is not followed. A split is a folder, a list of folders or a `.txt` file with an image a line.
    Images are sorted; their ids are those of `collecting.ids_of`. Sizes are read from the images, which the format
    cannot do without. The key `category_ids`, which `write_yolo` adds, gives classes other ids than 0, 1, 2 ...

    Args:
        source: `data.yaml`, or a folder with `images`, `labels` and `classes.txt`.
        split: a key of the file.
        image_root: stands for the file's `path` and may be anywhere.

    Raises:
        DataError: no sound YAML, the split or all its images are missing, none of its images has a label file, or a
            path leaves the folder.
    """
    found = load_yolo(Path(source), image_root)
    key = split if split in found.splits else ""
    if key not in found.splits:
        missing = f"; {found.absent[split]} does not exist" if split in found.absent else ""
        raise DataError(
            f"{source}: has no split {split!r}{missing}; there are: {', '.join(found.splits) or 'none'}"
        )
    reader = _Reader(found)
    for entry in found.splits[key]:
        reader.read(entry)
    return reader.finish(split)


def load_yolo(source: Path, image_root: Path | str | None = None) -> YoloSet:
    """Return what a `data.yaml`, or a folder without one, says about its splits and classes.

    Raises:
        DataError: as `read_yolo`.
    """
    if source.is_dir():
        if image_root is not None:
            raise DataError(f"{source}: image_root stands for the `path` of a data.yaml; there is none")
        return _load_folder(source)
    source = Path(os.path.abspath(source))
    document = read_yaml(source)
    classes, labels = _classes(document, source)
    faults: list[Fault] = []
    if image_root is None:
        root = _root(document.get("path"), source, faults)
    else:
        root = Path(os.path.abspath(image_root))
    splits: dict[str, tuple[str, ...]] = {}
    absent: dict[str, Path] = {}
    for name, given in document.items():
        items = [item for item in (given if isinstance(given, list) else [given]) if item != ""]
        if name in SPLITS and items:
            entries = [_entry(item, root, Where(source.name, name), faults) for item in items]
            lacking = [root / entry for entry in entries if not os.path.exists(root / entry)]
            if lacking:
                absent[name] = lacking[0]
            else:
                splits[name] = tuple(entries)
        elif name not in OTHER_KEYS and isinstance(given, str) and _is_inside(given, root):
            splits[name] = (clean_name(given, root, str(source)),)
    return YoloSet(source, root, classes, labels, splits, absent, "kpt_shape" in document, tuple(faults))


def _is_inside(given: str, root: Path) -> bool:
    """Return whether a value of any other key is a folder of the data set, and its key so a split."""
    try:
        return os.path.isdir(root / clean_name(given, root, ""))
    except DataError:
        return False


def _load_folder(folder: Path) -> YoloSet:
    folder = Path(os.path.abspath(folder))
    splits = folder_splits(folder)
    listed = next((folder / name for name in CLASSES if (folder / name).is_file()), None)
    if listed is None:
        raise DataError(
            f"{folder}: has images and labels as YOLO, but nothing names its classes. Needed is {EXAMPLE}, or "
            f"{CLASSES[0]} with a name a line"
        )
    if not Fence(folder).holds_file(listed):
        raise DataError(f"{listed}: needs a file with a class name a line")
    names = [line.strip() for line in _lines(listed, LARGEST_LIST)]
    while names and not names[-1]:
        names.pop()
    classes, labels = _named(dict(enumerate(names)), None, listed)
    return YoloSet(listed, folder, classes, labels, splits, {}, keypoints=False)


def folder_splits(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the splits of a folder by where its images and labels lie, none where it is not laid out so.

    `images/train` with `labels/train`, `train/images` with `train/labels`, or `images` with `labels`: one set, "".
    """
    inner = {name: (f"images/{name}", f"labels/{name}") for name in SPLITS}
    outer = {name: (f"{name}/images", f"{name}/labels") for name in SPLITS}
    for choices in (inner, outer, {"": ("images", "labels")}):
        found: dict[str, tuple[str, ...]] = {
            name: (images,)
            for name, (images, labels) in choices.items()
            if os.path.isdir(folder / images) and _holds_labels(folder / labels)
        }
        if found:
            return found
    return {}


def _holds_labels(folder: Path) -> bool:
    return os.path.isdir(folder) and any(name.endswith(".txt") for name in os.listdir(folder))


def _classes(document: dict[str, Plain], source: Path) -> tuple[Classes, dict[int, int]]:
    """Return the classes, and the index of each number that label files may have."""
    given = document.get("names")
    if isinstance(given, list):
        given = {str(number): name for number, name in enumerate(given)}
    if not isinstance(given, dict) or not given:
        raise DataError(
            f"{source}: needs `names`, a list of class names or a table `0: name`; got {brief(given)}"
        )
    names: dict[int, str] = {}
    for key, name in given.items():
        number = whole(key)
        if number is None or number in names or not isinstance(name, str):
            raise DataError(
                f"{source}: names: needs a whole number from 0 and a text, each number once; "
                f"got {brief(key)}: {brief(name)}"
            )
        names[number] = name.strip()
    count = document.get("nc", str(len(names)))
    if not isinstance(count, str) or whole(count) != len(names):
        raise DataError(
            f"{source}: nc is {brief(count)}, but names holds {len(names)} classes; correct one of them"
        )
    return _named(names, document.get("category_ids"), source)


def _named(names: dict[int, str], ids: Plain | None, source: Path) -> tuple[Classes, dict[int, int]]:
    numbers = sorted(names)
    given = numbers if ids is None else [whole(i) if isinstance(i, str) else None for i in ids]
    own = [number for number in given if number is not None]
    if isinstance(ids, str | dict) or len(own) != len(numbers):
        raise DataError(
            f"{source}: category_ids: needs a list of whole numbers from 0, one a class; got {brief(ids)}"
        )
    try:
        classes = Classes(tuple(names[number] for number in numbers), tuple(own))
        return classes, {number: label for label, number in enumerate(numbers)}
    except DataError as error:
        raise DataError(f"{source}: names: {error}") from None


def _root(given: Plain | None, source: Path, faults: list[Fault]) -> Path:
    """Return the folder that `path` means: one in the file's folder, or that folder itself."""
    base = source.parent
    if given is None or given in ("", "."):
        return base
    if not isinstance(given, str):
        raise DataError(f"{source}: path: needs a folder; got {brief(given)}")
    try:
        wanted = os.path.realpath(base / given)
        inside = Path(wanted).is_relative_to(os.path.realpath(base))
        if inside and os.path.isdir(wanted):
            return Path(os.path.normpath(base / os.path.relpath(wanted, os.path.realpath(base))))
    except ValueError:
        pass
    reason = f"{brief(given)} is no folder inside that of {source.name} and is not followed; its own folder is taken"
    faults.append(
        Fault(
            source.name, "path", reason, "repaired", "path elsewhere", "remove the line, or give image_root"
        )
    )
    return base


def _entry(given: Plain, root: Path, where: Where, faults: list[Fault]) -> str:
    """Return a split's folder or list, relative to the root."""
    label = f"{root / where.file}: {where.record}"
    if not isinstance(given, str):
        raise DataError(f"{label}: needs a folder, a list of folders or a .txt file; got {brief(given)}")
    name = given.strip().replace("\\", "/")
    if name in (".", "./"):
        return "."
    inner = name
    while inner.startswith("../"):
        inner = inner[3:]
    # As Roboflow writes it, for a file one folder further down than it lies.
    if inner != name and os.path.exists(root / clean_name(inner, root, label)):
        reason = f"{brief(given)} leads out of the data folder; {inner} in it is taken"
        faults.append(Fault(*where, reason, "repaired", "path elsewhere", f"write {inner}"))
        name = inner
    return clean_name(name, root, label)


def _lines(path: Path, limit: int) -> list[str]:
    try:
        return read_bytes(path, limit=limit).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: needs text in UTF-8; {error}") from None


def label_file(image: str) -> str:
    """Return where the labels of an image stand.

    >>> label_file("images/train/a.jpg"), label_file("images/images/a.b.png"), label_file("photos/a.jpg")
    ('labels/train/a.txt', 'images/labels/a.b.txt', 'photos/a.txt')
    """
    *folders, name = image.split("/")
    if "images" in folders:
        last = len(folders) - 1 - folders[::-1].index("images")
        folders[last] = "labels"
    return "/".join([*folders, f"{PurePosixPath(name).stem}.txt"])


class _Reader:
    """Reads the images of one split and their labels."""

    def __init__(self, found: YoloSet) -> None:
        self.found = found
        self.gathered = Collector(found.root)
        self.gathered.faults += found.faults
        self.with_labels = 0
        self.seen: dict[str, None] = {}

    def read(self, entry: str) -> None:
        """Read a folder of images, or a list of them."""
        is_folder = os.path.isdir(self.found.root / entry)
        images = self._images_in(entry) if is_folder else self._images_of(entry)
        for where, image in images:
            if image in self.seen:
                self.gathered.repair(where, "duplicate listing", f"{image} is listed twice; it counts once")
                continue
            self.seen[image] = None
            self._image(where, image)
        if is_folder:
            self._orphans(entry)

    def finish(self, split: str) -> Dataset:
        if self.gathered.files and not self.with_labels:
            raise DataError(
                f"{self.found.source}: none of the images of split {split!r} has a label file; looked for "
                f"{self.found.root / label_file(next(iter(self.seen)))}, for one. An image without objects may have "
                "none or an empty one, but not every image"
            )
        return self.gathered.finish(
            name=self.found.root.name, split=split, classes=self.found.classes, source=self.found.source
        )

    def _images_in(self, entry: str) -> Iterator[tuple[Where, str]]:
        if not self.gathered.fence.holds_folder(self.found.root / entry):
            return
        prefix = "" if entry == "." else f"{entry}/"
        for name in list_files(self.found.root / entry):
            if not is_image_name(name) or name.rpartition("/")[2].startswith("."):
                continue
            if fault := name_fault(name):
                self.gathered.drop(Where(entry, "image"), "bad file name", fault, "rename the file")
                continue
            yield Where(prefix + name, "image"), prefix + name

    def _images_of(self, entry: str) -> Iterator[tuple[Where, str]]:
        """Yield the images of a list: relative to the root, or to the list's own folder."""
        path, beside = self.found.root / entry, str(PurePosixPath(entry).parent)
        if not self.gathered.fence.holds_file(path):
            raise DataError(f"{path}: needs a folder of images or a text file with an image a line")
        for number, line in enumerate(_lines(path, LARGEST_LIST), 1):
            if not line.strip():
                continue
            where = Where(entry, f"line {number}")
            image = clean_name(line, self.found.root, f"{path}: line {number}")
            near = image if beside == "." else f"{beside}/{image}"
            yield where, near if near != image and os.path.isfile(self.found.root / near) else image

    def _image(self, where: Where, image: str) -> None:
        file = label_file(image)
        lines: list[str] = []
        if self.gathered.fence.holds_file(self.found.root / file):
            self.with_labels += 1
            try:
                lines = _lines(self.found.root / file, LARGEST_LABELS)
            except DataError as error:
                fix = "write the labels again; the image is not used without them"
                self.gathered.drop(Where(file, "file"), "unreadable labels", str(error), fix)
                return
        position = self.gathered.image(image, where)
        if position is None:
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._line(position, Where(file, f"line {number}"), line)

    def _line(self, position: int, where: Where, line: str) -> None:
        fields = line.split() if len(line) <= LONGEST_LINE else []
        shape = _corners(fields, self.found.keypoints)
        if isinstance(shape, str):
            fix = "a line is `class xc yc width height`, or a class and a polygon of three or more points"
            self.gathered.drop(where, "wrong columns", f"{shape}; got {brief(line.strip())}", fix)
            return
        number = whole(fields[0])
        label = None if number is None else self.found.labels.get(number)
        if label is None:
            known = f"{min(self.found.labels)} to {max(self.found.labels)}"
            reason = f"needs the number of a class of `names`, {known}; got {brief(fields[0])}"
            self.gathered.drop(
                where, "unknown class", reason, f"correct the number, or add it to {self.found.source.name}"
            )
            return
        width, height = self.gathered.sizes[position] or (1, 1)
        x1, y1, x2, y2 = shape
        self.gathered.box(position, (x1 * width, y1 * height, x2 * width, y2 * height), label, where)

    def _orphans(self, entry: str) -> None:
        """Name label files whose image is not there."""
        labels = PurePosixPath(label_file(f"{entry}/x")).parent.as_posix()
        if labels == entry or not self.gathered.fence.holds_folder(self.found.root / labels):
            return
        known = {label_file(image) for image in self.seen}
        for name in list_files(self.found.root / labels):
            file = f"{labels}/{name}"
            if name.endswith(".txt") and file not in known and not name.endswith("classes.txt"):
                fix = f"put the image into {entry}, or remove the label file"
                self.gathered.drop(
                    Where(file, "file"), "missing image", "there is no image for these labels", fix
                )


def _corners(fields: list[str], keypoints: bool) -> Box | str:
    """Return x1, y1, x2, y2 of a line as shares of the image, or what it needs."""
    count = len(fields)
    is_box = count == 5 or (keypoints and count > 5)
    if not is_box and not (count >= 7 and count % 2):
        more = " (a sixth is the score of a prediction)" if count == 6 else ""
        return f"needs 5 numbers, or a polygon of 7 or more, an odd count; there are {count}{more}"
    numbers = [decimal(field) for field in fields[1:5] if is_box] or [decimal(field) for field in fields[1:]]
    values = [value for value in numbers if value is not None]
    if len(values) < len(numbers):
        return "needs numbers"
    if is_box:
        xc, yc, width, height = values
        return xc - width / 2, yc - height / 2, xc + width / 2, yc + height / 2
    if not all(math.isfinite(value) for value in values):
        return math.nan, math.nan, math.nan, math.nan
    return min(values[0::2]), min(values[1::2]), max(values[0::2]), max(values[1::2])
