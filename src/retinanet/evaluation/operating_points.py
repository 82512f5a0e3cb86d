"""Score thresholds chosen on validation data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retinanet.errors import ConfigError
from retinanet.evaluation.pairing import Pairing, Verdict, overlaps
from retinanet.records import Classes, Detections, GroundTruth, Int8Array, OperatingPoints


def choose_operating_points(
    ground_truths: Sequence[GroundTruth],
    detections: Sequence[Detections],
    classes: Classes,
    *,
    iou: float = 0.5,
) -> OperatingPoints:
    """Return, for each class, the score threshold with the highest F1 = 2 TP / (2 TP + FP + FN).

    Detections are matched by COCO's rule at one IoU threshold (see `evaluate_detections`), those on
    ignored boxes count nowhere. A threshold keeps scores >= it and is the score of a detection; of equal
    F1 the higher threshold is taken. A class without ground truth or without a right detection is absent.

    Args:
        ground_truths, detections: one of each an image, in the same order; classes match by name.
        classes: the data set's classes.
        iou: least overlap, in (0, 1].

    Raises:
        ConfigError: `iou` is not in (0, 1].
        DataError: the sequences differ in length, or a ground-truth class is not in `classes`.
    """
    if not 0 < iou <= 1:
        raise ConfigError(f"iou needs a number in (0, 1]; got {iou!r}")
    pairing = Pairing.of(ground_truths, detections, classes)
    verdicts = _verdicts(pairing, iou)
    best_f1: dict[str, float] = {}
    f1: dict[str, float] = {}
    for label, objects in enumerate(pairing.counted_ground_truths(classes).tolist()):
        scores, right, wrong = pairing.ranked(verdicts, label)
        if not objects or not right.any():
            continue
        # Equal scores are kept or dropped together: only the last of them is a threshold.
        last = np.flatnonzero(np.diff(scores, append=-1) != 0)
        reached = 2 * right[last] / (right[last] + wrong[last] + objects)
        best = int(reached.argmax())
        name = classes.names[label]
        best_f1[name], f1[name] = float(scores[last[best]]), float(reached[best])
    return OperatingPoints(best_f1=best_f1, f1=f1)


def _verdicts(pairing: Pairing, iou: float) -> Int8Array:
    verdicts = np.full(len(pairing.labels), Verdict.WRONG, np.int8)
    for truth, found in pairing.by_image():
        overlap, inside = overlaps(pairing.boxes[found], pairing.gt_boxes[truth])
        same = pairing.labels[found, None] == pairing.gt_labels[None, truth]
        ignored = pairing.gt_ignored[None, truth]
        of_image = verdicts[found]
        of_image[(same & ignored & (inside >= iou)).any(axis=1)] = Verdict.NEITHER
        free = np.where(same & ~ignored & (overlap >= iou), overlap, 0)
        for detection in np.flatnonzero(free.any(axis=1)):
            row = free[detection]
            # Of equal overlaps the last, as COCO's matching takes it.
            chosen = len(row) - 1 - int(row[::-1].argmax())
            if row[chosen] > 0:
                of_image[detection] = Verdict.RIGHT
                free[:, chosen] = 0
    return verdicts
