"""Boxes: laws of the conversions, of the IoU family, of the coding and of NMS, with torchvision as a second opinion."""

import math

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from retinanet import boxes as b
from retinanet.errors import ConfigError

FAMILY = {"iou": b.iou, "giou": b.giou, "diou": b.diou, "ciou": b.ciou}
family = pytest.mark.parametrize("overlap", FAMILY.values(), ids=FAMILY)


def random_boxes(count: int, seed: int, dtype: torch.dtype = torch.float32, extent: float = 100.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(2, count, 2, generator=generator, dtype=dtype)
    return torch.cat((corner * extent, corner * extent + size * extent * 0.6 + 0.01), dim=1)


# ---------------------------------------------------------------------------------- shapes are checked


@pytest.mark.parametrize(
    "call",
    [
        lambda: b.iou(torch.zeros(3, 5), torch.zeros(3, 4)),  # five numbers are no box
        lambda: b.pairwise(b.iou, torch.zeros(4), torch.zeros(2, 4)),  # a single box is no list
        lambda: b.nms(torch.zeros(3, 4), torch.zeros(2), torch.zeros(3, dtype=torch.int64), 0.5),
        lambda: b.nms(torch.zeros(3, 4), torch.zeros(3), torch.zeros(3), 0.5),  # labels are integers
        lambda: b.BoxCoding().encode(torch.zeros(3, 4), torch.zeros(2, 4)),
        # A function that returns the transposed matrix is caught by the annotation of what is returned.
        lambda: b.pairwise(lambda x, y: b.iou(x, y).T, torch.zeros(3, 4), torch.zeros(2, 4)),
    ],
)
def test_a_wrong_shape_raises_under_pytest(call):
    with pytest.raises(TypeCheckError):
        call()


# ---------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize(
    ("there", "back"),
    [(b.xyxy_to_xywh, b.xywh_to_xyxy), (b.xyxy_to_cxcywh, b.cxcywh_to_xyxy)],
)
def test_conversions_round_trip(there, back):
    boxes = random_boxes(50, 0, torch.float64)
    torch.testing.assert_close(back(there(boxes)), boxes)
    torch.testing.assert_close(back(there(boxes.reshape(5, 10, 4))), boxes.reshape(5, 10, 4))


def test_conversions_by_hand():
    box = torch.tensor([10.0, 20.0, 14.0, 30.0])
    assert b.xyxy_to_xywh(box).tolist() == [10, 20, 4, 10]
    assert b.xyxy_to_cxcywh(box).tolist() == [12, 25, 4, 10]
    assert b.area(box).item() == 40


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ([-5.0, -6.0, 200.0, 300.0], [0, 0, 100, 50]),  # larger than the image on every side
        ([10.0, 10.0, 20.0, 20.0], [10, 10, 20, 20]),  # inside: untouched
        ([120.0, 60.0, 130.0, 70.0], [100, 50, 100, 50]),  # outside: empty, on the border
    ],
)
def test_clip(box, clipped):
    assert b.clip(torch.tensor(box), height=50, width=100).tolist() == clipped


