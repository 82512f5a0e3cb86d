"""Fast paths: numba on a CPU, Triton on CUDA.

Each does what a plain function above does, is tested equal to it, and is called by it where `usable` says so:

- `focal_sum`: the focal loss of class indices and its gradient (`losses.sigmoid_focal_loss`);
- `match`: anchors to boxes (`matching.match_anchors`);
- `select`: threshold and top-k on logits (`inference.post_process`);
- `nms`: per-class NMS (`boxes.nms`);
- `convolve3x3`: the convolution of heads, pyramid and residual blocks on a CPU (`model.convolution`);
- `prepare_images`: resize, normalise and pad (`preparing.prepare_batch`).

Nothing is compiled at import: numba's first call of a kernel compiles it and keeps the result on disk.
"""

# No `from __future__ import annotations`: torch reads the annotations of its operators.

import logging
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from retinanet.images import Preprocessing, UInt8Array

SLOW = "{problem}: losses, matching and NMS run many times slower, with the same results"

_needed = {"cpu": "numba", "cuda": "triton"}
_installed = {device for device, package in _needed.items() if find_spec(package) is not None}
_available: dict[str, bool] = {}


def available(device_type: str) -> bool:
    """Return whether there are fast paths for a type of device ("cpu", "cuda"); say once why there are none.

    A package that is installed may still not work with the others: the first call imports it.
    """
    if torch.compiler.is_compiling():  # which cannot see an import
        return _available.get(device_type, device_type in _installed)
    if device_type not in _available:
        problem = _problem(_needed[device_type]) if device_type in _needed else ""
        _available[device_type] = device_type in _needed and not problem
        if problem:
            logging.getLogger("retinanet").warning(SLOW.format(problem=problem))
    return _available[device_type]


def _problem(package: str) -> str:
    """Return why the fast paths of a package cannot be used, or nothing."""
    try:
        module = import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            return f"{package} is not installed (pip install {package})"
        return f"{package} cannot be imported ({error})"
    except ImportError as error:
        return f"{package} cannot be imported ({error})"
    if package == "numba" and module.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    return ""


def usable(*tensors: Tensor, dtypes: Sequence[torch.dtype] = (torch.float32,), cuda: bool = True) -> bool:
    """Return whether fast paths take these tensors: all on one kind of device, the first and
    all that are floating of one of `dtypes`."""
    kind = tensors[0].device.type
    if tensors[0].dtype not in dtypes or (kind == "cuda" and not cuda):
        return False
    for tensor in tensors:
        if tensor.device.type != kind or (tensor.dtype.is_floating_point and tensor.dtype not in dtypes):
            return False
    return available(kind) and (torch.compiler.is_compiling() or not any(map(_is_transformed, tensors)))


def _is_transformed(tensor: Tensor) -> bool:
    """Return whether `torch.func` or forward-mode differentiation is at work, for which our operators have no rules.

    Unasked, forward mode would take their derivative for 0.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def focal_sum(
    logits: Tensor,
    classes: Tensor,
    weight: Tensor | None,
    of_positive: float,
    of_negative: float,
    gamma: float,
    quality: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of the focal loss, with a `quality` of the varifocal loss, a float32 scalar, with its
    gradient.

    Args:
        logits: `[N, K]` float32 or bfloat16 (on CUDA float16 too).
        classes: int64 `[N]` below K; negative: no object.
        weight: float32 `[N]`, or None for 1; a row of weight 0 is not looked at.
        of_positive, of_negative: alpha_t of y = 1 and of y = 0.
        quality: float32 `[N]`, what an object's class is to score; `of_positive` is not used then.
    """
    gradient = logits.requires_grad and torch.is_grad_enabled()
    alphas = float(of_positive), float(of_negative)
    total, _ = _focal_sum(logits.contiguous(), classes, weight, *alphas, float(gamma), gradient, quality)
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
    quality: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if logits.is_cuda:
        from retinanet.kernels.cuda.focal import focal_sum as on_device
    else:
        from retinanet.kernels.cpu.focal import focal_sum as on_device
    if quality is None:
        return on_device(logits, classes, weight, of_positive, of_negative, gamma, with_gradient)
    from retinanet.kernels.quality import add_objects

    total, gradient = on_device(logits, classes, weight, 0.0, of_negative, gamma, with_gradient)
    return add_objects(total, gradient, logits, classes, weight, quality), gradient


@_focal_sum.register_fake
def _(
    logits: Tensor,
    classes: Tensor,
    weight: Tensor | None,
    of_positive: float,
    of_negative: float,
    gamma: float,
    with_gradient: bool,
    quality: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(logits) if with_gradient else logits.new_empty(0)
    return logits.new_empty((), dtype=torch.float32), gradient


def _keep_gradient(ctx, inputs, output) -> None:
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)  # else autograd makes zeros for it, as large as the logits
    ctx.save_for_backward(gradient)


def _scaled_gradient(ctx, of_total: Tensor | None, _of_gradient: Tensor | None):
    if of_total is None:
        return (None,) * 8
    (gradient,) = ctx.saved_tensors
    # A compiler that traces this hands in tensors without values, which are subclasses.
    traced = type(of_total) is not Tensor
    if torch.is_grad_enabled() and not traced:
        raise RuntimeError("the fused focal loss has no second derivative; use reduction='none' and sum it")
    # In training the factor is 1. Looking costs nothing on a CPU; elsewhere it would wait for the device.
    one = not traced and of_total.device.type == "cpu" and of_total.item() == 1
    if traced:
        gradient = (gradient * of_total.float()).to(gradient.dtype)
    else:
        if torch._C._autograd._get_current_graph_task_keep_graph():
            gradient = gradient.clone()  # asked for again later, and whoever gets it now may add to it
        if not one:
            gradient.mul_(of_total)
    return gradient, None, None, None, None, None, None, None


