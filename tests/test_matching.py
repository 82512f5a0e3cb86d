"""Matching: a matrix by hand, the rules at their edges, torchvision's matcher, bounded memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.detection._utils import Matcher

from retinanet.anchors import AnchorSpec, anchors_of_image
from retinanet.batches import MatchState
from retinanet.boxes import intersection, iou, pairwise
from retinanet.errors import ConfigError
from retinanet.matching import BLOCK, match_anchors, plain_match_anchors

NEGATIVE, POSITIVE, IGNORED = MatchState.NEGATIVE, MatchState.POSITIVE, MatchState.IGNORED


def bars(*lengths: float, top: float = 0.0) -> torch.Tensor:
    """Boxes of height 1 that start at x = 0: the IoU of two is the ratio of their lengths."""
    return torch.tensor([[0.0, top, length, top + 1] for length in lengths]).reshape(-1, 4)


def random_boxes(count: int, seed: int, extent: float = 240.0) -> torch.Tensor:
    corner, size = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat((corner * extent, corner * extent + 8 + size * 80), dim=1)


def dense_reference(anchors, boxes, ignored, *, low_quality=False):
    """The definition in one piece: the whole matrix at once."""
    overlaps = pairwise(iou, anchors, boxes) * ~ignored
    best, index = overlaps.max(dim=1)
    state = torch.full_like(index, IGNORED)
    state[best < 0.4] = NEGATIVE
    state[best >= 0.5] = POSITIVE
    if low_quality:
        of_box = overlaps.amax(dim=0)
        state[((overlaps == of_box) & (overlaps > 0)).any(dim=1)] = POSITIVE
    share = pairwise(intersection, anchors, boxes) / ((anchors[:, 2:] - anchors[:, :2]).prod(1)[:, None])
    inside = ((share >= 0.5) & ignored).any(dim=1)
    state[inside & (state != POSITIVE)] = IGNORED
    return state, index


def test_a_matrix_by_hand():
    # IoU with the box of length 8, and with the one of length 2 on another row
    anchors = torch.cat((bars(8, 4, 3.75, 3.25, 3, 16), bars(2, 3, top=5)))
    #            8/8  4/8   ~.47     ~.41     .375      .5     2/2       2/3
    state = [POSITIVE, POSITIVE, IGNORED, IGNORED, NEGATIVE, POSITIVE, POSITIVE, POSITIVE]
    found = match_anchors(anchors, torch.cat((bars(8), bars(2, top=5))))
    assert found.state.tolist() == state
    assert found.index.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("length", "thresholds", "state"),
    [
        (8, (0.5, 0.4), POSITIVE),  # IoU exactly 1/2: >=
        (7.99, (0.5, 0.4), IGNORED),
        (4, (0.5, 0.25), IGNORED),  # exactly the lower one: [0, lower) is background
        (3.99, (0.5, 0.25), NEGATIVE),
        (8, (0.5, 0.5), POSITIVE),  # no band between
        (7.99, (0.5, 0.5), NEGATIVE),
        (16, (1.0, 0.4), POSITIVE),
    ],
)
def test_thresholds(length, thresholds, state):
    positive, negative = thresholds
    found = match_anchors(bars(length), bars(16), positive_iou=positive, negative_iou=negative)
    assert found.state.tolist() == [state]


def test_of_equal_boxes_the_first_wins():
    boxes = bars(*[8] * (BLOCK + 3))  # equal within a block and across blocks
    assert match_anchors(bars(8), boxes).index.tolist() == [0]
    later = torch.cat((bars(9), boxes))
    assert match_anchors(bars(8), later).index.tolist() == [1]


def test_low_quality_gives_every_met_box_an_anchor():
    anchors = torch.cat((bars(8), bars(1, 2, top=5)))
    boxes = torch.cat((bars(8), bars(10, top=5)))  # the second is met at .1 and .2 only
    assert match_anchors(anchors, boxes).state.tolist() == [POSITIVE, NEGATIVE, NEGATIVE]
    assert match_anchors(anchors, boxes, low_quality=True).state.tolist() == [POSITIVE, NEGATIVE, POSITIVE]


def test_low_quality_ignores_a_box_that_meets_no_anchor():
    boxes = torch.tensor([[0.0, 0, 8, 1], [900.0, 900, 910, 910], [0.0, 0, 0, 0]])
    found = match_anchors(torch.cat((bars(8), bars(8, top=5))), boxes, low_quality=True)
    assert found.state.tolist() == [POSITIVE, NEGATIVE]


def test_low_quality_keeps_the_box_of_the_anchors_own_highest_iou():
    # The box of length 5 has its best anchor in 6 (5/6), which is nearer to the box of length 6.
    found = match_anchors(bars(6, 20), bars(6, 5), low_quality=True)
    assert found.state.tolist()[0] == POSITIVE
    assert found.index.tolist()[0] == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("low_quality", [False, True])
def test_equals_torchvision(seed, low_quality):
    anchors = torch.cat(anchors_of_image(AnchorSpec(), 256, 256))
    boxes = random_boxes(40, seed)
    overlaps = pairwise(iou, boxes, anchors)
    assert (overlaps.amax(dim=1) > 0).all()  # where a box meets no anchor, torchvision is wrong
    theirs = Matcher(0.5, 0.4, allow_low_quality_matches=low_quality)(overlaps)
    found = match_anchors(anchors, boxes, low_quality=low_quality)
    assert torch.equal(found.state == POSITIVE, theirs >= 0)
    assert torch.equal(found.state == NEGATIVE, theirs == -1)
    assert torch.equal(found.state == IGNORED, theirs == -2)
    positive = theirs >= 0
    assert torch.equal(found.index[positive], theirs[positive])


@pytest.mark.parametrize(
    ("anchor", "state"),
    [
        ([0.0, 0, 4, 1], IGNORED),  # within the region
        ([6.0, 0, 14, 1], IGNORED),  # half of its own area within: >=
        ([6.1, 0, 14.1, 1], NEGATIVE),  # less than half
        ([0.0, 0, 100, 1], NEGATIVE),  # holds the region, but is mostly outside
        ([0.0, 0, 10, 1], IGNORED),  # equals the region: still no object
        ([20.0, 0, 30, 1], POSITIVE),  # an object elsewhere
        ([2.0, 0, 3, 1], POSITIVE),  # an object inside the region stays one
        ([50.0, 0, 60, 1], NEGATIVE),
    ],
)
def test_ignored_regions(anchor, state):
    boxes = torch.tensor([[0.0, 0, 10, 1], [20.0, 0, 30, 1], [2.0, 0, 3, 1]])
    ignored = torch.tensor([True, False, False])
    for low_quality in (False, True):
        others = torch.tensor([anchor, [20.0, 0, 30, 1], [2.0, 0, 3, 1]])  # each object has its best anchor
        found = match_anchors(others, boxes, ignored, low_quality=low_quality)
        assert found.state.tolist()[0] == state


def test_an_ignored_region_never_lends_its_index():
    boxes = torch.tensor([[0.0, 0, 10, 1], [0.0, 0, 8, 1]])
    found = match_anchors(bars(10), boxes, torch.tensor([True, False]))
    assert found.state.tolist() == [POSITIVE]
    assert found.index.tolist() == [1]


@pytest.mark.parametrize("low_quality", [False, True])
def test_padding_changes_nothing(low_quality):
    anchors, boxes = torch.cat(anchors_of_image(AnchorSpec(), 256, 256)), random_boxes(10, 7)
    ignored = torch.arange(10) % 3 == 0
    bare = match_anchors(anchors, boxes, ignored, low_quality=low_quality)
    padded = match_anchors(
        anchors,
        torch.cat((boxes, torch.zeros(30, 4))),
        torch.cat((ignored, torch.zeros(30, dtype=torch.bool))),
        low_quality=low_quality,
    )
    assert torch.equal(bare.state, padded.state)
    assert torch.equal(bare.index, padded.index)


@pytest.mark.parametrize("ignored", [None, torch.zeros(0, dtype=torch.bool)])
def test_without_boxes_everything_is_background(ignored):
    found = match_anchors(bars(1, 2), torch.zeros(0, 4), ignored, low_quality=True)
    assert found.state.tolist() == [NEGATIVE, NEGATIVE]
    assert found.index.tolist() == [0, 0]


@pytest.mark.parametrize("wrong", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", range(4))
def test_a_coordinate_that_is_no_number_concerns_its_own_anchor_alone(wrong, column):
    anchors = torch.cat(anchors_of_image(AnchorSpec(), 96, 96))
    boxes = torch.tensor([[10.0, 10, 70, 60], [30, 20, 60, 90]])
    region = torch.tensor([False, True])
    whole = match_anchors(anchors, boxes, region, low_quality=True)
    ill = whole.state[: len(anchors) // 2].argmax()  # a positive one
    anchors[ill, column] = wrong
    found = match_anchors(anchors, boxes, region, low_quality=True)
    expected = plain_match_anchors(anchors, boxes, region, low_quality=True)
    assert torch.equal(found.state, expected.state)
    assert torch.equal(found.index, expected.index)
    others = torch.arange(len(anchors)) != ill
    assert torch.equal(found.state[others], whole.state[others])


def test_positive_iou_0_does_not_make_objects_of_nothing():
    found = match_anchors(torch.cat((bars(8), bars(8, top=5))), bars(4), positive_iou=0.0, negative_iou=0.0)
    assert found.state.tolist() == [POSITIVE, NEGATIVE]


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


@pytest.mark.parametrize("low_quality", [False, True])
def test_a_thousand_boxes_in_bounded_memory(low_quality):
    anchors, boxes = torch.cat(anchors_of_image(AnchorSpec(), 128, 128)), random_boxes(1000, 8, extent=120)
    ignored = torch.arange(1000) % 10 == 0
    with LargestTensor() as largest:
        found = match_anchors(anchors, boxes, ignored, low_quality=low_quality)
    state, index = dense_reference(anchors, boxes, ignored, low_quality=low_quality)
    assert torch.equal(found.state, state)
    assert torch.equal(found.index, index)
    assert 0 < largest.elements <= len(anchors) * BLOCK * 2  # x and y of each pair


@pytest.mark.parametrize(
    ("positive", "negative"),
    [(0.4, 0.5), (1.5, 0.4), (0.5, -0.1), (float("nan"), 0.4)],
)
def test_errors(positive, negative):
    with pytest.raises(ConfigError, match="0 <= negative_iou <= positive_iou <= 1; got negative_iou"):
        match_anchors(bars(1), bars(1), positive_iou=positive, negative_iou=negative)
