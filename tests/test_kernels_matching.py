"""Matching on a CPU: state and index are those of the plain matcher, ties, thresholds and odd boxes included."""

import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")

from kernel_cases import random_boxes, random_mask, seeded, torch_threads
from retinanet import kernels
from retinanet.anchors import AnchorSpec, all_anchors_of_image, anchors_of_image
from retinanet.batches import MatchState
from retinanet.boxes import iou, pairwise
from retinanet.kernels.cpu import matching
from retinanet.matching import match_anchors, plain_match_anchors

NAN, INF = math.nan, math.inf


def check_match(anchors, boxes, ignored=None, **options) -> Tensor:
    """State and index must be those of the plain matcher, image by image; return the states."""
    found = match_anchors(anchors, boxes, ignored, **options)
    assert (found.state.dtype, found.index.dtype) == (torch.int8, torch.int64)
    assert found.state.shape == found.index.shape == (len(boxes), len(anchors))
    for i, image in enumerate(boxes):
        expected = plain_match_anchors(anchors, image, None if ignored is None else ignored[i], **options)
        assert torch.equal(found.state[i], expected.state)
        assert torch.equal(found.index[i], expected.index)
    return found.state


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([1, 2, 127, 128, 129, 256, 300]),
    st.sampled_from([(0.5, 0.4), (0.5, 0.5), (0.5, 0.25), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0), (1 / 3, 0.2)]),
    st.booleans(),
    st.sampled_from([None, 0.0, 0.5, 1.0]),
    st.integers(1, 3),
)
def test_ties(seed, rows, thresholds, low_quality, share, number):
    # Corners on a grid: equal IoUs, equal boxes, IoUs on the thresholds, empty boxes, boxes inside out.
    positive_iou, negative_iou = thresholds
    generator = seeded(seed)
    extent = int(torch.randint(3, 9, (), generator=generator))
    anchors = torch.randint(0, extent, (rows, 4), generator=generator).float()
    boxes = torch.randint(0, extent, (3, 10, 4), generator=generator).float()
    boxes[0, 6:] = 0  # padding
    boxes[1] = 0
    options = {"positive_iou": positive_iou, "negative_iou": negative_iou, "low_quality": low_quality}
    ignored = None
    if share is not None:
        ignored = random_mask(3, 10, seed=seed)
        options["ignored_overlap"] = share
    with torch_threads(number), pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "LEAST_BLOCKS", 1)
        patch.setattr(matching, "LEAST_BOXES", 1)
        patch.setattr(matching, "GROUP", 1)
        check_match(anchors, boxes, ignored, **options)


@pytest.mark.usefixtures("any_threads", "small_parts")
@pytest.mark.parametrize("low_quality", [False, True])
def test_numbers_of_anchors_around_a_block(low_quality):
    for rows in (1, 127, 128, 129, 255, 256, 257, 5 * matching.BLOCK + 3):
        anchors, boxes = random_boxes(rows, seed=rows), random_boxes(2, 7, seed=rows + 1)
        check_match(anchors, boxes, random_mask(2, 7, seed=rows), low_quality=low_quality)


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("in_order", [True, False])
def test_many_anchors(in_order):
    # Enough that three threads share the first pass.
    anchors = torch.cat(anchors_of_image(AnchorSpec(), 640, 896))
    assert len(anchors) > 3 * matching.LEAST_BLOCKS * matching.BLOCK
    if not in_order:
        anchors = anchors[torch.randperm(len(anchors), generator=seeded(0))]
    boxes = random_boxes(2, 12, seed=1, extent=600)
    boxes[1, 5] = boxes[1, 4]
    boxes[1, 6] = torch.tensor([2e4, 2e4, 3e4, 3e4])  # meets no anchor
    boxes[1, 7] = anchors[54321]
    ignored = random_mask(2, 12, seed=2)
    state = check_match(anchors, boxes, ignored, low_quality=True)
    assert state.unique().tolist() == sorted(MatchState)  # nothing of this is vacuous


@pytest.mark.usefixtures("any_threads", "small_parts")
def test_prepared_anchors_match_as_others_do():
    for rows in (1, 128, 5 * matching.BLOCK + 3):
        anchors, boxes = random_boxes(rows, seed=rows), random_boxes(2, 7, seed=rows + 1)
        kernels.prepare(anchors)
        check_match(anchors, boxes, random_mask(2, 7, seed=rows), low_quality=True)


