"""The CPU kernels: equal to the plain functions, for any number of threads, in any process, with or without numba."""

import functools
import hashlib
import inspect
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("numba")

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

from retinanet import boxes as boxes_module
from retinanet import kernels
from retinanet.anchors import AnchorSpec, anchors_of_image
from retinanet.batches import MatchState
from retinanet.boxes import iou, nms, pairwise, plain_nms
from retinanet.errors import ConfigError
from retinanet.inference import post_processing
from retinanet.inference.post_processing import best_above, best_above_padded
from retinanet.kernels.cpu import focal, matching, memory, selection, threads
from retinanet.kernels.cpu import nms as nms_kernel
from retinanet.kernels.cpu.compiled import compiled
from retinanet.losses import sigmoid_focal_loss
from retinanet.matching import match_anchors, plain_match_anchors
from retinanet.model.heads import Head
from retinanet.model.spec import HeadSpec

NAN, INF = math.nan, math.inf
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
ALPHAS = (None, 0.25, 0.0, 1.0)


@contextmanager
def torch_threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=[1, 2, 3])
def any_threads(request):
    with torch_threads(request.param):
        yield


@pytest.fixture
def small_parts(monkeypatch):
    """Let small cases, too, be shared between threads."""
    monkeypatch.setattr(focal, "LEAST_BLOCKS", 1)
    monkeypatch.setattr(matching, "LEAST_BLOCKS", 1)
    monkeypatch.setattr(selection, "LEAST", 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run_python(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if run.returncode != 0:
        pytest.fail(f"{run.stdout}{run.stderr}", pytrace=False)
    return run


# ---------------------------------------------------------------------------------- which way a call goes


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("focal_sum", lambda: sigmoid_focal_loss(torch.zeros(2, 3), torch.zeros(2).long(), reduction="sum")),
        ("match", lambda: match_anchors(torch.zeros(5, 4), torch.zeros(3, 4))),
        ("select", lambda: post_processing._select([torch.zeros(1, 2, 3)], [0.0], 5)),
        ("nms", lambda: nms(torch.zeros(2, 4), torch.zeros(2), torch.zeros(2).long(), 0.5)),
    ],
)
def test_the_library_calls_the_kernel(name, call, monkeypatch):
    class Called(Exception):
        pass

    def raise_called(*_):
        raise Called

    monkeypatch.setattr(kernels, name, raise_called)
    with pytest.raises(Called):
        call()


@pytest.mark.parametrize(
    ("tensors", "dtypes", "expected"),
    [
        ([torch.zeros(1)], (torch.float32,), True),
        ([torch.zeros(1).double()], (torch.float32,), False),
        ([torch.zeros(1).bfloat16()], (torch.float32, torch.bfloat16), True),
        ([torch.zeros(1, device="meta")], (torch.float32,), False),
        ([torch.zeros(1), torch.zeros(1, device="meta")], (torch.float32,), False),
    ],
)
def test_usable(tensors, dtypes, expected):
    assert kernels.usable(*tensors, dtypes=dtypes) is expected


# ---------------------------------------------------------------------------------- focal loss: values


def exact(logits, classes, weight, alpha, gamma, reduction) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the plain formula in float64."""
    x = logits.detach().double().requires_grad_()
    weight = None if weight is None else weight.double()
    with torch_threads(1):  # for tensors as small as these it is quicker to do without the other
        each = sigmoid_focal_loss(x, classes, alpha, gamma, "none", weight=weight)
        loss = each.sum() if reduction == "sum" else each.mean()
        loss.backward()
    return loss.detach(), x.grad


def fused(logits, classes, weight=None, alpha=0.25, gamma=2.0, reduction="sum") -> tuple[Tensor, Tensor]:
    x = logits.detach().clone().requires_grad_()
    loss = sigmoid_focal_loss(x, classes, alpha, gamma, reduction, weight=weight)
    loss.backward()
    return loss.detach(), x.grad


def rounding(dtype: torch.dtype, gamma: float) -> float:
    """The relative error that a gradient may have."""
    # The exponent of a general power, rounded to float32, is up to 5 * 40 where the power is not yet nothing.
    in_float32 = 1.2e-6 if gamma in (0, 2) else 6e-6
    return in_float32 if dtype == torch.float32 else 2**-8 + in_float32


def check_focal(logits, classes, weight=None, alpha=0.25, gamma=2.0, reduction="sum", *, rtol=None):
    loss, gradient = fused(logits, classes, weight, alpha, gamma, reduction)
    expected, slope = exact(logits, classes, weight, alpha, gamma, reduction)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert gradient.dtype == logits.dtype
    # 1e-37: below it float32 has no normal numbers.
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-37)
    rtol = rounding(logits.dtype, gamma) if rtol is None else rtol
    torch.testing.assert_close(gradient.double(), slope, rtol=rtol, atol=1e-37)


def focal_case(rows: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Half of the logits as in training, half of them anywhere in -100..100."""
    generator = seeded(seed)
    usual = torch.randn(rows, classes, generator=generator) * 3
    anywhere = torch.rand(rows, classes, generator=generator) * 200 - 100
    logits = torch.where(torch.rand(rows, classes, generator=generator) < 0.5, usual, anywhere)
    return logits, torch.randint(-2, classes, (rows,), generator=generator)


def weightings(rows: int) -> dict[str, Tensor | None]:
    random = torch.rand(rows, generator=seeded(rows)) * 2
    zeros_in_runs = random * (torch.arange(rows) % 7 > 2)
    constant = torch.full((rows,), 0.37)
    return {"none": None, "random": random, "with zeros": zeros_in_runs, "constant": constant}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("classes", [1, 2, 3, 80, 91])