def test_empty_input_everywhere():
    none, some = torch.zeros(0, 4), random_boxes(3, 0)
    for convert in (b.xywh_to_xyxy, b.xyxy_to_xywh, b.cxcywh_to_xyxy, b.xyxy_to_cxcywh):
        assert convert(none).shape == (0, 4)
    assert b.area(none).shape == (0,)
    assert b.clip(none, height=1, width=1).shape == (0, 4)
    for overlap in (*FAMILY.values(), b.intersection):
        assert overlap(none, none).shape == (0,)
        assert b.pairwise(overlap, none, some).shape == (0, 3)
        assert b.pairwise(overlap, some, none).shape == (3, 0)
    assert b.BoxCoding().encode(none, none).shape == (0, 4)
    assert b.BoxCoding().decode(none, none).shape == (0, 4)
    kept = b.nms(none, torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


# ---------------------------------------------------------------------------------- the IoU family


@family
def test_overlap_is_symmetric_and_one_with_itself(overlap):
    first, second = random_boxes(40, 1), random_boxes(40, 2)
    torch.testing.assert_close(b.pairwise(overlap, first, second), b.pairwise(overlap, second, first).T)
    torch.testing.assert_close(overlap(first, first), torch.ones(40))


@family
@pytest.mark.parametrize(
    "box",
    [
        [0.0, 0.0, 1e-6, 1e-6],  # a millionth of a pixel
        [0.0, 0.0, 1e-6, 1e4],  # a needle
        [5000.0, 5000.0, 5000.001, 5000.001],  # far out, where float32 steps are 0.0005
        [0.0, 0.0, 1e5, 1e5],
    ],
)
def test_overlap_with_itself_is_one_at_every_size(overlap, box):
    box = torch.tensor(box)
    assert overlap(box, box).item() == 1


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # iou, giou, diou worked by hand
        # shared 2, union 6; enclosing 3 x 2 = 6; centres 1 apart, diagonal^2 13
        ([0, 0, 2, 2], [1, 0, 3, 2], (1 / 3, 1 / 3, 1 / 3 - 1 / 13)),
        # disjoint: union 2, enclosing 3 x 1; centres 2 apart, diagonal^2 10
        ([0, 0, 1, 1], [2, 0, 3, 1], (0, -1 / 3, -4 / 10)),
        # touching at a corner: union 2, enclosing 4; centres^2 2, diagonal^2 8
        ([0, 0, 1, 1], [1, 1, 2, 2], (0, -1 / 2, -1 / 4)),
        # nested, same centre: IoU 4 / 16, nothing else is lost
        ([0, 0, 4, 4], [1, 1, 3, 3], (1 / 4, 1 / 4, 1 / 4)),
        # an empty box within another
        ([0, 0, 2, 2], [1, 1, 1, 1], (0, 0, 0)),
    ],
)
def test_overlap_by_hand(first, second, expected):
    first, second = torch.tensor([first, second], dtype=torch.float64)
    for overlap, value in zip((b.iou, b.giou, b.diou), expected, strict=True):
        assert overlap(first, second).item() == pytest.approx(value)


def test_ciou_by_hand():
    # 4 x 2 and 2 x 4 around one centre: IoU 4 / 12, v = 4/pi^2 (atan 2 - atan 1/2)^2
    first, second = torch.tensor([[0, 1, 4, 3], [1, 0, 3, 4]], dtype=torch.float64)
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(0.5)) ** 2
    expected = 1 / 3 - v * v / (1 - 1 / 3 + v)
    assert b.ciou(first, second).item() == pytest.approx(expected)


def test_ranges_and_order():
    first, second = random_boxes(60, 3), random_boxes(60, 4, extent=300)
    values = {name: b.pairwise(overlap, first, second) for name, overlap in FAMILY.items()}
    assert values["iou"].min() >= 0
    assert values["iou"].max() <= 1
    for name in ("giou", "diou"):
        assert values[name].min() > -1
        assert (values[name] <= values["iou"] + 1e-6).all()
    assert (values["ciou"] <= values["diou"] + 1e-6).all()
    assert (values["giou"] < -0.5).any()  # the table reaches where boxes do not meet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (b.iou, torchvision.ops.box_iou),
        (b.giou, torchvision.ops.generalized_box_iou),
        (b.diou, torchvision.ops.distance_box_iou),
        (b.ciou, torchvision.ops.complete_box_iou),
    ],
)
def test_equals_torchvision(ours, theirs, dtype):
    first, second = random_boxes(50, 5, dtype), random_boxes(70, 6, dtype, extent=200)
    torch.testing.assert_close(b.pairwise(ours, first, second), theirs(first, second), atol=2e-6, rtol=1e-5)


