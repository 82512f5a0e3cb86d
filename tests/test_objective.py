"""The objective: one batch worked out in plain numbers, normalisers, empty images, ignored regions, level order."""

import dataclasses
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from retinanet.anchors import AnchorSpec, all_anchors_of_image, anchors_of_image
from retinanet.batches import MatchState, RawPredictions, Targets
from retinanet.boxes import BoxCoding, iou
from retinanet.errors import ConfigError
from retinanet.losses import hardest_one_to_three, sigmoid_cross_entropy
from retinanet.objective import (
    ByIou,
    Objective,
    focal,
    focal_star,
    giou_of_boxes,
    hinge,
    loss_of_anchors,
    ohem,
    ohem_one_to_three,
    smooth_l1_of_deltas,
    varifocal,
)

# On 16 x 16 px: four squares of 8 on the first level, the whole image on the second.
ANCHORS = AnchorSpec(sizes=(8.0, 16.0), scales=(1.0,), ratios=(1.0,), strides=(8, 16))
OBJECTIVE = Objective(anchors=ANCHORS, coding=BoxCoding())

# Two classes; all logits differ, so that no two anchors can be confused.
LOGITS = [
    [[-2.0, 0.5], [-1.0, -3.0], [0.3, -0.7], [1.1, 2.0], [-0.2, 0.9]],
    [[0.1, -1.5], [-2.5, 0.4], [0.8, -0.9], [-1.2, 0.6], [1.4, -0.4]],
]
DELTAS = [[[0.5, -0.125, 2.0, 0.1]] + [[9.0] * 4] * 4, [[7.0] * 4] * 5]
# Image 0: a box of class 1 that is positive for anchor 0 (IoU 48/64); one of class 0 that meets anchor 3 at
# 28/64, in the ignored band; everything else is background. Image 1: no objects, one padding row more.
BOXES = [[[0, 0, 8, 6], [8, 8, 16, 11.5]], [[0, 0, 0, 0], [0, 0, 0, 0]]]
CLASSES = [[1, 0], [0, 0]]


def predictions(logits=LOGITS, deltas=DELTAS):
    logits, deltas = torch.tensor(logits).requires_grad_(), torch.tensor(deltas).requires_grad_()
    made = RawPredictions(
        logits=logits.split([4, 1], dim=1), deltas=deltas.split([4, 1], dim=1), grids=((2, 2), (1, 1))
    )
    return made, logits, deltas