_focal_sum.register_autograd(_scaled_gradient, setup_context=_keep_gradient)


def convolve3x3(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the 3x3 convolution with stride 1 and padding 1 by Winograd's F(2x2, 3x3), with its gradients.

    Args:
        images: `[B, Ci, H, W]` float32 on the CPU, channels_last.
        weight: `[Co, Ci, 3, 3]`.
        bias: `[Co]` or None.
    """
    out = _convolve3x3(images, weight)
    return out if bias is None else out + bias[:, None, None]


@torch.library.custom_op("retinanet::convolve3x3", mutates_args=())
def _convolve3x3(images: Tensor, weight: Tensor) -> Tensor:
    from retinanet.kernels.cpu.winograd import convolve

    return convolve(images, weight)


@torch.library.custom_op("retinanet::convolve3x3_gradients", mutates_args=())
def _convolve3x3_gradients(
    gradient: Tensor, images: Tensor, weight: Tensor, of_images: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    from retinanet.kernels.cpu.winograd import image_gradient, weight_gradient

    return (
        image_gradient(gradient, weight) if of_images else images.new_empty(0),
        weight_gradient(images, gradient) if of_weight else images.new_empty(0),
    )


@_convolve3x3.register_fake
def _(images: Tensor, weight: Tensor) -> Tensor:
    batch, _, height, width = images.shape
    return images.new_empty((batch, height, width, len(weight))).permute(0, 3, 1, 2)


@_convolve3x3_gradients.register_fake
def _(
    gradient: Tensor, images: Tensor, weight: Tensor, of_images: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    last = torch.channels_last
    return (
        torch.empty_like(images, memory_format=last) if of_images else images.new_empty(0),
        torch.empty_like(weight, memory_format=last) if of_weight else images.new_empty(0),
    )


def _keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients_of_convolution(ctx, gradient: Tensor):
    images, weight = ctx.saved_tensors
    of_images, of_weight = ctx.needs_input_grad
    if torch.is_grad_enabled() and type(gradient) is Tensor:
        # With create_graph: torch's own gradients have derivatives.
        ones, which = [1, 1], [of_images, of_weight, False]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            gradient, images, weight, None, ones, ones, ones, False, [0, 0], 1, which
        )
        return dx, dw
    dx, dw = _convolve3x3_gradients(gradient, images, weight, of_images, of_weight)
    return dx if of_images else None, dw if of_weight else None


_convolve3x3.register_autograd(_gradients_of_convolution, setup_context=_keep_inputs)


def prepare(anchors: Tensor) -> None:
    """Let every `match` of these anchors `[R, 4]`, of this very tensor, begin with what depends on them alone.

    Nobody may write to them any more.
    """
    if usable(anchors, cuda=False):
        from retinanet.kernels.cpu.matching import prepare as on_device

        on_device(anchors)


def match(
    anchors: Tensor,
    boxes: Tensor,
    ignored: Tensor | None,
    positive_iou: float,
    negative_iou: float,
    low_quality: bool,
    ignored_overlap: float,
) -> tuple[Tensor, Tensor]:
    """Return state int8, index int64 `[B, R]` of anchors `[R, 4]` for float32 boxes `[B, G, 4]`, ignored `[B, G]`."""
    if anchors.is_cuda:
        from retinanet.kernels.cuda.matching import match as on_device
    else:
        from retinanet.kernels.cpu.matching import match as on_device
    return on_device(anchors, boxes, ignored, positive_iou, negative_iou, low_quality, ignored_overlap)


def select(levels: Sequence[Tensor], thresholds: Sequence[float], top_k: int) -> list[Tensor]:
    """Return for each level of logits `[N, K]` on the CPU the flat indices, ascending, of the `top_k` largest above
    its threshold; of equal ones the first."""
    from retinanet.kernels.cpu.selection import select as on_device

    return on_device(levels, thresholds, top_k)


def nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_kept: int | None) -> Tensor:
    """Return the indices that per-class NMS keeps, best first; boxes float32 `[N, 4]` on the CPU."""
    from retinanet.kernels.cpu.nms import nms as on_device

    return on_device(boxes, scores, labels, threshold, max_kept)


def prepare_images(
    images: Sequence[UInt8Array], sizes: Sequence[tuple[int, int]], preprocessing: Preprocessing
) -> Tensor:
    """Return the padded batch float32 `[B, 3, H, W]`, channels_last, of images resized ("antialias") to (width, height)
    of `sizes`."""
    from retinanet.kernels.cpu.resampling import fill

    if preprocessing.channel_order == "bgr":
        images = [image[:, :, ::-1] for image in images]
    divisor = preprocessing.divisor
    width, height = (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
    batch = np.empty((len(images), height, width, 3), np.float32)
    fill(batch, list(images), list(sizes), *preprocessing.normalisation())
    return torch.from_numpy(batch).permute(0, 3, 1, 2)
