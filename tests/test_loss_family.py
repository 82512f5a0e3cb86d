"""The losses beside the focal loss: against NumPy, autograd and closed forms; ignored examples, normalisers, mining."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch.nn.functional import cross_entropy, one_hot

from retinanet.errors import ConfigError
from retinanet.losses import (
    balanced_sample,
    cross_entropy_derivative,
    focal_loss_derivative,
    focal_star_loss_derivative,
    hardest,
    hardest_one_to_three,
    inverse_frequency_alpha,
    sigmoid_balanced_cross_entropy,
    sigmoid_cross_entropy,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    sigmoid_hinge_loss,
    sigmoid_varifocal_loss,
    softmax_focal_loss,
)

CLASSES = 5
EXTREMES = (-1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4)


# ---------------------------------------------------------------------------------- a second opinion, in NumPy


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def np_cross_entropy(x, y):
    return -(y * log_sigmoid(x) + (1 - y) * log_sigmoid(-x))


def np_balanced(x, y, alpha=0.75):
    return np_cross_entropy(x, y) * (alpha * y + (1 - alpha) * (1 - y))


def np_focal(x, y, alpha=0.25, gamma=2.0):
    one_minus_p_t = np.exp(log_sigmoid(-x)) * y + np.exp(log_sigmoid(x)) * (1 - y)
    return np_balanced(x, y, alpha) * one_minus_p_t**gamma


def np_star(x, y, alpha=0.25, gamma=2.0, beta=1.0):
    of_object, of_background = (-log_sigmoid(gamma * x_t + beta) / gamma for x_t in (x, -x))
    return (y * of_object + (1 - y) * of_background) * (alpha * y + (1 - alpha) * (1 - y))


def np_hinge(x, y, margin=0.9, alpha=None):
    p = np.exp(log_sigmoid(x))
    loss = y * np.maximum(0, margin - p) + (1 - y) * np.maximum(0, margin - (1 - p))
    return loss if alpha is None else loss * (alpha * y + (1 - alpha) * (1 - y))


SIGMOID = {
    "cross entropy": (sigmoid_cross_entropy, np_cross_entropy),
    "balanced": (sigmoid_balanced_cross_entropy, np_balanced),
    "balanced .1": (
        partial(sigmoid_balanced_cross_entropy, alpha=0.1),
        partial(np_balanced, alpha=0.1),
    ),
    "focal": (sigmoid_focal_loss, np_focal),
    "focal .5": (partial(sigmoid_focal_loss, alpha=0.5, gamma=0.5), partial(np_focal, alpha=0.5, gamma=0.5)),
    "focal* (2, 1)": (sigmoid_focal_star_loss, np_star),
    "focal* (4, 0)": (
        partial(sigmoid_focal_star_loss, gamma=4, beta=0),
        partial(np_star, gamma=4, beta=0),
    ),
    "hinge": (sigmoid_hinge_loss, np_hinge),
    "hinge .5": (partial(sigmoid_hinge_loss, margin=0.5), partial(np_hinge, margin=0.5)),
    "hinge, alpha": (partial(sigmoid_hinge_loss, alpha=0.25), partial(np_hinge, alpha=0.25)),
}
both = pytest.mark.parametrize("loss", list(SIGMOID))


def case(seed=0, rows=40):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64) * 3
    return x, torch.randint(-2, CLASSES, (rows,), generator=generator)


def dense(indices, dtype=torch.float64):
    return one_hot(indices.clamp(min=0), CLASSES).to(dtype) * (indices >= 0)[:, None]


def wanted(kind, indices):
    """Targets as class indices, as zeros and ones, and as something between."""
    if kind == "indices":
        return indices
    return dense(indices) if kind == "hard" else dense(indices) * 0.7 + 0.1


@both
@pytest.mark.parametrize("kind", ["indices", "hard", "soft"])
def test_equals_numpy(loss, kind):
    ours, theirs = SIGMOID[loss]
    x, indices = case()
    y = dense(indices) if kind == "indices" else wanted(kind, indices)
    expected = theirs(x.numpy(), y.numpy())
    np.testing.assert_allclose(ours(x, wanted(kind, indices)).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(
        ours(x, wanted(kind, indices), reduction="sum").numpy(), expected.sum(), rtol=1e-12
    )
    np.testing.assert_allclose(
        ours(x, wanted(kind, indices), reduction="mean").numpy(), expected.mean(), rtol=1e-12
    )


@both
@pytest.mark.parametrize("kind", ["indices", "hard", "soft"])
def test_gradcheck(loss, kind):
    x, indices = case(rows=6)
    x[0, 0] = 1.7  # no logit sits on the hinge itself
    targets = wanted(kind, indices)
    assert torch.autograd.gradcheck(
        lambda logits: SIGMOID[loss][0](logits, targets), x.clone().requires_grad_()
    )
    assert torch.autograd.gradcheck(
        lambda logits: SIGMOID[loss][0](logits, targets, reduction="mean", normalizer="positives"),
        x.clone().requires_grad_(),
    )


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["object", "background", "soft"])
def test_extreme_logits(loss, dtype, kind):
    ours, theirs = SIGMOID[loss]
    x = torch.tensor(EXTREMES, dtype=dtype)[:, None].requires_grad_()
    y = torch.full((len(EXTREMES), 1), {"object": 1.0, "background": 0.0, "soft": 0.3}[kind])
    value = ours(x, y)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert x.grad.dtype == dtype
    assert value.isfinite().all()
    assert x.grad.isfinite().all()
    if kind != "soft":
        expected = theirs(x.detach().double().numpy(), y.double().numpy())
        np.testing.assert_allclose(value.detach().numpy(), expected, rtol=2e-4, atol=1e-7)


def test_gamma_1_beta_0_is_balanced_cross_entropy():
    x, indices = case(1)
    torch.testing.assert_close(
        sigmoid_focal_star_loss(x, indices, 0.4, gamma=1, beta=0),
        sigmoid_balanced_cross_entropy(x, indices, 0.4),
    )


def test_hinge_is_zero_above_its_margin_and_learns_little_from_what_is_far_off():
    x = torch.tensor([[-9.0], [0.0], [math.log(9) + 1e-3], [9.0]], requires_grad=True)
    value = sigmoid_hinge_loss(x, torch.ones(4, 1))
    value.sum().backward()
    assert value[:, 0].tolist() == pytest.approx([0.9, 0.4, 0, 0], abs=2e-4)
    assert x.grad[1, 0].item() == pytest.approx(-0.25)  # -p_t (1 - p_t)
    assert abs(x.grad[0, 0].item()) < 2e-4
    assert x.grad[2:].abs().max() == 0


# ---------------------------------------------------------------------------------- Appendix B


@pytest.mark.parametrize("y", [-1.0, 1.0])
@pytest.mark.parametrize(
    ("loss", "derivative"),
    [
        (sigmoid_cross_entropy, cross_entropy_derivative),
        *(
            (
                partial(sigmoid_focal_loss, alpha=None, gamma=gamma),
                partial(focal_loss_derivative, gamma=gamma),
            )
            for gamma in (0.0, 0.5, 2.0, 5.0)
        ),
        *(
            (
                partial(sigmoid_focal_star_loss, alpha=None, gamma=gamma, beta=beta),
                partial(focal_star_loss_derivative, gamma=gamma, beta=beta),
            )
            for gamma, beta in ((2.0, 1.0), (4.0, 0.0), (1.0, -2.0))
        ),
    ],
)
def test_closed_forms_equal_autograd(loss, derivative, y):
    x = torch.cat((torch.linspace(-12, 12, 97), torch.tensor([-1e3, -100.0, 100.0, 1e3]))).double()
    leaf = x.clone().requires_grad_()
    loss(leaf, torch.full_like(x, float(y > 0)), reduction="sum").backward()
    closed = derivative(x, torch.full_like(x, y))
    torch.testing.assert_close(closed, leaf.grad, rtol=1e-9, atol=1e-300)
    # Wrong beyond doubt: -y; right beyond doubt: nothing.
    assert closed[x * y < -50].tolist() == pytest.approx([-y] * 2)
    assert closed[x * y > 50].abs().max() < 1e-20


def test_derivatives_at_a_point_by_hand():
    x, y = torch.tensor([math.log(3.0)]), torch.ones(1)  # p_t = 3/4
    assert cross_entropy_derivative(x, y).item() == pytest.approx(-0.25)
    expected = 0.25**2 * (2 * 0.75 * math.log(0.75) + 0.75 - 1)
    assert focal_loss_derivative(x, y).item() == pytest.approx(expected)
    star = 1 / (1 + math.exp(-(2 * math.log(3.0) + 1)))
    assert focal_star_loss_derivative(x, y).item() == pytest.approx(star - 1)


# ---------------------------------------------------------------------------------- the quality of boxes


def np_varifocal(x, indices, quality, alpha=0.25, gamma=2.0):
    """Element by element, as Eq. 2 of VarifocalNet is read."""
    loss = np.empty_like(x)
    for row, k in np.ndindex(*x.shape):
        p, q = 1 / (1 + math.exp(-x[row, k])), quality[row]
        if k == indices[row]:
            loss[row, k] = -q * (q * math.log(p) + (1 - q) * math.log(1 - p))
        else:
            loss[row, k] = -(1 - alpha) * p**gamma * math.log(1 - p)
    return loss


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_varifocal_equals_numpy(alpha, gamma, dtype):
    x, indices = case()
    quality, weight = torch.rand(40), torch.rand(40).to(dtype)
    quality[indices < 0] = math.nan  # not looked at
    expected = np_varifocal(x.numpy(), indices.numpy(), quality.numpy(), alpha, gamma)
    call = partial(sigmoid_varifocal_loss, x.to(dtype), indices, quality.to(dtype), alpha, gamma)
    close = partial(np.testing.assert_allclose, rtol=1e-5 if dtype == torch.float32 else 1e-6)
    close(call().numpy(), expected)
    close(call(reduction="sum").numpy(), expected.sum())
    close(call(reduction="mean").numpy(), expected.mean())
    positives = (indices >= 0).sum().item()
    close(call(reduction="mean", normalizer="positives").numpy(), expected.sum() / positives)
    weighed = expected * weight.numpy()[:, None]
    close(call(weight=weight).numpy(), weighed)
    close(call(reduction="sum", weight=weight).numpy(), weighed.sum())


def test_gradients_of_varifocal():
    x, indices = case(rows=6)
    quality, weight = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    for options in ({}, {"reduction": "sum"}, {"reduction": "mean", "normalizer": "positives"}):
        assert torch.autograd.gradcheck(
            lambda logits, given=options: sigmoid_varifocal_loss(
                logits, indices, quality, weight=weight, **given
            ),
            x.clone().requires_grad_(),
        )
    # The one pass over float32 logits has the gradient of the plain form.
    found, expected = x.float().requires_grad_(), x.clone().requires_grad_()
    sigmoid_varifocal_loss(found, indices, quality.float(), reduction="sum").backward()
    sigmoid_varifocal_loss(expected, indices, quality).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad.float())


def test_an_object_is_to_score_the_quality_of_its_box():
    """The gradient is 0 at p = q, and none flows into q."""
    quality = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64).requires_grad_()
    x = torch.logit(quality.detach())[:, None].requires_grad_()
    sigmoid_varifocal_loss(x, torch.zeros(3, dtype=torch.int64), quality, reduction="sum").backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x), atol=1e-12, rtol=0)
    assert quality.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("q", [0.0, 0.3, 1.0])
def test_varifocal_of_extreme_logits(dtype, reduction, index, q):
    x = torch.tensor(EXTREMES, dtype=dtype)[:, None].requires_grad_()
    rows = torch.full((len(EXTREMES),), index), torch.full((len(EXTREMES),), q)
    value = sigmoid_varifocal_loss(x, *rows, reduction=reduction).sum()
    value.backward()
    assert value.isfinite()
    assert value >= 0
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("of", ["rows", "elements"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_varifocal_ignores(of, dtype):
    x, indices = case(3)
    x, quality = x.to(dtype), torch.rand(40, dtype=dtype)
    ignore = torch.rand(x.shape[:1] if of == "rows" else x.shape) < 0.4
    everywhere = ignore if of == "elements" else ignore[:, None].expand(x.shape)
    each = torch.where(everywhere, 0, sigmoid_varifocal_loss(x, indices, quality))
    poisoned = torch.where(everywhere, math.nan, x).requires_grad_()
    call = partial(sigmoid_varifocal_loss, poisoned, indices, quality, ignore=ignore)
    torch.testing.assert_close(call().detach(), each)
    total = call(reduction="sum")
    torch.testing.assert_close(total.detach(), each.sum())
    torch.testing.assert_close(call(reduction="mean").detach(), each.sum() / (~everywhere).sum())
    total.backward()
    assert poisoned.grad[everywhere].abs().max() == 0
    assert poisoned.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, CLASSES), (2, 0, CLASSES)])
def test_varifocal_of_nothing(shape):
    x = torch.zeros(shape, requires_grad=True)
    value = sigmoid_varifocal_loss(x, torch.full(shape[:-1], -1), torch.zeros(shape[:-1]), reduction="sum")
    value.backward()
    assert value.item() == 0


# ---------------------------------------------------------------------------------- alpha, ignored, normaliser


@pytest.mark.parametrize(
    "loss", [sigmoid_focal_loss, sigmoid_balanced_cross_entropy, sigmoid_focal_star_loss]
)
@pytest.mark.parametrize("kind", ["indices", "hard", "soft"])
def test_alpha_of_each_class(loss, kind):
    x, indices = case(2)
    targets = wanted(kind, indices)
    alphas = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    found = loss(x, targets, alphas)
    for k, alpha in enumerate(alphas.tolist()):
        torch.testing.assert_close(found[:, k], loss(x, targets, alpha)[:, k])
    torch.testing.assert_close(
        loss(x.float(), targets, alphas, reduction="sum"), found.sum().float(), rtol=1e-5, atol=0
    )


def test_inverse_frequency_gives_both_sides_the_same_weight():
    positives = torch.tensor([1, 50, 100])
    alpha = inverse_frequency_alpha(positives, 1000)
    assert alpha.tolist() == pytest.approx([0.999, 0.95, 0.9])
    torch.testing.assert_close(alpha * positives, (1 - alpha) * (1000 - positives))


@both
@pytest.mark.parametrize("kind", ["indices", "hard", "soft"])
@pytest.mark.parametrize("of", ["rows", "elements"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_ignored_counts_for_nothing(loss, kind, of, dtype):
    x, indices = case(3)
    x, targets = x.to(dtype), wanted(kind, indices)
    ignore = torch.rand(x.shape[:1] if of == "rows" else x.shape) < 0.4
    everywhere = ignore if of == "elements" else ignore[:, None].expand(x.shape)
    each = torch.where(everywhere, 0, SIGMOID[loss][0](x, targets))
    torch.testing.assert_close(SIGMOID[loss][0](x, targets, ignore=ignore), each)
    total = SIGMOID[loss][0](x, targets, reduction="sum", ignore=ignore)
    torch.testing.assert_close(total, each.sum())
    mean = SIGMOID[loss][0](x, targets, reduction="mean", ignore=ignore)
    torch.testing.assert_close(mean, each.sum() / (~everywhere).sum())
    # Whatever lies there, even what is no number.
    poisoned = torch.where(everywhere, math.nan, x).requires_grad_()
    value = SIGMOID[loss][0](poisoned, targets, reduction="sum", ignore=ignore)
    value.backward()
    torch.testing.assert_close(value.detach(), total)
    assert poisoned.grad[everywhere].abs().max() == 0
    assert poisoned.grad.isfinite().all()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalizers(loss, dtype):
    x, indices = case(4)
    x = x.to(dtype)
    ignore = torch.arange(len(x)) % 3 == 0
    call = partial(SIGMOID[loss][0], x, reduction="mean")
    total = SIGMOID[loss][0](x, indices, reduction="sum")
    kept = SIGMOID[loss][0](x, indices, reduction="sum", ignore=ignore)
    positives = (indices >= 0).sum()
    close = partial(torch.testing.assert_close, check_dtype=False)
    close(call(indices, normalizer="elements"), total / x.numel())
    close(call(indices, normalizer="rows"), total / len(x))
    close(call(indices, normalizer="positives"), total / positives)
    close(call(dense(indices), normalizer="positives"), total / positives)
    close(call(indices, normalizer=7.0), total / 7)
    close(call(indices, normalizer=torch.tensor(3.0)), total / 3)
    close(call(indices, normalizer=np.int64(3)), total / 3)
    close(call(indices, normalizer=np.float32(3)), total / 3)
    close(call(indices, normalizer="rows", ignore=ignore), kept / (~ignore).sum())
    of_kept = ((indices >= 0) & ~ignore).sum()
    close(call(indices, normalizer="positives", ignore=ignore), kept / of_kept)
    close(call(dense(indices), normalizer="positives", ignore=ignore), kept / of_kept)
    # Soft targets count for what they say; without any object the divisor is 1.
    soft = dense(indices) * 0.5
    close(call(soft, normalizer="positives"), SIGMOID[loss][0](x, soft, reduction="sum") / (positives / 2))
    none = torch.full_like(indices, -1)
    close(call(none, normalizer="positives"), SIGMOID[loss][0](x, none, reduction="sum"))


def test_positives_are_the_same_in_both_forms_where_single_elements_are_ignored():
    x = torch.zeros(3, 2)
    indices, ignore = torch.tensor([0, 0, 1]), torch.tensor([[True, False], [False, False], [True, False]])
    pairs = torch.eye(2)[indices]
    for targets in (indices, pairs):
        total = sigmoid_focal_loss(x, targets, reduction="sum", ignore=ignore)
        mean = sigmoid_focal_loss(x, targets, reduction="mean", normalizer="positives", ignore=ignore)
        torch.testing.assert_close(mean, total / 2)  # the first row's own class is not known


def test_a_weight_that_is_no_number_does_not_matter_where_it_is_ignored():
    x, indices = case(9)
    weight, ignore = torch.ones(40), torch.arange(40) < 10
    weight[:10] = math.nan
    for dtype in (torch.float32, torch.float64):
        total = sigmoid_focal_loss(
            x.to(dtype), indices, reduction="sum", weight=weight.to(dtype), ignore=ignore
        )
        expected = sigmoid_focal_loss(x.to(dtype), indices, reduction="sum", ignore=ignore)
        torch.testing.assert_close(total, expected)


def test_softmax_takes_no_single_alpha():
    # Under pytest the annotation speaks first; without it, our own message.
    with pytest.raises((ConfigError, TypeCheckError), match="alpha"):
        softmax_focal_loss(ROWS, NONE, 0.25)


@both
def test_nothing_at_all(loss):
    for shape in ((0, CLASSES), (2, 0, CLASSES), (3, 0)):
        x = torch.zeros(shape, requires_grad=True)
        none = torch.full(shape[:-1], -1)
        for reduction in ("sum", "mean"):
            for normalizer in (None, "rows", "positives") if reduction == "mean" else (None,):
                value = SIGMOID[loss][0](x, none, reduction=reduction, normalizer=normalizer)
                value.backward()
                assert value.item() == 0
        nothing_known = torch.ones(shape, dtype=torch.bool)
        value = SIGMOID[loss][0](
            x,
            none,
            reduction="mean",
            normalizer="elements" if shape[-1] == 0 else "positives",
            ignore=nothing_known,
        )
        assert value.item() == 0
    everything = torch.ones(4, dtype=torch.bool)
    x = torch.zeros(4, CLASSES)
    zero = SIGMOID[loss][0](x, torch.zeros(4, dtype=torch.int64), reduction="mean", ignore=everything)
    assert zero.item() == 0


@pytest.mark.parametrize("normalizer", [None, "rows", "positives", 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_path_takes_ignored_rows_and_normalizers(normalizer, dtype):
    x, indices = case(5, rows=300)
    x, ignore, weight = x.to(dtype), torch.rand(300) < 0.3, torch.rand(300)
    values, gradients = [], []
    for of in (dtype, torch.float64):
        leaf = x.detach().clone().to(of).requires_grad_()
        value = sigmoid_focal_loss(
            leaf,
            indices,
            reduction="mean",
            weight=weight.to(torch.float64 if of == torch.float64 else torch.float32),
            ignore=ignore,
            normalizer=normalizer,
        )
        value.backward()
        values.append(value.detach().double())
        gradients.append(leaf.grad.double())
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-12)


# ---------------------------------------------------------------------------------- softmax


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [None, torch.tensor([0.1, 0.3, 0.5, 0.7, 1.0], dtype=torch.float64)])
def test_softmax_equals_numpy(gamma, alpha):
    x, indices = case(6)
    p = np.exp(x.numpy() - x.numpy().max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    of_class = np.ones(CLASSES) if alpha is None else alpha.numpy()
    each = -of_class * (1 - p) ** gamma * np.log(p)
    own = indices.clamp(min=0)
    expected = np.where(indices >= 0, each[np.arange(len(x)), own], 0)
    np.testing.assert_allclose(softmax_focal_loss(x, indices, alpha, gamma).numpy(), expected, rtol=1e-9)
    mean = softmax_focal_loss(x, indices, alpha, gamma, "mean").item()
    assert mean == pytest.approx(expected.sum() / (indices >= 0).sum().item())
    soft = torch.softmax(x * 0.3, dim=-1)
    np.testing.assert_allclose(
        softmax_focal_loss(x, soft, alpha, gamma).numpy(), (soft.numpy() * each).sum(1), rtol=1e-9
    )
    for targets in (indices, soft):
        assert torch.autograd.gradcheck(
            lambda logits, targets=targets: softmax_focal_loss(logits, targets, alpha, gamma),
            x.clone().requires_grad_(),
        )


def test_softmax_without_gamma_is_torchs_cross_entropy():
    x, indices = case(7)
    expected = cross_entropy(x, indices.clamp(min=-1), ignore_index=-1)
    torch.testing.assert_close(softmax_focal_loss(x, indices, gamma=0, reduction="mean"), expected)


def test_softmax_of_two_classes_is_the_sigmoid_form():
    x, indices = torch.linspace(-5, 5, 11, dtype=torch.float64), torch.arange(11) % 2
    pairs = torch.stack((torch.zeros_like(x), x), dim=1)
    expected = sigmoid_focal_loss(x, indices.double(), None)
    torch.testing.assert_close(softmax_focal_loss(pairs, indices), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_of_extreme_logits(gamma, dtype):
    x = torch.tensor([[-1e4, 1e4], [1e4, -1e4], [100.0, -100.0], [0.0, 0.0], [0.0, 30.0]], dtype=dtype)
    x.requires_grad_()
    loss = softmax_focal_loss(x, torch.ones(5, dtype=torch.int64), None, gamma)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert x.grad.isfinite().all()
    assert loss[1].item() == pytest.approx(2e4, rel=1e-2)
    assert x.grad[1].tolist() == pytest.approx([1, -1], abs=1e-2)
    assert loss[0].item() == 0


def test_softmax_ignores_and_weighs_rows():
    x, indices = case(8)
    ignore, weight = torch.arange(40) % 4 == 0, torch.rand(40, dtype=torch.float64)
    each = torch.where(ignore, 0, softmax_focal_loss(x, indices) * weight)
    poisoned = torch.where(ignore[:, None], math.nan, x).requires_grad_()
    found = softmax_focal_loss(poisoned, indices, weight=weight, ignore=ignore)
    torch.testing.assert_close(found.detach(), each)
    found.sum().backward()
    assert poisoned.grad.isfinite().all()
    positives = ((indices >= 0) & ~ignore).sum()
    for normalizer in (None, "rows", "positives"):
        mean = softmax_focal_loss(
            x, indices, reduction="mean", weight=weight, ignore=ignore, normalizer=normalizer
        )
        torch.testing.assert_close(mean, each.sum() / positives)


# ---------------------------------------------------------------------------------- hard examples


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union


def literal_ohem(losses, boxes, batch, nms_iou):
    """The hardest first; who overlaps a harder one that was kept is dropped; the first of those left."""
    kept = []
    for i in sorted(range(len(losses)), key=lambda i: (-losses[i], i)):
        if losses[i] > 0 and all(overlap(boxes[i], boxes[k]) <= nms_iou for k in kept):
            kept.append(i)
    return kept if batch is None else kept[:batch]


def examples(seed, count=120):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 60
    size = 10 + torch.rand(count, 2, generator=generator) * 20
    losses = (torch.rand(count, generator=generator) - 0.2).clamp(min=0)
    return losses, torch.cat((corner, corner + size), dim=1), torch.rand(count, generator=generator) < 0.2


@pytest.mark.parametrize("batch", [4, 16, 1000])
@pytest.mark.parametrize("nms_iou", [0.0, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_ohem_equals_a_literal_one(batch, nms_iou, seed):
    losses, boxes, positive = examples(seed)
    expected = literal_ohem(losses.tolist(), boxes.tolist(), batch, nms_iou)
    assert hardest(losses, boxes, batch=batch, nms_iou=nms_iou).tolist() == expected
    every = literal_ohem(losses.tolist(), boxes.tolist(), None, nms_iou)
    positives = [i for i in every if positive[i]][: batch // 4]
    negatives = [i for i in every if not positive[i]][: 3 * max(1, len(positives))]
    found = hardest_one_to_three(losses, boxes, positive, batch=batch, nms_iou=nms_iou)
    assert found.tolist() == positives + negatives


def test_ohem_of_nothing():
    none = torch.zeros(0)
    assert hardest(none, torch.zeros(0, 4)).tolist() == []
    assert hardest_one_to_three(none, torch.zeros(0, 4), none.bool()).tolist() == []
    losses, boxes, _ = examples(0)
    assert hardest(losses * 0, boxes).tolist() == []
    assert len(hardest_one_to_three(losses, boxes, torch.zeros(len(losses), dtype=torch.bool))) == 3


# ---------------------------------------------------------------------------------- errors

ROWS, NONE = torch.zeros(2, 3), torch.full((2,), -1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sigmoid_focal_star_loss(ROWS, NONE, gamma=0),
            "sigmoid_focal_star_loss needs gamma > 0; got 0",
        ),
        (lambda: sigmoid_focal_star_loss(ROWS, NONE, beta=math.inf), "needs a finite beta; got inf"),
        (
            lambda: sigmoid_varifocal_loss(ROWS, NONE, torch.zeros(2), gamma=-1),
            "sigmoid_varifocal_loss needs gamma >= 0; got -1",
        ),
        (
            lambda: sigmoid_varifocal_loss(ROWS, ROWS, torch.zeros(2)),
            r"needs int64 class indices of shape \[2\]; got torch.float32 of shape \[2, 3\]",
        ),
        (
            lambda: sigmoid_varifocal_loss(ROWS, NONE, ROWS),
            r"needs a floating quality of shape \[2\], one a row of inputs; got torch.float32 of shape \[2, 3\]",
        ),
        (
            lambda: sigmoid_varifocal_loss(ROWS, NONE + 1, torch.tensor([0.5, 1.5])),
            r"needs a quality in \[0, 1\] for every object; got 1.5",
        ),
        (
            lambda: sigmoid_hinge_loss(ROWS, NONE, margin=0),
            r"sigmoid_hinge_loss needs a margin in \(0, 1\]; got 0",
        ),
        (lambda: sigmoid_hinge_loss(ROWS, ROWS[:1]), "sigmoid_hinge_loss needs floating targets of shape"),
        (lambda: softmax_focal_loss(ROWS, NONE, gamma=-1), "softmax_focal_loss needs gamma >= 0; got -1"),
        (
            lambda: softmax_focal_loss(ROWS, NONE, gamma=math.inf),
            "softmax_focal_loss needs gamma >= 0; got inf",
        ),
        (
            lambda: sigmoid_focal_loss(ROWS, NONE, gamma=math.inf),
            "sigmoid_focal_loss needs gamma >= 0; got inf",
        ),
        (
            lambda: sigmoid_balanced_cross_entropy(ROWS, NONE, -0.5),
            r"sigmoid_balanced_cross_entropy needs alpha in \[0, 1\]; got -0.5",
        ),
        (
            lambda: sigmoid_focal_loss(ROWS, NONE, reduction="mean", normalizer=torch.tensor(0.0)),
            r"a number above 0 or a scalar tensor; got tensor\(0\.\)",
        ),
        (
            lambda: softmax_focal_loss(ROWS, NONE, ignore=ROWS.bool()),
            r"softmax_focal_loss needs an ignore of shape \[2\]; got \[2, 3\]",
        ),
        (
            lambda: sigmoid_focal_loss(ROWS, NONE, torch.zeros(2)),
            r"one alpha, or one a class, of shape \[3\]; got \[2\]",
        ),
        (
            lambda: sigmoid_focal_loss(ROWS, NONE, torch.tensor([0.1, 2, 0])),
            r"every alpha in \[0, 1\]; got \[0\.1",
        ),
        (
            lambda: sigmoid_focal_loss(ROWS, NONE, ignore=torch.zeros(3, dtype=torch.bool)),
            r"boolean ignore of shape \[2\] or \[2, 3\]; got torch\.bool of shape \[3\]",
        ),
        (lambda: sigmoid_focal_loss(ROWS, NONE, ignore=torch.zeros(2)), "got torch.float32 of shape"),
        (
            lambda: sigmoid_focal_loss(ROWS, NONE, reduction="sum", normalizer="rows"),
            "needs reduction='mean' for a normalizer, .* got 'sum'",
        ),
        (
            lambda: sigmoid_focal_loss(ROWS, NONE, reduction="mean", normalizer=0.0),
            "needs normalizer 'elements', 'rows', 'positives', a number above 0 .* got 0.0",
        ),
        (
            lambda: sigmoid_focal_loss(ROWS, NONE, reduction="mean", normalizer=torch.ones(1)),
            r"or a scalar tensor; got shape \[1\]",
        ),
        (
            lambda: sigmoid_focal_loss(ROWS, ROWS - 1),
            r"needs targets in \[0, 1\], or ignore=MASK where nothing is known; got -1 to -1",
        ),
        (
            lambda: softmax_focal_loss(ROWS, ROWS * math.nan),
            r"softmax_focal_loss needs targets in \[0, 1\], .*; got nan to nan",
        ),
        (
            lambda: inverse_frequency_alpha(torch.tensor([3, 11]), 10),
            r"of each class 0 to 10 of them; got \[3, 11\] of 10",
        ),
        (
            lambda: hardest(torch.zeros(1), torch.zeros(1, 4), batch=0),
            "hard example mining needs a batch of 1 or more; got 0",
        ),
        (
            lambda: hardest_one_to_three(torch.zeros(1), torch.zeros(1, 4), torch.ones(1).bool(), batch=3),
            "hard example mining needs a batch of 4 or more; got 3",
        ),
        (
            lambda: cross_entropy_derivative(torch.zeros(2), torch.tensor([1.0, 0.0])),
            r"cross_entropy_derivative needs y of \+1 \(an object\) or -1 \(background\); got 0",
        ),
        (
            lambda: focal_loss_derivative(torch.zeros(1), torch.tensor([2.0])),
            "focal_loss_derivative needs y of .*; got 2",
        ),
        (
            lambda: focal_loss_derivative(torch.zeros(1), torch.ones(1), gamma=-3),
            "focal_loss_derivative needs gamma >= 0; got -3",
        ),
        (
            lambda: focal_star_loss_derivative(torch.zeros(1), torch.zeros(1)),
            "focal_star_loss_derivative needs y of .*; got 0",
        ),
        (
            lambda: focal_star_loss_derivative(torch.zeros(1), torch.ones(1), gamma=0),
            "focal_star_loss_derivative needs gamma > 0; got 0",
        ),
        (
            lambda: focal_star_loss_derivative(torch.zeros(1), torch.ones(1), beta=math.nan),
            "focal_star_loss_derivative needs a finite beta; got nan",
        ),
        (
            lambda: hardest(torch.zeros(1), torch.zeros(1, 4), nms_iou=2.0),
            r"needs nms_iou in \[0, 1\]; got 2",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_balanced_sample():
    positive = torch.arange(1000) % 20 == 0  # 50 of them
    able = torch.arange(1000) != 40
    drawn = balanced_sample(positive, able, batch=100, generator=torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == 100
    assert positive[drawn].tolist() == [True] * 25 + [False] * 75
    assert 40 not in drawn
    again = balanced_sample(positive, able, batch=100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    other = balanced_sample(positive, able, batch=100, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(drawn, other)
    # Few positives: the background fills the batch. Few of everything: all that there is.
    assert positive[balanced_sample(positive, able, batch=400, positive_share=0.5)].sum() == 49
    assert len(balanced_sample(positive, able, batch=400, positive_share=0.5)) == 400
    assert sorted(balanced_sample(positive[:60], able[:60], batch=500).tolist()) == [
        i for i in range(60) if i != 40
    ]
    assert len(balanced_sample(positive[:0], able[:0])) == 0


def test_every_example_is_drawn_as_often_as_any_other_of_its_side():
    positive, able = torch.arange(40) < 8, torch.ones(40, dtype=torch.bool)
    generator = torch.Generator().manual_seed(3)
    counts = torch.zeros(40)
    for _ in range(2000):
        counts[balanced_sample(positive, able, batch=16, generator=generator)] += 1
    assert (counts[:8] / 2000 - 4 / 8).abs().max() < 0.05
    assert (counts[8:] / 2000 - 12 / 32).abs().max() < 0.05


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"batch": 0}, "batch of 1 or more"),
        ({"positive_share": 0.0}, r"\(0, 1\)"),
        ({"positive_share": 1.0}, "0, 1"),
    ],
)
def test_a_balanced_sample_refuses(told, message):
    ones = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ConfigError, match=message):
        balanced_sample(ones, ones, **told)
