"""The Triton kernels against float64 and the plain matcher: on a CUDA device, or else in Triton's interpreter.

Whether triton interprets is settled for a whole process when it is imported. So where there is no device, the checks
below skip, and `test_in_the_interpreter` runs them all in another process, on small CPU tensors.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from retinanet.anchors import AnchorSpec, anchors_of_image
from retinanet.batches import MatchState
from retinanet.boxes import iou, pairwise
from retinanet.errors import ConfigError
from retinanet.kernels.cuda import focal, matching
from retinanet.kernels.cuda.focal import focal_sum
from retinanet.kernels.cuda.matching import match
from retinanet.matching import plain_match_anchors

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

executed = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device, or TRITON_INTERPRET=1"
)
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

GAMMAS = (0.0, 0.5, 2.0, 5.0)
# The device's exp and division are good to a few last places; the error of exp grows with its argument.
EXACT = 4e-7 if INTERPRETED else 1e-5


@pytest.mark.slow
@compiled
def test_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).resolve())],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    if run.returncode != 0 or " passed" not in run.stdout:
        pytest.fail(f"in Triton's interpreter:\n{run.stdout}{run.stderr}", pytrace=False)


# ---------------------------------------------------------------------------------- focal loss


def exact(logits, classes, weight, of_positive, of_negative, gamma) -> tuple[Tensor, Tensor]:
    """Sum and gradient of the formula in float64."""
    x = logits.detach().cpu().double().requires_grad_()
    positive = classes.cpu()[:, None] == torch.arange(x.shape[1])
    x_t = torch.where(positive, x, -x)
    loss = torch.where(positive, of_positive, of_negative) * -logsigmoid(x_t)
    loss = loss * torch.exp(gamma * logsigmoid(-x_t))
    if weight is not None:
        loss = loss * weight.cpu().double()[:, None]
    total = loss.sum()
    total.backward()
    return total.detach(), x.grad


def check_focal(logits, classes, weight=None, alpha=(0.25, 0.75), gamma=2.0, *, rtol=1e-5, atol=1e-9):
    logits, classes = logits.to(DEVICE), classes.to(DEVICE)
    weight = None if weight is None else weight.to(DEVICE)
    expected, slope = exact(logits, classes, weight, *alpha, gamma)
    total, gradient = focal_sum(logits, classes, weight, *alpha, gamma, True)
    assert total.dtype == torch.float32
    assert total.shape == ()
    assert gradient.dtype == logits.dtype
    torch.testing.assert_close(total.cpu().double(), expected, rtol=2e-6, atol=1e-37)
    torch.testing.assert_close(gradient.cpu().double(), slope, rtol=rtol, atol=atol)
    alone, nothing = focal_sum(logits, classes, weight, *alpha, gamma, False)
    assert torch.equal(alone, total)
    assert nothing.shape == (0,)


def focal_case(rows: int, classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator) * 4
    indices = torch.randint(-2, classes, (rows,), generator=generator)
    weight = torch.rand(rows, generator=generator) * 2
    weight[::3] = 0
    return logits, indices, weight


@executed
@pytest.mark.parametrize("alpha", [(1.0, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("classes", [1, 3, 80, 91])
def test_focal_sum(classes, gamma, alpha):
    # Several blocks, the last one short; with 91 classes blocks begin within rows.
    logits, indices, weight = focal_case(3 * focal.BLOCK // classes + 5, classes, seed=classes)
    check_focal(logits, indices, weight, alpha, gamma)
    check_focal(logits[:50], indices[:50], None, alpha, gamma)


@executed
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    # A unit of the last place, for the interpreter truncates to bfloat16; below atol float16 is subnormal.
    [(torch.bfloat16, 2**-7, 1e-9), (torch.float16, 2**-10, 1e-7)],
)
def test_focal_sum_of_half_precision(dtype, rtol, atol, gamma):
    logits, indices, weight = focal_case(60, 80, seed=0)
    check_focal(logits.to(dtype), indices, weight, gamma=gamma, rtol=rtol, atol=atol)


@executed
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("index", [-1, 0])
def test_each_logit_alone(gamma, index):
    # One at a time: in a sum the hard examples would hide what the easy ones lose.
    for x in (0.0, 1e-6, 0.01, 0.3, 0.7, 1.0, 2.0, 4.6, 9.0, 16.0, 17.5):
        for logit in (torch.tensor([[x]]), torch.tensor([[-x]])):
            indices = torch.tensor([index])
            expected, slope = exact(logit, indices, None, 1.0, 1.0, gamma)
            total, gradient = focal_sum(logit.to(DEVICE), indices.to(DEVICE), None, 1.0, 1.0, gamma, True)
            rtol = EXACT + gamma * x * 1e-7  # what float32 leaves of exp(-gamma x)
            torch.testing.assert_close(total.cpu().double(), expected, rtol=rtol, atol=1e-37)
            torch.testing.assert_close(gradient.cpu().double(), slope, rtol=rtol, atol=1e-37)


@executed
@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's: gamma * 3e38, and exp(-inf) is 0
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("index", [-1, 0])
@pytest.mark.parametrize("x", [88.0, 100.0, 1e4, 3e38, -88.0, -100.0, -1e4, -3e38])
def test_extreme_logits(x, index, gamma):
    check_focal(torch.tensor([[x]]), torch.tensor([index]), gamma=gamma)


@executed
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_of_weight_0(bad, gamma):
    logits, indices, weight = focal_case(9, 5, seed=1)
    spoilt = torch.where(weight[:, None] == 0, bad, logits)
    clean = [t.to(DEVICE) for t in (logits, indices, weight)]
    total, gradient = focal_sum(spoilt.to(DEVICE), *clean[1:], 0.25, 0.75, gamma, True)
    expected, slope = focal_sum(*clean, 0.25, 0.75, gamma, True)
    assert torch.equal(total, expected)
    assert torch.equal(gradient, slope)
    assert gradient[0].abs().max() == 0
    assert gradient[1].abs().min() > 0


@executed
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("index", [-1, 2])
def test_a_nan_is_not_hidden(index, gamma):
    logits = torch.zeros(4, 3, device=DEVICE)
    logits[2, 2] = float("nan")
    indices = torch.full((4,), index, device=DEVICE)
    total, gradient = focal_sum(logits, indices, None, 0.25, 0.75, gamma, True)
    assert total.isnan()
    assert gradient.isnan().nonzero().tolist() == [[2, 2]]


@executed
def test_a_class_beyond_the_last_is_no_object():
    logits, indices, weight = (t.to(DEVICE) for t in focal_case(40, 7, seed=2))
    for beyond in (7, 8, 10**12):
        strange = torch.where(indices < 0, beyond, indices)
        found, expected = (focal_sum(logits, c, weight, 0.25, 0.75, 2.0, True) for c in (strange, indices))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@executed
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_no_logits(shape):
    logits = torch.zeros(shape, device=DEVICE)
    indices = torch.full(shape[:1], -1, device=DEVICE)
    total, gradient = focal_sum(logits, indices, None, 0.25, 0.75, 2.0, True)
    assert total.item() == 0
    assert gradient.shape == shape
    assert focal_sum(logits, indices, None, 0.25, 0.75, 2.0, False)[1].shape == (0,)


@executed
def test_vectors_need_not_be_contiguous():
    logits, indices, weight = (t.to(DEVICE) for t in focal_case(40, 7, seed=3))
    found = focal_sum(
        logits, indices.repeat_interleave(2)[::2], weight.repeat_interleave(3)[::3], 0.25, 0.75, 2.0, True
    )
    expected = focal_sum(logits, indices, weight, 0.25, 0.75, 2.0, True)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@executed
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one order anyway")
def test_every_run_gives_the_same_bits():
    case = [t.to(DEVICE) for t in focal_case(20_000, 80, seed=4)]
    first, *others = (focal_sum(*case, 0.25, 0.75, 2.0, True) for _ in range(5))
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


@executed
@pytest.mark.skipif(INTERPRETED, reason="more than 2^31 logits are too many for the interpreter")
def test_more_logits_than_int32_counts():
    rows, classes = 2**21 + 50, 1024
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free device memory")
    tail, indices, weight = focal_case(50, classes, seed=5)
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device=DEVICE)
    logits[-50:] = tail.to(logits)
    all_weights = torch.zeros(rows, device=DEVICE)
    all_weights[-50:] = weight.to(DEVICE)
    all_indices = torch.full((rows,), -1, device=DEVICE)
    all_indices[-50:] = indices.to(DEVICE)
    total, gradient = focal_sum(logits, all_indices, all_weights, 0.25, 0.75, 2.0, True)
    expected, slope = exact(logits[-50:], indices, weight, 0.25, 0.75, 2.0)
    torch.testing.assert_close(total.cpu().double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient[-50:].cpu().double(), slope, rtol=2**-7, atol=1e-9)
    assert gradient[:-50].count_nonzero() == 0


LOGITS, INDICES, WEIGHT = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.ones(2)


@pytest.mark.parametrize(
    ("logits", "indices", "weight", "message"),
    [
        (LOGITS.double(), INDICES, None, r"contiguous logits \[N, K\] of float32, .* got torch\.float64"),
        (LOGITS[:, :2], INDICES, None, r"shape \[2, 2\] and strides \[3, 1\]"),
        (LOGITS[0], INDICES, None, r"shape \[3\]"),
        (LOGITS, INDICES[:1], None, r"int64 classes of shape \[2\]; got torch\.int64 of \[1\]"),
        (LOGITS, INDICES.int(), None, r"int64 classes of shape \[2\]; got torch\.int32 of \[2\]"),
        (LOGITS, INDICES, WEIGHT[:1], r"float32 weight of shape \[2\]; got torch\.float32 of \[1\]"),
        (LOGITS, INDICES, WEIGHT.double(), r"float32 weight of shape \[2\]; got torch\.float64 of \[2\]"),
    ],
)
def test_errors_of_focal_sum(logits, indices, weight, message):
    with pytest.raises(ConfigError, match=f"focal_sum needs .*{message}"):
        focal_sum(logits, indices, weight, 0.25, 0.75, 2.0, True)


# ---------------------------------------------------------------------------------- matching


def check_match(
    anchors,
    boxes,
    ignored=None,
    positive_iou=0.5,
    negative_iou=0.4,
    low_quality=False,
    ignored_overlap=0.5,
) -> Tensor:
    """The kernel's state and index must be those of the plain matcher, image by image; return the states."""
    state, index = match(
        anchors.to(DEVICE),
        boxes.to(DEVICE),
        None if ignored is None else ignored.to(DEVICE),
        positive_iou,
        negative_iou,
        low_quality,
        ignored_overlap,
    )
    assert (state.dtype, index.dtype) == (torch.int8, torch.int64)
    assert state.shape == index.shape == (len(boxes), len(anchors))
    for i in range(len(boxes)):
        expected = plain_match_anchors(
            anchors,
            boxes[i],
            None if ignored is None else ignored[i],
            positive_iou=positive_iou,
            negative_iou=negative_iou,
            low_quality=low_quality,
            ignored_overlap=ignored_overlap,
        )
        assert torch.equal(state[i].cpu(), expected.state)
        assert torch.equal(index[i].cpu(), expected.index)
    return state.cpu()


