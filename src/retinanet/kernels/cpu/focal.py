"""The focal loss of class indices and its gradient, in one pass over the logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from retinanet.kernels.cpu.compiled import CONTRACT, REASSOCIATE, compiled
from retinanet.kernels.cpu.memory import recycled
from retinanet.kernels.cpu.threads import in_parallel
from retinanet.kernels.cpu.values import as_float32, flat_array, room_for, store

# Logits whose losses are added up in float32, in the same order for any number of threads; blocks add up in
# float64. Few enough that a block's logits and gradient stay in the first cache.
BLOCK = 2048
# Blocks that are worth a second thread: waking it takes about as long as these.
LEAST_BLOCKS = 24

f32 = np.float32
LOG2_E = f32(1.4426950408889634)
# log 2 in two parts: a small integer times the first is exact (Cody and Waite, 1980).
LN2_HIGH, LN2_LOW = f32(0.693359375), f32(-2.12194440054690583e-4)
# Minimax polynomials: exp on [-log(2)/2, log(2)/2], relative error 2e-9; log1p(e) / e on [0, 1], 3e-8.
E2, E3, E4, E5, E6 = (
    f32(0.4999999106),
    f32(0.166664198),
    f32(0.04166823253),
    f32(0.008374898694),
    f32(0.001383674215),
)
L0, L1, L2, L3, L4 = (
    f32(0.9999999404),
    f32(-0.4999949336),
    f32(0.3331909776),
    f32(-0.2484298199),
    f32(0.1910600811),
)
L5, L6, L7, L8 = f32(-0.1366324574), f32(0.07822594792), f32(-0.02950522862), f32(0.005232690834)
# A float32 of this size has no fraction, so that adding a number rounds it; the last bits of the sum, moved into the
# exponent's place, are 2^k of the rounded k: 127 is what exponents are counted from.
ROUNDING = f32(1.5 * 2**23 + 127)
# exp(-a) is taken as 0 from here on; float32 has no normal number for it.
FAR = f32(87.0)


def focal_sum(
    logits: Tensor,
    classes: Tensor,
    weight: Tensor | None,
    of_positive: float,
    of_negative: float,
    gamma: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the focal loss, float32, and its gradient like `logits` (empty if not asked for).

    logits `[N, K]` contiguous float32 or bfloat16; classes `[N]` int64 below K, negative: no object; weight `[N]`
    float32. Rows of weight 0 are not looked at, and their gradient is 0. The sum does not depend on the number
    of threads.
    """
    rows, values = logits.shape
    gradient = recycled(logits.shape, logits.dtype) if with_gradient else logits.new_empty(0)
    x, g = flat_array(logits), flat_array(gradient)
    c = classes.contiguous().numpy()
    w = np.ones(1, np.float32) if weight is None else weight.contiguous().numpy()
    rows_of_block = max(1, BLOCK // max(1, values))
    blocks = -(-rows // rows_of_block)
    sums = np.zeros(blocks)
    positive, negative, power = f32(of_positive), f32(of_negative), f32(gamma)

    def work(_: int, start: int, stop: int) -> None:
        _rows(x, g, c, w, values, rows_of_block, start, stop, positive, negative, power, sums)

    in_parallel(work, blocks, least=LEAST_BLOCKS)
    return torch.tensor(sums.sum(), dtype=torch.float32), gradient


@compiled()
def _rows(x, g, classes, weight, values, rows_of_block, start, stop, positive, negative, gamma, sums):
    """Do the blocks start..stop. Neighbouring background rows of one weight are one run, as long as can be."""
    weighted = len(weight) > 1
    read = np.empty(rows_of_block * values, np.float32)
    written = np.empty(rows_of_block * values, np.float32)
    for block in range(start, stop):
        first = block * rows_of_block
        last = min(first + rows_of_block, len(classes))
        lo, hi = first * values, last * values
        logits = as_float32(x[lo:hi], read)
        gradient = room_for(g[lo:hi], written[: hi - lo])
        total = 0.0
        row = first
        while row < last:
            w = weight[row] if weighted else weight[0]
            a = (row - first) * values
            label = classes[row]
            row += 1
            if w == 0:
                while row < last and (not weighted or weight[row] == 0):
                    row += 1
                gradient[a : (row - first) * values] = 0
            elif label < 0 or label >= values:
                while row < last and classes[row] < 0 and (not weighted or weight[row] == w):
                    row += 1
                b = (row - first) * values
                total += _background(logits[a:b], gradient[a:b], w * negative, gamma)
            else:
                at, b = a + label, a + values
                total += _background(logits[a:at], gradient[a:at], w * negative, gamma)
                total += _background(logits[at + 1 : b], gradient[at + 1 : b], w * negative, gamma)
                # -x, because the loss of y = 1 at x is that of y = 0 at -x.
                loss, slope = _term(-logits[at], w * positive, gamma)
                gradient[at] = -slope
                total += np.float64(loss)
        sums[block] = total
        store(gradient, g[lo:hi])


@compiled()
def _background(logits, gradient, scale, gamma):
    """Return the float64 sum of `scale` p^gamma softplus(x), and write its derivative.

    Scaled before it is added up in float32, whose range the sum of raw losses can exceed.
    """
    if gamma == 2:
        return np.float64(_background_2(logits, gradient, scale))
    if gamma == 0:
        return np.float64(_background_0(logits, gradient, scale))
    return np.float64(_background_any(logits, gradient, scale, gamma))


# Three loops and not one with a choice inside: they are what the compiler turns into vector code.


@compiled(REASSOCIATE)
def _background_2(logits, gradient, scale):
    total = f32(0)
    for i in range(len(logits)):
        loss, slope = _term_2(logits[i], scale)
        total += loss
        gradient[i] = slope
    return total


@compiled(REASSOCIATE)
def _background_0(logits, gradient, scale):
    total = f32(0)
    for i in range(len(logits)):
        loss, slope = _term_0(logits[i], scale)
        total += loss
        gradient[i] = slope
    return total


@compiled(REASSOCIATE)
def _background_any(logits, gradient, scale, gamma):
    total = f32(0)
    for i in range(len(logits)):
        loss, slope = _term_any(logits[i], scale, gamma)
        total += loss
        gradient[i] = slope
    return total


@compiled()
def _term(x, scale, gamma):
    if gamma == 2:
        return _term_2(x, scale)
    if gamma == 0:
        return _term_0(x, scale)
    return _term_any(x, scale, gamma)


# Loss and derivative of y = 0, times a scale (alpha and weight): l = p^gamma s, dl/dx = p^gamma (gamma (1 - p) s + p),
# with p = sigmoid(x) and s = softplus(x) = -log(1 - p).


@compiled(CONTRACT, inline=True)
def _term_2(x, scale):
    p, q, s, _ = _sigmoid_and_softplus(x)
    power = p * p * scale
    return power * s, power * (f32(2) * q * s + p)


@compiled(CONTRACT, inline=True)
def _term_0(x, scale):
    p, _, s, _ = _sigmoid_and_softplus(x)
    return scale * s, scale * p


@compiled(CONTRACT, inline=True)
def _term_any(x, scale, gamma):
    p, q, s, minus_log_p = _sigmoid_and_softplus(x)
    power = _exp_minus(gamma * minus_log_p) * scale
    return power * s, power * (gamma * q * s + p)


@compiled(CONTRACT, inline=True)
def _sigmoid_and_softplus(x):
    """Return sigmoid(x), sigmoid(-x), softplus(x), softplus(-x), each to the last digits of float32."""
    e = _exp_minus(abs(x))
    larger = f32(1) / (f32(1) + e)
    smaller = e * larger
    # In pairs (Estrin), which wait less for one another than a chain (Horner).
    e2 = e * e
    e4 = e2 * e2
    low, high = (L0 + e * L1) + e2 * (L2 + e * L3), (L4 + e * L5) + e2 * (L6 + e * L7)
    log1p = e * (low + e4 * (high + e4 * L8))
    below = x < 0  # a NaN is not, and so it reaches the sum
    return (
        smaller if below else larger,
        larger if below else smaller,
        max(x, f32(0)) + log1p,
        max(-x, f32(0)) + log1p,
    )


@compiled(CONTRACT, inline=True)
def _exp_minus(a):
    """Return exp(-a) for a >= 0."""
    shifted = ROUNDING - a * LOG2_E
    k = shifted - ROUNDING
    x = (-a - k * LN2_HIGH) - k * LN2_LOW
    y = f32(1) + x * (f32(1) + x * (E2 + x * (E3 + x * (E4 + x * (E5 + x * E6)))))
    two_to_k = np.int32(f32(shifted).view(np.int32) << np.int32(23)).view(np.float32)
    return f32(0) if a >= FAR else y * two_to_k
