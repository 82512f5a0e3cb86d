"""From raw predictions to detections in the network's frame (Section 4, Inference)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from retinanet import kernels
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
    boxes of all levels meet in one per-class NMS, and the `max_detections` best are kept. The result is on the CPU.

    Ties are decided: by score descending, then by index ascending (level, then anchor, then class).

    Args:
        anchors: per level `[h*w*A, 4]`, as `anchors_of_image` gives them.
        sizes: per image (width, height) of the network input without its padding; boxes are cut to it.
    """
    # The threshold is applied to logits, score > t where logit > log(t / (1 - t)), so that only what is kept meets
    # a sigmoid.
    limits = [
        math.log(threshold / (1 - threshold)) if threshold > 0 else -math.inf
        for threshold in options.thresholds(len(predictions.logits))
    ]
    select = _select_on_cuda if predictions.logits[0].is_cuda else _select
    chosen = select(predictions.logits, limits, options.top_k)
    return [
        _finish(found, width, height, options)
        for found, (width, height) in zip(_decode(predictions, anchors, chosen, coding), sizes, strict=True)
    ]


def _select(logits: Sequence[Tensor], limits: Sequence[float], top_k: int) -> list[list[Tensor]]:
    """Return for each image, level by level, the flat indices of the candidates, ascending."""
    images = [[level[i] for level in logits] for i in range(len(logits[0]))]
    if kernels.usable(*logits, dtypes=(torch.float32, torch.bfloat16)):
        return [kernels.select(levels, limits, top_k) for levels in images]
    return [
        [best_above(level, limit, top_k) for level, limit in zip(levels, limits, strict=True)]
        for levels in images
    ]


def best_above(logits: Float[Tensor, "N K"], limit: float, top_k: int) -> Int64[Tensor, "C"]:
    """Return the flat indices, ascending, of the `top_k` largest logits above a limit; of equal ones the first."""
    flat = logits.float().reshape(-1)
    index = torch.nonzero(flat > limit).squeeze(1)
    return index if len(index) <= top_k else index[first_largest(flat[index], top_k)]


def first_largest(values: Float[Tensor, "N"], k: int) -> Int64[Tensor, "k"]:
    """Return the positions of the k largest values, in order of position; of equal ones the first.

    `torch.topk` leaves open which of equal values it takes.
    """
    smallest = torch.topk(values, k, sorted=True).values[-1]
    larger = values > smallest
    equal = values == smallest
    room = k - larger.sum()
    return torch.nonzero(larger | (equal & (equal.cumsum(0) <= room))).squeeze(1)


def _select_on_cuda(logits: Sequence[Tensor], limits: Sequence[float], top_k: int) -> list[list[Tensor]]:
    """Do as `_select` with shapes that do not depend on values, so that the host waits for the device once."""
    padded = [best_above_padded(level, limit, top_k) for level, limit in zip(logits, limits, strict=True)]
    widths = [level.shape[1] for level in padded]
    together = torch.cat(padded, dim=1).cpu()
    return [[part[part >= 0] for part in image.split(widths)] for image in together]


def best_above_padded(logits: Float[Tensor, "B N K"], limit: float, top_k: int) -> Int64[Tensor, "B C"]:
    """Return what `best_above` returns for each image, filled up to one length with -1."""
    flat = logits.float().flatten(1)
    k = min(top_k, flat.shape[1])
    flat = torch.where(flat > limit, flat, -math.inf)
    smallest = torch.topk(flat, k, sorted=True).values[:, -1:]
    larger = flat > smallest
    equal = (flat == smallest) & (flat > -math.inf)
    take = larger | (equal & (equal.cumsum(1) <= k - larger.sum(1, keepdim=True)))
    # What is not taken goes to a place behind the last, which is cut off.
    place = torch.where(take, take.cumsum(1) - 1, k)
    index = torch.arange(flat.shape[1], device=flat.device).expand_as(flat)
    return torch.full((len(flat), k + 1), -1, device=flat.device).scatter_(1, place, index)[:, :k]


def _decode(
    predictions: RawPredictions, anchors: Sequence[Tensor], chosen: list[list[Tensor]], coding: BoxCoding
) -> list[Found]:
    """Return the candidates of each image, on the CPU, levels one after the other."""
    classes = predictions.logits[0].shape[2]
    device = predictions.logits[0].device
    found = []
    for i, levels in enumerate(chosen):
        counts = [len(level) for level in levels]
        index = torch.cat(levels).to(device)
        anchor = index // classes
        logits, deltas, boxes = (
            # Not `part[which]`, whose general form takes twice as long to get going.
            torch.cat(
                [part.index_select(0, which) for part, which in zip(parts, rows.split(counts), strict=True)]
            )
            for parts, rows in (
                ([level[i].reshape(-1) for level in predictions.logits], index),
                ([level[i] for level in predictions.deltas], anchor),
                (anchors, anchor),
            )
        )
        decoded = coding.decode(boxes, deltas)
        found.append(Found(decoded.cpu(), logits.float().sigmoid().cpu(), (index % classes).cpu()))
    return found


def _finish(found: Found, width: int, height: int, options: PostProcessing) -> Found:
    """Cut boxes to the image and suppress, in the order of the options."""
    if options.clip == "before-nms":
        found = _clip(found, width, height, options.drop_empty)
    keep = nms(*found, options.nms_threshold, max_kept=options.max_detections)
    found = Found(found.boxes[keep], found.scores[keep], found.labels[keep])
    if options.clip == "after-nms":
        found = _clip(found, width, height, options.drop_empty)
    return found


def _clip(found: Found, width: int, height: int, drop_empty: bool) -> Found:
    found = found._replace(boxes=clip(found.boxes, height=height, width=width))
    return _drop_empty(found) if drop_empty else found


def _drop_empty(found: Found) -> Found:
    x1, y1, x2, y2 = found.boxes.unbind(1)
    solid = (x2 > x1) & (y2 > y1)
    return Found(found.boxes[solid], found.scores[solid], found.labels[solid])
