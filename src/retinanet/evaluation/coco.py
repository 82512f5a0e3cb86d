"""COCO's average precision and recall of boxes, computed by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from retinanet.errors import ConfigError
from retinanet.evaluation.metrics import ClassMetrics, Metrics
from retinanet.evaluation.pairing import BoolArray, Float64Array, Pairing
from retinanet.records import Classes, Detections, GroundTruth, Int64Array

# Positions in the arrays [IoU threshold, recall, class, area range, cap] that the library returns.
IOU_50, IOU_75 = 0, 5
ALL, SMALL, MEDIUM, LARGE = range(4)


def evaluate_detections(
    ground_truths: Sequence[GroundTruth],
    detections: Sequence[Detections],
    classes: Classes,
    *,
    max_detections: int = 100,
) -> Metrics:
    """Judge detections by COCO's rule.

    Detections are matched to the data set's classes by name: those of other names are left out and
    counted, a class that the model does not know has AP 0, a class without ground truth has AP None and
    stays out of the mean. Equal scores keep the order of images, then of detections in them. Small,
    medium and large (up to 32², up to 96², above, in square pixels) go by the annotated area.

    Every kind of `Ignore` but NO takes the rule of COCO's crowds: the box needs not be found, and a
    detection that found no other object and whose intersection with it, over the *detection's* area,
    reaches the IoU threshold is neither right nor wrong, however many there are. For VOC's difficult
    boxes this forgives more than VOC does (a small detection inside one); `voc_average_precision` takes
    VOC's own rule.

    Args:
        ground_truths, detections: one of each an image, in the same order.
        classes: the data set's classes.
        max_detections: the best so many detections of each class in each image are judged, >= 1.

    Raises:
        ConfigError: `max_detections` is not a whole number from 1.
        DataError: the sequences differ in length, or a ground-truth class is not in `classes`.

    Reference: Lin et al., "Microsoft COCO", 2014, and cocoapi's `cocoeval.py`.
    """
    if isinstance(max_detections, bool) or not isinstance(max_detections, int) or max_detections < 1:
        raise ConfigError(f"max_detections needs a whole number from 1; got {max_detections!r}")
    pairing = Pairing.of(ground_truths, detections, classes)
    counted = pairing.counted_ground_truths(classes)
    present = np.flatnonzero(counted)
    caps = sorted({1, 10, 100, max_detections})
    precision, recall = _precision_and_recall(pairing, present, caps)
    at_cap = caps.index(max_detections)

    per_class: dict[str, ClassMetrics] = {}
    found = np.bincount(pairing.labels, minlength=len(classes))
    for label, name in enumerate(classes.names):
        of_class = precision[:, :, present == label, ALL, at_cap]
        per_class[name] = ClassMetrics(
            ap=_mean(of_class),
            ap50=_mean(of_class[IOU_50]),
            ap75=_mean(of_class[IOU_75]),
            ground_truths=int(counted[label]),
            detections=int(found[label]),
        )
    return Metrics(
        **_figures(precision, recall, caps, max_detections),
        max_detections=max_detections,
        images=pairing.images,
        ground_truths=int(counted.sum()),
        detections=len(pairing.labels),
        unmatched_detections=pairing.unmatched,
        per_class=per_class,
        at_100=None if max_detections == 100 else _figures(precision, recall, caps, 100),
    )


def _precision_and_recall(
    pairing: Pairing, present: Int64Array, caps: list[int]
) -> tuple[Float64Array, Float64Array]:
    """Return precision `[10, 101, present classes, 4, caps]` and recall `[10, present classes, 4, caps]`.

    One run serves all caps: matching goes by descending score, so what the first N detections match does
    not depend on those after them. -1 stands for undefined.
    """
    if not len(present):
        return np.zeros((10, 101, 0, 4, len(caps))), np.zeros((10, 0, 4, len(caps)))
    gt_chosen = np.isin(pairing.gt_labels, present)
    truths = _annotations(pairing.gt_image, pairing.gt_labels, pairing.gt_boxes, gt_chosen)
    areas, ignored = pairing.gt_areas[gt_chosen].tolist(), pairing.gt_ignored[gt_chosen].tolist()
    for truth, area, is_ignored in zip(truths, areas, ignored, strict=True):
        truth["area"] = area
        truth["iscrowd"] = int(is_ignored)
    chosen = np.isin(pairing.labels, present)
    found = _annotations(pairing.image, pairing.labels, pairing.boxes, chosen)
    for detection, score in zip(found, pairing.scores[chosen].tolist(), strict=True):
        detection["score"] = score

    head = {
        "images": [{"id": number} for number in range(1, pairing.images + 1)],
        "categories": [{"id": label, "name": str(label)} for label in (present + 1).tolist()],
    }
    evaluator = COCOeval_faster(
        COCO({**head, "annotations": truths}), COCO({**head, "annotations": found}), "bbox"
    )
    evaluator.params.maxDets = caps
    evaluator.evaluate()
    evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"])


def _annotations(
    image: Int64Array, labels: Int64Array, boxes: Float64Array, chosen: BoolArray
) -> list[dict[str, Any]]:
    sizes = np.maximum(boxes[chosen, 2:] - boxes[chosen, :2], 0)
    rows = zip(
        (image[chosen] + 1).tolist(),
        (labels[chosen] + 1).tolist(),
        np.concatenate([boxes[chosen, :2], sizes], axis=1).tolist(),
        sizes.prod(axis=1).tolist(),
        strict=True,
    )
    # Ids start at 1: the rule marks "matched" by the other side's id, and 0 means "not matched".
    return [
        {"id": number, "image_id": image_id, "category_id": category, "bbox": box, "area": area, "iscrowd": 0}
        for number, (image_id, category, box, area) in enumerate(rows, start=1)
    ]


def _figures(
    precision: Float64Array, recall: Float64Array, caps: list[int], cap: int
) -> dict[str, float | None]:
    p, r = precision[..., caps.index(cap)], recall[..., caps.index(cap)]
    return {
        "ap": _mean(p[..., ALL]),
        "ap50": _mean(p[IOU_50, ..., ALL]),
        "ap75": _mean(p[IOU_75, ..., ALL]),
        "ap_small": _mean(p[..., SMALL]),
        "ap_medium": _mean(p[..., MEDIUM]),
        "ap_large": _mean(p[..., LARGE]),
        "ar1": _mean(recall[..., ALL, caps.index(1)]),
        "ar10": _mean(recall[..., ALL, caps.index(10)]),
        "ar100": _mean(recall[..., ALL, caps.index(100)]),
        "ar_small": _mean(r[..., SMALL]),
        "ar_medium": _mean(r[..., MEDIUM]),
        "ar_large": _mean(r[..., LARGE]),
    }


def _mean(values: Float64Array) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
