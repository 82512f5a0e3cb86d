"""What travels between rooms: classes, ground truth, detections, operating points. NumPy only.

Every record is validated where it is made, so that no later room has to ask again. Boxes are `xyxy`,
float32, absolute pixels of the original image as a person sees it (EXIF applied), continuous
coordinates: width = x2 - x1. Arrays inside a record are read-only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retinanet.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    import supervision
    import torch
    from PIL import Image

    from retinanet.images import ImageSource

Float32Array: TypeAlias = NDArray[np.float32]
Int64Array: TypeAlias = NDArray[np.int64]
Int8Array: TypeAlias = NDArray[np.int8]


class Ignore(IntEnum):
    """Why a ground-truth box is not an object to be found (or that it is one).

    Evaluation and training treat every kind but `NO` alike: a detection there is neither right nor
    wrong, an anchor there is neither positive nor negative.
    """

    NO = 0
    CROWD = 1  # COCO's iscrowd: a region holding many objects
    DIFFICULT = 2  # VOC's difficult flag
    CUT = 3  # what a crop left of an object is too small to learn from


@dataclass(frozen=True)
class Classes:
    """The classes of a data set or model, in order: names and the ids their data set gave them.

    A class inside the program is an index 0..K-1 into `names`. There is no background class.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = tuple(self.names)
        ids = tuple(int(i) for i in self.ids) or tuple(range(len(names)))
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "ids", ids)
        if not names:
            raise DataError("Classes needs at least one class name; none was given")
        for what, values in (("name", names), ("id", ids)):
            twice = sorted(str(value) for value, count in Counter(values).items() if count > 1)
            if twice:
                raise DataError(f"Classes needs distinct {what}s; given more than once: {', '.join(twice)}")
        if len(ids) != len(names):
            raise DataError(f"Classes needs one id a name; got {len(names)} names and {len(ids)} ids")
        for name in names:
            if not isinstance(name, str) or not name.strip():
                raise DataError(f"Classes needs non-empty text as names; got {name!r}")

    def __len__(self) -> int:
        return len(self.names)

    def changes_from(self, known: Classes) -> str:
        """Say what becomes of a model's classes when it is to know these.

        >>> Classes(("dog", "horse")).changes_from(Classes(("cat", "dog")))
        'kept: dog; new: horse; dropped: cat'
        """
        parts = {
            "kept": [name for name in self.names if name in known.names],
            "new": [name for name in self.names if name not in known.names],
            "dropped": [name for name in known.names if name not in self.names],
        }
        return "; ".join(f"{what}: {', '.join(names) or 'none'}" for what, names in parts.items())

    def index_of_id(self) -> dict[int, int]:
        """Map the data set's id of a class to its index."""
        return {category: index for index, category in enumerate(self.ids)}


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The annotated boxes of one image.

    Args:
        boxes: `[G, 4]` xyxy, finite, x2 > x1 and y2 > y1.
        classes: `[G]` class indices, >= 0.
        areas: `[G]` annotated areas in square pixels (a mask's area where there is one); the boxes'
            areas when not given. COCO's small, medium and large are decided by it.
        ignore: `[G]` values of `Ignore`; none are ignored when not given.
        ids: `[G]` the data set's annotation ids; 0, 1, ... when not given.
    """

    boxes: Float32Array
    classes: Int64Array
    areas: Float32Array = None  # type: ignore[assignment]  # filled in __post_init__
    ignore: Int8Array = None  # type: ignore[assignment]
    ids: Int64Array = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        boxes = _boxes(self.boxes, "GroundTruth")
        count = len(boxes)
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        if not ((width > 0) & (height > 0)).all():
            bad = int(np.flatnonzero((width <= 0) | (height <= 0))[0])
            raise DataError(
                f"GroundTruth needs boxes with x2 > x1 and y2 > y1; box {bad} is {boxes[bad].tolist()}"
            )
        areas = width * height if self.areas is None else self.areas
        ignore = np.zeros(count) if self.ignore is None else self.ignore
        ids = np.arange(count) if self.ids is None else self.ids
        classes = _column(self.classes, count, np.int64, "GroundTruth.classes")
        if count and classes.min() < 0:
            raise DataError(f"GroundTruth.classes needs indices from 0; got {int(classes.min())}")
        _freeze(
            self,
            boxes=boxes,
            classes=classes,
            areas=_column(areas, count, np.float32, "GroundTruth.areas"),
            ignore=_column(ignore, count, np.int8, "GroundTruth.ignore"),
            ids=_column(ids, count, np.int64, "GroundTruth.ids"),
        )

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def empty(cls) -> GroundTruth:
        """An image without objects."""
        return cls(boxes=np.zeros((0, 4), np.float32), classes=np.zeros(0, np.int64))

    def select(self, keep: NDArray[Any]) -> GroundTruth:
        """Return the boxes chosen by an index or boolean array."""
        return GroundTruth(
            self.boxes[keep], self.classes[keep], self.areas[keep], self.ignore[keep], self.ids[keep]
        )


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector found in one image, best first.

    Args:
        boxes: `[D, 4]` xyxy, finite, in pixels of the original image.
        scores: `[D]` in [0, 1], descending.
        labels: `[D]` class indices into `classes`.
        classes: the classes of the model.
        width, height: size of the original image in pixels.
    """

    boxes: Float32Array
    scores: Float32Array
    labels: Int64Array
    classes: Classes
    width: int
    height: int

    def __post_init__(self) -> None:
        boxes = _boxes(self.boxes, "Detections")
        count = len(boxes)
        scores = _column(self.scores, count, np.float32, "Detections.scores")
        labels = _column(self.labels, count, np.int64, "Detections.labels")
        if count and not (scores.min() >= 0 and scores.max() <= 1):
            raise DataError(f"Detections.scores needs [0, 1]; got {scores.min():g} to {scores.max():g}")
        if count and (np.diff(scores) > 0).any():
            raise DataError("Detections.scores needs descending order")
        if count and not (labels.min() >= 0 and labels.max() < len(self.classes)):
            raise DataError(
                f"Detections.labels needs indices 0..{len(self.classes) - 1}; "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        _freeze(self, boxes=boxes, scores=scores, labels=labels)

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def none(cls, classes: Classes, width: int, height: int) -> Detections:
        """Nothing found in an image of that size."""
        return cls(
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.int64),
            classes,
            width,
            height,
        )

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.classes.names[label] for label in self.labels]

    @property
    def category_ids(self) -> Int64Array:
        """The id that the training data set gave to the class of each detection."""
        return np.asarray(self.classes.ids, np.int64)[self.labels]

    def select(self, keep: NDArray[Any]) -> Detections:
        """Return the detections chosen by an index or boolean array (order must stay descending)."""
        return Detections(
            self.boxes[keep], self.scores[keep], self.labels[keep], self.classes, self.width, self.height
        )

    def in_classes(self, classes: Classes) -> Detections:
        """Return the detections whose class name `classes` has too, with its indices and ids."""
        index = {name: i for i, name in enumerate(classes.names)}
        known = np.array([name in index for name in self.names], bool)
        labels = np.array([index[name] for name in self.names if name in index], np.int64)
        return Detections(self.boxes[known], self.scores[known], labels, classes, self.width, self.height)

    def above(self, threshold: float) -> Detections:
        """Return the detections with score >= threshold."""
        return self.select(self.scores >= threshold)

    def torch(self) -> dict[str, torch.Tensor]:
        """Return boxes, scores and labels as tensors (copies)."""
        import torch

        return {
            "boxes": torch.tensor(self.boxes),
            "scores": torch.tensor(self.scores),
            "labels": torch.tensor(self.labels),
        }

    def to_supervision(self) -> supervision.Detections:
        """Return `supervision.Detections` with `class_name` in its data."""
        try:
            import supervision
        except ImportError:
            raise MissingExtraError("supervision", "supervision") from None
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.labels.copy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, image: ImageSource) -> Image.Image:
        """Return a copy of the image (a path, bytes, PIL image or RGB array) with boxes, names and scores."""
        from retinanet.drawing import draw_boxes
        from retinanet.images import decode

        captions = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True)]
        return draw_boxes(decode(image), self.boxes, captions=captions, groups=self.labels)