@family
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0, 0, 1, 1], [1, 0, 2, 1]),  # touching along a side
        ([0, 0, 1, 1], [1, 1, 2, 2]),  # touching at a corner
        ([0, 0, 9, 9], [2, 3, 4, 5]),  # nested
        ([0, 0, 1, 1], [50, 60, 70, 90]),  # disjoint
        ([3, 4, 5, 6], [3, 4, 5, 6]),  # identical
        ([0, 0, 1e-6, 1e-6], [0, 0, 2e-6, 1e-6]),  # tiny
        ([0, 0, 1e-6, 1e-6], [100, 100, 900, 900]),  # tiny and far
        ([0, 0, 1000, 1e-6], [0, 0, 1e-6, 1000]),  # needles
        ([5, 5, 5, 5], [0, 0, 9, 9]),  # a point in a box
        ([5, 5, 5, 8], [0, 0, 9, 9]),  # a line in a box
        ([5, 5, 5, 5], [5, 5, 5, 5]),  # the same point twice
        ([5, 5, 5, 5], [7, 7, 7, 7]),  # two points
        ([0, 0, 100, 1e-30], [0, 0, 100, 100]),  # as good as a line
    ],
)
def test_value_and_gradient_are_finite(overlap, first, second):
    pair = torch.tensor([first, second], dtype=torch.float32, requires_grad=True)
    value = overlap(pair[0], pair[1])
    value.backward()
    assert value.isfinite()
    assert pair.grad.isfinite().all(), pair.grad


@pytest.mark.parametrize("overlap", [b.iou, b.giou, b.diou])
def test_gradcheck(overlap):
    first = random_boxes(6, 7, torch.float64).requires_grad_()
    second = random_boxes(6, 8, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(overlap, (first, second))


def test_giou_pulls_disjoint_boxes_together_where_iou_cannot():
    moving, still = torch.tensor([0.0, 0.0, 1.0, 1.0], requires_grad=True), torch.tensor([5.0, 0.0, 6.0, 1.0])
    b.giou(moving, still).backward()
    assert moving.grad[2] > 0  # its right side is to go right
    moving.grad = None
    b.iou(moving, still).backward()
    assert moving.grad.abs().sum() == 0


# ---------------------------------------------------------------------------------- coding


def test_coding_by_hand():
    # anchor: centre (10, 20), 8 x 4; box: centre (14, 19), 16 x 2
    anchor, box = torch.tensor([[6.0, 18.0, 14.0, 22.0]]), torch.tensor([[6.0, 18.0, 22.0, 20.0]])
    deltas = [(14 - 10) / 8, (19 - 20) / 4, math.log(16 / 8), math.log(2 / 4)]
    assert b.BoxCoding().encode(anchor, box)[0].tolist() == pytest.approx(deltas)
    weighted = b.BoxCoding(weights=(10, 10, 5, 5)).encode(anchor, box)[0]
    expected = [10 * deltas[0], 10 * deltas[1], 5 * deltas[2], 5 * deltas[3]]
    assert weighted.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "coding",
    [
        b.BoxCoding(),
        b.BoxCoding(weights=(10, 10, 5, 5)),
        b.BoxCoding(clamp=None),
        b.BoxCoding(clamp_both_sides=True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_undoes_encode(coding, dtype):
    anchors, boxes = random_boxes(100, 9, dtype) + 1, random_boxes(100, 10, dtype)
    boxes[:, 2:] += 2  # no size ratio beyond the clamp
    decoded = coding.decode(anchors, coding.encode(anchors, boxes))
    assert decoded.dtype == dtype
    keep = ((boxes[:, 2:] - boxes[:, :2]) / (anchors[:, 2:] - anchors[:, :2])).log().abs().amax(1) < 4
    assert keep.sum() > 90
    torch.testing.assert_close(decoded[keep], boxes[keep], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(
    ("coding", "delta", "factor"),
    [
        (b.BoxCoding(), 50.0, 1000 / 16),  # Detectron's clamp
        (b.BoxCoding(), -5.0, math.exp(-5)),  # only above
        (b.BoxCoding(clamp_both_sides=True), -5.0, 16 / 1000),
        (b.BoxCoding(clamp=None), 5.0, math.exp(5)),
        (b.BoxCoding(weights=(1, 1, 5, 5)), 10.0, math.exp(2)),  # the clamp is of t / W
        (b.BoxCoding(clamp=1.0), 1.0, math.e),
    ],
)
def test_clamp(coding, delta, factor):
    box = coding.decode(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, delta, 0.0]]))
    assert (box[0, 2] - box[0, 0]).item() == pytest.approx(2 * factor, rel=1e-5)
    assert (box[0, 3] - box[0, 1]).item() == pytest.approx(2)


def test_decode_computes_in_float32():
    anchors, deltas = random_boxes(5, 11), torch.randn(5, 4).bfloat16()
    decoded = b.BoxCoding().decode(anchors, deltas)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, b.BoxCoding().decode(anchors, deltas.float()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1, 1, 0, 1)}, r"weights needs four positive numbers; got \(1, 1, 0, 1\)"),
        ({"weights": (1, 1, math.nan, 1)}, "weights needs four positive numbers"),
        ({"clamp": 0.0}, r"clamp needs a positive number or None; got 0\.0"),
        ({"clamp": None, "clamp_both_sides": True}, "clamp_both_sides needs BoxCoding.clamp, which is None"),
    ],
)
def test_coding_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        b.BoxCoding(**options)


