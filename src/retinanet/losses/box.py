"""Box losses: on deltas (smooth L1, L1) and on decoded boxes (GIoU)."""

import torch
from jaxtyping import Float
from torch import Tensor

from retinanet.boxes import giou
from retinanet.errors import ConfigError


def smooth_l1(
    predicted: Float[Tensor, "*N 4"], target: Float[Tensor, "*N 4"], beta: float = 1.0
) -> Float[Tensor, "*N"]:
    """Smooth L1 summed over the four deltas: 0.5 x^2 / beta where |x| < beta, else |x| - 0.5 beta.

    The switch of the paper is at beta = 1; Detectron's code uses 1/9; beta = 0 is L1.

    Reference: Girshick, "Fast R-CNN", ICCV 2015, Eq. 3.
    """
    if not beta >= 0:
        raise ConfigError(f"smooth_l1 needs beta >= 0; got {beta}")
    return torch.nn.functional.smooth_l1_loss(predicted, target, reduction="none", beta=beta).sum(-1)


def l1(predicted: Float[Tensor, "*N 4"], target: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N"]:
    """|x| summed over the four deltas."""
    return smooth_l1(predicted, target, beta=0)


def giou_loss(predicted: Float[Tensor, "*N 4"], target: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N"]:
    """1 - GIoU of xyxy boxes; in [0, 2), and useful as a gradient even when they do not meet."""
    return 1 - giou(predicted, target)