def test_focal_sum(classes, gamma, dtype):
    rows = 2 * focal.BLOCK // classes + 5  # the last block is short, and no block ends within a row
    logits, indices = focal_case(rows, classes, seed=classes)
    for weight, alpha in product(weightings(rows).values(), ALPHAS):
        check_focal(logits.to(dtype), indices, weight, alpha, gamma)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", weightings(1))
def test_focal_mean(kind, gamma):
    logits, indices = focal_case(200, 3, seed=0)
    check_focal(logits, indices, weightings(200)[kind], gamma=gamma, reduction="mean")


def test_focal_mean_of_bfloat16_is_rounded_once():
    logits, indices = focal_case(1003, 3, seed=0)
    _, gradient = fused(logits.bfloat16(), indices, reduction="mean")
    _, slope = exact(logits.bfloat16(), indices, None, 0.25, 2.0, "mean")
    seen = slope.abs() > 1e-20
    # Eight binary digits: at most 2^-8 off after one rounding, and more after two. The rest is float32's.
    assert ((gradient.double() / slope - 1).abs()[seen] <= 2**-8 + 1e-5).all()


@pytest.mark.parametrize("index", [-1, 0])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_each_logit_alone(gamma, index):
    # One at a time: in a sum the hard examples hide what the easy ones lose.
    near_zero = torch.tensor([0.0, 1e-30, 1e-6, 0.01, 0.3, 0.7, 2.0, 16.6, 17.5])
    for x in torch.cat((near_zero, -near_zero, torch.linspace(-100, 100, 81))):
        logits, classes = x.reshape(1, 1), torch.tensor([index])
        loss, gradient = fused(logits, classes, None, None, gamma)
        expected, slope = exact(logits, classes, None, None, gamma, "sum")
        rtol = 6e-7 + gamma * abs(x.item()) * 1.2e-7  # what float32 leaves of exp(-gamma |x|)
        torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=1e-37)
        torch.testing.assert_close(gradient.double(), slope, rtol=rtol, atol=1e-37)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [87.0, 87.5, 88.0, 88.8, 104.0, 1e4, 3e38])
def test_extreme_logits(size, dtype, gamma):
    for x, index in product((size, -size), (-1, 0)):
        logits = torch.tensor([[x], [0.5]], dtype=dtype)
        check_focal(logits, torch.tensor([index, -1]), gamma=gamma)


@pytest.mark.parametrize("kind", weightings(1))
@pytest.mark.parametrize("gamma", GAMMAS)
def test_bfloat16_is_float32_rounded_once(gamma, kind):
    logits, indices = focal_case(300, 7, seed=1)
    logits, weight = logits.bfloat16(), weightings(300)[kind]
    loss, gradient = fused(logits, indices, weight, gamma=gamma)
    wide_loss, wide_gradient = fused(logits.float(), indices, weight, gamma=gamma)
    assert torch.equal(loss, wide_loss)
    assert torch.equal(gradient, wide_gradient.bfloat16())


def test_bfloat16_is_rounded_to_even():
    # At x = 0 the slope of cross entropy is 1/2 of the weight: here halfway between two bfloat16 numbers.
    weight = 1 + torch.arange(1, 256, 2) / 256
    _, gradient = fused(torch.zeros(128, 1).bfloat16(), torch.full((128,), -1), weight, None, 0.0)
    assert torch.equal(gradient[:, 0], (weight / 2).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])  # rounded as a number, the last two become 0
