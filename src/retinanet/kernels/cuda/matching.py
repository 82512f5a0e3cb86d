"""Anchors x ground truth -> a state and an index an anchor, for a batch, without the matrix (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retinanet.batches import MatchState
from retinanet.errors import ConfigError

# Anchors a program, of one warp: the highest IoU of a box is then found by shuffles, without a barrier.
BLOCK = 128

# The result must be that of the plain reference bit for bit: an IoU that differs in its last place crosses a
# threshold or breaks a tie somewhere in a million pairs. So each operation rounds by itself. Fused, a * b + c
# would round once (area + area - shared has that form); `div_rn` stands for `/` below, which on float32 compiles
# to an approximate division. IEEE addition, multiplication and comparison need no such care: Triton keeps
# subnormals and never reorders them.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}

# A kernel sees globals only as constants.
NEGATIVE = tl.constexpr(int(MatchState.NEGATIVE))
POSITIVE = tl.constexpr(int(MatchState.POSITIVE))
IGNORED = tl.constexpr(int(MatchState.IGNORED))


@torch.compiler.disable
def match(
    anchors: Tensor,
    boxes: Tensor,
    ignored: Tensor | None,
    positive_iou: float,
    negative_iou: float,
    low_quality: bool,
    ignored_overlap: float,
) -> tuple[Tensor, Tensor]:
    """Match the same anchors to the boxes of each image, exactly as the plain reference does for one image.

    An anchor is positive, for the box of its highest IoU (the first of equals), when that IoU >= positive_iou;
    negative when it is < negative_iou; ignored between. See `retinanet.matching` for every rule.

    Args:
        anchors: `[R, 4]` float32 xyxy.
        boxes: `[B, G, 4]` float32 xyxy; zero rows are padding.
        ignored: `[B, G]` bool, true for regions that are no objects; or None.
        positive_iou, negative_iou: 0 <= negative_iou <= positive_iou <= 1, which the caller has checked.
        low_quality: also make positive the anchors that reach a box's highest IoU, when that is above 0.
        ignored_overlap: the share of its own area that an anchor needs in a region to be ignored.

    Returns:
        `[B, R]` int8 values of `MatchState`, and `[B, R]` int64 the box with the highest IoU (0 if there is none).

    Memory is O(B (R + G)); the host never waits.

    Raises:
        ConfigError: a tensor whose shape or dtype the kernel would misread.
    """
    _check(anchors, boxes, ignored)
    images, count, _ = boxes.shape
    state = torch.empty(images, len(anchors), dtype=torch.int8, device=anchors.device)
    index = torch.empty_like(state, dtype=torch.int64)
    if state.numel() == 0:
        return state, index
    anchors, boxes = anchors.contiguous(), boxes.contiguous()
    ignored = None if ignored is None else ignored.contiguous()
    # Non-negative floats are ordered as their bits are, so an integer maximum finds the highest IoU.
    best_of_box = None
    if low_quality:
        best_of_box = torch.zeros(images, count, dtype=torch.int32, device=anchors.device)
    sizes = len(anchors), count
    thresholds = positive_iou, negative_iou, ignored_overlap
    grid = (triton.cdiv(len(anchors), BLOCK), images)
    options = {"BLOCK": BLOCK, **OPTIONS}
    with torch.cuda.device_of(anchors):
        _match_kernel[grid](
            anchors,
            boxes,
            ignored,
            state,
            index,
            best_of_box,
            *sizes,
            *thresholds,
            POSITIVE_IOU_IS_0=positive_iou == 0,
            **options,
        )
        if best_of_box is not None:
            # A second pass, for a box's highest IoU is known only when every anchor has been seen.
            _low_quality_kernel[grid](anchors, boxes, ignored, best_of_box, state, *sizes, **options)
    return state, index


def _check(anchors: Tensor, boxes: Tensor, ignored: Tensor | None) -> None:
    if anchors.shape[1:] != (4,) or boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ConfigError(
            f"match needs anchors [R, 4] and boxes [B, G, 4]; got {list(anchors.shape)} and {list(boxes.shape)}"
        )
    if anchors.dtype != torch.float32 or boxes.dtype != torch.float32:
        raise ConfigError(f"match needs float32 anchors and boxes; got {anchors.dtype} and {boxes.dtype}")
    if ignored is not None and (ignored.shape != boxes.shape[:2] or ignored.dtype != torch.bool):
        raise ConfigError(
            f"match needs bool ignored of shape {list(boxes.shape[:2])}; "
            f"got {ignored.dtype} of {list(ignored.shape)}"
        )


# G changes from batch to batch; a kernel compiled anew for each divisor of it would be wasted.
@triton.jit(do_not_specialize=["rows", "count"])
def _match_kernel(
    anchors: tl.tensor,
    boxes: tl.tensor,
    ignored: tl.tensor,
    state: tl.tensor,
    index: tl.tensor,
    best_of_box: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    positive_iou: tl.tensor,
    negative_iou: tl.tensor,
    ignored_overlap: tl.tensor,
    POSITIVE_IOU_IS_0: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, inside, ax1, ay1, ax2, ay2, own = _anchors_of_program(anchors, rows, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    enough = ignored_overlap * own

    best = tl.zeros((BLOCK,), dtype=tl.float32)
    best_box = tl.zeros((BLOCK,), dtype=tl.int32)
    in_region = tl.zeros((BLOCK,), dtype=tl.int1)
    for g in range(count):
        box = image * count + g
        shared, iou = _met(ax1, ay1, ax2, ay2, own, boxes, box)
        if ignored is not None:
            region = tl.load(ignored + box)
            in_region = in_region | (region & (shared >= enough) & (shared > 0))
            iou = tl.where(region, 0.0, iou)
        better = iou > best
        best = tl.where(better, iou, best)
        best_box = tl.where(better, g, best_box)
        if best_of_box is not None:
            highest = tl.max(iou, axis=0)
            # Most blocks of anchors are nowhere near the box: those stay out of the queue.
            tl.atomic_max(
                best_of_box + box, highest.to(tl.int32, bitcast=True), mask=highest > 0, sem="relaxed"
            )

    found = tl.where(best < negative_iou, NEGATIVE, IGNORED)
    found = tl.where(best >= positive_iou, POSITIVE, found)
    if POSITIVE_IOU_IS_0:  # even then an anchor without any box is no object
        found = tl.where(best == 0, NEGATIVE, found)
    if ignored is not None:
        found = tl.where(in_region & (found != POSITIVE), IGNORED, found)
    tl.store(state + image * rows + row, found.to(tl.int8), mask=inside)
    tl.store(index + image * rows + row, best_box.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["rows", "count"])
def _low_quality_kernel(
    anchors: tl.tensor,
    boxes: tl.tensor,
    ignored: tl.tensor,
    best_of_box: tl.tensor,
    state: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row, inside, ax1, ay1, ax2, ay2, own = _anchors_of_program(anchors, rows, BLOCK)
    image = tl.program_id(1).to(tl.int64)

    reaches = tl.zeros((BLOCK,), dtype=tl.int1)
    for g in range(count):
        box = image * count + g
        # 0 where the box met no anchor, and for regions: neither turns any anchor positive.
        highest = tl.load(best_of_box + box).to(tl.float32, bitcast=True)
        _, iou = _met(ax1, ay1, ax2, ay2, own, boxes, box)
        reaches = reaches | ((iou == highest) & (iou > 0))
    tl.store(state + image * rows + row, tl.full((BLOCK,), POSITIVE, tl.int8), mask=inside & reaches)


@triton.jit
def _anchors_of_program(
    anchors: tl.tensor, rows: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the rows of a program, which of them exist, their corners and areas."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    # Beyond the last anchor stand empty ones, which overlap nothing.
    x1 = tl.load(anchors + row * 4, mask=inside, other=0.0)
    y1 = tl.load(anchors + row * 4 + 1, mask=inside, other=0.0)
    x2 = tl.load(anchors + row * 4 + 2, mask=inside, other=0.0)
    y2 = tl.load(anchors + row * 4 + 3, mask=inside, other=0.0)
    return row, inside, x1, y1, x2, y2, (x2 - x1) * (y2 - y1)


@triton.jit
def _met(
    ax1: tl.tensor,
    ay1: tl.tensor,
    ax2: tl.tensor,
    ay2: tl.tensor,
    own: tl.tensor,
    boxes: tl.tensor,
    box: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the intersection and the IoU of anchors of the area `own` with a box."""
    bx1 = tl.load(boxes + box * 4)
    by1 = tl.load(boxes + box * 4 + 1)
    bx2 = tl.load(boxes + box * 4 + 2)
    by2 = tl.load(boxes + box * 4 + 3)
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    shared = width * height
    union = own + (bx2 - bx1) * (by2 - by1) - shared
    whole = union > 0
    return shared, tl.where(whole, tl.div_rn(shared, tl.where(whole, union, 1.0)), 0.0)
