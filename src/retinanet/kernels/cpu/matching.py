"""IoU and matching of anchors to boxes without an anchors x boxes matrix."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from retinanet.batches import MatchState
from retinanet.kernels.cpu.compiled import compiled
from retinanet.kernels.cpu.memory import recycled
from retinanet.kernels.cpu.threads import in_parallel

# Anchors looked at together. Neighbours in memory are neighbours in the image, so that most boxes lie outside the
# rectangle around a block and cost one comparison for all of it.
BLOCK = 128
# Blocks that a thread takes at a time.
GROUP = 16
# Blocks that are worth a second thread.
LEAST_BLOCKS = 64
# Blocks remembered for a box, those in which it reached its best IoU so far. Where more tie, all are looked at again.
REMEMBERED = 32
# Boxes whose low-quality matches are worth a second thread.
LEAST_BOXES = 64

f32 = np.float32
MOST, LEAST = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
NEGATIVE, POSITIVE, IGNORED = (np.int8(state) for state in MatchState)


# The rectangles around the blocks of prepared anchors.
_prepared = WeakIdKeyDictionary()
_NOTHING = np.empty((0, 4), np.float32)


def prepare(anchors: Tensor) -> None:
    """Remember the rectangles around the blocks of anchors float32 `[R, 4]` for as long as these live."""
    rows = anchors.contiguous().numpy()
    bounds = np.empty((-(-len(rows) // BLOCK), 4), np.float32)
    _bounds(rows.view(np.int32), bounds)
    _prepared[anchors] = bounds


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
    """Return state int8 and index int64 `[B, R]` for anchors `[R, 4]`, boxes `[B, G, 4]`, ignored `[B, G]`.

    Equal to `plain_match_anchors` for each image, to the bit: the same float32 operations in the same order.
    """
    images, count = len(boxes), len(anchors)
    state = recycled(torch.Size((images, count)), torch.int8)
    index = recycled(torch.Size((images, count)), torch.int64)
    a, b = anchors.detach().contiguous().numpy(), boxes.detach().contiguous().numpy()
    s, i = state.numpy(), index.numpy()
    if ignored is None:
        objects, regions = b, b[:, :0]
    else:
        of_region = ignored.numpy()[..., None]
        # As an empty box a region wins no anchor, and indices stay those of `boxes`.
        objects, regions = np.where(of_region, f32(0), b), np.where(of_region, b, f32(0))
        regions = regions if of_region.any() else b[:, :0]
    blocks, bounds = -(-count // BLOCK), _prepared.get(anchors, _NOTHING)
    # As in torch, a tensor of float32 meets a Python number rounded to float32.
    positive, negative, share = f32(positive_iou), f32(negative_iou), f32(ignored_overlap)

    objects, regions = (np.ascontiguousarray(of.transpose(0, 2, 1)) for of in (objects, regions))
    # Threads take groups of blocks in turns: the coarse levels, whose anchors meet most boxes, come last.
    threads = max(1, min(torch.get_num_threads(), blocks // LEAST_BLOCKS))
    # Of each thread what it found.
    shape = (threads, images, objects.shape[2])
    best, reached = np.zeros(shape, np.float32), np.zeros((*shape, 1 + REMEMBERED), np.int32)

    def first(_: int, start: int, stop: int) -> None:
        for thread in range(start, stop):  # one, unless torch's threads have become fewer since
            found = best[thread], reached[thread]
            _match(
                a, bounds, objects, regions, thread, threads, GROUP, positive, negative, share, s, i, *found
            )

    in_parallel(first, threads, least=1)
    if low_quality and objects.shape[2]:
        in_parallel(
            lambda _, start, stop: _low_quality(a, objects, start, stop, GROUP, best, reached, s),
            images * objects.shape[2],
            least=LEAST_BOXES,
        )
    return state, index


@compiled()
def _match(
    anchors, bounds, objects, regions, thread, threads, group,
    positive, negative, share, state, index, best_of_box, reached,
):  # fmt: skip
    bits = anchors.view(np.int32)
    columns, bound = np.empty((7, BLOCK), np.float32), np.empty(4, np.float32)
    which_of_anchor, inside = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.bool_)
    most = max(objects.shape[2], regions.shape[2])
    meets, listed = np.empty(most, np.bool_), np.empty(most + 1, np.int32)
    # Without any box an anchor is no object, whatever the thresholds.
    of_none = NEGATIVE if negative > 0 or positive == 0 else IGNORED
    for block in range(-(-len(anchors) // BLOCK)):
        if block // group % threads != thread:
            continue
        first = block * BLOCK
        n = min(BLOCK, len(anchors) - first)
        x1, y1, x2, y2, area = columns[0, :n], columns[1, :n], columns[2, :n], columns[3, :n], columns[4, :n]
        overlap, best, which = columns[5, :n], columns[6, :n], which_of_anchor[:n]
        if len(bounds):
            bound = bounds[block]
        else:
            _bound(bits, first, first + n, bound)
        unpacked = False
        for image in range(len(objects)):
            s, i = state[image, first : first + n], index[image, first : first + n]
            near = _near(objects[image], bound, meets, listed)
            if near == 0:
                s[:] = of_none
                i[:] = 0
            else:
                if not unpacked:
                    _unpack(anchors[first : first + n], x1, y1, x2, y2, area)
                    unpacked = True
                best[:] = 0
                which[:] = 0
                boxes = objects[image]
                for at in range(near):
                    g = listed[at]
                    _meet(x1, y1, x2, y2, area, boxes[0, g], boxes[1, g], boxes[2, g], boxes[3, g], overlap)
                    _improve(overlap, best, which, g)
                    _remember(block, _highest(overlap), best_of_box[image], g, reached[image, g])
                _decide(best, which, positive, negative, s, i)
            boxes = regions[image]
            for at in range(_near(boxes, bound, meets, listed)):
                if not unpacked:
                    _unpack(anchors[first : first + n], x1, y1, x2, y2, area)
                    unpacked = True
                g = listed[at]
                a, b, c, d = boxes[0, g], boxes[1, g], boxes[2, g], boxes[3, g]
                _lies_in(x1, y1, x2, y2, area, a, b, c, d, share, inside[:n])
                for k in range(n):
                    if inside[k] and s[k] != POSITIVE:
                        s[k] = IGNORED


@compiled()
def _remember(block, highest, best_of_box, g, reached):
    """Write to reached[1:] the blocks in which box g has its best IoU so far, and to reached[0] how many."""
    if highest > best_of_box[g]:
        best_of_box[g] = highest
        reached[0] = 0
    if highest == best_of_box[g] and highest > 0:
        if reached[0] < REMEMBERED:
            reached[1 + reached[0]] = block
        reached[0] += 1


@compiled()
def _low_quality(anchors, objects, start, stop, group, best, reached, state):
    """Make positive the anchors that reach the best IoU of the boxes start..stop, counted over the images.

    Args:
        best, reached: `[T, B, G]` and `[T, B, G, 1 + REMEMBERED]`, what each thread found; zeros where it had no part.
    """
    columns, bound = np.empty((6, BLOCK), np.float32), np.empty(4, np.float32)
    bits = anchors.view(np.int32)
    for number in range(start, stop):
        image, g = number // objects.shape[2], number % objects.shape[2]
        highest = best[0, image, g]
        for part in range(1, len(best)):
            highest = max(highest, best[part, image, g])
        if highest > 0:
            for part in range(len(best)):
                if best[part, image, g] == highest:
                    blocks = reached[part, image, g]
                    if blocks[0] <= REMEMBERED:
                        for at in range(blocks[0]):
                            _reach(
                                anchors, blocks[1 + at], objects[image, :, g], highest, columns, state[image]
                            )
                    else:
                        box = objects[image, :, g]
                        for block in range(-(-len(anchors) // BLOCK)):
                            if block // group % len(best) != part:
                                continue
                            _bound(bits, block * BLOCK, min(len(bits), (block + 1) * BLOCK), bound)
                            if (
                                box[0] < bound[2]
                                and box[2] > bound[0]
                                and box[1] < bound[3]
                                and box[3] > bound[1]
                            ):
                                _reach(anchors, block, box, highest, columns, state[image])


@compiled()
def _reach(anchors, block, box, best, columns, state):
    first = block * BLOCK
    n = min(BLOCK, len(anchors) - first)
    x1, y1, x2, y2, area = columns[0, :n], columns[1, :n], columns[2, :n], columns[3, :n], columns[4, :n]
    overlap = columns[5, :n]
    _unpack(anchors[first : first + n], x1, y1, x2, y2, area)
    _meet(x1, y1, x2, y2, area, box[0], box[1], box[2], box[3], overlap)
    for k in range(n):
        if overlap[k] == best:
            state[first + k] = POSITIVE


@compiled()
def _bounds(bits, bounds):
    for block in range(len(bounds)):
        _bound(bits, block * BLOCK, min(len(bits), (block + 1) * BLOCK), bounds[block])


@compiled()
def _bound(bits, start, stop, bound):
    """Write the rectangle around the anchors start..stop; it may be too large, never too small.

    On the bits of the coordinates, because the compiler makes no vector code of a minimum of floats: `_ordered`
    keeps the order of floats. A NaN is beyond the infinities there, and counts as the one next to it.
    """
    left = top = MOST
    right = bottom = LEAST
    for k in range(start, stop):
        x1, y1 = _ordered(bits[k, 0]), _ordered(bits[k, 1])
        x2, y2 = _ordered(bits[k, 2]), _ordered(bits[k, 3])
        left = x1 if x1 < left else left
        top = y1 if y1 < top else top
        right = x2 if x2 > right else right
        bottom = y2 if y2 > bottom else bottom
    bound[0], bound[1], bound[2], bound[3] = _least(left), _least(top), _most(right), _most(bottom)


@compiled(inline=True)
def _ordered(bits):
    """Map the bits of floats to integers of the same order, and back."""
    return np.int32(bits ^ (np.int32(bits >> np.int32(31)) & MOST))


@compiled(inline=True)
def _least(least):
    value = np.int32(_ordered(least)).view(np.float32)
    return value if value == value else f32(-np.inf)


@compiled(inline=True)
def _most(most):
    value = np.int32(_ordered(most)).view(np.float32)
    return value if value == value else f32(np.inf)


@compiled()
def _near(boxes, bound, meets, listed):
    """List the boxes `[4, G]` that meet the rectangle around a block; return how many. Without branches to predict."""
    if boxes.shape[1] == 0:
        return 0
    _meets(boxes[0], boxes[1], boxes[2], boxes[3], bound[0], bound[1], bound[2], bound[3], meets)
    count = 0
    for g in range(boxes.shape[1]):
        listed[count] = g
        count += meets[g]
    return count


@compiled()
def _meets(x1, y1, x2, y2, left, top, right, bottom, meets):
    for g in range(len(x1)):
        meets[g] = (x1[g] < right) & (x2[g] > left) & (y1[g] < bottom) & (y2[g] > top)


@compiled()
def _unpack(anchors, x1, y1, x2, y2, area):
    # One loop for each: with more arrays than these the compiler no longer proves them apart.
    _column(anchors, 0, x1)
    _column(anchors, 1, y1)
    _column(anchors, 2, x2)
    _column(anchors, 3, y2)
    for k in range(len(area)):
        area[k] = (x2[k] - x1[k]) * (y2[k] - y1[k])


@compiled(inline=True)
def _column(rows, number, out):
    for k in range(len(out)):
        out[k] = rows[k, number]


@compiled(inline=True)
def _shared(x1, y1, x2, y2, a, b, c, d):
    width = (x2 if x2 < c else c) - (x1 if x1 > a else a)
    height = (y2 if y2 < d else d) - (y1 if y1 > b else b)
    return (width if width > 0 else f32(0)) * (height if height > 0 else f32(0))


@compiled(inline=True)
def _iou(x1, y1, x2, y2, area, a, b, c, d, own):
    shared = _shared(x1, y1, x2, y2, a, b, c, d)
    union = area + own - shared
    return shared / union if union > 0 else f32(0)


@compiled()
def _meet(x1, y1, x2, y2, area, a, b, c, d, overlap):
    own = (c - a) * (d - b)
    for k in range(len(overlap)):
        overlap[k] = _iou(x1[k], y1[k], x2[k], y2[k], area[k], a, b, c, d, own)


@compiled()
def _improve(overlap, best, which, number):
    box = np.int32(number)
    for k in range(len(overlap)):
        better = overlap[k] > best[k]
        best[k] = overlap[k] if better else best[k]
        which[k] = box if better else which[k]


@compiled()
def _highest(overlap):
    """Return the largest of values >= 0, as integers: a maximum of floats is not made vector code."""
    bits = overlap.view(np.int32)
    highest = np.int32(0)
    for k in range(len(bits)):
        highest = bits[k] if bits[k] > highest else highest
    return np.int32(highest).view(np.float32)


@compiled()
def _decide(best, which, positive, negative, state, index):
    for k in range(len(best)):
        matched = best[k] >= positive and best[k] > 0  # without any box an anchor is no object even at 0
        apart = best[k] < negative or (positive == 0 and best[k] == 0)
        state[k] = POSITIVE if matched else (NEGATIVE if apart else IGNORED)
        index[k] = which[k]


@compiled()
def _lies_in(x1, y1, x2, y2, area, a, b, c, d, share, inside):
    for k in range(len(inside)):
        shared = _shared(x1[k], y1[k], x2[k], y2[k], a, b, c, d)
        inside[k] = shared > 0 and shared >= share * area[k]
