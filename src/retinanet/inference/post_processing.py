"""From raw predictions to detections in the network's frame (Section 4, Inference). The plain reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from retinanet.batches import RawPredictions
from retinanet.boxes import BoxCoding, clip, nms
from retinanet.model import PostProcessing


class Found(NamedTuple):
    """Detections of one image, best first, in pixels of the network input."""

    boxes: Float[Tensor, "D 4"]
    scores: Float[Tensor, "D"]
    labels: Int64[Tensor, "D"]


@torch.no_grad()
def post_process(
    predictions: RawPredictions,
    anchors: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    *,
    coding: BoxCoding,
    options: PostProcessing,
) -> list[Found]:
    """Return what is found in each image of a batch.

    A level gives at most `top_k` (anchor, class) pairs with score above its threshold, the best ones; the
    boxes of all levels meet in one per-class NMS, and the `max_detections` best are kept.

    Ties are decided: by score descending, then by index ascending (level, then anchor, then class).

    Args:
        anchors: per level `[h*w*A, 4]`, as `anchors_of_image` gives them.
        sizes: per image (width, height) of the network input without its padding; boxes are cut to it.
    """
    thresholds = options.thresholds(len(predictions.logits))
    found = []
    for i, (width, height) in enumerate(sizes):
        levels = [
            candidates(logits[i], deltas[i], boxes, threshold, coding=coding, top_k=options.top_k)
            for logits, deltas, boxes, threshold in zip(
                predictions.logits, predictions.deltas, anchors, thresholds, strict=True
            )
        ]
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*levels, strict=True))
        if options.clip == "before-nms":
            boxes = clip(boxes, height=height, width=width)
            if options.drop_empty:
                boxes, scores, labels = _drop_empty(Found(boxes, scores, labels))
        keep = nms(boxes, scores, labels, options.nms_threshold, max_kept=options.max_detections)
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        if options.clip == "after-nms":
            boxes = clip(boxes, height=height, width=width)
            if options.drop_empty:
                boxes, scores, labels = _drop_empty(Found(boxes, scores, labels))
        found.append(Found(boxes, scores, labels))
    return found


def candidates(
    logits: Float[Tensor, "N K"],
    deltas: Float[Tensor, "N 4"],
    anchors: Float[Tensor, "N 4"],
    threshold: float,
    *,
    coding: BoxCoding,
    top_k: int,
) -> Found:
    """Return the decoded candidates of one level of one image, in order of index.

    The threshold is applied to logits, score > t where logit > log(t / (1 - t)), so that only what is kept
    meets a sigmoid.
    """
    flat = logits.float().reshape(-1)
    at_least = math.log(threshold / (1 - threshold)) if threshold > 0 else -math.inf
    index = torch.nonzero(flat > at_least).squeeze(1)
    if len(index) > top_k:
        index = index[first_largest(flat[index], top_k)]
    anchor, label = index // logits.shape[1], index % logits.shape[1]
    return Found(coding.decode(anchors[anchor], deltas[anchor]), flat[index].sigmoid(), label)


def first_largest(values: Float[Tensor, "N"], k: int) -> Int64[Tensor, "k"]:
    """Return the positions of the k largest values, in order of position; of equal ones the first.

    `torch.topk` leaves open which of equal values it takes.
    """
    smallest = torch.topk(values, k, sorted=True).values[-1]
    larger = values > smallest
    equal = values == smallest
    room = k - larger.sum()
    return torch.nonzero(larger | (equal & (equal.cumsum(0) <= room))).squeeze(1)


def _drop_empty(found: Found) -> Found:
    x1, y1, x2, y2 = found.boxes.unbind(1)
    solid = (x2 > x1) & (y2 > y1)
    return Found(found.boxes[solid], found.scores[solid], found.labels[solid])
