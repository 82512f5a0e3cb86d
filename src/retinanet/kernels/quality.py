"""What the varifocal loss says of objects: few rows, put beside the one pass over all logits, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def add_objects(
    total: Tensor, gradient: Tensor, logits: Tensor, classes: Tensor, weight: Tensor | None, quality: Tensor
) -> Tensor:
    """Return `total` with the losses of objects' own classes, whose derivatives are written into `gradient`, if any.

    The loss of a logit x with p = sigmoid(x) is -q (q log p + (1 - q) log(1 - p)), its derivative q (p - q). A row of
    weight 0 is not looked at. No shape depends on a value, so that the host waits for no device.
    """
    counts = classes >= 0 if weight is None else (classes >= 0) & (weight != 0)
    own = torch.where(counts, classes, 0)[:, None]
    x = torch.where(counts, logits.gather(1, own)[:, 0].float(), 0)
    q = torch.where(counts, quality, 0)
    share = q if weight is None else torch.where(counts, q * weight, 0)
    if gradient.numel():
        slope = (share * (x.sigmoid() - q)).to(gradient.dtype)
        gradient.scatter_(1, own, torch.where(counts[:, None], slope[:, None], gradient.gather(1, own)))
    losses = share * (q * logsigmoid(x) + (1 - q) * logsigmoid(-x))
    return total - losses.sum(dtype=torch.float64).to(total.dtype)
