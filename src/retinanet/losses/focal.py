"""The focal loss (Sections 3.1 and 3.2 of the paper), from logits: sigmoid and loss are one operation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from retinanet import kernels
from retinanet.errors import ConfigError
from retinanet.losses.arguments import (
    Alpha,
    Normalizer,
    Reduction,
    balance,
    divisor,
    require,
    sigmoid_loss,
)

WHO = "sigmoid_focal_loss"


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = 0.25,
    gamma: float = 2,
    reduction: Reduction = "none",
    *,
    weight: Tensor | None = None,
    ignore: Tensor | None = None,
    normalizer: Normalizer | None = None,
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
        alpha: in [0, 1]; the weight of y = 1. A tensor `[K]` holds one for each class.
        gamma: >= 0; how fast easy examples lose weight.
        reduction: "none" returns the shape of `inputs`; "sum", "mean" a scalar.
        weight: multiplies the loss, shape `inputs.shape[:-1]`; 0 ignores a row (its gradient is 0).
        ignore: true for what is neither object nor background: rows, `inputs.shape[:-1]`, or single
            elements, `inputs.shape`. Loss and gradient there are 0, whatever the logit.
        normalizer: what "mean" divides the sum by: "elements" (the default), "rows" or "positives" (rows
            with a class; of dense targets their sum), without those that are ignored and at least 1; or a
            number or scalar tensor. The paper divides by the anchors assigned to objects.

    Raises:
        ConfigError: a number out of its range, shapes that do not fit, a class index of K or more (on CUDA,
            where asking would wait for the device, such a row counts as no object or stops the device).

    From class indices, "sum" and "mean" are one pass over the logits that writes the gradient beside the sum
    (`retinanet.kernels`); it has no second derivative, and "none" has.

    Value and gradient are finite for every gamma and every logit with |gamma x| below the largest number of the type
    (3.4e38 in float32): with x_t = x or -x the loss is -alpha_t exp(gamma log sigmoid(-x_t)) log sigmoid(x_t), and
    log sigmoid never overflows.

    >>> x = torch.tensor([[0.0, 2.0, -3.0]])
    >>> sigmoid_focal_loss(x, torch.tensor([1]), reduction="sum")
    tensor(0.1305)
    >>> sigmoid_focal_loss(x, torch.tensor([[0.0, 1.0, 0.0]]), reduction="sum")
    tensor(0.1305)

    Reference: Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection", ICCV 2017.
    """
    if not 0 <= gamma < float("inf"):
        raise ConfigError(f"{WHO} needs gamma >= 0; got {gamma}")
    if reduction != "none" and inputs.numel() and has_fast_path(inputs, targets, alpha, weight, ignore):
        require(WHO, inputs, targets, alpha, reduction, normalizer, weight, ignore)
        return fast(inputs, targets, alpha, gamma, reduction, weight, ignore, normalizer)
    return sigmoid_loss(
        WHO,
        inputs,
        targets,
        lambda x_t: focal_of_margin(x_t, gamma),
        alpha=alpha,
        reduction=reduction,
        normalizer=normalizer,
        weight=weight,
        ignore=ignore,
        soft=lambda x, y: _soft(x, y, gamma),
    )


def focal_of_margin(x_t: Tensor, gamma: float) -> Tensor:
    """Return -(1 - p_t)^gamma log p_t with p_t = sigmoid(x_t), Eq. 4."""
    cross_entropy = -logsigmoid(x_t)
    return cross_entropy if gamma == 0 else torch.exp(gamma * logsigmoid(-x_t)) * cross_entropy


def _soft(logits: Tensor, y: Tensor, gamma: float) -> Tensor:
    log_p, log_not_p = logsigmoid(logits), logsigmoid(-logits)
    loss = -(y * log_p + (1 - y) * log_not_p)
    if gamma != 0:
        # 1 - p_t = y (1 - p) + (1 - y) p; its logarithm is exact where one of the terms is 0.
        loss = loss * torch.exp(gamma * torch.logaddexp(y.log() + log_not_p, (1 - y).log() + log_p))
    return loss


def has_fast_path(
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha,
    weight: Tensor | None,
    ignore: Tensor | None,
    quality: Tensor | None = None,
) -> bool:
    """Return whether the one pass takes these, of the varifocal loss with the quality of each row's box."""
    if targets.dtype != torch.int64 or isinstance(alpha, Tensor):
        return False
    if ignore is not None and ignore.ndim == inputs.ndim:
        return False
    given = tuple(tensor for tensor in (inputs, targets, weight, ignore, quality) if tensor is not None)
    learned = weight is not None and weight.requires_grad
    return kernels.usable(*given, dtypes=(torch.float32, torch.bfloat16)) and not learned


def fast(
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha,
    gamma: float,
    reduction: Reduction,
    weight: Tensor | None,
    ignore: Tensor | None,
    normalizer: Normalizer | None,
    quality: Tensor | None = None,
) -> Tensor:
    """Return the focal loss, with a quality the varifocal loss, summed by the one pass."""
    of_positive, of_negative = balance(alpha, inputs)
    weights = None if weight is None else weight.reshape(-1).float()
    if ignore is not None:
        known = inputs.new_ones(targets.numel(), dtype=torch.float32) if weights is None else weights
        weights = torch.where(ignore.reshape(-1), 0, known)
    if reduction == "mean":  # within the sum, so that a bfloat16 gradient is rounded once
        ones = inputs.new_ones(targets.numel(), dtype=torch.float32)
        weights = (ones if weights is None else weights) / divisor(inputs, targets, normalizer, ignore)
    rows = inputs.reshape(targets.numel(), inputs.shape[-1])
    scores = None if quality is None else quality.reshape(-1).float()
    return kernels.focal_sum(
        rows, targets.reshape(-1), weights, float(of_positive), float(of_negative), gamma, scores
    )
