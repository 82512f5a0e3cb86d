"""The focal loss (Sections 3.1 and 3.2 of the paper), from logits: sigmoid and loss are one operation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from retinanet import kernels
from retinanet.errors import ConfigError

Reduction = Literal["none", "mean", "sum"]


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | None = 0.25,
    gamma: float = 2,
    reduction: Reduction = "none",
    *,
    weight: Tensor | None = None,
) -> Tensor:
    r"""Focal loss of K independent sigmoids: FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t), Eq. 5.

    p = sigmoid(x); p_t = p where y = 1, else 1 - p; alpha_t = alpha where y = 1, else 1 - alpha.
    gamma 0 is alpha-balanced cross entropy (Eq. 3); alpha None (or negative, torchvision's way to say it)
    leaves alpha_t out (Eq. 4).

    Args:
        inputs: logits `[..., K]`, any floating type; the loss is computed in float32 or better.
        targets: dense, the shape of `inputs`, in [0, 1] (soft labels allowed: cross entropy and p_t
            interpolate between y = 0 and y = 1, as in torchvision); or int64 class indices
            `inputs.shape[:-1]`, 0..K-1, where any negative index means "no object". Indices never
            become a one-hot tensor.
        alpha: in [0, 1]; the weight of y = 1.
        gamma: >= 0; how fast easy examples lose weight.
        reduction: "none" returns the shape of `inputs`; "sum", "mean" a scalar ("mean" over all elements).
        weight: multiplies the loss, shape `inputs.shape[:-1]`; 0 ignores a row (its gradient is 0).

    Raises:
        ConfigError: a number out of its range, shapes that do not fit, a class index of K or more (on CUDA,
            where asking would wait for the device, such a row counts as no object or stops the device).

    From class indices, "sum" and "mean" are one pass over the logits that writes the gradient beside the sum
    (`retinanet.kernels`); it has no second derivative, and "none" has.

    Value and gradient are finite for every finite logit and every gamma: with x_t = x or -x the loss is
    -alpha_t exp(gamma log sigmoid(-x_t)) log sigmoid(x_t), and log sigmoid never overflows.

    >>> x = torch.tensor([[0.0, 2.0, -3.0]])
    >>> sigmoid_focal_loss(x, torch.tensor([1]), reduction="sum")
    tensor(0.1305)
    >>> sigmoid_focal_loss(x, torch.tensor([[0.0, 1.0, 0.0]]), reduction="sum")
    tensor(0.1305)

    Reference: Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection", ICCV 2017.
    """
    if alpha is not None and not alpha <= 1:
        raise ConfigError(f"sigmoid_focal_loss needs alpha in [0, 1] or None; got {alpha}")
    if not gamma >= 0:
        raise ConfigError(f"sigmoid_focal_loss needs gamma >= 0; got {gamma}")
    if reduction not in ("none", "mean", "sum"):
        raise ConfigError(f"sigmoid_focal_loss needs reduction 'none', 'mean' or 'sum'; got {reduction!r}")
    by_index = targets.shape == inputs.shape[:-1] and targets.dtype == torch.int64
    if not by_index and not (targets.shape == inputs.shape and targets.is_floating_point()):
        raise ConfigError(
            f"sigmoid_focal_loss needs floating targets of shape {list(inputs.shape)} or int64 class indices "
            f"of shape {list(inputs.shape[:-1])}; got {targets.dtype} of shape {list(targets.shape)}"
        )
    if (
        weight is not None and weight.shape != inputs.shape[:-1]
    ):  # it could broadcast to something else in silence
        raise ConfigError(
            f"sigmoid_focal_loss needs a weight of shape {list(inputs.shape[:-1])}, one a row of inputs; "
            f"got {list(weight.shape)}"
        )
    if by_index:
        _require_classes(targets, inputs.shape[-1])
        if reduction != "none" and inputs.numel() and _has_fast_path(inputs, targets, weight):
            return _fast_sum(
                inputs, targets, alpha, gamma, weight, 1 / inputs.numel() if reduction == "mean" else 1
            )
    logits = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    loss = (
        _from_indices(logits, targets, alpha, gamma)
        if by_index
        else _dense(logits, targets.to(logits.dtype), alpha, gamma)
    )
    if weight is not None:
        loss = loss * weight[..., None]
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


def _require_classes(targets: Tensor, classes: int) -> None:
    # On a device the question would wait for it; there an index beyond the last counts as no object.
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and targets.numel():
        highest = int(targets.max())
        if highest >= classes:
            raise ConfigError(
                f"sigmoid_focal_loss needs class indices below {classes}, the size of the last dimension of inputs; "
                f"got {highest}"
            )


def _has_fast_path(inputs: Tensor, targets: Tensor, weight: Tensor | None) -> bool:
    tensors = (inputs, targets) if weight is None else (inputs, targets, weight)
    learned = weight is not None and weight.requires_grad
    return kernels.usable(*tensors, dtypes=(torch.float32, torch.bfloat16)) and not learned


def _fast_sum(
    inputs: Tensor, targets: Tensor, alpha: float | None, gamma: float, weight: Tensor | None, factor: float
) -> Tensor:
    of_positive, of_negative = _balance(alpha)
    weights = None if weight is None else weight.reshape(-1).float()
    if factor != 1:  # within the sum, so that a bfloat16 gradient is rounded once
        ones = inputs.new_ones(targets.numel(), dtype=torch.float32)
        weights = (ones if weights is None else weights) * factor
    rows = inputs.reshape(targets.numel(), inputs.shape[-1])
    return kernels.focal_sum(rows, targets.reshape(-1), weights, of_positive, of_negative, gamma)


def _balance(alpha: float | None) -> tuple[float, float]:
    """Return alpha_t of y = 1 and of y = 0."""
    return (1.0, 1.0) if alpha is None or alpha < 0 else (alpha, 1 - alpha)


def _hard(x_t: Tensor, gamma: float) -> Tensor:
    """Return -(1 - p_t)^gamma log p_t with p_t = sigmoid(x_t), Eq. 4."""
    cross_entropy = -logsigmoid(x_t)
    return cross_entropy if gamma == 0 else torch.exp(gamma * logsigmoid(-x_t)) * cross_entropy


def _from_indices(logits: Tensor, targets: Tensor, alpha: float | None, gamma: float) -> Tensor:
    # Nearly every element has y = 0: one dense pass takes that for all, a sparse one corrects the rest.
    of_positive, of_negative = _balance(alpha)
    loss = of_negative * _hard(-logits, gamma)
    where = torch.nonzero(targets >= 0, as_tuple=True)
    here = (*where, targets[where])
    return loss.index_put(here, of_positive * _hard(logits[here], gamma))


def _dense(logits: Tensor, targets: Tensor, alpha: float | None, gamma: float) -> Tensor:
    log_p, log_not_p = logsigmoid(logits), logsigmoid(-logits)
    loss = -(targets * log_p + (1 - targets) * log_not_p)
    if gamma != 0:
        # 1 - p_t = y (1 - p) + (1 - y) p; its logarithm is exact where one of the terms is 0.
        loss = loss * torch.exp(
            gamma * torch.logaddexp(targets.log() + log_not_p, (1 - targets).log() + log_p)
        )
    of_positive, of_negative = _balance(alpha)
    return loss * (of_positive * targets + of_negative * (1 - targets))
