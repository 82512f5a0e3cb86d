"""ATSS: anchors are assigned by how well those near an object fit it, not by thresholds that are the same for all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from retinanet.anchors import AnchorSpec, all_anchors_of_image
from retinanet.batches import MatchState
from retinanet.boxes import area, iou
from retinanet.matching import Matches, match_anchors

# Rows and columns of each level whose crossings are an object's candidates: nine locations, the paper's k.
NEAREST = 3


class _Candidates(NamedTuple):
    """Of every object C anchors: their rows, whether there is such a row, and whether their centre is in the object."""

    rows: Int64[Tensor, "B G C"]
    exists: Bool[Tensor, "B G C"]
    inside: Bool[Tensor, "B G C"]


@torch.no_grad()
def match_atss(
    spec: AnchorSpec,
    height: int,
    width: int,
    boxes: Float[Tensor, "B G 4"],
    ignored: Bool[Tensor, "B G"],
) -> Matches:
    """Match the anchors of images of the padded size height x width to the ground-truth boxes of a batch.

    An object's candidates are the anchors of the nine locations, on every level, where the three rows and the three
    columns nearest to its centre cross; of a smaller grid, all. With mean m and standard deviation s of the
    candidates' IoUs with the object, those are positive whose IoU >= m + s and whose centre lies inside the object. If
    there is none, the first candidate of the highest IoU is, when that is above 0. An anchor that several objects want
    is that one's whose IoU is higher (the first of equals). What is left is negative, or ignored where regions say so,
    as in `match_anchors`; an empty box (a padding row) matches nothing.

    Memory is O(anchors + boxes x levels x anchors of a location), not anchors x boxes, and no shape depends on a value.

    Reference: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training
    Sample Selection", CVPR 2020. There candidates are the nine nearest locations by distance, which differ where a
    centre lies between locations or near the border, and an object without a positive anchor is left without.
    """
    anchors = all_anchors_of_image(spec, height, width, boxes.device)
    objects = torch.where(ignored[..., None], 0, boxes)
    near = _candidates(spec, height, width, objects)
    overlaps = iou(anchors[near.rows], objects[:, :, None])
    positive = (overlaps >= _enough(overlaps, near.exists)[..., None]) & near.exists & near.inside
    positive &= (area(objects) > 0)[..., None]
    best = overlaps.where(near.exists, -1).max(dim=-1, keepdim=True)
    alone = ~positive.any(dim=-1, keepdim=True) & (best.values > 0)
    positive |= alone & (torch.arange(overlaps.shape[-1], device=boxes.device) == best.indices)

    # Of those who want an anchor the one with the highest IoU, of equals the first, wins it.
    rows, count = near.rows.flatten(1), boxes.shape[1]
    wish = overlaps.where(positive, -1).flatten(1)
    highest = wish.new_full((len(boxes), len(anchors)), -1).scatter_reduce(1, rows, wish, "amax")
    number = torch.arange(count, device=boxes.device).repeat_interleave(overlaps.shape[-1])
    number = number.where(positive.flatten(1) & (wish == highest.gather(1, rows)), count)
    winner = rows.new_full(highest.shape, count).scatter_reduce(1, rows, number, "amin")

    found = winner < count
    rest = match_anchors(anchors, torch.where(ignored[..., None], boxes, 0), ignored).state
    return Matches(torch.where(found, int(MatchState.POSITIVE), rest).to(torch.int8), winner.where(found, 0))


def _enough(overlaps: Tensor, exists: Tensor) -> Tensor:
    """Return mean + standard deviation of those that exist, `[B, G]`."""
    count = exists.sum(dim=-1)
    mean = (overlaps * exists).sum(dim=-1) / count
    squares = ((overlaps - mean[..., None]).square() * exists).sum(dim=-1)
    return mean + (squares / (count - 1)).sqrt()


def _candidates(spec: AnchorSpec, height: int, width: int, boxes: Tensor) -> _Candidates:
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    parts, first = [], 0
    for level, (rows, columns) in enumerate(spec.grids(height, width)):
        step_y, step_x = spec.steps(level, height, width)
        y = _nearest(centre[..., 1] / step_y - spec.center, rows)
        x = _nearest(centre[..., 0] / step_x - spec.center, columns)
        location = (y.clamp(max=rows - 1) * columns)[..., :, None] + x.clamp(max=columns - 1)[..., None, :]
        row = (
            first
            + location[..., None] * spec.per_location
            + torch.arange(spec.per_location, device=boxes.device)
        )
        exists = (y < rows)[..., :, None] & (x < columns)[..., None, :]
        low, high = boxes[..., None, :2], boxes[..., None, 2:]
        y, x = (y + spec.center) * step_y, (x + spec.center) * step_x
        in_y = (y > low[..., 1]) & (y < high[..., 1])
        in_x = (x > low[..., 0]) & (x < high[..., 0])
        inside = in_y[..., :, None] & in_x[..., None, :]
        parts.append(
            _Candidates(
                row.flatten(-3),
                exists[..., None].expand(row.shape).flatten(-3),
                inside[..., None].expand(row.shape).flatten(-3),
            )
        )
        first += rows * columns * spec.per_location
    return _Candidates(*(torch.cat(of_levels, dim=-1) for of_levels in zip(*parts, strict=True)))


def _nearest(place: Tensor, count: int) -> Tensor:
    """Return the `NEAREST` numbers nearest to a place, of 0 .. count - 1 where there are as many, `[..., NEAREST]`."""
    start = (place - (NEAREST - 1) / 2).round().clamp(0, max(count - NEAREST, 0)).long()
    return start[..., None] + torch.arange(NEAREST, device=place.device)
