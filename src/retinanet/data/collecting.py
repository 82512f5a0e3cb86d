"""Images and boxes on their way from a file of any format into a `Dataset`, each held to the same rules."""

from __future__ import annotations

import posixpath
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from retinanet.data.dataset import Dataset
from retinanet.data.faults import FaultLog
from retinanet.data.kinds import Kind
from retinanet.data.policies import Distinct, judge_box
from retinanet.data.rules import (
    LONGEST_SIDE,
    Box,
    Fence,
    ImageFiles,
    brief,
    name_fault,
    refuse_escape,
    smallest_size,
)
from retinanet.errors import DataError, ImageError
from retinanet.images import read_size
from retinanet.records import Classes, Ignore

Size = tuple[int, int]


class Where(NamedTuple):
    """Where a record stands: the annotation file, relative to the data folder, and the place in it."""

    file: str
    record: str


class _Boxes:
    """What `Dataset.from_columns` takes of boxes, in numbers of the machine: as objects of Python they would take ten
    times the memory, and there may be millions.
    """

    def __init__(self) -> None:
        self.owners = array("q")
        self.corners = array("f")  # four a box
        self.labels = array("q")
        self.areas = array("f")
        self.ignore = array("b")
        self.ids = array("q")

    def __len__(self) -> int:
        return len(self.owners)

    def add(self, image: int, box: Box, label: int, area: float, ignore: int, own_id: int) -> None:
        self.owners.append(image)
        self.corners.extend(box)
        self.labels.append(label)
        self.areas.append(area)
        self.ignore.append(ignore)
        self.ids.append(own_id)