def random_boxes(*shape: int, seed: int, extent: float = 240.0) -> Tensor:
    corner, size = torch.rand(2, *shape, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat((corner * extent, corner * extent + 8 + size * 80), dim=-1)


def random_mask(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.3


@executed
@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("with_ignored", [False, True])
def test_match(with_ignored, low_quality):
    images, rows, count = (3, 300, 9) if INTERPRETED else (8, 100_003, 60)
    anchors, boxes = random_boxes(rows, seed=0), random_boxes(images, count, seed=1)
    boxes[0, count // 2 :] = 0  # padding
    boxes[-1] = 0
    ignored = random_mask(images, count, seed=2) if with_ignored else None
    state = check_match(anchors, boxes, ignored, low_quality=low_quality)
    assert state[:-1].unique().tolist() == sorted(MatchState)  # nothing of this is vacuous
    assert state[-1].unique().tolist() == [MatchState.NEGATIVE]


@executed
@pytest.mark.parametrize("low_quality", [False, True])
def test_match_on_the_anchors_of_an_image(low_quality):
    side = 64 if INTERPRETED else 1024
    anchors = torch.cat(anchors_of_image(AnchorSpec(), side, side))
    boxes = random_boxes(2, 6, seed=3, extent=side * 0.9)
    boxes[0, 2] = boxes[0, 1]
    boxes[1, 3] = torch.tensor([2e4, 2e4, 3e4, 3e4])  # meets no anchor
    boxes[1, 4] = anchors[100]
    check_match(anchors, boxes, torch.tensor([[False] * 6, [True] + [False] * 5]), low_quality=low_quality)


@executed
@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize(
    "thresholds", [(0.5, 0.4), (0.5, 0.5), (0.5, 0.25), (1.0, 0.0), (0.0, 0.0), (1 / 3, 0.2)]
)
def test_ties(thresholds, low_quality):
    # Corners on a grid of 5 x 5: equal IoUs, equal boxes, IoUs on the thresholds, empty boxes, boxes inside out.
    generator = torch.Generator().manual_seed(4)
    anchors = torch.randint(0, 5, (200, 4), generator=generator).float()
    boxes = torch.randint(0, 5, (2, 10, 4), generator=generator).float()
    for ignored in (None, random_mask(2, 10, seed=5)):
        check_match(anchors, boxes, ignored, *thresholds, low_quality=low_quality)


@executed
@pytest.mark.parametrize("seed", range(5))
def test_a_threshold_that_is_an_iou(seed):
    # An IoU of another rounding would fall below the threshold, or miss the best of the box, somewhere here.
    anchors, boxes = random_boxes(128, seed=seed), random_boxes(1, 4, seed=seed + 100)
    overlaps = pairwise(iou, anchors, boxes[0])
    for threshold in overlaps[overlaps > 0.3].sort().values[::2].tolist():
        state = check_match(anchors, boxes, None, threshold, threshold, low_quality=True)
        assert MatchState.POSITIVE in state


@executed
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_ignored_regions(share):
    anchors = torch.tensor([[0.0, 0, 4, 1], [6, 0, 14, 1], [6.1, 0, 14.1, 1], [0, 0, 100, 1], [0, 0, 10, 1]])
    anchors = torch.cat((anchors, random_boxes(150, seed=6, extent=30) - 20))
    boxes = torch.tensor([[[0.0, 0, 10, 1], [-9, -9, 15, 40], [2, 0, 3, 1]]])
    for ignored in ([True, False, False], [True, True, False], [True, True, True]):
        for low_quality in (False, True):
            check_match(
                anchors, boxes, torch.tensor([ignored]), low_quality=low_quality, ignored_overlap=share
            )


@executed
def test_inputs_need_not_be_contiguous():
    anchors, boxes = random_boxes(100, seed=7), random_boxes(2, 8, seed=8)
    ignored = random_mask(2, 8, seed=9)
    check_match(anchors[::2], boxes[:, ::2], ignored[:, ::2], low_quality=True)


@executed
@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("with_ignored", [False, True])
@pytest.mark.parametrize(("images", "rows", "count"), [(0, 5, 3), (2, 5, 0), (2, 0, 0), (0, 0, 0), (1, 1, 1)])
def test_nothing_to_match(images, rows, count, with_ignored, low_quality):
    ignored = torch.zeros(images, count, dtype=torch.bool) if with_ignored else None
    anchors, boxes = random_boxes(rows, seed=10), random_boxes(images, count, seed=11)
    check_match(anchors, boxes, ignored, low_quality=low_quality)


@executed
def test_boxes_without_anchors():  # which the plain matcher refuses
    for low_quality in (False, True):
        boxes = torch.zeros(2, 3, 4, device=DEVICE)
        state, index = match(torch.zeros(0, 4, device=DEVICE), boxes, None, 0.5, 0.4, low_quality, 0.5)
        assert state.shape == index.shape == (2, 0)


ANCHORS, BOXES = torch.zeros(5, 4), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("anchors", "boxes", "ignored", "message"),
    [
        (ANCHORS, BOXES[0], None, r"anchors \[R, 4\] and boxes \[B, G, 4\]; got \[5, 4\] and \[3, 4\]"),
        (ANCHORS[:, :3], BOXES, None, r"got \[5, 3\] and \[2, 3, 4\]"),
        (ANCHORS.double(), BOXES, None, r"float32 anchors and boxes; got torch\.float64 and torch\.float32"),
        (ANCHORS, BOXES.half(), None, r"got torch\.float32 and torch\.float16"),
        (
            ANCHORS,
            BOXES,
            torch.zeros(2, 2, dtype=torch.bool),
            r"bool ignored of shape \[2, 3\]; got torch\.bool",
        ),
        (ANCHORS, BOXES, torch.zeros(2, 3), r"got torch\.float32 of \[2, 3\]"),
    ],
)
def test_errors_of_match(anchors, boxes, ignored, message):
    with pytest.raises(ConfigError, match=f"match needs .*{message}"):
        match(anchors, boxes, ignored, 0.5, 0.4, False, 0.5)


# ---------------------------------------------------------------------------------- compilation, which needs no device

TYPES = {
    "logits": "*fp32",
    "classes": "*i64",
    "weight": "*fp32",
    "partial": "*fp32",
    "gradient": "*fp32",
    "elements": "i64",
    "anchors": "*fp32",
    "boxes": "*fp32",
    "ignored": "*u1",
    "best_of_box": "*i32",
    "state": "*i64",
    "index": "*i64",
    "rows": "i32",
    "count": "i32",
}


def ptx_of(kernel, options, **constants) -> str:
    """Compile for a GPU that need not be there."""
    types = {name: "constexpr" if name in constants else TYPES.get(name, "fp32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]


@pytest.fixture
def compiler_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@compiled
@pytest.mark.usefixtures("compiler_cache")
@pytest.mark.parametrize("low_quality", [False, True])
def test_matching_compiles_to_ieee_arithmetic(low_quality):
    constants = {"POSITIVE_IOU_IS_0": False, "BLOCK": matching.BLOCK}
    if not low_quality:
        constants["best_of_box"] = None
    sources = [ptx_of(matching._match_kernel, matching.OPTIONS, **constants)]
    if low_quality:
        sources.append(ptx_of(matching._low_quality_kernel, matching.OPTIONS, BLOCK=matching.BLOCK))
    for source in sources:
        words = {word for word in source.split() if word.endswith(".f32") and word != ".f32"}
        arithmetic = {
            word for word in words if word.startswith(("add", "sub", "mul", "div", "fma", "mad", "rcp"))
        }
        # `.rn` on an addition or multiplication also forbids the assembler to fuse it.
        assert arithmetic == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}
        assert not any(".ftz" in word for word in words)


@compiled
@pytest.mark.usefixtures("compiler_cache")
@pytest.mark.parametrize(
    ("dtype", "gamma", "absent"),
    [
        ("*fp32", 2, {}),
        ("*bf16", 2, {"weight": None}),
        ("*fp16", None, {}),
        ("*bf16", None, {"gradient": None}),
        ("*fp32", 0, {"weight": None, "gradient": None}),
    ],
)
def test_the_focal_loss_compiles(dtype, gamma, absent, monkeypatch):
    monkeypatch.setitem(TYPES, "logits", dtype)
    monkeypatch.setitem(TYPES, "gradient", dtype)
    constants = {"CLASSES": 80, "GAMMA": gamma, "BLOCK": focal.BLOCK, **absent}
    source = ptx_of(focal._focal_kernel, focal.OPTIONS, **constants)
    assert "ex2.approx" in source
    # Atomic additions would come in another order each time.
    assert "atom.global" not in source
    assert "red.global" not in source
