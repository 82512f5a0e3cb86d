"""Pascal VOC folders: `JPEGImages`, `Annotations/*.xml`, `ImageSets/Main/{split}.txt`.

Corners in the files count pixels from 1 and include the last one: xmin 1, xmax 640 is the whole width of an
image of 640. Here, and nowhere else, they become continuous coordinates: x1 = xmin - 1, x2 = xmax.
Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/ (section 3.3 and the devkit's code)
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from retinanet.data.dataset import Annotation, Dataset
from retinanet.data.duplicates import drop_duplicates
from retinanet.data.faults import FaultLog
from retinanet.data.image_files import SUFFIXES
from retinanet.data.kinds import Kind
from retinanet.data.policies import LONGEST_NUMBER, decimal, in_words
from retinanet.data.rules import (
    LONGEST_SIDE,
    Box,
    Fence,
    ImageFiles,
    brief,
    clip_box,
    name_fault,
    read_bytes,
    refuse_escape,
    smallest_size,
)
from retinanet.data.voc_pages import CORNERS, UnsoundPage, VocObject, VocPage, read_page
from retinanet.errors import DataError, ImageError, did_you_mean
from retinanet.images import read_size
from retinanet.records import Classes, Ignore

LISTS = "ImageSets/Main"
LARGEST_LIST = 64 * 2**20
MOST_NAMES = 2_000_000  # lines of a list


def read_voc(folder: Path | str, *, split: str, images: ImageFiles = "required") -> Dataset:
    """Read one split of a Pascal VOC folder.

    Classes are the names in the annotations of every split together, sorted, with ids 0..K-1, so that all
    splits agree. Image ids are the names in the split's list. `difficult` becomes `Ignore.DIFFICULT`.
    A folder without lists is one set, of whatever name is asked for, with every annotation file.
    An object with two equal corners is a click, not a box, and is dropped; reversed corners are one rectangle all the
    same and are exchanged; an object that stands twice counts once. The image of `NAME` is
    `JPEGImages/NAME` with the extension that `<filename>` has, else a known one, else `<filename>` itself. An
    annotation file that is damaged costs its image.

    Args:
        split: the name of a list in `ImageSets/Main`; lines may end in the flags 1, 0, -1 of per-class lists.
        images: "absent" looks at no image file; a missing size is then the smallest that holds the boxes.

    Raises:
        DataError: the split or all its images are missing or unusable, or an annotation file is a trap: too large, or
            with a DOCTYPE.
    """
    root = Path(os.path.abspath(folder))
    lists = split_lists(root)
    if lists and split not in lists:
        raise DataError(
            f"{folder}: needs the list {LISTS}/{split}.txt; there are: {', '.join(lists) or 'none'}."
            + did_you_mean(split, lists)
        )
    reader = _Reader(root)
    stems = {name: reader.stems(path) for name, path in lists.items()} or {split: reader.every_stem()}
    pages = {stem: reader.page(stem) for listed in stems.values() for _, stem in listed}
    listing = f"{LISTS}/{split}.txt" if lists else "Annotations"
    entries = reader.entries(listing, stems[split], pages, images)
    names = {
        item.name
        for page in pages.values()
        if isinstance(page, VocPage)
        for item in page.objects
        if item.name
    }
    if not names:
        raise DataError(f"{folder}: needs an object with a name in Annotations/*.xml; there is none")
    classes = Classes(names=tuple(sorted(names)))
    annotations = reader.annotations(entries, classes)
    return Dataset.build(
        name=root.name,
        split=split,
        root=root,
        classes=classes,
        files=[entry.file for entry in entries],
        image_ids=[entry.stem for entry in entries],
        sizes=reader.sizes(entries, annotations),
        annotations=annotations,
        faults=reader.log.kept,
        fault_counts=reader.log.counts,
        left_out=reader.left_out,
    )


def split_lists(folder: Path) -> dict[str, Path]:
    """Return the lists in `ImageSets/Main` by name; none where the folder is missing."""
    main = folder / LISTS
    return {path.stem: path for path in sorted(main.glob("*.txt"))}


def main_splits(lists: Iterable[str]) -> list[str]:
    """Return the splits that together count every image once: no per-class lists, no union.

    `aeroplane_train` lists the images of `train` with a flag; `trainval` is `train` and `val` again.
    """
    names = set(lists)
    unions = {"trainval"} if names & {"train", "val"} else set()
    return sorted(name for name in names - unions if not names & set(_endings(name)))


def _endings(name: str) -> list[str]:
    parts = name.split("_")
    return ["_".join(parts[start:]) for start in range(1, len(parts))]


class _Entry(NamedTuple):
    """One image of the split."""

    stem: str
    file: str
    page: VocPage
    size: tuple[int, int] | None


class _Reader:
    """Reads the files of one folder and keeps what was wrong with them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fence = Fence(root)
        self.xml_files = _names(root / "Annotations")
        self.log = FaultLog()
        self.left_out: list[str] = []

    def stems(self, path: Path) -> list[tuple[int, str]]:
        """Return (line number, name) of a list."""
        if not self.fence.holds_file(path):
            raise DataError(f"{path}: needs a file with one image name a line")
        try:
            lines = read_bytes(path, limit=LARGEST_LIST).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: needs text in UTF-8; {error}") from None
        if len(lines) > MOST_NAMES:
            raise DataError(f"{path}: needs at most {MOST_NAMES:,} lines; got {len(lines):,}")
        found = []
        for number, line in enumerate(lines, 1):
            stem = line.strip()
            words = stem.rsplit(maxsplit=1)
            if len(words) == 2 and words[1] in ("1", "0", "-1") and f"{stem}.xml" not in self.xml_files:
                stem = words[0]
            if not stem:
                continue
            if fault := name_fault(stem):
                raise DataError(f"{path}: line {number}: {fault}")
            refuse_escape(stem, f"{path}: line {number}")
            found.append((number, stem))
        return found

    def every_stem(self) -> list[tuple[int, str]]:
        """Return (number, name) of every annotation file, sorted."""
        names = sorted(name.removesuffix(".xml") for name in self.xml_files if name.endswith(".xml"))
        if fault := next(filter(None, map(name_fault, names)), None):
            raise DataError(f"{self.root / 'Annotations'}: {fault}")
        return list(enumerate(names, 1))

    def page(self, stem: str) -> VocPage | str | None:
        """Return what the annotation file says, why it says nothing, or None where there is none."""
        path = self.root / "Annotations" / f"{stem}.xml"
        if path.name not in self.xml_files or not self.fence.holds_file(path):
            return None
        try:
            return read_page(path)
        except UnsoundPage as error:
            return str(error)

    def entries(
        self,
        listing: str,
        stems: list[tuple[int, str]],
        pages: dict[str, VocPage | str | None],
        images: ImageFiles,
    ) -> list[_Entry]:
        """Find the images of a list; drop those without annotation or image."""
        if images == "required" and not os.path.isdir(self.root / "JPEGImages"):
            raise DataError(f"{self.root}: needs a folder JPEGImages with the images; there is none")
        present = _names(self.root / "JPEGImages") if images == "required" else frozenset()
        by_stem: dict[str, str] = {}
        for name in sorted(present, key=lambda name: (_rank(name), name)):
            if _rank(name) < len(SUFFIXES):
                by_stem.setdefault(PurePosixPath(name).stem, name)
        found: dict[str, _Entry] = {}
        for number, stem in stems:
            record, page = f"line {number} ({stem})", pages[stem]
            if stem in found:
                reason = "the image is listed twice; it counts once"
                self.log.repair(listing, record, reason, Kind.DUPLICATE_LISTING)
                continue
            if page is None:
                reason = f"there is no annotation file Annotations/{stem}.xml"
                self.log.drop(listing, record, reason, Kind.MISSING_ANNOTATION)
                self._leave_out(by_stem, stem, images)
                continue
            if isinstance(page, str):
                fix = "write the XML again; the image is not used without it"
                self.log.drop(f"Annotations/{stem}.xml", "file", page, Kind.UNREADABLE_LABELS, fix)
                self._leave_out(by_stem, stem, images)
                continue
            wanted = stem + PurePosixPath(page.filename).suffix
            if images == "absent":
                found[stem] = _Entry(stem, f"JPEGImages/{wanted}", page, page.size)
                continue
            choices = [wanted] if _rank(wanted) < len(SUFFIXES) else []
            choices += [by_stem.get(stem, ""), page.filename]
            file = next((f"JPEGImages/{name}" for name in choices if name in present), None)
            if file is None or not self.fence.holds_file(self.root / file):
                reason = f"there is no image JPEGImages/{stem} ({', '.join(SUFFIXES)})"
                self.log.drop(listing, record, reason, Kind.MISSING_IMAGE)
                continue
            try:
                size = page.size or read_size(self.root / file)
            except ImageError as error:
                reason = f"the size is missing and cannot be read: {error}"
                self.log.drop(f"Annotations/{stem}.xml", "size", reason, Kind.UNREADABLE_IMAGE)
                self.left_out.append(file)
                continue
            found[stem] = _Entry(stem, file, page, size)
        if not found:
            example = f" {self.log.kept[0]}" if self.log.kept else " The list is empty"
            raise DataError(f"{self.root / listing}: needs at least one usable image; got none.{example}")
        return list(found.values())

    def _leave_out(self, by_stem: dict[str, str], stem: str, images: ImageFiles) -> None:
        if stem in by_stem:
            self.left_out.append(f"JPEGImages/{by_stem[stem]}")
        elif images == "absent":  # it may lie elsewhere, with any suffix
            self.left_out.append(f"JPEGImages/{stem}{SUFFIXES[0]}")

    def annotations(self, entries: list[_Entry], classes: Classes) -> list[Annotation]:
        """Return the sound boxes, numbered from 1 over all objects of the split, dropped ones too."""
        labels = {name: label for label, name in enumerate(classes.names)}
        found, records, counted = [], [], 0
        for position, entry in enumerate(entries):
            for number, item in enumerate(entry.page.objects, 1):
                counted += 1
                box = self._box(entry, number, item)
                if box is None:
                    continue
                area = (box[2] - box[0]) * (box[3] - box[1])
                ignore = Ignore.DIFFICULT if item.difficult else Ignore.NO
                found.append(Annotation(position, box, labels[item.name], area, ignore, counted))
                records.append((f"Annotations/{entry.stem}.xml", number, item.name))
        kept, firsts = drop_duplicates(
            np.array([item.image for item in found], np.int64),
            np.array([item.label for item in found], np.int64),
            np.array([item.box for item in found], np.float32).reshape(-1, 4),
            np.array([item.ignore for item in found], np.int8),
        )
        for place in np.flatnonzero(~kept).tolist():
            file, number, name = records[place]
            reason = (
                f"is the box of object {records[firsts[place]][1]} again, of the same class; it counts once"
            )
            self.log.drop(file, f"object {number} ({name})", reason, Kind.DUPLICATE_BOX)
        return [item for item, is_kept in zip(found, kept.tolist(), strict=True) if is_kept]

    def _box(self, entry: _Entry, number: int, item: VocObject) -> Box | None:
        file, record = f"Annotations/{entry.stem}.xml", f"object {number} ({item.name or 'no name'})"
        given = "no corners" if item.corners is None else f"[{', '.join(item.corners)}]"
        given = given if len(given) <= 4 * LONGEST_NUMBER else brief(given)
        corners = [decimal(text) for text in item.corners or ()]
        finite = [value for value in corners if value is not None and math.isfinite(value)]
        if not item.name:
            reason = "name needs the name of a class; it is missing"
            self.log.drop(file, record, reason, Kind.MISSING_CLASS)
            return None
        if len(finite) != 4:
            reason = f"bndbox needs four finite numbers {', '.join(CORNERS)}; got {given}"
            are_numbers = len(corners) == 4 and None not in corners
            self.log.drop(file, record, reason, Kind.NOT_FINITE if are_numbers else Kind.NOT_A_NUMBER)
            return None
        if finite[:2] == finite[2:]:
            reason = f"corners {given} are equal: a click, not a box"
            self.log.drop(file, record, reason, Kind.EQUAL_CORNERS)
            return None
        (xmin, xmax), (ymin, ymax) = sorted(finite[::2]), sorted(finite[1::2])
        width, height = entry.size or (LONGEST_SIDE, LONGEST_SIDE)
        box, cut = clip_box((xmin - 1, ymin - 1, xmax, ymax), width, height)
        if box is None:
            kind = Kind.EMPTY_BOX if "no area" in (cut or "") else Kind.OUTSIDE_IMAGE
            self.log.drop(file, record, f"corners {given}: {cut}", kind)
        elif [xmin, ymin, xmax, ymax] != finite:
            taken = in_words((box[0] + 1, box[1] + 1, box[2], box[3]))
            reason = (
                f"corners {given} are reversed; xmax >= xmin and ymax >= ymin are required: taken as {taken}"
            )
            self.log.repair(file, record, reason, Kind.REVERSED_BOX)
        elif cut is not None:
            self.log.repair(file, record, f"corners {given}: {cut}", Kind.OUTSIDE_IMAGE)
        return box

    def sizes(self, entries: list[_Entry], annotations: list[Annotation]) -> list[tuple[int, int]]:
        boxes: dict[int, list[Box]] = {i: [] for i, entry in enumerate(entries) if entry.size is None}
        for annotation in annotations:
            if annotation.image in boxes:
                boxes[annotation.image].append(annotation.box)
        least = {index: smallest_size(own) for index, own in boxes.items()}
        for index, (width, height) in least.items():
            became = f"{width} x {height}, the least that holds the boxes"
            reason = f"width and height are missing; they became {became}"
            self.log.repair(f"Annotations/{entries[index].stem}.xml", "size", reason, Kind.MISSING_SIZE)
        return [entry.size or least[index] for index, entry in enumerate(entries)]


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None


def _rank(name: str) -> int:
    """Order of preference of a file's extension; `len(SUFFIXES)` where it is not an image's."""
    suffix = PurePosixPath(name).suffix.lower()
    return SUFFIXES.index(suffix) if suffix in SUFFIXES else len(SUFFIXES)