def test_anchors_of_an_image_are_prepared_and_only_they():
    anchors = all_anchors_of_image(AnchorSpec(), 96, 64)
    assert matching._prepared[anchors].shape == (-(-len(anchors) // matching.BLOCK), 4)
    assert anchors.clone() not in matching._prepared
    own = random_boxes(300, seed=0)
    kernels.prepare(own)
    # What was prepared is what is used: nothing is near rectangles without size.
    matching._prepared[own][:] = 0
    assert not match_anchors(own, own[None]).index.any()
    count = len(matching._prepared)
    del own
    gc.collect()
    assert len(matching._prepared) == count - 1


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_threshold_that_is_an_iou(seed, low_quality):
    # An IoU of another rounding would fall below the threshold somewhere here.
    anchors, boxes = random_boxes(300, seed=seed), random_boxes(1, 4, seed=seed + 100)
    overlaps = pairwise(iou, anchors, boxes[0])
    for threshold in overlaps[overlaps > 0.3].sort().values[::5].tolist():
        options = {"positive_iou": threshold, "negative_iou": threshold, "low_quality": low_quality}
        assert MatchState.POSITIVE in check_match(anchors, boxes, **options)


@pytest.mark.parametrize("seed", range(5))
def test_low_quality_finds_the_best_of_boxes_of_every_size(seed):
    # Sizes over six orders of magnitude.
    generator = seeded(seed)
    corner = torch.rand(600, 2, generator=generator) * 100
    size = 10 ** (torch.rand(600, 2, generator=generator) * 3 - 1)
    every = torch.cat((corner, corner + size), dim=1)
    state = check_match(every[:500], every[500:].reshape(2, 50, 4), low_quality=True)
    assert MatchState.POSITIVE in state


@pytest.mark.usefixtures("any_threads", "small_parts")
@pytest.mark.parametrize(
    "blocks", [1, matching.REMEMBERED, matching.REMEMBERED + 1, 3 * matching.REMEMBERED + 1]
)
def test_low_quality_finds_every_block_that_ties(blocks):
    # In each block but the first one anchor reaches the best IoU of the first box.
    anchors = torch.tensor([0.0, 0, 4, 4]).repeat((1 + blocks) * matching.BLOCK, 1)
    anchors[matching.BLOCK + 7 :: matching.BLOCK] = torch.tensor([0.0, 0, 5, 5])
    anchors[3] = torch.tensor([0.0, 0, 4, 5])
    boxes = torch.tensor([[[0.0, 0, 9, 9], [50, 50, 60, 60]]])
    state = check_match(anchors, boxes, low_quality=True)
    assert (state[0, matching.BLOCK + 7 :: matching.BLOCK] == MatchState.POSITIVE).all()
    assert state[0, matching.BLOCK + 8] == MatchState.NEGATIVE
    # A better one after all of them, in the next thread's part or the same, and none of them counts.
    anchors[-1] = torch.tensor([0.0, 0, 9, 8])
    state = check_match(anchors, boxes.flip(1), low_quality=True)
    assert (state[0] == MatchState.POSITIVE).sum() == 1


def test_an_infinite_box_is_as_in_the_plain_matcher():
    anchors, boxes = random_boxes(200, seed=3), random_boxes(1, 6, seed=4)
    boxes[0, 0, 2:] = INF
    boxes[0, 1, :2] = -INF
    boxes[0, 2, 3] = NAN
    boxes[0, 3] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
    check_match(anchors, boxes, low_quality=True)


@pytest.mark.parametrize("low_quality", [False, True])
def test_inputs_of_a_match_need_not_be_contiguous(low_quality):
    anchors, boxes = random_boxes(200, seed=5), random_boxes(2, 8, seed=6)
    check_match(anchors[::2], boxes[:, ::2], random_mask(2, 8, seed=7)[:, ::2], low_quality=low_quality)


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("with_ignored", [False, True])
@pytest.mark.parametrize(("images", "rows", "count"), [(0, 5, 3), (2, 5, 0), (0, 5, 0), (1, 1, 1)])
def test_nothing_to_match(images, rows, count, with_ignored, low_quality):
    ignored = torch.zeros(images, count, dtype=torch.bool) if with_ignored else None
    anchors, boxes = random_boxes(rows, seed=8), random_boxes(images, count, seed=9)
    check_match(anchors, boxes, ignored, low_quality=low_quality)


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 0, 4), (0, 3, 4), (3, 4)])
def test_boxes_without_anchors(shape, low_quality):  # which the plain matcher refuses
    found = match_anchors(torch.zeros(0, 4), torch.zeros(shape), low_quality=low_quality)
    assert found.state.shape == found.index.shape == (*shape[:-2], 0)
