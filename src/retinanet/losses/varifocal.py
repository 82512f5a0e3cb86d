"""The varifocal loss: the focal loss whose objects are to score how good their boxes are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from retinanet.errors import ConfigError
from retinanet.losses.arguments import Normalizer, Reduction, balance, known, of_elements, reduce, require
from retinanet.losses.focal import fast, focal_of_margin, has_fast_path

WHO = "sigmoid_varifocal_loss"


def sigmoid_varifocal_loss(
    inputs: Tensor,
    targets: Tensor,
    quality: Tensor,
    alpha: float | None = 0.25,
    gamma: float = 2,
    reduction: Reduction = "none",
    *,
    weight: Tensor | None = None,
    ignore: Tensor | None = None,
    normalizer: Normalizer | None = None,
) -> Tensor:
    r"""Varifocal loss of K independent sigmoids. The own class of an object whose box has the quality q is to score q:
    VFL(p, q) = -q (q log p + (1 - q) log(1 - p)); everything else is to score 0, by the focal loss as it is:
    VFL(p, 0) = -(1 - alpha) p^gamma log(1 - p).

    So a well placed box outranks its neighbours on the same object, which is what NMS and AP ask for, and the best
    examples weigh most among objects, the hardest among the rest. Where p = q the gradient is 0. An object whose box
    misses it, q = 0, costs nothing, as q near 0 costs next to nothing; the publication's Eq. 2, to the letter, takes it
    for background.

    Args:
        inputs: logits `[..., K]`, any floating type; the loss is computed in float32 or better.
        targets: int64 class indices `inputs.shape[:-1]`, 0..K-1; any negative one means "no object".
        quality: q in [0, 1] of every row, `inputs.shape[:-1]`, for instance the IoU of its box with the object; not
            looked at where there is no object. No gradient flows into it.
        alpha: as in `sigmoid_focal_loss`, of what is no object alone: 1 - alpha weighs it (0.75 in the publication).
        gamma: >= 0; how fast easy negatives lose weight.

    The other arguments, shapes and errors: see `sigmoid_focal_loss`, also for what is one pass over the logits.

    >>> x = torch.tensor([[0.0, 2.0, -3.0]])
    >>> sigmoid_varifocal_loss(x, torch.tensor([1]), torch.tensor([0.9]), reduction="sum")
    tensor(0.4243)

    Reference: Zhang, Wang, Dayoub, Sünderhauf, "VarifocalNet: An IoU-aware Dense Object Detector", CVPR 2021, Eq. 2.
    """
    if not 0 <= gamma < float("inf"):
        raise ConfigError(f"{WHO} needs gamma >= 0; got {gamma}")
    by_index = require(WHO, inputs, targets, alpha, reduction, normalizer, weight, ignore)
    if not by_index:
        raise ConfigError(
            f"{WHO} needs int64 class indices of shape {list(inputs.shape[:-1])}; got {targets.dtype} of shape "
            f"{list(targets.shape)}"
        )
    _require_quality(quality, targets)
    quality = quality.detach()
    if (
        reduction != "none"
        and inputs.numel()
        and has_fast_path(inputs, targets, alpha, weight, ignore, quality)
    ):
        return fast(inputs, targets, alpha, gamma, reduction, weight, ignore, normalizer, quality)
    logits = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    unknown = None if ignore is None else of_elements(ignore, inputs)
    if unknown is not None:  # else the gradient of an infinite loss would be 0 times infinity
        logits = torch.where(unknown, 0, logits)
    _, of_negative = balance(alpha, logits)
    loss = of_negative * focal_of_margin(-logits, gamma)
    if inputs.numel():
        # One element of every row, of most rows not used: how many are, a host that asked a device would wait for.
        own, is_object = targets.clamp(min=0)[..., None], (targets >= 0)[..., None]
        q = torch.where(is_object, quality[..., None], 0).to(logits.dtype)
        right = torch.where(is_object, _of_object(logits.gather(-1, own), q), loss.gather(-1, own))
        loss = loss.scatter(-1, own, right)
    if weight is not None:
        loss = loss * weight[..., None]
    if unknown is not None:
        loss = torch.where(unknown, 0, loss)
    return reduce(loss, targets, reduction, normalizer, ignore)


def _of_object(logits: Tensor, quality: Tensor) -> Tensor:
    """Return -q (q log p + (1 - q) log(1 - p))."""
    return -quality * (quality * logsigmoid(logits) + (1 - quality) * logsigmoid(-logits))


def _require_quality(quality: Tensor, targets: Tensor) -> None:
    if quality.shape != targets.shape or not quality.is_floating_point():
        raise ConfigError(
            f"{WHO} needs a floating quality of shape {list(targets.shape)}, one a row of inputs; got {quality.dtype} "
            f"of shape {list(quality.shape)}"
        )
    if known(quality):
        wrong = (targets >= 0) & ((quality < 0) | (quality > 1))
        if wrong.any():
            raise ConfigError(
                f"{WHO} needs a quality in [0, 1] for every object; got {quality[wrong][0].item():g}"
            )