def test_a_weight_that_is_no_number_is_not_hidden(bits, dtype):
    weight = torch.tensor([0, bits], dtype=torch.int32).view(torch.float32)
    loss, gradient = fused(torch.zeros(2, 3, dtype=dtype), torch.tensor([-1, 1]), weight)
    assert loss.isnan()
    assert gradient.isnan().tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_weight_0_are_not_looked_at(dtype, bad, gamma):
    logits, indices = focal_case(50, 5, seed=2)
    weight = weightings(50)["with zeros"]
    unseen = weight == 0
    assert unseen.any()
    assert (indices[unseen] >= 0).any()
    spoilt = torch.where(unseen[:, None], bad, logits).to(dtype)
    loss, gradient = fused(spoilt, indices, weight, gamma=gamma)
    expected, slope = fused(logits.to(dtype), indices, weight, gamma=gamma)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, slope)
    assert gradient[unseen].count_nonzero() == 0


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [-1, 0, 4])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_nan_is_not_hidden(rows, index, dtype, gamma):
    logits = torch.zeros(rows, 5, dtype=dtype)
    logits[rows // 2, 4] = NAN
    loss, gradient = fused(logits, torch.full((rows,), index), torch.full((rows,), 0.5), gamma=gamma)
    assert loss.isnan()
    assert gradient.isnan().nonzero().tolist() == [[rows // 2, 4]]


@pytest.mark.parametrize(
    "shape",
    [
        (0, 5),
        (2, 0, 5),
        (0, 7, 5),
        (3, 0),
    ],
)
def test_no_logits(shape):
    loss, gradient = fused(torch.zeros(shape), torch.full(shape[:-1], -1))
    assert loss.item() == 0
    assert gradient.shape == shape


def test_leading_dimensions():
    logits, indices = focal_case(60, 5, seed=3)
    weight = weightings(60)["with zeros"]
    expected, slope = fused(logits, indices, weight)
    loss, gradient = fused(logits.view(3, 4, 5, 5), indices.view(3, 4, 5), weight.view(3, 4, 5))
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, slope.view(3, 4, 5, 5))


def test_inputs_need_not_be_contiguous():
    logits, indices = focal_case(60, 5, seed=4)
    weight = weightings(60)["random"]
    strided = torch.stack((logits, logits + 1), dim=-1)[..., 0]
    found = fused(strided, indices.repeat_interleave(2)[::2], weight.repeat_interleave(3)[::3])
    for one, other in zip(found, fused(logits, indices, weight), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_class_beyond_the_last_is_an_error(reduction):
    with pytest.raises(ConfigError, match=r"class indices below 3, .*; got 7"):
        sigmoid_focal_loss(torch.zeros(4, 3), torch.tensor([0, 7, -1, 2]), reduction=reduction)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_any_number_of_threads_gives_the_same_bits(gamma, dtype):
    # Many cases, and nothing but background, which is added up in long runs: a sum in another order often rounds
    # to the same float32.
    for rows in range(80, 200, 6):
        logits, _ = focal_case(rows, 80, seed=rows)
        found = []
        for number in (1, 2, 3):
            with torch_threads(number):
                found.append(fused(logits.to(dtype), torch.full((rows,), -1), gamma=gamma))
        for loss, gradient in found[1:]:
            assert torch.equal(loss, found[0][0])
            assert torch.equal(gradient, found[0][1])


# ---------------------------------------------------------------------------------- focal loss: an operator of torch's


def head_of(classes: int) -> tuple[Head, Tensor]:
    torch.manual_seed(0)
    head = Head(channels=8, anchors=9, values=classes, spec=HeadSpec(depth=1), prior=0.01)
    return head.to(memory_format=torch.channels_last), torch.randn(2, 8, 6, 5).to(
        memory_format=torch.channels_last
    )


def test_the_output_of_a_head_is_not_copied(monkeypatch):
    head, level = head_of(classes=3)
    logits = head(level)
    seen = []
    on_device = focal.focal_sum
    monkeypatch.setattr(
        focal, "focal_sum", lambda x, *others: seen.append(x.data_ptr()) or on_device(x, *others)
    )
    sigmoid_focal_loss(logits, torch.full((2, 270), -1), reduction="sum")
    assert seen == [logits.data_ptr()]


def test_the_gradient_reaches_the_head():
    head, level = head_of(classes=3)
    indices = torch.randint(-4, 3, (2, 270), generator=seeded(0))
    fast = sigmoid_focal_loss(head(level), indices, reduction="sum")
    slow = sigmoid_focal_loss(head(level), indices).sum()
    gradients = [torch.autograd.grad(loss, [*head.parameters()]) for loss in (fast, slow)]
    for ours, plain in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("learning", [True, False])
def test_without_a_gradient_no_memory_is_taken_for_one(learning, monkeypatch):
    def refuse(*_):
        raise AssertionError("memory was taken")

    logits, indices = focal_case(50, 5, seed=6)
    expected, _ = fused(logits, indices)
    monkeypatch.setattr(focal, "recycled", refuse)
    with torch.no_grad() if learning else torch.enable_grad():
        loss = sigmoid_focal_loss(logits.requires_grad_(learning), indices, reduction="sum")
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    _, gradient = kernels._focal_sum(logits.detach(), indices, None, 0.25, 0.75, 2.0, False)
    assert gradient.shape == (0,)


def test_no_second_derivative():
    logits, indices = focal_case(5, 3, seed=7)
    loss = sigmoid_focal_loss(logits.requires_grad_(), indices, reduction="sum")
    with pytest.raises(RuntimeError, match="no second derivative; use reduction='none'"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("factor", [1.0, 0.5, -3.0])
def test_the_gradient_is_scaled(factor):
    logits, indices = focal_case(50, 3, seed=8)
    _, slope = fused(logits, indices)
    (factor * sigmoid_focal_loss(logits.requires_grad_(), indices, reduction="sum")).backward()
    assert torch.equal(logits.grad, factor * slope)


def test_backward_twice_accumulates():
    logits, indices = focal_case(50, 3, seed=9)
    _, slope = fused(logits, indices)
    loss = sigmoid_focal_loss(logits.requires_grad_(), indices, reduction="sum")
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(logits.grad, 2 * slope)


def test_backward_three_times_accumulates():
    logits, indices = focal_case(50, 3, seed=9)
    _, slope = fused(logits, indices)
    loss = sigmoid_focal_loss(logits.requires_grad_(), indices, reduction="sum")
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, 3 * slope)


def test_a_gradient_may_be_changed_between_two_backward_passes():
    logits, indices = focal_case(50, 3, seed=9)
    _, slope = fused(logits, indices)
    loss = sigmoid_focal_loss(logits.requires_grad_(), indices, reduction="sum")
    loss.backward(retain_graph=True)
    logits.grad.zero_()
    loss.backward()
    assert torch.equal(logits.grad, slope)


def test_the_losses_of_two_levels_have_gradients_of_their_own():
    one, other = (focal_case(50, 3, seed=seed) for seed in (10, 11))
    slopes = [fused(*case)[1] for case in (one, other)]
    leaves = [case[0].clone().requires_grad_() for case in (one, other)]
    losses = [
        sigmoid_focal_loss(leaf, case[1], reduction="sum")
        for leaf, case in zip(leaves, (one, other), strict=True)
    ]
    sum(losses).backward()
    for leaf, slope in zip(leaves, slopes, strict=True):
        assert torch.equal(leaf.grad, slope)


# torch's own, when it looks at the tensors that it traces.
looks_at_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@looks_at_grad
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_torch_compile(reduction):
    logits, indices = focal_case(50, 3, seed=12)
    weight = weightings(50)["with zeros"]
    leaf = logits.clone().requires_grad_()
    torch.compiler.reset()
    loss_of = functools.partial(sigmoid_focal_loss, reduction=reduction)
    compiled_loss = torch.compile(loss_of, fullgraph=True, backend="aot_eager")  # which needs no C++ compiler
    loss = compiled_loss(leaf, indices, weight=weight)
    loss.backward()
    expected, slope = fused(logits, indices, weight, reduction=reduction)
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(leaf.grad, slope)


@looks_at_grad
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_its_promises_to_torch(dtype, weighted):
    logits, indices = focal_case(20, 3, seed=13)
    weight = weightings(20)["random"] if weighted else None
    arguments = (logits.to(dtype).requires_grad_(), indices, weight, 0.25, 0.75, 2.0, True)
    torch.library.opcheck(torch.ops.retinanet.focal_sum.default, arguments)


# ---------------------------------------------------------------------------------- matching


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


def random_boxes(*shape: int, seed: int, extent: float = 240.0) -> Tensor:
    corner, size = torch.rand(2, *shape, 2, generator=seeded(seed))
    return torch.cat((corner * extent, corner * extent + 8 + size * 80), dim=-1)


def random_mask(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed)) < 0.3


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
    # Enough that three threads share both passes.
    anchors = torch.cat(anchors_of_image(AnchorSpec(), 640, 896))
    assert len(anchors) > 3 * 4 * matching.LEAST_BLOCKS * matching.BLOCK
    if not in_order:
        anchors = anchors[torch.randperm(len(anchors), generator=seeded(0))]
    boxes = random_boxes(2, 12, seed=1, extent=600)
    boxes[1, 5] = boxes[1, 4]
    boxes[1, 6] = torch.tensor([2e4, 2e4, 3e4, 3e4])  # meets no anchor
    boxes[1, 7] = anchors[54321]
    ignored = random_mask(2, 12, seed=2)
    state = check_match(anchors, boxes, ignored, low_quality=True)
    assert state.unique().tolist() == sorted(MatchState)  # nothing of this is vacuous


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
    # Sizes over six orders of magnitude: where areas alone rule a block out, and where they do not.
    generator = seeded(seed)
    corner = torch.rand(600, 2, generator=generator) * 100
    size = 10 ** (torch.rand(600, 2, generator=generator) * 3 - 1)
    every = torch.cat((corner, corner + size), dim=1)
    state = check_match(every[:500], every[500:].reshape(2, 50, 4), low_quality=True)
    assert MatchState.POSITIVE in state


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


# ---------------------------------------------------------------------------------- selection

LEVELS = {
    "normal": lambda n: torch.randn(n, generator=seeded(n)) * 3,
    "ties": lambda n: torch.randint(-3, 4, (n,), generator=seeded(n)).float(),
    "all equal": lambda n: torch.ones(n),
    "all equal, below": lambda n: -torch.ones(n),
    "ascending": lambda n: torch.linspace(-1, 5, n),  # each beats all before it
    "ascending steps": lambda n: torch.arange(n).float() // 50,
    "descending": lambda n: torch.linspace(5, -1, n),
    "not finite": lambda n: torch.tensor([NAN, 1.0, -INF, INF, 0.0, -0.0, 3e38]).repeat(n // 7 + 1)[:n],
}


@pytest.mark.usefixtures("any_threads", "small_parts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LEVELS)
def test_select(kind, dtype):
    # Around a block; a room that is filled many times; fewer than top_k.
    levels = [LEVELS[kind](n).to(dtype)[:, None] for n in (1, 127, 128, 129, 6000)]
    for limit, top_k in product((-INF, -1.0, 0.0, 1.0, 4.0, INF), (1, 10, 1000)):
        limits = [limit] * len(levels)
        found = kernels.select(levels, limits, top_k)
        for ours, level in zip(found, levels, strict=True):
            assert ours.dtype == torch.int64
            assert torch.equal(ours, best_above(level, limit, top_k))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=400), min_size=1, max_size=4),
    st.integers(-4, 3),
    st.integers(1, 20),
    st.integers(1, 3),
)
def test_select_with_ties(levels, limit, top_k, number):
    levels = [torch.tensor(values).float()[None] for values in levels]
    with torch_threads(number), pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "LEAST", 1)
        found = kernels.select(levels, [float(limit)] * len(levels), top_k)
    for ours, level in zip(found, levels, strict=True):
        assert torch.equal(ours, best_above(level, float(limit), top_k))


