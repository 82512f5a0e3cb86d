"""The PASCAL VOC devkit's average precision, written plainly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from retinanet.errors import ConfigError
from retinanet.evaluation.pairing import Pairing, Verdict, overlaps
from retinanet.records import Classes, Detections, GroundTruth, Int8Array, Int64Array

Interpolation = Literal["every_point", "eleven_point"]


def voc_average_precision(
    ground_truths: Sequence[GroundTruth],
    detections: Sequence[Detections],
    classes: Classes,
    *,
    iou: float = 0.5,
    interpolation: Interpolation = "every_point",
    inclusive: bool = False,
) -> dict[str, float | None]:
    """Return the average precision of each class by VOC's rule; None without ground truth.

    A detection looks at the ground-truth box of its class and image that it overlaps most. Below `iou`
    it is wrong; on an ignored box it is neither right nor wrong; else the first by score over all images
    is right and each later one is wrong. With precision p at recall r, and P(r) = max of p at recalls >= r:

        every_point   AP = sum of P(r_n) (r_n - r_{n-1})         VOC 2010 and later
        eleven_point  AP = mean of P(0), P(0.1), ... P(1)        VOC 2007

    The eleven recalls are k * 0.1 in floating point, where 0.3, 0.6 and 0.7 come out a rounding error too
    high: published figures depend on it.

    Args:
        ground_truths, detections: one of each an image, in the same order; classes match by name.
        classes: the data set's classes.
        iou: least overlap, in (0, 1].
        inclusive: take corners as the first and last pixel *inside* the box, width = x2 - x1 + 1, as the
            devkit does: an edge convention, only for boxes that were never converted to continuous
            coordinates.

    Raises:
        ConfigError: `iou` or `interpolation` is not one of those.
        DataError: the sequences differ in length, or a ground-truth class is not in `classes`.

    Reference: Everingham et al., "The PASCAL VOC Challenge", 2010, section 4.2; VOCdevkit `VOCevaldet.m`.
    """
    if not 0 < iou <= 1:
        raise ConfigError(f"iou needs a number in (0, 1]; got {iou!r}")
    if interpolation not in ("every_point", "eleven_point"):
        raise ConfigError(f"interpolation needs 'every_point' or 'eleven_point'; got {interpolation!r}")
    pairing = Pairing.of(ground_truths, detections, classes)
    verdicts = _verdicts(pairing, iou, inclusive)
    area = _every_point if interpolation == "every_point" else _eleven_point
    result: dict[str, float | None] = {}
    for label, objects in enumerate(pairing.counted_ground_truths(classes).tolist()):
        _, right, wrong = pairing.ranked(verdicts, label)
        result[classes.names[label]] = area(right, wrong, objects) if objects else None
    return result


def _verdicts(pairing: Pairing, iou: float, inclusive: bool) -> Int8Array:
    target = np.full(len(pairing.labels), -1)
    for truth, found in pairing.by_image():
        overlap, _ = overlaps(pairing.boxes[found], pairing.gt_boxes[truth], extra=int(inclusive))
        overlap[pairing.labels[found, None] != pairing.gt_labels[None, truth]] = -1
        most = overlap.argmax(axis=1)
        target[found] = np.where(overlap.max(axis=1) >= iou, truth.start + most, -1)

    verdicts = np.full(len(target), Verdict.WRONG, np.int8)
    matched = np.flatnonzero(target >= 0)
    best_first = matched[np.argsort(-pairing.scores[matched], kind="stable")]
    _, first = np.unique(target[best_first], return_index=True)
    verdicts[best_first[first]] = Verdict.RIGHT
    verdicts[matched[pairing.gt_ignored[target[matched]]]] = Verdict.NEITHER
    return verdicts


def _every_point(right: Int64Array, wrong: Int64Array, objects: int) -> float:
    precision = np.maximum.accumulate((right / (right + wrong))[::-1])[::-1]
    return float((precision * np.diff(right, prepend=0)).sum() / objects)


def _eleven_point(right: Int64Array, wrong: Int64Array, objects: int) -> float:
    precision, recall = right / (right + wrong), right / objects
    # As in the Python programs that published figures, k * 0.1 in floating point: 3 of 10, 9 of 15 and 7 of
    # 10 miss their own point by a rounding error, which can move AP by 1 / 11 of a precision each.
    reached = [precision[recall >= tenth] for tenth in np.linspace(0, 1, 11)]
    return float(sum(values.max() for values in reached if values.size) / 11)