@dataclass(frozen=True)
class OperatingPoints:
    """Score thresholds chosen on validation data, by class name, each with the F1 it reached there.

    `best_f1` maps a class name to the threshold with the highest F1 at IoU 0.5; a class without
    validation objects is absent.
    """

    best_f1: dict[str, float] = field(default_factory=dict)
    f1: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, values in (("best_f1", self.best_f1), ("f1", self.f1)):
            for name, value in values.items():
                if not 0 <= value <= 1:
                    raise DataError(f"OperatingPoints.{what}[{name!r}] needs [0, 1]; got {value!r}")

    def threshold_per_class(self, classes: Classes, otherwise: float) -> Float32Array:
        """Return `[K]` thresholds, `otherwise` for classes without one."""
        return np.array([self.best_f1.get(name, otherwise) for name in classes.names], np.float32)


def _boxes(values: Any, who: str) -> Float32Array:
    boxes = np.array(values, dtype=np.float32)
    if boxes.size == 0 and boxes.ndim < 2:
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise DataError(f"{who}.boxes needs shape [N, 4] (x1, y1, x2, y2); got {list(boxes.shape)}")
    if not np.isfinite(boxes).all():
        bad = int(np.flatnonzero(~np.isfinite(boxes).all(axis=1))[0])
        raise DataError(f"{who}.boxes needs finite numbers; box {bad} is {boxes[bad].tolist()}")
    return boxes


def _column(values: Sequence[Any] | NDArray[Any], count: int, dtype: Any, what: str) -> NDArray[Any]:
    column = np.array(values, dtype=dtype)
    if column.shape != (count,):
        raise DataError(f"{what} needs one value a box, shape [{count}]; got {list(column.shape)}")
    return column


def _freeze(record: Any, **arrays: NDArray[Any]) -> None:
    for name, array in arrays.items():
        array.setflags(write=False)
        object.__setattr__(record, name, array)
