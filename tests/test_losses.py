"""Losses: laws of the focal loss, the paper's figures and derivatives, extreme logits, torchvision."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from retinanet.errors import ConfigError
from retinanet.losses import giou_loss, l1, sigmoid_focal_loss, smooth_l1

GAMMAS = (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)
EXTREMES = torch.tensor([-1e4, -100.0, -30.0, -1.0, 0.0, 1.0, 30.0, 100.0, 1e4])


def logit(p: float) -> Tensor:
    return torch.tensor([math.log(p / (1 - p))], dtype=torch.float64)


def dense_of(indices: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class indices as a dense target; a negative index is a row of zeros."""
    return one_hot(indices.clamp(min=0), classes).to(dtype) * (indices >= 0)[..., None]


def random_case(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 20, 6, generator=generator, dtype=dtype) * 4
    return logits, torch.randint(-2, 6, (3, 20), generator=generator)


def literal(logits: Tensor, dense: Tensor, alpha: float | None, gamma: float) -> Tensor:
    """Eq. 5 in float64; the exponent's logarithm is taken so that nothing underflows before its time."""
    x_t = torch.where(dense == 1, logits.double(), -logits.double())
    alpha_t = 1.0 if alpha is None else torch.where(dense == 1, alpha, 1 - alpha)
    return -alpha_t * torch.exp(gamma * logsigmoid(-x_t)) * logsigmoid(x_t)


# ---------------------------------------------------------------------------------- laws


def test_gamma_0_without_alpha_is_cross_entropy():
    logits, indices = random_case(0)
    dense = dense_of(indices, 6)
    expected = binary_cross_entropy_with_logits(logits, dense, reduction="none")
    for targets in (indices, dense):
        torch.testing.assert_close(sigmoid_focal_loss(logits, targets, alpha=None, gamma=0), expected)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("y", [0.0, 1.0])
def test_ratio_to_cross_entropy(gamma, y):
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64)
    targets = torch.full_like(logits, y)
    p_t = torch.sigmoid(logits if y else -logits)
    ratio = sigmoid_focal_loss(logits, targets, None, gamma) / sigmoid_focal_loss(logits, targets, None, 0)
    torch.testing.assert_close(ratio, (1 - p_t) ** gamma)


@pytest.mark.parametrize(("alpha", "silent"), [(0.0, 1.0), (1.0, 0.0)])
def test_alpha_at_its_ends_silences_one_side(alpha, silent):
    logits = torch.linspace(-5, 5, 11)
    assert sigmoid_focal_loss(logits, torch.full_like(logits, silent), alpha).abs().max() == 0
    assert sigmoid_focal_loss(logits, torch.full_like(logits, 1 - silent), alpha).min() > 0