def targets(boxes=BOXES, classes=CLASSES, ignored=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(len(boxes), -1, 4)
    classes = torch.tensor(classes, dtype=torch.int64).reshape(boxes.shape[:2])
    given = torch.zeros(boxes.shape[:2], dtype=torch.bool) if ignored is None else torch.tensor(ignored)
    return Targets(boxes, classes, given)


def losses(objective=OBJECTIVE, made=None, wanted=None):
    return objective(made or predictions()[0], wanted or targets(), height=16, width=16)


def plain_focal(x, y, alpha=0.25, gamma=2.0):
    p = 1 / (1 + math.exp(-x))
    p_t, alpha_t = (p, alpha) if y else (1 - p, 1 - alpha)
    return -alpha_t * (1 - p_t) ** gamma * math.log(p_t)


def plain_smooth_l1(x, beta=1.0):
    return 0.5 * x * x / beta if abs(x) < beta else abs(x) - 0.5 * beta


def plain_sums():
    """L_cls and L_loc of each image before any division."""
    of_classes = [0.0, 0.0]
    for image in range(2):
        for anchor in range(5):
            if (image, anchor) == (0, 3):
                continue  # ignored
            for k in range(2):
                y = (image, anchor, k) == (0, 0, 1)
                of_classes[image] += plain_focal(LOGITS[image][anchor][k], y)
    wanted = [0, (3 - 4) / 8, math.log(8 / 8), math.log(6 / 8)]
    of_boxes = sum(plain_smooth_l1(d - t) for d, t in zip(DELTAS[0][0], wanted, strict=True))
    return of_classes, of_boxes


# ---------------------------------------------------------------------------------- the case by hand


def test_a_batch_by_hand():
    (first, second), of_boxes = plain_sums()
    found = losses(dataclasses.replace(OBJECTIVE, box_weight=3.0))
    # Each image by its own positives (1; and 0, which counts as 1), then the mean over two images.
    assert found.classes.item() == pytest.approx((first / 1 + second / 1) / 2, rel=1e-5)
    assert found.boxes.item() == pytest.approx((of_boxes / 1 + 0) / 2, rel=1e-5)
    assert found.total.item() == pytest.approx(found.classes.item() + 3 * found.boxes.item())
    assert found.positives.item() == 1


@pytest.mark.parametrize("normalizer", ["image", "all-processes"])
def test_parts_of_a_step_with_their_shares_are_the_step(normalizer):
    objective = dataclasses.replace(OBJECTIVE, normalizer=normalizer)
    made, _, _ = predictions()
    wanted = targets(BOXES, [[0] * len(image) for image in BOXES])
    whole = objective(made, wanted, height=16, width=16)
    positives = objective.positives(wanted, height=16, width=16)
    shares = objective.shares(positives, total=positives.sum(), images=len(BOXES))
    totals = []
    for image in range(len(BOXES)):
        rows = slice(image, image + 1)
        part = dataclasses.replace(
            made, logits=tuple(x[rows] for x in made.logits), deltas=tuple(x[rows] for x in made.deltas)
        )
        totals.append(objective(part, wanted[rows], height=16, width=16, shares=shares[rows]).total.item())
    assert sum(totals) == pytest.approx(whole.total.item(), rel=1e-5)
    assert positives.sum() == whole.positives


@pytest.mark.parametrize(
    ("normalizer", "boxes", "divisors"),
    [
        # Positives an image: 1 and 0. Each image's sum is divided by:
        ("image", BOXES, (2, 2)),
        ("all-processes", BOXES, (1, 1)),
        # 3 and 1 (three squares and the whole image)
        ("image", [[[0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16]], [[0, 0, 16, 16], [0] * 4, [0] * 4]], (6, 2)),
        (
            "all-processes",
            [[[0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16]], [[0, 0, 16, 16], [0] * 4, [0] * 4]],
            (4, 4),
        ),
        # none anywhere: never below 1
        ("image", [[[0] * 4], [[0] * 4]], (2, 2)),
        ("all-processes", [[[0] * 4], [[0] * 4]], (1, 1)),
    ],
)
def test_normalizers(normalizer, boxes, divisors):
    # Loss functions that count: each kept anchor costs its weight, each positive 1.
    objective = dataclasses.replace(
        OBJECTIVE,
        normalizer=normalizer,
        class_loss=lambda logits, classes, weight: (logits[..., 0] * weight).sum(),
        box_loss=lambda deltas, anchors, boxes, coding: deltas[:, 0] * 0 + 1,
    )
    made, logits, _ = predictions()
    wanted = targets(boxes, [[0] * len(image) for image in boxes])
    found = losses(objective, made, wanted)
    found.classes.backward()
    for image, divisor in enumerate(divisors):
        assert logits.grad[image, 1, 0].item() == pytest.approx(1 / divisor)
    positives = (
        (3 * (1 / divisors[0]) + 1 / divisors[1]) if len(boxes[0]) == 3 else found.positives / divisors[0]
    )
    assert found.boxes.item() == pytest.approx(float(positives))


def test_box_losses():
    box = [[[0, 0, 8, 6]]]
    made, _, _ = predictions([LOGITS[0]], [DELTAS[0]])
    wanted = [0.5, 0.0, 2.0, 0.1 - math.log(0.75)]  # distances, in each delta
    for beta in (1.0, 1 / 9, 0.0):
        found = losses(
            dataclasses.replace(OBJECTIVE, box_loss=smooth_l1_of_deltas(beta)), made, targets(box, [[1]])
        )
        expected = sum(plain_smooth_l1(x, beta) if beta else abs(x) for x in wanted)
        assert found.boxes.item() == pytest.approx(expected, rel=1e-5)
    # GIoU: zero deltas leave the anchor, and the box fills 6 / 8 of it.
    made, _, _ = predictions([LOGITS[0]], [[[0.0] * 4] * 5])
    found = losses(dataclasses.replace(OBJECTIVE, box_loss=giou_of_boxes()), made, targets(box, [[1]]))
    assert found.boxes.item() == pytest.approx(1 - 6 / 8)


def test_class_loss_options():
    found = losses(dataclasses.replace(OBJECTIVE, class_loss=focal(None, 0.0)))
    expected = sum(
        plain_focal(LOGITS[i][a][k], (i, a, k) == (0, 0, 1), gamma=0)
        / (0.25 if (i, a, k) == (0, 0, 1) else 0.75)
        for i in range(2)
        for a in range(5)
        for k in range(2)
        if (i, a) != (0, 3)
    )
    assert found.classes.item() == pytest.approx(expected / 2, rel=1e-5)


def test_varifocal_asks_a_class_for_the_quality_of_its_box():
    """Against the formula, anchor by anchor and class by class."""
    spec, coding = AnchorSpec(), BoxCoding()
    levels = anchors_of_image(spec, 64, 96)
    anchors, alpha, gamma = torch.cat(levels), 0.3, 1.5
    boxes = torch.tensor([[[10.0, 12, 44, 45], [30, 5, 90, 60]], [[5, 5, 38, 36], [0, 0, 0, 0]]])
    targets = Targets(boxes, torch.tensor([[2, 0], [1, 0]]), torch.tensor([[False, False], [False, False]]))
    logits = [torch.randn(2, len(level), 3) for level in levels]
    deltas = [0.1 * torch.randn(2, len(level), 4) for level in levels]
    objective = Objective(anchors=spec, coding=coding, class_loss=varifocal(alpha, gamma))
    found = objective(RawPredictions(tuple(logits), tuple(deltas), ()), targets, height=64, width=96)

    assigned = objective.assign(targets, height=64, width=96)
    expected = torch.zeros(())
    for image in (0, 1):
        x, offsets = torch.cat([of[image] for of in logits]), torch.cat([of[image] for of in deltas])
        p, of_image = x.sigmoid(), torch.zeros(())
        positive = assigned.state[image] == MatchState.POSITIVE
        for anchor in torch.nonzero(assigned.state[image] != MatchState.IGNORED).squeeze(1).tolist():
            for k in range(3):
                if positive[anchor] and k == assigned.classes[image, anchor]:
                    box = coding.decode(anchors[anchor], offsets[anchor])
                    q = iou(box, boxes[image, assigned.box[image, anchor]])
                    of_image -= q * (q * p[anchor, k].log() + (1 - q) * (1 - p[anchor, k]).log())
                else:
                    of_image -= (1 - alpha) * p[anchor, k] ** gamma * (1 - p[anchor, k]).log()
        expected += of_image / positive.sum() / 2
    assert found.positives > 4
    torch.testing.assert_close(found.classes, expected, rtol=1e-4, atol=1e-5)
    plain = Objective(anchors=spec, coding=coding)
    same = plain(RawPredictions(tuple(logits), tuple(deltas), ()), targets, height=64, width=96)
    torch.testing.assert_close(found.boxes, same.boxes)


@pytest.mark.parametrize("boxes", [BOXES, [[], []]])
def test_the_quality_of_all_rows_is_that_of_the_positive_ones(boxes):
    wanted = targets(boxes, CLASSES if boxes[0] else [[], []])
    state, _, box = OBJECTIVE.assign(wanted, height=16, width=16)
    anchors, deltas = all_anchors_of_image(ANCHORS, 16, 16), torch.tensor(DELTAS).clamp(max=0.5)
    given = (deltas, anchors, wanted.boxes, state == MatchState.POSITIVE, box)
    found = OBJECTIVE._quality_of_positives(*given)
    torch.testing.assert_close(found, OBJECTIVE._quality_of_all(*given))
    assert (found > 0).sum() == len(boxes[0]) // 2


def test_no_gradient_flows_through_the_quality_of_a_box():
    objective = dataclasses.replace(OBJECTIVE, class_loss=varifocal(), box_weight=0.0)
    made, _, deltas = predictions()
    losses(objective, made).total.backward()
    assert deltas.grad.abs().max() == 0


def test_mining_is_told_nothing_of_boxes():
    with pytest.raises(ConfigError, match="with mining needs a class loss that is told nothing of boxes"):
        dataclasses.replace(OBJECTIVE, class_loss=varifocal(), mining=ohem())


# ---------------------------------------------------------------------------------- who gets a gradient


def test_ignored_anchors_and_the_boxes_of_negatives_have_no_gradient():
    made, logits, deltas = predictions()
    losses(made=made).total.backward()
    assert logits.grad[0, 3].abs().max() == 0
    assert (logits.grad.abs().amax(-1) > 0).sum() == 9
    assert (deltas.grad.abs().amax(-1) > 0).nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("box_loss", [smooth_l1_of_deltas(), giou_of_boxes()])
@pytest.mark.parametrize("rows", [0, 3])
def test_a_batch_of_background(rows, box_loss):
    made, logits, deltas = predictions()
    wanted = targets([[[0] * 4] * rows] * 2, [[0] * rows] * 2)
    found = losses(dataclasses.replace(OBJECTIVE, box_loss=box_loss), made, wanted)
    assert found.classes.isfinite()
    assert found.classes > 0
    assert found.boxes == 0
    assert found.positives == 0
    found.boxes.backward(retain_graph=True)
    assert deltas.grad.abs().max() == 0  # zero, but there: all processes need the same graph
    found.total.backward()
    assert (logits.grad.abs() > 0).all()


def test_padding_rows_change_nothing():
    bare, padded = (
        targets(),
        targets([[*image, *[[0] * 4] * 5] for image in BOXES], [[*c, *[0] * 5] for c in CLASSES]),
    )
    assert losses(wanted=bare).total == losses(wanted=padded).total


def test_a_crowd_region_is_neither():
    # The crowd covers the upper half of the image: anchors 0 and 1 lie in it, and half of anchor 4.
    made, logits, deltas = predictions()
    wanted = targets([[[0, 0, 16, 8]], [[0] * 4]], [[1], [0]], [[True], [False]])
    found = losses(made=made, wanted=wanted)
    found.total.backward()
    assert found.positives == 0
    assert logits.grad[0].abs().amax(-1).gt(0).tolist() == [False, False, True, True, False]
    assert logits.grad[1].abs().amax(-1).gt(0).all()
    assert deltas.grad.abs().max() == 0


@pytest.mark.parametrize("level", range(5))
def test_a_positive_lands_on_its_level(level):
    spec = AnchorSpec(scales=(1.0,), ratios=(1.0,))
    rows = [r * c for r, c in spec.grids(128, 128)]
    logits = [torch.zeros(1, n, 3, requires_grad=True) for n in rows]
    deltas = [torch.zeros(1, n, 4, requires_grad=True) for n in rows]
    made = RawPredictions(tuple(logits), tuple(deltas), spec.grids(128, 128))
    # An object exactly on the last anchor of the level; a little shifted, so that its deltas matter.
    stride, size = spec.strides[level], spec.sizes[level]
    center = 128 - stride / 2
    box = [[[center - size / 2 + 1, center - size / 2, center + size / 2 + 1, center + size / 2]]]
    objective = Objective(
        anchors=spec, coding=BoxCoding(), matching=ByIou(positive_iou=0.9, negative_iou=0.9)
    )
    found = objective(made, targets(box, [[2]]), height=128, width=128)
    found.total.backward()
    assert found.positives == 1
    for other in range(5):
        touched = deltas[other].grad.abs().amax(-1).nonzero().tolist()
        assert touched == ([[0, rows[level] - 1]] if other == level else [])
        # Of y = 1 the logit has to rise, of y = 0 to fall.
        rising = (logits[other].grad < 0).nonzero().tolist()
        assert rising == ([[0, rows[level] - 1, 2]] if other == level else [])


def test_losses_are_float32_from_bfloat16_predictions():
    made, _, _ = predictions()
    half = RawPredictions(
        tuple(x.bfloat16() for x in made.logits), tuple(x.bfloat16() for x in made.deltas), made.grids
    )
    found = losses(made=half)
    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(losses(made=made).total.item(), rel=0.02)


def test_box_weight_error():
    with pytest.raises(ConfigError, match="--box-weight needs 0 or more; got -1"):
        dataclasses.replace(OBJECTIVE, box_weight=-1.0)


@pytest.mark.parametrize("box_loss", [smooth_l1_of_deltas(), giou_of_boxes()])
@pytest.mark.parametrize("boxes", [BOXES, [[], []]])
def test_boxes_of_all_rows_give_what_the_positive_ones_give(box_loss, boxes):
    """The form for CUDA, where no shape may depend on a value."""
    objective = dataclasses.replace(OBJECTIVE, box_loss=box_loss)
    wanted = targets(boxes, CLASSES if boxes is BOXES else [[], []])
    anchors = all_anchors_of_image(ANCHORS, 16, 16)
    state, _, box = objective.assign(wanted, height=16, width=16)
    share = torch.tensor([0.5, 0.25])
    results = []
    for form in (objective._boxes_of_positives, objective._boxes_of_all):
        deltas = torch.tensor(DELTAS).requires_grad_()
        total = form(deltas, anchors, wanted.boxes, state == 1, box, share)
        total.backward()
        results.append((total.detach(), deltas.grad))
    torch.testing.assert_close(results[0], results[1])


def test_on_cuda_the_host_waits_for_nothing(monkeypatch):
    """Tensors without values refuse whatever needs a value on the host, just where a device would be waited for."""
    monkeypatch.setattr("retinanet.kernels.usable", lambda *_, **__: False)  # Triton needs a device
    with FakeTensorMode():
        made = RawPredictions(
            logits=tuple(torch.empty(2, n, 3, device="cuda", requires_grad=True) for n in (4, 1)),
            deltas=tuple(torch.empty(2, n, 4, device="cuda", requires_grad=True) for n in (4, 1)),
            grids=((2, 2), (1, 1)),
        )
        wanted = Targets(
            torch.empty(2, 5, 4, device="cuda"),
            torch.empty(2, 5, dtype=torch.int64, device="cuda"),
            torch.empty(2, 5, dtype=torch.bool, device="cuda"),
        )
        for class_loss in (lambda logits, classes, weight: logits.sum(), varifocal()):
            objective = dataclasses.replace(OBJECTIVE, class_loss=class_loss)
            anchors_of_image.cache_clear()
            found = losses(objective, made, wanted)
            assert found.total.device.type == "cuda"
    anchors_of_image.cache_clear()


# ---------------------------------------------------------------------------------- hard examples


@pytest.mark.parametrize("loss", [focal(), focal(None, 0), focal_star(), hinge()])
def test_any_loss_tells_what_each_anchor_costs(loss):
    logits, classes = torch.randn(2, 30, 3), torch.randint(-1, 3, (2, 30))
    expected = torch.zeros(2, 30)
    for image in range(2):
        for anchor in range(30):
            alone = (slice(image, image + 1), slice(anchor, anchor + 1))
            expected[image, anchor] = loss(logits[alone], classes[alone], torch.ones(1, 1))
    torch.testing.assert_close(loss_of_anchors(loss, logits, classes), expected)
    with torch.no_grad():
        torch.testing.assert_close(loss_of_anchors(loss, logits, classes), expected)


def cross_entropy_of_image(image):
    classes = torch.full((5,), -1)
    if image == 0:
        classes[0] = 1
    return sigmoid_cross_entropy(torch.tensor(LOGITS[image]), classes).sum(dim=1)


def test_only_the_hardest_anchors_are_learned_from():
    # The squares do not overlap; the whole image covers a quarter of each, so NMS at 0.2 drops what it beats.
    all_anchors = torch.cat(anchors_of_image(ANCHORS, 16, 16))
    objective = dataclasses.replace(OBJECTIVE, class_loss=focal(None, 0), mining=ohem(4, 0.2))
    made, logits, deltas = predictions()
    found = losses(objective, made)
    found.total.backward()
    for image in range(2):
        each = cross_entropy_of_image(image)
        if image == 0:
            each[3] = 0  # ignored, however hard
        order = [i for i in each.argsort(descending=True).tolist() if each[i] > 0]
        if order[0] == 4:
            chosen = [4]
        else:
            before = order[: order.index(4)]
            assert before
            chosen = [i for i in order if i != 4]
        learned = logits.grad[image].abs().sum(dim=1) > 0
        assert torch.nonzero(learned)[:, 0].tolist() == sorted(chosen)
    assert all_anchors.shape == (5, 4)
    # Boxes are learned from the positive whether it is hard or not.
    assert deltas.grad[0, 0].abs().sum() > 0


def test_mined_anchors_keep_their_weight_and_the_rest_loses_it():
    objective = dataclasses.replace(
        OBJECTIVE, class_loss=focal(None, 0), mining=lambda losses, anchors, positive: torch.tensor([0, 3])
    )
    found = losses(objective)
    # Anchor 3 of image 0 is ignored, and stays so. Each image is divided by its positives, then by two images.
    expected = (cross_entropy_of_image(0)[0] + cross_entropy_of_image(1)[[0, 3]].sum()) / 2
    assert found.classes.item() == pytest.approx(expected.item(), rel=1e-5)


def test_one_to_three_is_told_which_anchors_are_positive():
    seen = []

    def spy(losses, anchors, positive):
        seen.append((losses, positive))
        return hardest_one_to_three(losses, anchors, positive, batch=4, nms_iou=1.0)

    ours = dataclasses.replace(OBJECTIVE, mining=spy)
    theirs = dataclasses.replace(OBJECTIVE, mining=ohem_one_to_three(4, 1.0))
    assert losses(ours).classes == losses(theirs).classes
    assert [positive.tolist() for _, positive in seen] == [[True] + [False] * 4, [False] * 5]
    assert seen[0][0][3] == 0
