"""Which anchor answers for which object: anchors x ground truth -> a state and an index an anchor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int8, Int64
from torch import Tensor

from retinanet import kernels
from retinanet.batches import MatchState
from retinanet.boxes import area, intersection, iou, pairwise
from retinanet.errors import ConfigError

# Boxes compared at a time. The largest temporary is anchors x BLOCK, whatever the number of boxes.
BLOCK = 16


@dataclass(frozen=True)
class Matches:
    """Values of `MatchState`, and the number of the box that a positive answers for; of other anchors it is some box's,
    0 where there is none."""

    state: Int8[Tensor, "*B R"]
    index: Int64[Tensor, "*B R"]


def match_anchors(
    anchors: Float[Tensor, "R 4"],
    boxes: Float[Tensor, "*B G 4"],
    ignored: Bool[Tensor, "*B G"] | None = None,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    low_quality: bool = False,
    ignored_overlap: float = 0.5,
) -> Matches:
    """Match anchors to the ground-truth boxes of an image, or of a batch of them, by IoU (Section 4 of the paper).

    An anchor is positive, for the box of its highest IoU (the first of equals), when that IoU >= positive_iou;
    negative when it is < negative_iou; ignored between. An empty box (a padding row) matches nothing.

    Args:
        ignored: true for regions (crowd, difficult, cut away) that are no objects. An anchor that would be
            negative or between is ignored when |anchor ∩ region| / |anchor| >= ignored_overlap.
        low_quality: also make positive the anchors that reach a box's highest IoU with any anchor, however
            low, but above 0: a box that overlaps no anchor must not turn every anchor positive, as it does
            in detectron2, torchvision and MMDetection. The anchor keeps the box of its own highest IoU.

    Memory is O(anchors + boxes) of the batch, not anchors x boxes.
    """
    if not 0 <= negative_iou <= positive_iou <= 1:
        raise ConfigError(
            "match_anchors needs 0 <= negative_iou <= positive_iou <= 1; "
            f"got negative_iou {negative_iou} and positive_iou {positive_iou}"
        )
    images = boxes if boxes.ndim == 3 else boxes[None]
    regions = None if ignored is None else ignored.reshape(images.shape[:2])
    options = (positive_iou, negative_iou, low_quality, ignored_overlap)
    if kernels.usable(anchors, images):
        state, index = kernels.match(anchors, images, regions, *options)
    else:
        state = torch.zeros((len(images), len(anchors)), dtype=torch.int8, device=anchors.device)
        index = torch.zeros_like(state, dtype=torch.int64)
        for i, image in enumerate(images):
            one = plain_match_anchors(anchors, image, None if regions is None else regions[i], *options)
            state[i], index[i] = one.state, one.index
    shape = (*boxes.shape[:-2], len(anchors))
    return Matches(state.reshape(shape), index.reshape(shape))


@torch.no_grad()
def plain_match_anchors(
    anchors: Tensor,
    boxes: Tensor,
    ignored: Tensor | None = None,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    low_quality: bool = False,
    ignored_overlap: float = 0.5,
) -> Matches:
    """Do as `match_anchors` for one image, readably; what the fast paths are tested against."""
    best = anchors.new_zeros(len(anchors))
    index = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    # An ignored region is no object: as an empty box it can win no anchor, and indices stay those of `boxes`.
    objects = boxes if ignored is None else torch.where(ignored[:, None], 0, boxes)
    best_of_box = []
    for start in range(0, len(objects), BLOCK):
        overlaps = pairwise(iou, anchors, objects[start : start + BLOCK])
        highest, which = overlaps.max(dim=1)
        better = highest > best
        best = torch.where(better, highest, best)
        index = torch.where(better, which + start, index)
        best_of_box.append(overlaps.amax(dim=0))

    state = torch.full_like(index, MatchState.IGNORED, dtype=torch.int8)
    state[best < negative_iou] = MatchState.NEGATIVE
    state[best >= positive_iou] = MatchState.POSITIVE
    if positive_iou == 0:  # even then an anchor without any box is no object
        state[best == 0] = MatchState.NEGATIVE
    if low_quality and best_of_box:
        state[_reaches_best(anchors, objects, torch.cat(best_of_box))] = MatchState.POSITIVE
    if ignored is not None:
        inside = _lies_in(anchors, torch.where(ignored[:, None], boxes, 0), ignored_overlap)
        state[inside & (state != MatchState.POSITIVE)] = MatchState.IGNORED
    return Matches(state, index)


def _reaches_best(anchors: Tensor, objects: Tensor, best_of_box: Tensor) -> Tensor:
    reaches = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    for start in range(0, len(objects), BLOCK):
        overlaps = pairwise(iou, anchors, objects[start : start + BLOCK])
        reaches |= ((overlaps == best_of_box[start : start + BLOCK]) & (overlaps > 0)).any(dim=1)
    return reaches


def _lies_in(anchors: Tensor, regions: Tensor, share: float) -> Tensor:
    inside = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    own = area(anchors)[:, None]
    for start in range(0, len(regions), BLOCK):
        overlaps = pairwise(intersection, anchors, regions[start : start + BLOCK])
        inside |= ((overlaps >= share * own) & (overlaps > 0)).any(dim=1)
    return inside
