"""The focal loss and its gradient in one pass over the logits (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retinanet.errors import ConfigError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Logits a program. Sixteen a thread: enough loads in flight to hide memory, few enough to stay in registers.
BLOCK = 2048

# Said aloud, for Triton's default is about to change. Contracting a * b + c rounds once instead of twice, which
# the polynomial below only gains from.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def focal_sum(
    logits: Tensor,
    classes: Tensor,
    weight: Tensor | None,
    of_positive: float,
    of_negative: float,
    gamma: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    r"""Sum of weight * FL over all elements, and its gradient: FL = -alpha_t (1 - p_t)^gamma log(p_t), Eq. 5.

    With x_t = x where the column is the row's class, else -x, and p_t = sigmoid(x_t):
    dFL/dx_t = -alpha_t (1 - p_t)^gamma (1 - p_t - gamma p_t log p_t), Eq. 10.

    Args:
        logits: `[N, K]` contiguous; float32, bfloat16 or float16, computed in float32.
        classes: `[N]` int64; negative (or K and above) is "no object".
        weight: `[N]` float32 or None. A row of weight 0 adds nothing and gets gradient 0, whatever its logits.
        of_positive, of_negative: alpha_t of y = 1 and of y = 0.
        gamma: >= 0.
        with_gradient: without it the second result is empty.

    Returns:
        the sum, a float32 scalar, and the gradient `[N, K]` in the dtype of `logits`.

    Both are finite for every finite logit (unless the sum itself leaves float32) and the same in every run: sums
    of blocks are stored and added in one order. The only temporary is one float a block; the host never waits.

    Raises:
        ConfigError: a tensor whose shape, layout or dtype the kernel would misread.
    """
    if logits.dim() != 2 or not logits.is_contiguous() or logits.dtype not in _DTYPES:
        raise ConfigError(
            "focal_sum needs contiguous logits [N, K] of float32, bfloat16 or float16; "
            f"got {logits.dtype} of shape {list(logits.shape)} and strides {list(logits.stride())}"
        )
    rows = logits.shape[:1]
    if classes.shape != rows or classes.dtype != torch.int64:
        raise ConfigError(
            f"focal_sum needs int64 classes of shape {list(rows)}; got {classes.dtype} of {list(classes.shape)}"
        )
    if weight is not None and (weight.shape != rows or weight.dtype != torch.float32):
        raise ConfigError(
            f"focal_sum needs a float32 weight of shape {list(rows)}; got {weight.dtype} of {list(weight.shape)}"
        )
    gradient = torch.empty_like(logits) if with_gradient else None
    blocks = triton.cdiv(logits.numel(), BLOCK)
    partial = logits.new_empty(blocks, dtype=torch.float32)
    if blocks:
        with torch.cuda.device_of(logits):
            _focal_kernel[(blocks,)](
                logits,
                classes.contiguous(),
                None if weight is None else weight.contiguous(),
                partial,
                gradient,
                logits.numel(),
                of_positive,
                of_negative,
                gamma,
                CLASSES=logits.shape[1],
                GAMMA=int(gamma) if gamma in (0, 2) else None,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    # Tens of thousands of blocks: float64 here costs nothing and keeps their sum as exact as its terms.
    total = partial.sum(dtype=torch.float64).to(torch.float32)
    return total, logits.new_empty(0) if gradient is None else gradient


@triton.jit
def _focal_kernel(
    logits: tl.tensor,
    classes: tl.tensor,
    weight: tl.tensor,
    partial: tl.tensor,
    gradient: tl.tensor,
    elements: tl.tensor,
    of_positive: tl.tensor,
    of_negative: tl.tensor,
    gamma: tl.tensor,
    CLASSES: tl.constexpr,
    GAMMA: tl.constexpr,  # 0, 2, or None for the general `gamma`
    BLOCK: tl.constexpr,
) -> None:
    # Blocks run over the flat logits, so that no lane idles whatever K is. Positions may exceed 2^31; within a
    # block they are counted in int32 from the beginning of the row in which the block begins.
    program = tl.program_id(0)
    start = program.to(tl.int64) * BLOCK
    first_row = start // CLASSES
    element = tl.arange(0, BLOCK)
    inside = element < elements - start
    position = (start - first_row * CLASSES).to(tl.int32) + element
    row = position // CLASSES
    column = position - row * CLASSES

    # Every row is read, of weight 0 too: a mask that changes from row to row would break up the wide loads.
    x = tl.load(logits + start + element, mask=inside, other=0.0).to(tl.float32)
    positive = tl.load(classes + first_row + row, mask=inside, other=-1) == column
    alpha_t = tl.where(positive, of_positive, of_negative)
    if weight is not None:
        scale = tl.load(weight + first_row + row, mask=inside, other=0.0)
        alpha_t = alpha_t * scale
        x = tl.where(scale == 0, 0.0, x)  # for 0 * NaN would be NaN
    else:
        alpha_t = tl.where(inside, alpha_t, 0.0)

    x_t = tl.where(positive, x, -x)
    e = tl.exp(-tl.abs(x))
    log1p_e = _log1p(e)
    larger = 1.0 / (1.0 + e)  # sigmoid(|x|); the smaller one is e times it and keeps its digits
    not_p_t = tl.where(x_t >= 0, e * larger, larger)
    cross_entropy = tl.maximum(-x_t, 0.0) + log1p_e  # -log p_t
    slope = not_p_t
    if GAMMA == 0:
        loss = cross_entropy
    else:
        p_t = tl.where(x_t >= 0, larger, e * larger)
        slope += gamma * (p_t * cross_entropy)  # p_t first: the cross entropy alone may be 3e38
        if GAMMA == 2:
            focus = not_p_t * not_p_t
        else:
            focus = tl.exp(-gamma * (tl.maximum(x_t, 0.0) + log1p_e))
        loss = focus * cross_entropy
        slope = focus * slope
    tl.store(partial + program, tl.sum(alpha_t * loss, axis=0))
    if gradient is not None:
        slope = alpha_t * slope
        slope = tl.where(positive, -slope, slope)
        tl.store(gradient + start + element, slope.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _log1p(e: tl.tensor) -> tl.tensor:
    """log(1 + e) for e in [0, 1], relative error < 1.8e-7 (three halves of the last bit).

    e + e^2 Q(e), Q the polynomial that minimises the largest relative error. Triton's language has no log1p,
    the device library's has no interpreter, and log(1 + e) loses e below 1e-7: the loss of every easy example.
    """
    q = -0.0300658001 + 0.00536482629 * e
    q = 0.0792045483 + q * e
    q = -0.137538034 + q * e
    q = 0.191536554 + q * e
    q = -0.248571638 + q * e
    q = 0.333213226 + q * e
    q = -0.49999648 + q * e
    return e + e * e * q
