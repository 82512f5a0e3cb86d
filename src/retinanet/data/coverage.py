"""How well anchors fit the objects of a data set: the IoU of every object's best anchor, and shares of it.

An anchor grid is regular, so that the best anchor needs no search. For a box of centre c and sides (w, h) and
anchors of sides (a, b), the overlap is o_x o_y with

    o_x = max(0, min(w, a, (w + a) / 2 - |c_x - x|)),

which falls with the distance to the anchor's centre x, and o_y alike. The location nearest in x and nearest in y is
therefore the best for every shape of a level, and IoU = o_x o_y / (w h + a b - o_x o_y).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retinanet.anchors import AnchorSpec
from retinanet.data.dataset import Dataset
from retinanet.images import Preprocessing
from retinanet.records import Float32Array, Ignore, Int64Array

# Objects whose anchors are looked up at a time.
BLOCK = 20_000
# COCO's limits of small and medium, in square pixels of the annotated area.
SMALL, LARGE = 32.0**2, 96.0**2


@dataclass(frozen=True, eq=False)
class NetworkObjects:
    """The objects of a data set (no ignored boxes) as a network of one input size meets them.

    Args:
        boxes: `[M, 4]` float32 xyxy, pixels of the resized image.
        padded: `[M, 2]` (width, height) of their images, padded to the divisor.
        rows: `[M]` their places in `Dataset.boxes`.
    """

    boxes: Float32Array
    padded: Int64Array
    rows: Int64Array

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Coverage:
    """What share of objects has a best anchor of IoU >= 0.5 and of >= 0.4, and the mean IoU with the best anchor.

    Shares are None where there is no object.
    """

    objects: int
    at_50: float | None
    at_40: float | None
    mean: float | None

    @classmethod
    def of(cls, overlaps: NDArray[np.floating]) -> Coverage:
        """Sum up the IoU of each object's best anchor."""
        if not len(overlaps):
            return cls(0, None, None, None)
        return cls(
            len(overlaps),
            float((overlaps >= 0.5).mean()),
            float((overlaps >= 0.4).mean()),
            float(overlaps.mean()),
        )


def objects_in_network(
    dataset: Dataset, preprocessing: Preprocessing, *, most: int | None = None
) -> NetworkObjects:
    """Return the objects of a data set in the frame of the network's input.

    Args:
        most: take at most that many, at equal distances in the data set; all when None.
    """
    rows = np.flatnonzero(dataset.ignore == Ignore.NO)
    if most is not None and len(rows) > most:
        rows = rows[np.linspace(0, len(rows) - 1, most).astype(int)]
    images = np.searchsorted(dataset.offsets, rows, side="right") - 1
    used, owner = np.unique(images, return_inverse=True)
    original = np.array([dataset.size(int(i)) for i in used], np.float64).reshape(-1, 2)
    resized = np.array([preprocessing.resized_size(*dataset.size(int(i))) for i in used], np.int64)
    resized = resized.reshape(-1, 2)
    scale = np.tile(resized / original, 2).astype(np.float32)
    padded = -(-resized // preprocessing.divisor) * preprocessing.divisor
    return NetworkObjects(dataset.boxes[rows] * scale[owner], padded[owner], rows)


def best_overlaps(spec: AnchorSpec, objects: NetworkObjects) -> NDArray[np.float32]:
    """Return `[M]` the IoU of each object with its best anchor."""
    found = np.zeros(len(objects), np.float32)
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    for level in range(len(spec.sizes)):
        away = distances(spec, level, objects)
        shapes = spec.shapes(level).numpy()
        for start in range(0, len(objects), BLOCK):
            part = slice(start, start + BLOCK)
            np.maximum(
                found[part],
                overlaps_of_shapes(sides[part], away[part], shapes).max(axis=1),
                out=found[part],
            )
    return found


def distances(spec: AnchorSpec, level: int, objects: NetworkObjects) -> Float32Array:
    """Return `[M, 2]` |x| and |y| from each object's centre to the nearest location of a level, pixels."""
    stride = spec.strides[level]
    grid = -(-objects.padded // stride)
    step = objects.padded // grid if spec.stride_rule == "image" else np.int64(stride)
    centres = (objects.boxes[:, :2] + objects.boxes[:, 2:]) / 2
    nearest = np.clip(np.rint(centres / step - spec.center), 0, grid - 1)
    away: Float32Array = np.abs(centres - (nearest + spec.center) * step).astype(np.float32)
    return away


def overlaps_of_shapes(
    sides: Float32Array, away: Float32Array, shapes: NDArray[np.floating]
) -> NDArray[np.float32]:
    """Return `[M, A]` the IoU of boxes with the anchors of their nearest location.

    Args:
        sides: `[M, 2]` width and height of the boxes.
        away: `[M, 2]` distances of their centres from the location.
        shapes: `[A, 2]` width and height of the anchors.
    """
    shapes = shapes.astype(np.float32)
    shared = np.ones((len(sides), len(shapes)), np.float32)
    for axis in (0, 1):
        side, anchor = sides[:, axis, None], shapes[None, :, axis]
        reach = (side + anchor) / 2 - away[:, axis, None]
        np.minimum(reach, side, out=reach)
        np.minimum(reach, anchor, out=reach)
        np.maximum(reach, 0, out=reach)
        shared *= reach
    union = sides.prod(axis=1)[:, None] + shapes.prod(axis=1)[None] - shared
    shared /= union
    return shared


def coverage_by_class(
    dataset: Dataset, rows: Int64Array, overlaps: NDArray[np.floating]
) -> dict[str, Coverage]:
    """Return the coverage of every class by name, those without objects too."""
    labels = dataset.labels[rows]
    return {name: Coverage.of(overlaps[labels == label]) for label, name in enumerate(dataset.classes.names)}


def coverage_by_size(
    dataset: Dataset, rows: Int64Array, overlaps: NDArray[np.floating]
) -> dict[str, Coverage]:
    """Return the coverage of COCO's small, medium and large objects, by the annotated area."""
    areas = dataset.areas[rows]
    kinds = {
        "small": areas <= SMALL,
        "medium": (areas > SMALL) & (areas <= LARGE),
        "large": areas > LARGE,
    }
    return {name: Coverage.of(overlaps[chosen]) for name, chosen in kinds.items()}
