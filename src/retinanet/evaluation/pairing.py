"""Ground truth and detections of all images side by side, in the data set's classes: what is judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retinanet.errors import DataError
from retinanet.records import Classes, Detections, GroundTruth, Ignore, Int8Array, Int64Array

Float64Array: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]


class Verdict(IntEnum):
    """What a detection is."""

    WRONG = 0
    RIGHT = 1
    NEITHER = 2  # it lies on an ignored box


@dataclass(frozen=True, eq=False)
class Pairing:
    """Flat arrays over all images; `image` and `gt_image` ascend, detections of an image are best first.

    `labels` are indices into the data set's classes; detections of other class names are left out and
    counted in `unmatched`.
    """

    images: int
    gt_boxes: Float64Array
    gt_labels: Int64Array
    gt_areas: Float64Array
    gt_ignored: BoolArray
    gt_image: Int64Array
    boxes: Float64Array
    scores: Float64Array
    labels: Int64Array
    image: Int64Array
    unmatched: int

    @classmethod
    def of(
        cls, ground_truths: Sequence[GroundTruth], detections: Sequence[Detections], classes: Classes
    ) -> Pairing:
        """Bring both sides to the same images and, by name, to the same classes.

        Raises:
            DataError: the two sequences differ in length, or a ground-truth class is not in `classes`.
        """
        if len(ground_truths) != len(detections):
            raise DataError(
                "Evaluation needs one GroundTruth and one Detections an image, in the same order; "
                f"got {len(ground_truths)} and {len(detections)}"
            )
        for number, truth in enumerate(ground_truths):
            if len(truth) and truth.classes.max() >= len(classes):
                raise DataError(
                    f"Evaluation needs ground-truth classes 0..{len(classes) - 1}; "
                    f"image {number} (from 0) has {int(truth.classes.max())}: pass the data set's own classes"
                )
        labels = _joined([_labels_in(found, classes) for found in detections], np.int64)
        known = labels >= 0
        image = np.repeat(np.arange(len(detections)), [len(found) for found in detections])
        return cls(
            images=len(ground_truths),
            gt_boxes=_joined([truth.boxes for truth in ground_truths], np.float64, (4,)),
            gt_labels=_joined([truth.classes for truth in ground_truths], np.int64),
            gt_areas=_joined([truth.areas for truth in ground_truths], np.float64),
            gt_ignored=_joined([truth.ignore for truth in ground_truths], np.int8) != Ignore.NO,
            gt_image=np.repeat(np.arange(len(ground_truths)), [len(truth) for truth in ground_truths]),
            boxes=_joined([found.boxes for found in detections], np.float64, (4,))[known],
            scores=_joined([found.scores for found in detections], np.float64)[known],
            labels=labels[known],
            image=image[known],
            unmatched=int(np.count_nonzero(~known)),
        )

    def counted_ground_truths(self, classes: Classes) -> Int64Array:
        """Return `[K]` numbers of boxes that are not ignored."""
        return np.bincount(self.gt_labels[~self.gt_ignored], minlength=len(classes))

    def by_image(self) -> Iterator[tuple[slice, slice]]:
        """Yield (ground truth, detections) of each image that has both."""
        numbers = np.arange(self.images + 1)
        gt_bounds = np.searchsorted(self.gt_image, numbers).tolist()
        bounds = np.searchsorted(self.image, numbers).tolist()
        for number in range(self.images):
            truth = slice(gt_bounds[number], gt_bounds[number + 1])
            found = slice(bounds[number], bounds[number + 1])
            if truth.start < truth.stop and found.start < found.stop:
                yield truth, found

    def ranked(self, verdicts: Int8Array, label: int) -> tuple[Float64Array, Int64Array, Int64Array]:
        """Return the scores of one class, best first over all images, with cumulated right and wrong ones.

        Equal scores keep the order of images and of detections in them. Verdicts NEITHER are left out.
        """
        chosen = np.flatnonzero((self.labels == label) & (verdicts != Verdict.NEITHER))
        chosen = chosen[np.argsort(-self.scores[chosen], kind="stable")]
        right = verdicts[chosen] == Verdict.RIGHT
        return self.scores[chosen], np.cumsum(right), np.cumsum(~right)


def overlaps(boxes: Float64Array, others: Float64Array, extra: int = 0) -> tuple[Float64Array, Float64Array]:
    """Return the `[D, G]` IoU of two sets of boxes, and the intersection over the area of `boxes`.

    `extra` is added to every width and height. Boxes without area overlap nothing.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.maximum(high - low + extra, 0).prod(axis=2)
    area = (boxes[:, 2:] - boxes[:, :2] + extra).prod(axis=1)[:, None]
    other_area = (others[:, 2:] - others[:, :2] + extra).prod(axis=1)[None, :]
    some = common > 0
    iou = np.divide(common, area + other_area - common, out=np.zeros_like(common), where=some)
    return iou, np.divide(common, area, out=np.zeros_like(common), where=some)


def _labels_in(found: Detections, classes: Classes) -> Int64Array:
    if found.classes.names == classes.names:
        return found.labels
    index = {name: number for number, name in enumerate(classes.names)}
    return np.array([index.get(name, -1) for name in found.classes.names], np.int64)[found.labels]


def _joined(parts: Sequence[NDArray[Any]], dtype: Any, item: tuple[int, ...] = ()) -> NDArray[Any]:
    return np.concatenate([np.zeros((0, *item), dtype), *parts]).astype(dtype, copy=False)
