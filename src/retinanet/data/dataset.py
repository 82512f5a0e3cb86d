"""A data set in memory: image files, sizes and annotations in flat arrays, and what was wrong with it.

Loader workers share flat arrays without copying; lists of Python objects would be copied by every worker
as soon as their reference counts are touched.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retinanet.errors import DataError, ImageError
from retinanet.records import Classes, Float32Array, GroundTruth, Int8Array, Int64Array

Int32Array: TypeAlias = NDArray[np.int32]
StrArray: TypeAlias = NDArray[np.str_]
Action: TypeAlias = Literal["repaired", "dropped"]

CLASSES_IN_SUMMARY = 12


@dataclass(frozen=True)
class Fault:
    """One thing a reader could not take as it stood.

    Args:
        file: the annotation file, relative to the data folder.
        record: where in the file, e.g. "annotations[3] (id 17)" or "object 2 (RBC)".
        reason: what was required and what came.
        action: "repaired" where the record has one meaning, "dropped" where it has none.
        kind: what it is in one or two words, the same for every fault of its sort and in every format, e.g.
            "reversed box": reports count and group by it.
        fix: what to do about it in the data set; empty where the reason says all.
    """

    file: str
    record: str
    reason: str
    action: Action
    kind: str = "fault"
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.record}: {self.reason} ({self.action})"


class Annotation(NamedTuple):
    """One box on its way into a `Dataset`; `image` is the position of its image."""

    image: int
    box: tuple[float, float, float, float]
    label: int
    area: float
    ignore: int
    id: int


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set: N images, M boxes. Arrays are read-only.

    Args:
        name: the folder or file the data set came from.
        split: "train", "val", ... as asked for.
        root: the folder that `files` are relative to.
        classes: K classes; the same for every split.
        files: `[N]` text of fixed width, paths relative to `root`.
        widths, heights: `[N]` int32, pixels of the image as a person sees it.
        image_ids: `[N]` the data set's own ids, int64 or text; distinct.
        offsets: `[N + 1]` int64; image i owns the boxes `offsets[i]` to `offsets[i + 1]`.
        boxes: `[M, 4]` float32 xyxy, absolute pixels, inside their image.
        labels: `[M]` int64 class indices 0..K-1.
        areas: `[M]` float32 annotated areas in square pixels.
        ignore: `[M]` int8 values of `retinanet.records.Ignore`.
        annotation_ids: `[M]` int64.
        faults: what the reader repaired or dropped; of very many the first.
        fault_counts: how many there were of each (kind, action), those of `faults` when not given.
        format: what it was read as, "COCO", "YOLO" ...; empty where nothing was recognised.
        left_out: files, relative to `root`, of images that were listed but could not be used.
        unread: what the annotations hold beside boxes, in plain words: "masks", "key points", "polygons".
    """

    name: str
    split: str
    root: Path
    classes: Classes
    files: StrArray
    widths: Int32Array
    heights: Int32Array
    image_ids: Int64Array | StrArray
    offsets: Int64Array
    boxes: Float32Array
    labels: Int64Array
    areas: Float32Array
    ignore: Int8Array
    annotation_ids: Int64Array
    faults: tuple[Fault, ...] = ()
    fault_counts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    format: str = ""
    left_out: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images, boxes = len(self.files), len(self.boxes)
        text = np.asarray(self.image_ids).dtype.kind == "U"
        columns: dict[str, tuple[Any, tuple[int, ...]]] = {
            "files": (np.str_, (images,)),
            "widths": (np.int32, (images,)),
            "heights": (np.int32, (images,)),
            "image_ids": (np.str_ if text else np.int64, (images,)),
            "offsets": (np.int64, (images + 1,)),
            "boxes": (np.float32, (boxes, 4)),
            "labels": (np.int64, (boxes,)),
            "areas": (np.float32, (boxes,)),
            "ignore": (np.int8, (boxes,)),
            "annotation_ids": (np.int64, (boxes,)),
        }
        for column, (dtype, shape) in columns.items():
            values = np.array(getattr(self, column), dtype=dtype)
            if values.shape != shape:
                raise DataError(f"Dataset.{column} needs shape {list(shape)}; got {list(values.shape)}")
            values.setflags(write=False)
            object.__setattr__(self, column, values)
        counts = self.fault_counts or Counter((str(fault.kind), fault.action) for fault in self.faults)
        object.__setattr__(self, "fault_counts", dict(counts))
        self._check()

    def _check(self) -> None:
        if not len(self):
            raise DataError(f"Dataset {self.name!r} needs at least one image; none was given")
        if min(int(self.widths.min()), int(self.heights.min())) < 1:
            bad = int(np.flatnonzero((self.widths < 1) | (self.heights < 1))[0])
            raise DataError(f"Dataset needs image sizes from 1 pixel; {self.files[bad]} has {self.size(bad)}")
        if len(np.unique(self.image_ids)) != len(self):
            raise DataError(f"Dataset {self.name!r} needs distinct image ids; some are given twice")
        offsets = self.offsets
        if offsets[0] != 0 or offsets[-1] != len(self.boxes) or (np.diff(offsets) < 0).any():
            raise DataError(f"Dataset.offsets needs to rise from 0 to {len(self.boxes)}, the number of boxes")
        sound = np.isfinite(self.boxes).all(axis=1)
        sound &= (self.boxes[:, 2] > self.boxes[:, 0]) & (self.boxes[:, 3] > self.boxes[:, 1])
        if not sound.all():
            bad = int(np.flatnonzero(~sound)[0])
            raise DataError(
                f"Dataset.boxes needs finite x2 > x1 and y2 > y1; box {bad} is {self.boxes[bad].tolist()}"
            )
        low, high = int(self.labels.min(initial=0)), int(self.labels.max(initial=0))
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"Dataset.labels needs class indices 0..{len(self.classes) - 1}; got {low} to {high}"
            )

    @classmethod
    def build(
        cls,
        *,
        name: str,
        split: str,
        root: Path,
        classes: Classes,
        files: Sequence[str],
        image_ids: Sequence[int] | Sequence[str],
        sizes: Sequence[tuple[int, int]],
        annotations: Sequence[Annotation],
        faults: Iterable[Fault] = (),
        fault_counts: Mapping[tuple[str, str], int] | None = None,
        left_out: Iterable[str] = (),
        unread: Iterable[str] = (),
    ) -> Dataset:
        """Make a data set from one entry an image and boxes in any order (kept within an image)."""
        return cls.from_columns(
            name=name,
            split=split,
            root=root,
            classes=classes,
            files=files,
            image_ids=image_ids,
            sizes=np.array(sizes, np.int32).reshape(-1, 2),
            owners=np.array([a.image for a in annotations], np.int64),
            boxes=np.array([a.box for a in annotations], np.float32).reshape(-1, 4),
            labels=np.array([a.label for a in annotations], np.int64),
            areas=np.array([a.area for a in annotations], np.float32),
            ignore=np.array([a.ignore for a in annotations], np.int8),
            annotation_ids=np.array([a.id for a in annotations], np.int64),
            faults=faults,
            fault_counts=fault_counts,
            left_out=left_out,
            unread=unread,
        )

    @classmethod
    def from_columns(
        cls,
        *,
        name: str,
        split: str,
        root: Path,
        classes: Classes,
        files: Sequence[str],
        image_ids: Sequence[int] | Sequence[str],
        sizes: NDArray[Any],
        owners: Int64Array,
        boxes: Float32Array,
        labels: Int64Array,
        areas: Float32Array,
        ignore: Int8Array,
        annotation_ids: Int64Array,
        faults: Iterable[Fault] = (),
        fault_counts: Mapping[tuple[str, str], int] | None = None,
        left_out: Iterable[str] = (),
        unread: Iterable[str] = (),
    ) -> Dataset:
        """Make a data set from columns, a row a box in any order (kept within an image).

        Args:
            sizes: `[N, 2]` width and height.
            owners: `[M]` the position of each box's image.
        """
        order = np.argsort(owners, kind="stable")
        return cls(
            name=name,
            split=split,
            root=root,
            classes=classes,
            files=np.array(files, np.str_),
            widths=sizes[:, 0],
            heights=sizes[:, 1],
            image_ids=np.array(image_ids),
            offsets=np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(files)))]),
            boxes=boxes[order],
            labels=labels[order],
            areas=areas[order],
            ignore=ignore[order],
            annotation_ids=annotation_ids[order],
            faults=tuple(faults),
            fault_counts=fault_counts or {},
            left_out=tuple(left_out),
            unread=tuple(unread),
        )

    @property
    def fault_total(self) -> int:
        """How many faults there were, kept or only counted."""
        return sum(self.fault_counts.values())

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """Return where the image file is."""
        return self.root / str(self.files[index])

    def size(self, index: int) -> tuple[int, int]:
        """Return (width, height) in pixels."""
        return int(self.widths[index]), int(self.heights[index])

    def require_size(self, index: int, width: int, height: int) -> None:
        """Refuse an image of another size than its boxes were drawn on: they would lie beside their objects.

        Raises:
            ImageError: `width` and `height` are not the annotated ones.
        """
        if (width, height) != self.size(index):
            annotated = " x ".join(map(str, self.size(index)))
            raise ImageError(
                f"{self.path(index)}: needs {annotated} pixels, as annotated; got {width} x {height}. "
                "`retinanet data check` says more"
            )

    def ground_truth(self, index: int) -> GroundTruth:
        """Return the boxes of one image."""
        index = range(len(self))[index]
        own = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return GroundTruth(
            boxes=self.boxes[own],
            classes=self.labels[own],
            areas=self.areas[own],
            ignore=self.ignore[own],
            ids=self.annotation_ids[own],
        )

    def digest(self) -> str:
        """Return a short name of the images and annotations: the same as long as none of them changes."""
        found = hashlib.sha256(json.dumps([self.classes.names, self.classes.ids]).encode())
        for values in (
            self.files,
            self.widths,
            self.heights,
            self.offsets,
            self.boxes,
            self.labels,
            self.ignore,
        ):
            found.update(np.ascontiguousarray(values).tobytes())
        return found.hexdigest()[:16]

    def index_of_image_id(self) -> dict[str, int]:
        """Map the text of an image's id to its position: 7 and "7" are the same id everywhere."""
        return {str(image_id): index for index, image_id in enumerate(self.image_ids.tolist())}

    def subset(self, indices: Sequence[int] | NDArray[Any]) -> Dataset:
        """Return a data set of the images chosen by distinct indices (in that order) or a boolean mask.

        Faults belong to the reading and stay with every subset.
        """
        chosen = np.asarray(indices)
        if chosen.dtype == np.bool_ and chosen.shape == (len(self),):
            chosen = np.flatnonzero(chosen)
        if chosen.size == 0:
            raise DataError("Dataset.subset needs at least one image; none was chosen")
        if chosen.dtype.kind not in "iu" or chosen.ndim != 1:
            raise DataError(f"Dataset.subset needs image indices or a mask of {len(self)} booleans")
        low, high = int(chosen.min()), int(chosen.max())
        if low < 0 or high >= len(self):
            raise DataError(f"Dataset.subset needs indices 0..{len(self) - 1}; got {low} to {high}")
        counts = np.diff(self.offsets)[chosen]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[chosen] - offsets[:-1], counts)
        return Dataset(
            name=self.name,
            split=self.split,
            root=self.root,
            classes=self.classes,
            files=self.files[chosen],
            widths=self.widths[chosen],
            heights=self.heights[chosen],
            image_ids=self.image_ids[chosen],
            offsets=offsets,
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            areas=self.areas[rows],
            ignore=self.ignore[rows],
            annotation_ids=self.annotation_ids[rows],
            faults=self.faults,
            fault_counts=self.fault_counts,
            format=self.format,
            left_out=self.left_out,
            unread=self.unread,
        )

    def summary(self) -> str:
        """Return two lines for people: images, empty images, faults; boxes by class, ignored boxes."""
        empty = int((np.diff(self.offsets) == 0).sum())
        ignored = int((self.ignore != 0).sum())
        total = self.fault_total
        dropped = sum(number for (_, action), number in self.fault_counts.items() if action == "dropped")
        counts = np.bincount(self.labels[self.ignore == 0], minlength=len(self.classes))
        shown = [f"{name} {count:,}" for name, count in zip(self.classes.names, counts.tolist(), strict=True)]
        if len(shown) > CLASSES_IN_SUMMARY:
            shown[CLASSES_IN_SUMMARY:] = [f"and {len(shown) - CLASSES_IN_SUMMARY} more classes"]
        return (
            f"{self.name}, {self.split}: {_count(len(self), 'image')}, {empty:,} without boxes; "
            f"{_count(total, 'fault')} ({dropped:,} dropped, {total - dropped:,} repaired)\n"
            f"{_count(int(counts.sum()), 'box')}: {', '.join(shown)}; {ignored:,} more to be ignored"
        )


def _count(number: int, noun: str) -> str:
    plural = {"box": "boxes"}.get(noun, f"{noun}s")
    return f"{number:,} {noun if number == 1 else plural}"
