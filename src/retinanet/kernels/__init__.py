"""Fast paths of the four operations that are not convolutions: numba on a CPU, Triton on CUDA.

Each does what a plain function above does, is tested equal to it, and is called by it where `usable` says so:

- `focal_sum`: the focal loss of class indices and its gradient (`losses.sigmoid_focal_loss`);
- `match`: anchors to boxes (`matching.match_anchors`);
- `select`: threshold and top-k on logits (`inference.post_process`);
- `nms`: per-class NMS (`boxes.nms`).

Nothing is compiled at import: numba's first call of a kernel compiles it and keeps the result on disk.
"""

# No `from __future__ import annotations`: torch reads the annotations of its operators.

import functools
import logging
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

MISSING = (
    "numba is not installed: losses, matching and NMS run on the CPU many times slower, with the same results; "
    "run: pip install numba"
)


@torch.compiler.assume_constant_result
@functools.cache
def available(device_type: str) -> bool:
    """Return whether there are fast paths for a type of device ("cpu", "cuda"); say so once where they are missing."""
    if device_type == "cuda":
        return find_spec("triton") is not None
    if device_type == "cpu" and find_spec("numba") is None:
        logging.getLogger("retinanet").warning(MISSING)
        return False
    return device_type == "cpu"


def usable(*tensors: Tensor, dtypes: Sequence[torch.dtype] = (torch.float32,), cuda: bool = True) -> bool:
    """Return whether fast paths take these tensors: all on one kind of device, the first of one of `dtypes`."""
    kinds = {tensor.device.type for tensor in tensors}
    if len(kinds) != 1 or tensors[0].dtype not in dtypes or (kinds == {"cuda"} and not cuda):
        return False
    return available(kinds.pop())


def focal_sum(
    logits: Tensor,
    classes: Tensor,
    weight: Tensor | None,
    of_positive: float,
    of_negative: float,
    gamma: float,
) -> Tensor:
    """Return the weighted sum of the focal loss, a float32 scalar, with its gradient.

    Args:
        logits: `[N, K]` float32 or bfloat16 (on CUDA float16 too).
        classes: int64 `[N]` below K; negative: no object.
        weight: float32 `[N]`, or None for 1; a row of weight 0 is not looked at.
        of_positive, of_negative: alpha_t of y = 1 and of y = 0.
    """
    gradient = logits.requires_grad and torch.is_grad_enabled()
    total, _ = _focal_sum(
        logits.contiguous(), classes, weight, float(of_positive), float(of_negative), float(gamma), gradient
    )
    return total


# An operator of torch's own kind, so that autograd and torch.compile see an ordinary function.
@torch.library.custom_op("retinanet::focal_sum", mutates_args=())
def _focal_sum(
    logits: Tensor,
    classes: Tensor,
    weight: Tensor | None,
    of_positive: float,
    of_negative: float,
    gamma: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    if logits.is_cuda:
        from retinanet.kernels.cuda.focal import focal_sum as on_device
    else:
        from retinanet.kernels.cpu.focal import focal_sum as on_device
    return on_device(logits, classes, weight, of_positive, of_negative, gamma, with_gradient)


@_focal_sum.register_fake
def _(
    logits: Tensor,
    classes: Tensor,
    weight: Tensor | None,
    of_positive: float,
    of_negative: float,
    gamma: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(logits) if with_gradient else logits.new_empty(0)
    return logits.new_empty((), dtype=torch.float32), gradient


def _keep_gradient(ctx, inputs, output) -> None:
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(gradient)


def _scaled_gradient(ctx, of_total: Tensor, _of_gradient: Tensor | None):
    (gradient,) = ctx.saved_tensors
    # A compiler that traces this hands in tensors without values, which are subclasses.
    traced = type(of_total) is not Tensor
    if torch.is_grad_enabled() and not traced:
        raise RuntimeError("the fused focal loss has no second derivative; use reduction='none' and sum it")
    # In training the factor is 1. Looking costs nothing on a CPU; elsewhere it would wait for the device.
    one = not traced and of_total.device.type == "cpu" and of_total.item() == 1
    return gradient if one else gradient * of_total.to(gradient.dtype), None, None, None, None, None, None


_focal_sum.register_autograd(_scaled_gradient, setup_context=_keep_gradient)


@torch.compiler.disable
def match(
    anchors: Tensor,
    boxes: Tensor,
    ignored: Tensor | None,
    positive_iou: float,
    negative_iou: float,
    low_quality: bool,
    ignored_overlap: float,
) -> tuple[Tensor, Tensor]:
    """Return state and index int64 `[B, R]` of anchors `[R, 4]` for boxes `[B, G, 4]`, float32, ignored `[B, G]`."""
    if anchors.is_cuda:
        from retinanet.kernels.cuda.matching import match as on_device
    else:
        from retinanet.kernels.cpu.matching import match as on_device
    return on_device(anchors, boxes, ignored, positive_iou, negative_iou, low_quality, ignored_overlap)


@torch.compiler.disable
def select(levels: Sequence[Tensor], thresholds: Sequence[float], top_k: int) -> list[Tensor]:
    """Return for each level of logits `[N, K]` on the CPU the flat indices, ascending, of the `top_k` largest above
    its threshold; of equal ones the first."""
    from retinanet.kernels.cpu.selection import select as on_device

    return on_device(levels, thresholds, top_k)


@torch.compiler.disable
def nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_kept: int | None) -> Tensor:
    """Return the indices that per-class NMS keeps, best first; boxes float32 `[N, 4]` on the CPU."""
    from retinanet.kernels.cpu.nms import nms as on_device

    return on_device(boxes, scores, labels, threshold, max_kept)