@pytest.mark.parametrize("alpha", [None, 0.25, 0.75])
def test_alpha_weighs_the_two_sides(alpha):
    logits = torch.tensor([1.5])
    for y, share in ((1.0, alpha), (0.0, None if alpha is None else 1 - alpha)):
        plain = sigmoid_focal_loss(logits, torch.tensor([y]), None)
        weighed = sigmoid_focal_loss(logits, torch.tensor([y]), alpha)
        torch.testing.assert_close(weighed, plain * (1 if share is None else share))


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_indices_equal_dense_targets(alpha, gamma, reduction):
    logits, indices = random_case(1, torch.float64)
    values, gradients = [], []
    for targets in (indices, dense_of(indices, 6, torch.float64)):
        leaf = logits.clone().requires_grad_()
        weight = torch.linspace(0, 2, 60, dtype=torch.float64).reshape(3, 20)
        value = sigmoid_focal_loss(leaf, targets, alpha, gamma, reduction, weight=weight)
        value.sum().backward()
        values.append(value.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


def test_weight():
    logits, indices = random_case(2)
    weight = torch.ones(3, 20)
    weight[1] = 0
    weight[2] = 3
    leaf = logits.clone().requires_grad_()
    loss = sigmoid_focal_loss(leaf, indices, weight=weight)
    plain = sigmoid_focal_loss(logits, indices)
    torch.testing.assert_close(loss.detach(), plain * weight[..., None])
    loss.sum().backward()
    assert leaf.grad[1].abs().max() == 0
    assert leaf.grad[0].abs().min() > 0


def test_reductions():
    logits, indices = random_case(3)
    each = sigmoid_focal_loss(logits, indices)
    assert each.shape == logits.shape
    torch.testing.assert_close(sigmoid_focal_loss(logits, indices, reduction="sum"), each.sum())
    torch.testing.assert_close(sigmoid_focal_loss(logits, indices, reduction="mean"), each.mean())


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows(shape):
    logits = torch.zeros(shape, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.zeros(shape[:-1], dtype=torch.int64), reduction="sum")
    loss.backward()
    assert loss.item() == 0


# ---------------------------------------------------------------------------------- the paper's figures


@pytest.mark.parametrize(
    ("p_t", "least", "most"),
    [
        (0.9, 99.9, 100.1),  # "100x lower loss compared with CE"
        (0.968, 950, 1050),  # "1000x lower"
        (0.5, 3.999, 4.001),  # "scaled down by at most 4x for p_t <= .5"
        (0.25, 1, 4),
        (0.01, 1, 4),
    ],
)
def test_gamma_2_against_cross_entropy(p_t, least, most):
    target = torch.ones(1, dtype=torch.float64)
    cross_entropy = sigmoid_focal_loss(logit(p_t), target, None, 0).item()
    assert cross_entropy == pytest.approx(-math.log(p_t))
    assert least <= cross_entropy / sigmoid_focal_loss(logit(p_t), target, None, 2).item() <= most


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("y", [-1, 1])
def test_derivative_of_the_paper(gamma, y):
    # Eq. 10: dFL/dx = y (1 - p_t)^gamma (gamma p_t log p_t + p_t - 1)
    x = torch.linspace(-8, 8, 33, dtype=torch.float64, requires_grad=True)
    sigmoid_focal_loss(x, torch.full_like(x, float(y > 0)).detach(), None, gamma, "sum").backward()
    p_t = torch.sigmoid(y * x.detach())
    expected = y * (1 - p_t) ** gamma * (gamma * p_t * p_t.log() + p_t - 1)
    torch.testing.assert_close(x.grad, expected)


# ---------------------------------------------------------------------------------- numbers at the edge


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["object", "background", "ones", "zeros", "soft"])
def test_extreme_logits(gamma, dtype, kind):
    leaf = EXTREMES.to(dtype)[:, None].requires_grad_()
    targets = {
        "object": torch.zeros(9, dtype=torch.int64),
        "background": torch.full((9,), -1),
        "ones": torch.ones(9, 1),
        "zeros": torch.zeros(9, 1),
        "soft": torch.full((9, 1), 0.3),
    }[kind]
    loss = sigmoid_focal_loss(leaf, targets, None, gamma)
    loss.sum().backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert leaf.grad.dtype == dtype
    assert loss.isfinite().all()
    assert leaf.grad.isfinite().all()
    if kind != "soft":
        dense = torch.full((9, 1), float(kind in ("object", "ones")))
        expected = literal(leaf.detach(), dense, None, gamma)
        torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-4, atol=1e-30)
        # A confident mistake keeps its full gradient, -y; whatever gamma is.
        wrong = 0 if dense[0, 0] else -1
        assert leaf.grad[wrong, 0].item() == pytest.approx(-1 if dense[0, 0] else 1, abs=1e-2)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("y", [0.0, 1.0])
def test_the_largest_logits(gamma, y):
    x = torch.tensor([[-1.6e38], [1.6e38]], requires_grad=True)  # twice that still is a number
    loss = sigmoid_focal_loss(x, torch.full((2, 1), y), None, gamma)
    loss.sum().backward()
    wrong = 0 if y else 1
    assert loss[:, 0].tolist() == pytest.approx([1.6e38 * (wrong == i) for i in range(2)])
    assert x.grad[:, 0].tolist() == pytest.approx([(wrong == i) * (1 - 2 * y) for i in range(2)])


@pytest.mark.parametrize("label", [-1, 0])
def test_a_small_weight_keeps_huge_losses_in_range(label):
    x = torch.full((2, 1), 3e38 if label < 0 else -3e38)
    total = sigmoid_focal_loss(x, torch.tensor([label, label]), None, 2, "sum", weight=torch.full((2,), 0.1))
    torch.testing.assert_close(total, torch.tensor(6e37))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["indices", "dense", "soft"])
def test_gradcheck(gamma, kind):
    logits, indices = random_case(4, torch.float64)
    logits, indices = logits[0, :6], indices[0, :6]
    dense = dense_of(indices, 6, torch.float64)
    targets = {"indices": indices, "dense": dense, "soft": dense * 0.8 + 0.1}[kind]
    assert torch.autograd.gradcheck(
        lambda x: sigmoid_focal_loss(x, targets, 0.25, gamma), logits.clone().requires_grad_()
    )


# ---------------------------------------------------------------------------------- torchvision


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("alpha", [0.25, 0.9, -1])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_equals_torchvision(reduction, alpha, gamma):
    logits, indices = random_case(5)
    for targets in (
        dense_of(indices, 6),
        torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)),
    ):
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        value = sigmoid_focal_loss(ours, targets, alpha, gamma, reduction)
        expected = torchvision_focal_loss(theirs, targets, alpha, gamma, reduction)
        torch.testing.assert_close(value, expected, rtol=2e-4, atol=1e-6)
        value.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-3, atol=2e-6)


# ---------------------------------------------------------------------------------- cost and errors


class Int64OfSize(TorchDispatchMode):
    """Fail as soon as an operation makes an int64 or boolean tensor of at least so many elements."""

    def __init__(self, elements):
        super().__init__()
        self.elements = elements

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype in (torch.int64, torch.bool):
                assert leaf.numel() < self.elements, f"{func} made {leaf.dtype} {list(leaf.shape)}"
        return result


