"""The focal loss on a CPU: equal to the formula in float64, an operator as torch wants it, the same on any threads."""

import functools
import math
from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from kernel_cases import seeded, torch_threads
from retinanet import kernels
from retinanet.errors import ConfigError
from retinanet.kernels.cpu import focal
from retinanet.losses import sigmoid_focal_loss, sigmoid_varifocal_loss
from retinanet.model.heads import Head
from retinanet.model.spec import HeadSpec

NAN, INF = math.nan, math.inf
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
ALPHAS = (None, 0.25, 0.0, 1.0)


# ---------------------------------------------------------------------------------- values


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


# ---------------------------------------------------------------------------------- an operator of torch's


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


def test_the_kept_gradient_is_a_constant_to_autograd():
    logits, indices = focal_case(5, 3, seed=7)
    total, gradient = kernels._focal_sum(logits.requires_grad_(), indices, None, 0.25, 0.75, 2.0, True)
    assert total.requires_grad
    assert not gradient.requires_grad


def test_no_second_derivative():
    logits, indices = focal_case(5, 3, seed=7)
    loss = sigmoid_focal_loss(logits.requires_grad_(), indices, reduction="sum")
    with pytest.raises(RuntimeError, match="no second derivative; use reduction='none'"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("factor", [1.0, 0.5, 2.0, -3.0])
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


def test_a_scaled_gradient_may_be_asked_for_again():
    logits, indices = focal_case(50, 3, seed=9)
    _, slope = fused(logits, indices)
    loss = 0.5 * sigmoid_focal_loss(logits.requires_grad_(), indices, reduction="sum")
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(logits.grad, slope)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


def test_a_loss_that_gets_no_gradient_hands_none_on():
    logits, indices = focal_case(5, 3, seed=7)
    loss = sigmoid_focal_loss(logits.requires_grad_(), indices, reduction="sum")
    NoGradient.apply(loss).backward()
    assert logits.grad is None


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


# ---------------------------------------------------------------------------------- the varifocal loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", weightings(1))
@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_varifocal_is_the_plain_form_in_float64(gamma, kind, reduction, dtype):
    logits, indices = focal_case(1003, 3, seed=14)
    logits, weight = logits.to(dtype), weightings(1003)[kind]
    quality = torch.rand(1003, generator=seeded(15))
    quality[:100] = torch.tensor([0.0, 1.0]).repeat(50)
    x, exactly = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = sigmoid_varifocal_loss(x, indices, quality, 0.3, gamma, reduction, weight=weight)
    found.backward()
    weight = None if weight is None else weight.double()
    each = sigmoid_varifocal_loss(exactly, indices, quality.double(), 0.3, gamma, weight=weight)
    (each.sum() if reduction == "sum" else each.mean()).backward()
    total = each.detach().sum() if reduction == "sum" else each.detach().mean()
    torch.testing.assert_close(found.detach().double(), total, rtol=2e-6, atol=1e-37)
    # Near p = q the slope q (p - q) is a difference of nearly equal numbers.
    near = 1e-7 * exactly.grad.abs().max().item()
    torch.testing.assert_close(x.grad.double(), exactly.grad, rtol=rounding(dtype, gamma), atol=near)


def test_varifocal_does_not_look_at_rows_of_weight_0_nor_at_the_quality_of_what_is_no_object():
    logits, indices = focal_case(50, 3, seed=16)
    quality, weight = torch.rand(50), weightings(50)["with zeros"]
    expected = sigmoid_varifocal_loss(logits, indices, quality, reduction="sum", weight=weight)
    quality[indices < 0] = NAN
    x = torch.where(weight[:, None] == 0, NAN, logits).requires_grad_()
    found = sigmoid_varifocal_loss(x, indices, quality, reduction="sum", weight=weight)
    found.backward()
    torch.testing.assert_close(found.detach(), expected)
    assert x.grad.isfinite().all()
    assert x.grad[weight == 0].abs().max() == 0


def test_varifocal_hides_no_nan():
    logits, indices = torch.zeros(2, 3), torch.tensor([1, -1])
    bad = torch.full((2,), NAN)
    assert sigmoid_varifocal_loss(logits, indices, bad, reduction="sum").isnan()
    logits[0, 1] = NAN
    assert sigmoid_varifocal_loss(logits, indices, bad * 0 + 0.5, reduction="sum").isnan()


@looks_at_grad
def test_torch_compile_of_varifocal():
    logits, indices = focal_case(50, 3, seed=12)
    quality, weight = torch.rand(50), weightings(50)["with zeros"]
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    torch.compiler.reset()
    loss_of = functools.partial(sigmoid_varifocal_loss, reduction="sum")
    loss = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(found, indices, quality, weight=weight)
    loss.backward()
    other = loss_of(expected, indices, quality, weight=weight)
    other.backward()
    torch.testing.assert_close((loss.detach(), found.grad), (other.detach(), expected.grad))


@looks_at_grad
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_its_promises_with_a_quality(dtype):
    logits, indices = focal_case(20, 3, seed=13)
    quality = torch.rand(20, generator=seeded(13))
    arguments = (logits.to(dtype).requires_grad_(), indices, None, 0.25, 0.75, 2.0, True, quality)
    torch.library.opcheck(torch.ops.retinanet.focal_sum.default, arguments)
