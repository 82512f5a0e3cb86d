"""Boxes: conversions, the IoU family, delta coding, NMS.

A box is `xyxy` in continuous absolute pixels: width = x2 - x1. Every function takes empty input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from retinanet import kernels
from retinanet.errors import ConfigError

Overlap = Callable[[Tensor, "Tensor"], Tensor]


def xywh_to_xyxy(boxes: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N 4"]:
    """Convert (left, top, width, height), the format of COCO files, to xyxy."""
    corner, size = boxes.split(2, dim=-1)
    return torch.cat((corner, corner + size), dim=-1)


def xyxy_to_xywh(boxes: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N 4"]:
    """Convert xyxy to (left, top, width, height)."""
    first, last = boxes.split(2, dim=-1)
    return torch.cat((first, last - first), dim=-1)


def cxcywh_to_xyxy(boxes: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N 4"]:
    """Convert (centre x, centre y, width, height) to xyxy."""
    center, size = boxes.split(2, dim=-1)
    return torch.cat((center - size / 2, center + size / 2), dim=-1)


def xyxy_to_cxcywh(boxes: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N 4"]:
    """Convert xyxy to (centre x, centre y, width, height)."""
    first, last = boxes.split(2, dim=-1)
    return torch.cat(((first + last) / 2, last - first), dim=-1)


def area(boxes: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N"]:
    """Return width * height in square pixels (negative for a box turned inside out on one axis)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def clip(boxes: Float[Tensor, "*N 4"], *, height: float, width: float) -> Float[Tensor, "*N 4"]:
    """Move corners that lie outside an image to its border."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(
        (x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)), dim=-1
    )


def intersection(a: Float[Tensor, "*N 4"], b: Float[Tensor, "*M 4"]) -> Float[Tensor, "*O"]:
    """Return the area that a and b share, broadcast over leading dimensions; 0 when they only touch."""
    first = torch.maximum(a[..., :2], b[..., :2])
    last = torch.minimum(a[..., 2:], b[..., 2:])
    width, height = (last - first).clamp(min=0).unbind(-1)
    return width * height


def iou(a: Float[Tensor, "*N 4"], b: Float[Tensor, "*M 4"]) -> Float[Tensor, "*O"]:
    """IoU = |a ∩ b| / |a ∪ b|, broadcast over leading dimensions; in [0, 1].

    Two empty boxes have IoU 0. No epsilon is added: a box of a millionth of a pixel has IoU 1 with
    itself. The gradient is finite everywhere.

    >>> iou(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 3.0, 2.0])).item()
    0.3333333432674408
    """
    shared = intersection(a, b)
    return _ratio(shared, area(a) + area(b) - shared)


def giou(a: Float[Tensor, "*N 4"], b: Float[Tensor, "*M 4"]) -> Float[Tensor, "*O"]:
    """GIoU = IoU - |C without a ∪ b| / |C|, C the smallest box around both; in (-1, 1].

    Reference: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019.
    """
    shared = intersection(a, b)
    union = area(a) + area(b) - shared
    width, height = _enclosing_size(a, b).unbind(-1)
    enclosing = width * height
    return _ratio(shared, union) - _ratio(enclosing - union, enclosing)


def diou(a: Float[Tensor, "*N 4"], b: Float[Tensor, "*M 4"]) -> Float[Tensor, "*O"]:
    """DIoU = IoU - d^2 / c^2: d between the centres, c the diagonal of the smallest box around both; in (-1, 1].

    Reference: Zheng et al., "Distance-IoU Loss", AAAI 2020.
    """
    between = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    return iou(a, b) - _ratio(between.square().sum(-1), _enclosing_size(a, b).square().sum(-1))


def ciou(a: Float[Tensor, "*N 4"], b: Float[Tensor, "*M 4"]) -> Float[Tensor, "*O"]:
    """CIoU = DIoU - alpha v, v = 4/pi^2 (atan(w_a/h_a) - atan(w_b/h_b))^2, alpha = v / (1 - IoU + v).

    alpha is a constant to the gradient, as its authors define it. A box without width or height counts
    as square in v, which keeps the gradient finite.

    Reference: Zheng et al., "Distance-IoU Loss", AAAI 2020.
    """
    v = 4 / math.pi**2 * (_slant(a) - _slant(b)).square()
    with torch.no_grad():
        alpha = _ratio(v, 1 - iou(a, b) + v)
    return diou(a, b) - alpha * v


def pairwise(overlap: Overlap, a: Float[Tensor, "N 4"], b: Float[Tensor, "M 4"]) -> Float[Tensor, "N M"]:
    """Apply `iou`, `giou`, `diou`, `ciou` or `intersection` to every pair of a row of a and a row of b."""
    return overlap(a[:, None], b[None, :])


def _enclosing_size(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    # Both branches of a `where` reach the gradient, so the denominator itself must be safe.
    positive = whole > 0
    return torch.where(positive, part / torch.where(positive, whole, 1), 0)


def _slant(boxes: Tensor) -> Tensor:
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    solid = (width > 0) & (height > 0)
    # Not atan(w / h): the quotient of a needle overflows, and its gradient with it.
    return torch.atan2(torch.where(solid, width, 1), torch.where(solid, height, 1))


@dataclass(frozen=True)
class BoxCoding:
    """The R-CNN parameterisation of a box g relative to an anchor a (centres x, y; sizes w, h).

    t_x = W_x (g_x - a_x) / a_w,  t_y = W_y (g_y - a_y) / a_h,  t_w = W_w log(g_w / a_w),  t_h = W_h log(g_h / a_h)

    Args:
        weights: (W_x, W_y, W_w, W_h), positive.
        clamp: decoded t_w / W_w and t_h / W_h are at most this, so that exp cannot overflow; the default,
            log(1000 / 16), is Detectron's. None does not clamp.
        clamp_both_sides: also at least -clamp, as MMDetection does.

    Reference: Girshick et al., "Rich feature hierarchies", CVPR 2014, Appendix C.
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    clamp: float | None = math.log(1000 / 16)
    clamp_both_sides: bool = False

    def __post_init__(self) -> None:
        if len(self.weights) != 4 or not all(weight > 0 for weight in self.weights):
            raise ConfigError(f"BoxCoding.weights needs four positive numbers; got {self.weights}")
        if self.clamp is not None and not self.clamp > 0:
            raise ConfigError(f"BoxCoding.clamp needs a positive number or None; got {self.clamp}")
        if self.clamp is None and self.clamp_both_sides:
            raise ConfigError("BoxCoding.clamp_both_sides needs BoxCoding.clamp, which is None")

    def encode(self, anchors: Float[Tensor, "*N 4"], boxes: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N 4"]:
        """Return the deltas that turn each anchor into its box; both need positive sizes."""
        anchor_center, anchor_size = xyxy_to_cxcywh(anchors).split(2, dim=-1)
        center, size = xyxy_to_cxcywh(boxes).split(2, dim=-1)
        deltas = torch.cat(((center - anchor_center) / anchor_size, torch.log(size / anchor_size)), dim=-1)
        return deltas * deltas.new_tensor(self.weights)

    def decode(self, anchors: Float[Tensor, "*N 4"], deltas: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N 4"]:
        """Return the boxes that the deltas say, in float32 or better."""
        deltas = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
        shift, log_scale = (deltas / deltas.new_tensor(self.weights)).split(2, dim=-1)
        if self.clamp is not None:
            log_scale = log_scale.clamp(min=-self.clamp if self.clamp_both_sides else None, max=self.clamp)
        anchor_center, anchor_size = xyxy_to_cxcywh(anchors).split(2, dim=-1)
        center = anchor_center + shift * anchor_size
        return cxcywh_to_xyxy(torch.cat((center, anchor_size * log_scale.exp()), dim=-1))


def nms(
    boxes: Float[Tensor, "N 4"],
    scores: Float[Tensor, "N"],
    labels: Int64[Tensor, "N"],
    threshold: float,
    *,
    max_kept: int | None = None,
) -> Int64[Tensor, "M"]:
    """Per-class greedy non-maximum suppression: return the indices kept, best score first.

    In order of score descending, then index ascending, a box is kept unless a kept box of its class has
    IoU > threshold with it. With `max_kept` the work stops once that many are kept; since boxes are met in
    order of score, the result is the head of the full one.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(f"nms needs a threshold in [0, 1]; got {threshold}")
    if max_kept is not None and max_kept < 1:
        raise ConfigError(f"nms needs max_kept of at least 1 or None; got {max_kept}")
    # From CUDA the boxes come here: greedy is sequential, and a thousand of them take a tenth of a millisecond.
    boxes_here, scores_here = boxes.detach().float().cpu(), scores.detach().float().cpu()
    run = kernels.nms if kernels.available("cpu") else plain_nms
    return run(boxes_here, scores_here, labels.cpu(), threshold, max_kept).to(boxes.device)


def plain_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_kept: int | None = None
) -> Tensor:
    """Do as `nms` on the CPU, readably. The loop is sequential, and NumPy is quicker than torch at small vectors."""
    order = np.argsort(-scores.numpy(), kind="stable")
    x1, y1, x2, y2 = boxes.numpy()[order].T
    classes = labels.numpy()[order]
    areas = (x2 - x1) * (y2 - y1)
    alive = np.ones(len(order), dtype=bool)
    kept: list[int] = []
    for i in range(len(order)):
        if not alive[i]:
            continue
        kept.append(i)
        if len(kept) == max_kept:
            break
        width = np.minimum(x2[i], x2[i + 1 :]) - np.maximum(x1[i], x1[i + 1 :])
        height = np.minimum(y2[i], y2[i + 1 :]) - np.maximum(y1[i], y1[i + 1 :])
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        union = areas[i] + areas[i + 1 :] - shared
        # The quotient itself is compared (not shared > threshold * union): another rounding would be another NMS.
        overlap = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
        alive[i + 1 :] &= (overlap <= threshold) | (classes[i + 1 :] != classes[i])
    return torch.from_numpy(order[np.array(kept, dtype=np.int64)])