def test_indices_never_become_one_hot():
    logits, indices = random_case(6)
    with Int64OfSize(logits.numel()):
        sigmoid_focal_loss(logits.requires_grad_(), indices, reduction="sum").backward()
    with pytest.raises(AssertionError), Int64OfSize(logits.numel()):
        one_hot(indices.clamp(min=0), 6)  # the guard itself works


ROWS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sigmoid_focal_loss(ROWS, ROWS, alpha=1.5), r"alpha in \[0, 1\] or None; got 1\.5"),
        (lambda: sigmoid_focal_loss(ROWS, ROWS, alpha=math.nan), "alpha in .* got nan"),
        (lambda: sigmoid_focal_loss(ROWS, ROWS, gamma=-1), "gamma >= 0; got -1"),
        (
            lambda: sigmoid_focal_loss(ROWS, ROWS[:1]),
            r"of shape \[2, 3\] or int64 class indices of shape \[2\]; got",
        ),
        (lambda: sigmoid_focal_loss(ROWS, ROWS.long()), r"got torch\.int64 of shape \[2, 3\]"),
        (lambda: sigmoid_focal_loss(ROWS, torch.zeros(2)), r"got torch\.float32 of shape \[2\]"),
        # Without the check this would broadcast to [2, 3, 3].
        (
            lambda: sigmoid_focal_loss(ROWS, ROWS, weight=ROWS),
            r"weight of shape \[2\], one a row of inputs; got \[2, 3\]",
        ),
        (lambda: sigmoid_focal_loss(ROWS, ROWS, weight=torch.ones(1)), r"weight of shape \[2\]"),
        (
            lambda: smooth_l1(torch.zeros(1, 4), torch.zeros(1, 4), -1.0),
            r"smooth_l1 needs beta >= 0; got -1\.0",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_an_unknown_reduction_is_an_error():
    # Under pytest the annotation speaks first; without it, our own message.
    with pytest.raises((ConfigError, TypeCheckError), match="reduction"):
        sigmoid_focal_loss(ROWS, ROWS, reduction="avg")


# ---------------------------------------------------------------------------------- box losses


@pytest.mark.parametrize(
    ("x", "beta", "loss"),
    [
        (0.5, 1.0, 0.5 * 0.25),  # below the switch: 0.5 x^2 / beta
        (-0.5, 1.0, 0.5 * 0.25),
        (1.0, 1.0, 0.5),  # at the switch both are the same
        (3.0, 1.0, 2.5),  # above: |x| - 0.5 beta
        (0.1, 1 / 9, 0.5 * 0.01 * 9),  # Detectron
        (0.5, 1 / 9, 0.5 - 1 / 18),
        (0.1, 0.0, 0.1),  # L1
        (0.0, 0.0, 0.0),
    ],
)
def test_smooth_l1(x, beta, loss):
    predicted = torch.tensor([[x, 0.0, 0.0, 0.0], [x, x, x, x]], dtype=torch.float64)
    expected = [loss, 4 * loss]  # summed over the four deltas
    assert smooth_l1(predicted, torch.zeros(2, 4, dtype=torch.float64), beta).tolist() == pytest.approx(
        expected
    )


def test_l1_and_the_slope_of_smooth_l1():
    predicted = torch.tensor([[0.05, -0.2, 2.0, -3.0]], requires_grad=True)
    assert l1(predicted, torch.zeros(1, 4)).item() == pytest.approx(5.25)
    smooth_l1(predicted, torch.zeros(1, 4), 0.1).sum().backward()
    assert predicted.grad[0].tolist() == pytest.approx([0.5, -1, 1, -1])  # x / beta, then sign(x)


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_gradcheck_of_smooth_l1(beta):
    generator = torch.Generator().manual_seed(2)
    predicted, target = torch.randn(2, 12, 4, generator=generator, dtype=torch.float64)
    difference = (predicted - target).abs()
    assert (difference < 1).any()  # both sides of the paper's switch
    assert (difference > 1).any()
    assert torch.autograd.gradcheck(
        lambda *boxes: smooth_l1(*boxes, beta), (predicted.requires_grad_(), target.requires_grad_())
    )


def test_gradcheck_of_l1_and_giou_loss():
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(2, 12, 2, generator=generator, dtype=torch.float64) * 3
    sides = 1 + torch.rand(2, 12, 2, generator=generator, dtype=torch.float64) * 3
    boxes = tuple(torch.cat((corners, corners + sides), dim=2).requires_grad_())
    for loss in (l1, giou_loss):
        assert torch.autograd.gradcheck(loss, boxes)


def test_giou_loss():
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 2, 2], [0.0, 0, 4, 4]])
    others = torch.tensor([[2.0, 0, 3, 1], [1.0, 0, 3, 2], [0.0, 0, 4, 4]])
    assert giou_loss(boxes, others).tolist() == pytest.approx([4 / 3, 2 / 3, 0])
    assert giou_loss(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    assert smooth_l1(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
