"""NMS on a CPU: the kept indices and their order are those of the plain form."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")

from kernel_cases import random_boxes, seeded
from retinanet.boxes import iou, nms, pairwise, plain_nms
from retinanet.kernels.cpu import nms as nms_kernel

NAN, INF = math.nan, math.inf


def check_nms(boxes, scores, labels, threshold=0.5, max_kept=None) -> Tensor:
    found = nms(boxes, scores, labels, threshold, max_kept=max_kept)
    assert found.dtype == torch.int64
    assert torch.equal(found, plain_nms(boxes, scores, labels, threshold, max_kept))
    return found


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(0, 150),
    st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 1.0]),
    st.sampled_from([None, 1, 5, 1000]),
    st.sampled_from([1, 3]),
)
def test_nms(seed, count, threshold, max_kept, classes):
    # Coarse values: scores tie, boxes coincide, are empty or inside out, and IoUs equal the threshold.
    generator = seeded(seed)
    boxes = torch.randint(0, 8, (count, 4), generator=generator).float()
    scores = torch.randint(-2, 3, (count,), generator=generator).float() / 2
    labels = torch.randint(0, classes, (count,), generator=generator)
    check_nms(boxes, scores, labels, threshold, max_kept)


@pytest.mark.parametrize("count", [63, 64, 65, 128, 129, 300])
def test_nms_with_more_kept_boxes_than_are_compared_at_once(count):
    # Disjoint boxes, then a copy of each: the copies meet their box at every place of a block.
    apart = torch.arange(count)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5])
    boxes = torch.cat((apart, apart.flip(0) + 1))
    scores = torch.cat((torch.ones(count), torch.zeros(count)))
    kept = check_nms(boxes, scores, torch.zeros(2 * count, dtype=torch.int64), 0.3)
    assert kept.tolist() == list(range(count))


@pytest.mark.parametrize("seed", range(5))
def test_an_nms_threshold_that_is_an_iou(seed):
    # IoU > threshold, of the quotient: that of another rounding would suppress somewhere here.
    boxes = random_boxes(60, seed=seed, extent=60)
    scores = torch.rand(60, generator=seeded(seed))
    overlaps = pairwise(iou, boxes, boxes)
    for threshold in overlaps[(overlaps > 0.3) & (overlaps < 1)].sort().values[::40].tolist():
        check_nms(boxes, scores, torch.zeros(60, dtype=torch.int64), threshold)


@pytest.mark.parametrize(
    "values",
    [
        [-1, -5, -1, -(2**63)],
        [10**12, 5, 2**63 - 1, 10**12],
        [0, 3, 4, 5],  # as large as the number of boxes, or nearly
        [7, 7, 7, 7],
    ],
)
def test_nms_of_strange_labels(values):
    labels = torch.tensor(values).repeat(10)
    boxes = torch.randint(0, 6, (40, 4), generator=seeded(0)).float()
    kept = check_nms(boxes, torch.rand(40, generator=seeded(1)), labels, 0.3)
    assert len(kept) < 40


def test_nms_of_scores_that_are_no_numbers():
    scores = torch.tensor([NAN, 0.5, -INF, INF, -NAN, 0.0, -0.0, 1e-45, -1e-45, 3e38])
    boxes = torch.arange(10)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5])
    kept = check_nms(boxes, scores, torch.zeros(10, dtype=torch.int64))
    assert kept.tolist() == [3, 9, 1, 7, 5, 6, 8, 2, 0, 4]


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered", "ignore:overflow encountered"
)  # the plain one's
def test_nms_of_boxes_that_are_not_finite():
    boxes = torch.randint(0, 6, (60, 4), generator=seeded(2)).float()
    boxes[torch.rand(60, 4, generator=seeded(3)) < 0.1] = NAN
    boxes[torch.rand(60, 4, generator=seeded(4)) < 0.1] = INF
    boxes[torch.rand(60, 4, generator=seeded(5)) < 0.1] = -INF
    boxes[torch.rand(60, 4, generator=seeded(6)) < 0.1] = 3e38
    check_nms(boxes, torch.rand(60, generator=seeded(7)), torch.zeros(60, dtype=torch.int64), 0.3)


def test_inputs_of_nms_need_not_be_contiguous():
    table = torch.randint(0, 6, (80, 6), generator=seeded(8)).float()
    labels = torch.arange(80) % 3
    check_nms(table[::2, :4], table[::2, 4], labels[::2], 0.3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, NAN, -NAN, INF, -INF]), max_size=60))
def test_the_order_of_scores_is_a_stable_argsort(values):
    scores = np.array(values, dtype=np.float32)
    assert nms_kernel.by_score(scores).tolist() == np.argsort(-scores, kind="stable").tolist()


def test_the_order_of_many_scores():
    scores = (np.random.default_rng(0).normal(size=100_000) * 100).astype(np.float32).round(1)
    assert np.array_equal(nms_kernel.by_score(scores), np.argsort(-scores, kind="stable"))
