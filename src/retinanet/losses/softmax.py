"""The focal loss over classes that exclude each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from retinanet.errors import ConfigError
from retinanet.losses.arguments import Normalizer, Reduction, reduce, require


def softmax_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: Tensor | None = None,
    gamma: float = 2,
    reduction: Reduction = "none",
    *,
    weight: Tensor | None = None,
    ignore: Tensor | None = None,
    normalizer: Normalizer | None = None,
) -> Tensor:
    r"""Focal loss of a softmax over K classes: -sum_k y_k alpha_k (1 - p_k)^gamma log(p_k).

    p = softmax(x). With class indices only the term of the true class is there: Eq. 4 and 5 with p_t its probability,
    the multi-class form that Section 3 mentions. gamma 0 is cross entropy. There is no background class unless one of
    the K is it.

    Args:
        inputs: logits `[..., K]`, any floating type; computed in float32 or better.
        targets: int64 class indices `inputs.shape[:-1]`, 0..K-1, where a negative one means "ignored"; or
            dense, the shape of `inputs`, in [0, 1].
        alpha: weights of the classes, `[K]`, in [0, 1]; None is 1 for each.
        gamma: >= 0.
        reduction: "none" returns the loss of every row, `inputs.shape[:-1]`; "sum", "mean" a scalar.
        weight, ignore: of rows, `inputs.shape[:-1]`.
        normalizer: what "mean" divides by: "rows" (the default, here the same as "elements"), those that are
            not ignored; "positives" (rows with a class; of dense targets their sum); a number or a tensor.

    Raises:
        ConfigError: as `sigmoid_focal_loss`.

    >>> softmax_focal_loss(torch.zeros(1, 2), torch.tensor([1]))
    tensor([0.1733])
    """
    who = "softmax_focal_loss"
    if not 0 <= gamma < float("inf"):
        raise ConfigError(f"{who} needs gamma >= 0; got {gamma}")
    if alpha is not None and not isinstance(alpha, Tensor):
        raise ConfigError(
            f"{who} needs an alpha for each class, a tensor of shape {list(inputs.shape[-1:])}; got {alpha}"
        )
    by_index = require(who, inputs, targets, alpha, reduction, normalizer, weight, ignore)
    if ignore is not None and ignore.ndim == inputs.ndim:
        raise ConfigError(
            f"{who} needs an ignore of shape {list(inputs.shape[:-1])}; got {list(ignore.shape)}"
        )
    if by_index:
        nothing = targets < 0
        ignore = nothing if ignore is None else nothing | ignore
    logits = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    if ignore is not None:
        logits = torch.where(ignore[..., None], 0, logits)
    log_p = log_softmax(logits, dim=-1)
    alphas = None if alpha is None else alpha.to(log_p)
    if by_index:
        own = targets.clamp(min=0)
        loss = _of_probability(log_p.gather(-1, own[..., None])[..., 0], gamma)
        loss = loss if alphas is None else loss * alphas[own]
    else:
        each = targets.to(log_p) * _of_probability(log_p, gamma)
        loss = (each if alphas is None else each * alphas).sum(dim=-1)
    if weight is not None:
        loss = loss * weight
    if ignore is not None:
        loss = torch.where(ignore, 0, loss)
    return loss if reduction == "none" else reduce(loss[..., None], targets, reduction, normalizer, ignore)


def _of_probability(log_p: Tensor, gamma: float) -> Tensor:
    """Return -(1 - p)^gamma log p."""
    if gamma == 0:
        return -log_p
    # A root has no slope at 0, so the least that a float holds stands for 1 - p where p rounds to 1.
    others = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return -(others**gamma) * log_p