class Collector:
    """Gathers one split; what cannot be taken as it stands becomes a `Fault`.

    Args:
        root: the folder that image files are relative to.
        fence: the folder that no image may lie outside of, not even by a link; `root` when not given.
        images: "absent" asks image files that are there for sizes that are missing, and needs none.
    """

    def __init__(self, root: Path, *, fence: Path | None = None, images: ImageFiles = "required") -> None:
        self.root = root
        self.fence = Fence(fence or root)
        self.images = images
        self.files: list[str] = []
        self.sizes: list[Size | None] = []
        self.left_out: list[str] = []  # files of images that were dropped
        self.log = FaultLog()
        self.unread: set[str] = set()  # see `Dataset`
        self._listed: list[Where] = []
        self._places: dict[str, int | None] = {}
        self._distinct = Distinct()
        self._boxes = _Boxes()
        self._unsized: dict[int, list[Box]] = {}  # the boxes of images without a size

    def drop(self, where: Where, kind: Kind, reason: str, fix: str = "") -> None:
        self.log.drop(*where, reason, kind, fix)

    def repair(self, where: Where, kind: Kind, reason: str, fix: str = "") -> None:
        self.log.repair(*where, reason, kind, fix)

    def image(self, file: str, where: Where, size: Size | None = None) -> int | None:
        """Return the position of an image, new or known; None where it is not to be used, which is named once."""
        if file not in self._places:
            self._places[file] = self._new_image(file, where, size)
        return self._places[file]

    def another_image(self, file: str, where: Where, size: Size | None = None) -> int | None:
        """Return the position of an image that is its own even where another has the same file."""
        return self._new_image(file, where, size)

    def _new_image(self, file: str, where: Where, size: Size | None) -> int | None:
        if self.images == "required":
            path = self.root / file
            if not self.fence.holds_file(path):
                fix = "put the file there, or take it out of the list"
                self.drop(where, Kind.MISSING_IMAGE, f"there is no image file {path}", fix)
                self.left_out.append(file)
                return None
            try:
                size = size or read_size(path)
            except ImageError as error:
                fix = "replace the file by a sound one, or take it out of the data set"
                self.drop(where, Kind.UNREADABLE_IMAGE, f"its size cannot be read: {error}", fix)
                self.left_out.append(file)
                return None
        elif size is None and self.fence.holds_file(self.root / file):
            with suppress(ImageError):
                size = read_size(self.root / file)
        self.files.append(file)
        self.sizes.append(size)
        self._listed.append(where)
        return len(self.files) - 1

    def box(
        self,
        image: int,
        corners: Box,
        label: int,
        where: Where,
        *,
        ignore: Ignore = Ignore.NO,
        area: float | None = None,
        own_id: int | None = None,
    ) -> None:
        """Take a box in pixels, or name why not; without an id of its own it is numbered from 1."""
        width, height = self.sizes[image] or (LONGEST_SIDE, LONGEST_SIDE)
        verdict = judge_box(corners, width, height)
        if verdict.kind is not None:
            told = (verdict.kind, verdict.reason, verdict.fix)
            (self.drop if verdict.box is None else self.repair)(where, *told)
        box = verdict.box
        if box is None:
            return
        if not self._distinct.adds(image, box, label, ignore):
            same = "the image has the same box of the same class already"
            self.drop(where, Kind.DUPLICATE_BOX, same, "remove the copy")
            return
        area = (box[2] - box[0]) * (box[3] - box[1]) if area is None else area
        number = len(self._boxes) + 1 if own_id is None else own_id
        self._boxes.add(image, box, label, area, ignore, number)
        if self.sizes[image] is None:
            self._unsized.setdefault(image, []).append(box)

    def finish(
        self,
        *,
        name: str,
        split: str,
        classes: Classes,
        source: Path,
        image_ids: Sequence[int] | Sequence[str] | None = None,
    ) -> Dataset:
        """Return the data set.

        Args:
            source: what was read, for messages.
            image_ids: one an image; those of `ids_of` when not given.

        Raises:
            DataError: no image is usable.
        """
        if not self.files:
            first = f" {self.log.kept[0]}" if self.log.kept else " It lists none"
            raise DataError(f"{source}: needs at least one usable image in split {split!r}; got none.{first}")
        rows = self._boxes
        return Dataset.from_columns(
            name=name,
            split=split,
            root=self.root,
            classes=classes,
            files=self.files,
            image_ids=ids_of(self.files) if image_ids is None else image_ids,
            sizes=np.array(self._sizes(), np.int32),
            owners=np.array(rows.owners, np.int64),
            boxes=np.array(rows.corners, np.float32).reshape(-1, 4),
            labels=np.array(rows.labels, np.int64),
            areas=np.array(rows.areas, np.float32),
            ignore=np.array(rows.ignore, np.int8),
            annotation_ids=np.array(rows.ids, np.int64),
            faults=self.log.kept,
            fault_counts=self.log.counts,
            left_out=self.left_out,
            unread=sorted(self.unread),
        )

    def _sizes(self) -> list[Size]:
        for index in [place for place, size in enumerate(self.sizes) if size is None]:
            width, height = self.sizes[index] = smallest_size(self._unsized.get(index, []))
            became = f"{width} x {height}, the least that holds the boxes"
            reason = f"the image's size is missing; it became {became}"
            self.repair(self._listed[index], Kind.MISSING_SIZE, reason)
        return [size for size in self.sizes if size is not None]


def ids_of(files: Sequence[str]) -> list[int] | list[str]:
    """Return the ids of images that have none: what a person would call them, as short as it stays distinct.

    The names without folder and ending, as whole numbers where all of them are (as COCO's files are called and
    numbered); the whole paths where two images would have the same name.

    >>> ids_of(["a/000000000139.jpg", "a/000000000285.jpg"]), ids_of(["a/x.jpg", "b/y.jpg"]), ids_of(["a/x", "b/x"])
    ([139, 285], ['x', 'y'], ['a/x', 'b/x'])
    """
    stems = [PurePosixPath(file).stem for file in files]
    if all(stem.isascii() and stem.isdecimal() and len(stem) < 19 for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return stems if len(set(stems)) == len(stems) else list(files)


def clean_name(given: str, root: Path, where: str) -> str:
    """Return a file name of an annotation file as a path relative to `root`, with "/" and without ".".

    A Windows path gets our slashes. An absolute path is understood where it lies in `root`.

    Raises:
        DataError: it leads out of the folder, or cannot be a file name.
    """
    if fault := name_fault(given):
        raise DataError(f"{where}: {fault}")
    name = given.strip().replace("\\", "/")
    if name.startswith(f"{root.as_posix().rstrip('/')}/"):
        name = name[len(root.as_posix().rstrip("/")) + 1 :]
    refuse_escape(name, where)
    name = posixpath.normpath(name)
    if name == ".":
        raise DataError(f"{where}: needs the name of a file or folder in {root}; got {brief(given)}")
    return name
