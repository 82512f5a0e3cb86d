"""YOLO: `data.yaml` beside folders of images and of label files, a line a box: `class xc yc width height`.

Numbers are shares of the image's sides, 0 to 1, centre first; classes count from 0. A line of a class and three or
more points is a polygon and becomes its bounding box. The labels of `images/train/a.jpg` stand in
`labels/train/a.txt`: the last folder called `images` is replaced; where there is none, they stand beside the image.
No label file, or an empty one, means an image without objects; a split without any label file is one without boxes,
which is named.
Format: https://docs.ultralytics.com/datasets/detect/
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from retinanet.data.collecting import Collector, Where, clean_name
from retinanet.data.dataset import Dataset
from retinanet.data.image_files import is_image_name, list_files
from retinanet.data.kinds import Kind
from retinanet.data.policies import decimal, whole
from retinanet.data.rules import Box, brief, name_fault, read_text_lines
from retinanet.data.yolo_table import LARGEST_LIST, YoloSet, load_yolo
from retinanet.errors import DataError

LARGEST_LABELS = 8 * 2**20  # bytes of one image's labels; some 200,000 boxes
LONGEST_LINE = 2**20  # characters


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
        DataError: no sound YAML, the split or all its images are missing, or a path leaves the folder.
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
        self.gathered.log.take(found.faults)
        self.with_labels = 0
        self.seen: dict[str, None] = {}

    def read(self, entry: str) -> None:
        """Read a folder of images, or a list of them."""
        is_folder = os.path.isdir(self.found.root / entry)
        images = self._images_in(entry) if is_folder else self._images_of(entry)
        for where, image in images:
            if image in self.seen:
                self.gathered.repair(
                    where, Kind.DUPLICATE_LISTING, f"{image} is listed twice; it counts once"
                )
                continue
            self.seen[image] = None
            self._image(where, image)
        if is_folder:
            self._orphans(entry)

    def finish(self, split: str) -> Dataset:
        if self.gathered.files and not self.with_labels:
            reason = (
                f"none of the {len(self.seen):,} images of split {split!r} has a label file; looked for "
                f"{label_file(next(iter(self.seen)))}, for one: it is a split without boxes"
            )
            fix = "put the label files there; leave it so where nobody annotated the images"
            where = Where(self.found.source.name, split)
            self.gathered.repair(where, Kind.MISSING_ANNOTATION, reason, fix)
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
                self.gathered.drop(Where(entry, "image"), Kind.BAD_FILE_NAME, fault, "rename the file")
                self.gathered.left_out.append(prefix + name)
                continue
            yield Where(prefix + name, "image"), prefix + name

    def _images_of(self, entry: str) -> Iterator[tuple[Where, str]]:
        """Yield the images of a list: relative to the root, or to the list's own folder."""
        path, beside = self.found.root / entry, str(PurePosixPath(entry).parent)
        if not self.gathered.fence.holds_file(path):
            raise DataError(f"{path}: needs a folder of images or a text file with an image a line")
        for number, line in enumerate(read_text_lines(path, LARGEST_LIST), 1):
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
                lines = read_text_lines(self.found.root / file, LARGEST_LABELS)
            except DataError as error:
                fix = "write the labels again; the image is not used without them"
                self.gathered.drop(Where(file, "file"), Kind.UNREADABLE_LABELS, str(error), fix)
                self.gathered.left_out.append(image)
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
            self.gathered.drop(where, Kind.WRONG_COLUMNS, f"{shape}; got {brief(line.strip())}", fix)
            return
        number = whole(fields[0])
        label = None if number is None else self.found.labels.get(number)
        if label is None:
            known = f"{min(self.found.labels)} to {max(self.found.labels)}"
            reason = f"needs the number of a class of `names`, {known}; got {brief(fields[0])}"
            self.gathered.drop(
                where,
                Kind.UNKNOWN_CLASS,
                reason,
                f"correct {brief(fields[0])}, or add it to `names` in {self.found.source.name}",
            )
            return
        if len(fields) > 5:
            self.gathered.unread.add("key points" if self.found.keypoints else "polygons")
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
                    Where(file, "file"), Kind.MISSING_IMAGE, "there is no image for these labels", fix
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
