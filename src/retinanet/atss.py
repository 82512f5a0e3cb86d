"""ATSS: anchors are assigned by how well those near an object fit it, not by thresholds that are the same for all."""

from __future__ import annotations

import itertools
from functools import lru_cache
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
# An object's threshold is so many standard deviations above the mean. ATSS has 1, for a single anchor a location; with
# nine that makes some fifty anchors positive for an object, 2 about seventeen (decision 0009).
DEVIATIONS = 2.0


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
    *,
    deviations: float = DEVIATIONS,
) -> Matches:
    """Match the anchors of images of the padded size height x width to the ground-truth boxes of a batch.

    An object's candidates are the anchors of the nine locations, on every level, where the three rows and the three
    columns nearest to its centre cross; of a smaller grid, all. With mean m and standard deviation s of the
    candidates' IoUs with the object, those are positive whose IoU >= m + deviations s and whose centre lies inside the
    object. If there is none, the first candidate of the highest IoU is, when that is above 0. An anchor that several
    objects want is that one's whose IoU is higher (the first of equals). What is left is negative, or ignored where
    regions say so, as in `match_anchors`; an empty box (a padding row) matches nothing.

    Memory is O(anchors + boxes x levels x anchors of a location), not anchors x boxes, and no shape depends on a value.

    Reference: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training
    Sample Selection", CVPR 2020. There candidates are the nine nearest locations by distance, which differ where a
    centre lies between locations or near the border, deviations are 1, and an object without a positive anchor is left
    without.
    """
    anchors = all_anchors_of_image(spec, height, width, boxes.device)
    objects = torch.where(ignored[..., None], 0, boxes)
    near = _candidates(spec, height, width, objects)
    overlaps = iou(anchors[near.rows], objects[:, :, None])
    positive = (overlaps >= _enough(overlaps, near.exists, deviations)[..., None]) & near.exists & near.inside
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


def _enough(overlaps: Tensor, exists: Tensor, deviations: float) -> Tensor:
    """Return mean + deviations x standard deviation of those that exist, `[B, G]`."""
    count = exists.sum(dim=-1)
    mean = (overlaps * exists).sum(dim=-1) / count
    squares = ((overlaps - mean[..., None]).square() * exists).sum(dim=-1)
    return mean + deviations * (squares / (count - 1)).sqrt()


def _candidates(spec: AnchorSpec, height: int, width: int, boxes: Tensor) -> _Candidates:
    grid = _grid(spec, height, width, boxes.device)
    y, y_exists, y_inside = _nearest(boxes[..., 1], boxes[..., 3], grid.step_y, grid.rows, spec.center)
    x, x_exists, x_inside = _nearest(boxes[..., 0], boxes[..., 2], grid.step_x, grid.columns, spec.center)
    first, columns = grid.first[:, None, None], grid.columns[:, None, None]
    location = first + y[..., :, None] * columns + x[..., None, :]
    exists = y_exists[..., :, None] & x_exists[..., None, :]
    inside = y_inside[..., :, None] & x_inside[..., None, :]
    anchors = torch.arange(spec.per_location, device=boxes.device)
    rows = location[..., None] * spec.per_location + anchors
    exists, inside = (of[..., None].expand_as(rows).flatten(2) for of in (exists, inside))
    return _Candidates(rows.flatten(2), exists, inside)


def _nearest(
    low: Tensor, high: Tensor, step: Tensor, count: Tensor, center: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `NEAREST` of each level's `count` rows (or columns) that are nearest to the middle of an object, which
    of them exist, and which lie between its sides, each `[B, G, L, NEAREST]`."""
    place = ((low + high) / 2)[..., None] / step - center
    start = (place - (NEAREST - 1) / 2).round().clamp(min=0).long()
    start = torch.minimum(start, (count - NEAREST).clamp(min=0))
    number = start[..., None] + torch.arange(NEAREST, device=low.device)
    at = (number + center) * step[:, None]
    inside = (at > low[..., None, None]) & (at < high[..., None, None])
    last = (count - 1)[:, None]
    return torch.minimum(number, last), number <= last, inside


class _Grid(NamedTuple):
    """Of every level: locations before it, rows and columns of locations, and pixels between them, each `[L]`."""

    first: Tensor
    rows: Tensor
    columns: Tensor
    step_y: Tensor
    step_x: Tensor


@lru_cache(maxsize=32)
def _grid(spec: AnchorSpec, height: int, width: int, device: torch.device) -> _Grid:
    grids = spec.grids(height, width)
    first = [0, *itertools.accumulate(rows * columns for rows, columns in grids)][:-1]
    steps = [spec.steps(level, height, width) for level in range(len(grids))]
    columns_of_table = (first, *zip(*grids, strict=True), *zip(*steps, strict=True))
    return _Grid(*(torch.tensor(values, device=device) for values in columns_of_table))