# ---------------------------------------------------------------------------------- NMS


def plain_nms(boxes, scores, labels, threshold):
    """The definition, pair by pair."""
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i)):
        same = [j for j in kept if labels[j] == labels[i]]
        if all(b.iou(boxes[i], boxes[j]).item() <= threshold for j in same):
            kept.append(i)
    return kept


@given(st.integers(0, 10_000), st.integers(0, 30), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_nms_is_its_definition(seed, count, threshold):
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers from a small range: ties in score, equal boxes, IoU exactly at the threshold, empty boxes.
    corner = torch.randint(0, 6, (count, 2), generator=generator)
    boxes = torch.cat((corner, corner + torch.randint(0, 5, (count, 2), generator=generator)), 1).float()
    scores = torch.randint(0, 4, (count,), generator=generator) / 4
    labels = torch.randint(0, 3, (count,), generator=generator)
    kept = plain_nms(boxes, scores, labels, threshold)
    assert b.nms(boxes, scores, labels, threshold).tolist() == kept
    for head in (1, 3, count + 1):
        assert b.nms(boxes, scores, labels, threshold, max_kept=head).tolist() == kept[:head]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_nms_equals_torchvision_class_by_class(threshold):
    boxes = random_boxes(400, 12)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randperm(400, generator=generator) / 400  # no ties
    labels = torch.randint(0, 5, (400,), generator=generator)
    theirs = []
    for label in range(5):
        of_class = torch.nonzero(labels == label).squeeze(1)
        theirs += of_class[torchvision.ops.nms(boxes[of_class], scores[of_class], threshold)].tolist()
    theirs.sort(key=lambda i: -scores[i].item())
    assert len(theirs) < 400
    assert b.nms(boxes, scores, labels, threshold).tolist() == theirs


def test_nms_keeps_boxes_without_area():
    boxes = torch.tensor([[1.0, 1, 1, 1], [1.0, 1, 1, 1], [0.0, 0, 2, 2]])  # IoU with an empty box is 0
    assert b.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64), 0.0).tolist() == [
        0,
        1,
        2,
    ]


def test_nms_threshold_itself_is_kept():
    boxes = torch.tensor([[0.0, 0, 2, 1], [0.0, 0, 1, 1]])  # IoU exactly 1 / 2
    labels = torch.zeros(2, dtype=torch.int64)
    assert b.nms(boxes, torch.tensor([0.9, 0.8]), labels, 0.5).tolist() == [0, 1]
    assert b.nms(boxes, torch.tensor([0.9, 0.8]), labels, 0.499).tolist() == [0]


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_nms_threshold_error(threshold):
    with pytest.raises(ConfigError, match=r"nms needs a threshold in \[0, 1\]; got"):
        b.nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), threshold)


@pytest.mark.parametrize("max_kept", [0, -1])
def test_nms_max_kept_error(max_kept):
    with pytest.raises(ConfigError, match="nms needs max_kept of at least 1 or None; got"):
        b.nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5, max_kept=max_kept)