def test_each_level_has_its_own_threshold():
    levels = [torch.randn(50, 3, generator=seeded(seed)) for seed in range(3)]
    limits = [-1.0, 0.0, 1.5]
    expected = [best_above(level, limit, 20) for level, limit in zip(levels, limits, strict=True)]
    assert all(map(torch.equal, kernels.select(levels, limits, 20), expected))


@pytest.mark.usefixtures("any_threads")
def test_select_from_many_logits():
    level = torch.randn(4 * selection.LEAST // 80, 80, generator=seeded(0)).mul(4).round()  # with ties
    for limit, top_k in ((-INF, 1000), (2.0, 10), (8.0, 100_000)):
        (found,) = kernels.select([level], [limit], top_k)
        assert torch.equal(found, best_above(level, limit, top_k))


def test_select_takes_a_threshold_strictly_in_float32():
    limit = math.log(0.05 / 0.95)  # which float32 has not
    level = torch.tensor([[limit], [math.nextafter(limit, 0)], [limit + 1e-6]])
    (found,) = kernels.select([level], [limit], 5)
    assert found.tolist() == best_above(level, limit, 5).tolist() == [2]


@pytest.mark.parametrize("shapes", [[(0, 3)], [(0, 3), (0, 3)], [(5, 3), (0, 3)], [(4, 0)]])
def test_select_from_nothing(shapes):
    found = kernels.select([torch.ones(shape) for shape in shapes], [0.0] * len(shapes), 5)
    assert [len(of_level) for of_level in found] == [min(5, rows * classes) for rows, classes in shapes]


def test_select_from_an_image_of_a_batch_of_bfloat16():
    logits = torch.randn(3, 40, 5, generator=seeded(1)).bfloat16().requires_grad_()
    (found,) = kernels.select([logits[1]], [0.0], 7)
    assert torch.equal(found, best_above(logits[1].detach(), 0.0, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LEVELS)
def test_the_padded_variant_for_devices(kind, dtype):
    batch = torch.stack([LEVELS[kind](120).roll(shift).reshape(40, 3) for shift in (0, 1, 17)]).to(dtype)
    batch[2] = -5.0  # an image without anything above most limits
    for limit, top_k in product((-INF, -1.0, 0.0, 1.0, 4.0, INF), (1, 10, 1000)):
        padded = best_above_padded(batch, limit, top_k)
        assert padded.shape == (3, min(top_k, 120))
        for row, image in zip(padded, batch, strict=True):
            expected = best_above(image, limit, top_k)
            filling = torch.full((padded.shape[1] - len(expected),), -1)
            assert torch.equal(row, torch.cat((expected, filling)))


def test_selection_for_devices_is_that_of_the_cpu():
    levels = [torch.randint(-3, 4, (2, rows, 3), generator=seeded(rows)).float() for rows in (50, 12, 3)]
    limits = [1.0, 0.0, -INF]
    ours, others = (
        select(levels, limits, 10) for select in (post_processing._select_on_cuda, post_processing._select)
    )
    for image, other in zip(ours, others, strict=True):
        assert all(map(torch.equal, image, other))
        assert [len(of_level) for of_level in image] == [10, 10, 9]


# ---------------------------------------------------------------------------------- NMS


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


# ---------------------------------------------------------------------------------- memory


@pytest.fixture
def nothing_kept(monkeypatch):
    monkeypatch.setattr(memory, "_kept", [])


def floats(*shape: int) -> Tensor:
    return memory.recycled(torch.Size(shape), torch.float32)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(
    "held",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[90:],
        lambda tensor: tensor.view(torch.int32).view(10, 10).t(),
        lambda tensor: tensor.requires_grad_().detach(),
        lambda tensor: torch.nn.Parameter(tensor),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.numpy()[::-1][3:],
        lambda tensor: memoryview(tensor.numpy()),
        lambda tensor: torch.from_numpy(tensor.numpy()[5:]),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: tensor.clone().requires_grad_().mul(tensor).grad_fn,  # saved for a backward pass
    ],
)
def test_memory_that_is_held_is_not_handed_out(held):
    tensor = floats(100)
    address = tensor.data_ptr()
    holder = held(tensor)
    del tensor
    others = [floats(size) for size in (100, 90, 60, 100)]
    assert all(other.data_ptr() != address for other in others)
    del holder
    assert floats(100).data_ptr() == address


@pytest.mark.usefixtures("nothing_kept")
def test_no_two_tensors_share_memory():
    generator = np.random.default_rng(0)
    held: list[tuple[int, Tensor]] = []
    for number in range(400):
        held.append((number, floats(int(generator.integers(1, 60))).fill_(number)))
        if len(held) > 5:
            held.pop(int(generator.integers(0, len(held))))
        assert all((tensor == value).all() for value, tensor in held)


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize(
    ("shape", "dtype", "again"),
    [
        ((100,), torch.float32, True),
        ((5, 20), torch.float32, True),
        ((50, 1), torch.float32, True),
        ((200,), torch.bfloat16, True),
        ((30,), torch.int64, True),
        ((49,), torch.float32, False),  # less than half would be a waste
        ((101,), torch.float32, False),
    ],
)
def test_freed_memory_is_used_again(shape, dtype, again):
    address = floats(100).data_ptr()
    tensor = memory.recycled(torch.Size(shape), dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert memory.kept_bytes() == (400 if again else tensor.nbytes)
    if again:
        assert tensor.data_ptr() == address


@pytest.mark.usefixtures("nothing_kept")
def test_what_is_kept_does_not_grow_with_the_shapes_seen():
    generator = np.random.default_rng(1)
    for _ in range(300):
        size = int(generator.integers(1, 100_000))
        tensors = floats(size), floats(size)
        assert 2 * 4 * size <= memory.kept_bytes() <= 2 * 2 * 4 * size
        del tensors


@pytest.mark.usefixtures("nothing_kept")
def test_the_smallest_that_fits_is_taken():
    addresses = [tensor.data_ptr() for tensor in [floats(size) for size in (199, 120, 110, 150)]]
    assert floats(100).data_ptr() == addresses[2]


@pytest.mark.usefixtures("nothing_kept")
def test_an_empty_tensor_takes_nothing():
    tensor = floats(3, 0, 5)
    assert tensor.shape == (3, 0, 5)
    assert memory.kept_bytes() == 0


@pytest.mark.usefixtures("nothing_kept")
def test_a_second_step_uses_the_gradient_of_the_first():
    logits, indices = focal_case(100, 10, seed=14)
    gradients = set()
    for _ in range(3):
        loss, gradient = fused(logits, indices)
        gradients.add(gradient.data_ptr())
        del loss, gradient
    assert len(gradients) == 1
    assert memory.kept_bytes() == logits.nbytes


PEAKS = """
import sys
import numpy as np
import torch
from retinanet.losses import sigmoid_focal_loss
from retinanet.matching import match_anchors

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

def report(work, size, allowed):
    work(size // 50)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what is in use from here on
    before = peak()
    result = work(size)
    grown = peak() - before
    control = np.ones(allowed, np.uint8)  # this must show
    print(grown, peak() - before)

generator = torch.Generator().manual_seed(0)

def random_boxes(count):
    corner, size = torch.rand(2, count, 2, generator=generator)
    return torch.cat((corner * 1000, corner * 1000 + 8 + size * 80), dim=1)

anchors, boxes, ignored = random_boxes(120_000), random_boxes(20_000), torch.arange(20_000) % 10 == 0
report(lambda n: match_anchors(anchors, boxes[:n], ignored[:n], low_quality=True), 20_000, int(sys.argv[1]))

logits, indices, weight = torch.zeros(125_000, 80), torch.arange(125_000) % 80 - 40, torch.ones(125_000)

def step(rows):
    leaf = logits[:rows].requires_grad_()
    sigmoid_focal_loss(leaf, indices[:rows], reduction="sum", weight=weight[:rows]).backward()
    return leaf.grad

report(step, 125_000, int(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory():
    # A matrix of 120,000 anchors x 20,000 boxes would be 9.6 GB; 10 million logits have a gradient of 40 MB.
    allowed = [100 * 10**6, 40 * 10**6 + 30 * 10**6]
    for line, most in zip(run_python(PEAKS, *allowed).stdout.splitlines(), allowed, strict=True):
        grown, with_control = map(int, line.split())
        assert grown < most
        assert with_control > 0.9 * most


# ---------------------------------------------------------------------------------- threads


@pytest.fixture(params=["team of torch", "pool"])
def any_way(request, monkeypatch):
    """Both kinds of threads, where torch has a team that can be used."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("no OpenMP runtime of a known kind")


@pytest.mark.usefixtures("any_threads", "any_way")
@pytest.mark.parametrize("least", [0, 1, 2, 7, 100])
def test_parts_cover_the_range_in_order(least):
    for count in (0, 1, 2, 3, 7, 100, 101):
        parts = threads.in_parallel(lambda *part: part, count, least=least)
        assert [number for number, _, _ in parts] == list(range(len(parts)))
        assert [i for _, start, stop in parts for i in range(start, stop)] == list(range(count))
        assert len(parts) == max(1, min(torch.get_num_threads(), count // max(1, least)))
        lengths = [stop - start for _, start, stop in parts]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.usefixtures("any_way")
def test_parts_run_at_the_same_time():
    meeting = threading.Barrier(3)
    with torch_threads(3):
        places = threads.in_parallel(lambda *_: meeting.wait(timeout=30), 3, least=1)
    assert sorted(places) == [0, 1, 2]


@pytest.mark.usefixtures("any_way")
def test_results_are_in_order_whichever_ends_first():
    def slowest_first(part, *_):
        time.sleep(0.05 * (2 - part))
        return part

    with torch_threads(3):
        assert threads.in_parallel(slowest_first, 3, least=1) == [0, 1, 2]


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("broken", [{0}, {1}, {2}, {0, 2}, {0, 1, 2}])
def test_a_failure_is_raised_after_all_parts_have_ended(broken):
    ended = []

    def work(part, *_):
        if part in broken:
            raise ValueError(f"part {part}")
        time.sleep(0.05)
        ended.append(part)

    with torch_threads(3):
        with pytest.raises(ValueError, match="part") as raised:
            threads.in_parallel(work, 3, least=1)
        assert set(ended) == {0, 1, 2} - broken
        assert int(str(raised.value)[-1]) in broken
        assert threads.in_parallel(lambda part, *_: part, 3, least=1) == [0, 1, 2]


# Large enough for two threads in each kernel. Only NumPy makes and compares them: in a forked child torch's own
# threads may hang.
@functools.cache
def large_case() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    corner, size = random.random((2, 70_030, 2), np.float32) * 200
    every = np.concatenate((corner, corner + size), axis=1)
    return {
        "logits": random.normal(size=(7000, 80)).astype(np.float32),
        "classes": random.integers(-3, 80, 7000),
        "weight": random.integers(0, 3, 7000).astype(np.float32),
        "anchors": every[30:],
        "boxes": every[:30].reshape(3, 10, 4),
        "ignored": random.random((3, 10)) < 0.3,
        "scores": random.random(300, np.float32).round(1),
        "labels": random.integers(0, 2, 300),
    }


def answers() -> dict[str, str]:
    """Digests of what each kernel returns for one case."""
    case = {name: torch.from_numpy(array) for name, array in large_case().items()}
    found = {
        "focal": focal.focal_sum(case["logits"], case["classes"], case["weight"], 0.25, 0.75, 2.0, True),
        "match": matching.match(case["anchors"], case["boxes"], case["ignored"], 0.5, 0.4, True, 0.5),
        "select": selection.select([case["logits"], case["logits"][:2]], [1.0, 0.0], 1000),
        "nms": [nms_kernel.nms(case["anchors"][:300], case["scores"], case["labels"], 0.5, None)],
    }
    return {
        name: hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
        for name, tensors in found.items()
    }


def answers_of_two_threads() -> dict[str, str]:
    with torch_threads(2):
        return answers()


@pytest.fixture
def expected_answers() -> dict[str, str]:
    """Those of one thread; torch's team and the kernels' own pool have threads from now on."""
    answers_of_two_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "_openmp", lambda: None)
        answers_of_two_threads()
    assert threads._pool is not None
    with torch_threads(1):
        return answers()


def test_the_answers_are_right(expected_answers):
    case = {name: torch.from_numpy(array) for name, array in large_case().items()}
    focal_case = case["logits"], case["classes"], case["weight"]
    check_focal(*focal_case)
    check_match(case["anchors"], case["boxes"], case["ignored"], low_quality=True)
    check_nms(case["anchors"][:300], case["scores"], case["labels"])
    assert answers_of_two_threads() == expected_answers


@pytest.mark.usefixtures("any_way")
def test_python_threads_may_call_kernels_at_once(expected_answers):
    start = threading.Barrier(4)

    def call(_):
        start.wait(timeout=30)
        return [answers() for _ in range(5)]

    with torch_threads(3), ThreadPoolExecutor(4) as pool:
        for found in pool.map(call, range(4)):
            assert found == [expected_answers] * 5


# ---------------------------------------------------------------------------------- processes

# Python says so from 3.12 on; that it does work is what is tested.
may_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
start_methods = pytest.mark.parametrize(
    "method", sorted({"fork", "spawn"} & set(multiprocessing.get_all_start_methods()))
)
SECONDS = 120  # for a child to start and answer


def send_answers(pipe) -> None:
    pipe.send(answers_of_two_threads())


def answers_of_child(method: str, target=send_answers) -> dict[str, str]:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs,))
    child.start()
    try:
        assert ours.poll(SECONDS), "the child hangs"
        found = ours.recv()
        child.join(SECONDS)
        assert child.exitcode == 0
        return found
    finally:
        child.kill()
        child.join()


@may_fork
@start_methods
def test_a_child_process(method, expected_answers):
    assert answers_of_child(method) == expected_answers


@may_fork
@needs_fork
def test_a_child_that_is_forked_while_kernels_run(expected_answers):
    stop = threading.Event()

    def keep_calling():
        while not stop.is_set():
            answers_of_two_threads()

    caller = threading.Thread(target=keep_calling)
    caller.start()
    try:
        assert answers_of_child("fork") == expected_answers
    finally:
        stop.set()
        caller.join()


@may_fork
@needs_fork
@pytest.mark.parametrize("module", [threads, memory])
def test_a_lock_that_another_thread_holds_does_not_stop_a_forked_child(module, expected_answers):
    held, release = threading.Event(), threading.Event()

    def hold():
        with module._lock:
            held.set()
            release.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        assert answers_of_child("fork") == expected_answers
    finally:
        release.set()
        holder.join()


class Answers(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> dict[str, str]:
        return answers_of_two_threads()


@may_fork
@start_methods
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than the machine has cores
def test_workers_of_a_data_loader(method, expected_answers):
    workers = {"fork": 2, "spawn": 1}[method]  # to import all this takes a while
    loader = DataLoader(
        Answers(), batch_size=None, num_workers=workers, multiprocessing_context=method, timeout=SECONDS
    )
    assert [*loader] == [expected_answers] * 4


# ---------------------------------------------------------------------------------- numba's cache


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


VALUES = np.array([3.0, 1.0, 2.0], np.float32)


def smallest():
    """A kernel as a new process has it: nothing of it is compiled or loaded yet."""
    return compiled()(selection._smallest.py_func)


def came_from_disk(kernel) -> bool:
    assert kernel(VALUES) == 1
    return sum(kernel.stats.cache_hits.values()) == 1


def test_machine_code_is_kept_on_disk(cache_folder):
    assert not came_from_disk(smallest())
    assert {file.suffix for file in cache_folder.rglob("*.*")} == {".nbi", ".nbc"}
    assert came_from_disk(smallest())


@pytest.mark.parametrize("content", [b"", b"half", b"10", b"noise"])
@pytest.mark.parametrize("kinds", [[".nbi"], [".nbc"], [".nbi", ".nbc"]])
def test_a_spoilt_file_is_replaced(kinds, content, cache_folder):
    came_from_disk(smallest())
    for file in [file for file in cache_folder.rglob("*.*") if file.suffix in kinds]:
        whole = file.read_bytes()
        spoilt = {b"half": whole[: len(whole) // 2], b"10": whole[:10], b"noise": b"\x80\x04noise" * 100}
        file.write_bytes(spoilt.get(content, content))
    assert not came_from_disk(smallest())
    assert came_from_disk(smallest())


def test_a_missing_file_is_replaced(cache_folder):
    came_from_disk(smallest())
    for file in cache_folder.rglob("*.nbc"):
        file.unlink()
    assert not came_from_disk(smallest())
    assert came_from_disk(smallest())


def test_other_sources_are_another_key(cache_folder, monkeypatch):
    came_from_disk(smallest())
    module = sys.modules[compiled.__module__]
    monkeypatch.setattr(module, "SOURCES", "0" * 64)
    assert not came_from_disk(smallest())
    assert came_from_disk(smallest())
    monkeypatch.undo()


def test_sources_are_those_of_all_kernels_and_of_the_states(monkeypatch):
    module = sys.modules[compiled.__module__]
    read = []
    read_bytes = module.Path.read_bytes
    monkeypatch.setattr(module.Path, "read_bytes", lambda file: read.append(file.name) or read_bytes(file))
    assert module._digest_of_sources() == module.SOURCES
    assert {"focal.py", "matching.py", "nms.py", "selection.py", "values.py", "compiled.py"} <= set(read)
    assert inspect.getsourcefile(MatchState).endswith(read[-1])
    monkeypatch.setattr(module.Path, "read_bytes", lambda file: b"other")
    assert module._digest_of_sources() != module.SOURCES


def raise_(error: Exception):
    def call(*_, **__):
        raise error

    return call


@pytest.mark.usefixtures("cache_folder")
@pytest.mark.parametrize("place", [(FunctionCache, "save_overload"), (IndexDataCacheFile, "_save_data")])
def test_a_full_disk_stops_no_call(place, monkeypatch):
    monkeypatch.setattr(*place, raise_(OSError(28, "No space left on device")))
    assert not came_from_disk(smallest())
    monkeypatch.undo()


def test_a_spoilt_file_on_a_full_disk_stops_no_call(cache_folder, monkeypatch):
    came_from_disk(smallest())
    for file in cache_folder.rglob("*.nbi"):
        file.write_bytes(b"")
    monkeypatch.setattr(IndexDataCacheFile, "_save_index", raise_(OSError(28, "No space left on device")))
    assert not came_from_disk(smallest())


def test_a_failure_to_load_stops_no_call(cache_folder, monkeypatch):
    came_from_disk(smallest())
    monkeypatch.setattr(FunctionCache, "load_overload", raise_(ValueError("bytes of another kind")))
    assert not came_from_disk(smallest())


def test_without_a_place_for_files_kernels_are_compiled_all_the_same(monkeypatch):
    monkeypatch.setattr(FunctionCache, "__init__", raise_(RuntimeError("no locator available")))
    assert not came_from_disk(smallest())


def test_a_process_with_spoilt_files_in_its_cache(cache_folder):
    assert not came_from_disk(smallest())
    files = [*cache_folder.rglob("*.nbi"), *cache_folder.rglob("*.nbc")]
    assert len(files) == 2
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
    script = """
import numpy as np
from retinanet.kernels.cpu.selection import _smallest
print(_smallest(np.array([3, 1, 2], np.float32)))
"""
    assert run_python(script, NUMBA_CACHE_DIR=str(cache_folder)).stdout == "1.0\n"
    assert came_from_disk(smallest())  # from what the other process has left


# ---------------------------------------------------------------------------------- without numba


def everything(case: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Call every function that has a fast path, and each twice. Another process runs this source text."""
    import torch

    from retinanet.batches import RawPredictions
    from retinanet.boxes import BoxCoding, nms
    from retinanet.inference import post_process
    from retinanet.losses import sigmoid_focal_loss
    from retinanet.matching import match_anchors
    from retinanet.model import PostProcessing

    logits, deltas, boxes = case["logits"], case["deltas"], case["boxes"]
    found = {"loss": [], "match": [], "nms": [], "post_process": []}
    for reduction in ("none", "sum", "mean"):
        leaf = logits.clone().requires_grad_()
        loss = sigmoid_focal_loss(leaf, case["classes"], reduction=reduction, weight=case["weight"])
        loss.sum().backward()
        found["loss"] += [loss.detach(), leaf.grad]
    for low_quality in (False, True):
        matches = match_anchors(case["anchors"], boxes, case["ignored"], low_quality=low_quality)
        found["match"] += [matches.state, matches.index]
    for most in (None, 5):
        found["nms"].append(nms(boxes[0], case["scores"], case["labels"], 0.4, max_kept=most))
    for dtype in (torch.float32, torch.bfloat16):
        raw = RawPredictions((logits.to(dtype),), (deltas,), ((10, 30),))
        for one in post_process(
            raw, [case["anchors"]], [(200, 200)] * 2, coding=BoxCoding(), options=PostProcessing(top_k=50)
        ):
            found["post_process"] += [one.boxes, one.scores, one.labels]
    return found


SCRIPT = f"""
import sys

sys.modules["numba"] = None
import torch
from torch import Tensor

{inspect.getsource(everything)}

torch.save(everything(torch.load(sys.argv[1])), sys.argv[2])
assert not any(name.startswith("retinanet.kernels.cpu.") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def without_numba(tmp_path_factory):
    """What `everything` returns with numba and without, and what the process without it wrote to stderr."""
    generator = seeded(0)
    case = {
        "logits": torch.randint(-8, 5, (2, 300, 4), generator=generator) / 2,
        "deltas": torch.randint(-2, 3, (2, 300, 4), generator=generator) / 4,
        "classes": torch.randint(-2, 4, (2, 300), generator=generator),
        "weight": torch.randint(0, 3, (2, 300), generator=generator).float(),
        "anchors": random_boxes(300, seed=1),
        "boxes": random_boxes(2, 40, seed=2),
        "ignored": random_mask(2, 40, seed=3),
        "scores": torch.rand(40, generator=generator),
        "labels": torch.randint(0, 3, (40,), generator=generator),
    }
    folder = tmp_path_factory.mktemp("without_numba")
    torch.save(case, folder / "case.pt")
    run = run_python(SCRIPT, folder / "case.pt", folder / "found.pt")
    return everything(case), torch.load(folder / "found.pt"), run.stderr


@pytest.mark.parametrize("name", ["match", "nms", "post_process"])
def test_results_without_numba_are_the_same(name, without_numba):
    with_numba, others, _ = without_numba
    assert len(with_numba[name]) == len(others[name]) > 0
    assert all(tensor.numel() for tensor in others[name])
    assert all(map(torch.equal, with_numba[name], others[name]))


def test_losses_without_numba_are_the_same(without_numba):
    with_numba, others, _ = without_numba
    for ours, plain in zip(with_numba["loss"], others["loss"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-9)


def test_one_line_says_that_numba_is_missing(without_numba):
    (line,) = without_numba[2].splitlines()
    assert line == kernels.MISSING
    assert "pip install numba" in line


def test_nms_without_numba_is_the_plain_one(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda device_type: False)
    monkeypatch.setattr(boxes_module, "plain_nms", lambda *_: torch.tensor([7]))
    assert nms(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1).long(), 0.5).tolist() == [7]
