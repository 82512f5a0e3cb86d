"""The closed-form derivatives of Appendix B, of the losses without alpha, with respect to the logit x.

y is +1 for an object and -1 for background, as in Appendix B (targets of the losses are 1 and 0); p_t = sigmoid(y x).
All of them tend to 0 where the answer is right beyond doubt; where it is wrong beyond doubt, to -y. Stable for any
logit x with a finite gamma x; equal to autograd (tested). All raise ConfigError for a y that is neither +1 nor -1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from retinanet.errors import ConfigError
from retinanet.losses.arguments import known


def cross_entropy_derivative(x: Float[Tensor, "*N"], y: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """dCE/dx = y (p_t - 1), Eq. 9, in (-1, 1)."""
    _require_signs("cross_entropy_derivative", y)
    return -y * torch.sigmoid(-y * x)


def focal_loss_derivative(
    x: Float[Tensor, "*N"], y: Float[Tensor, "*N"], gamma: float = 2
) -> Float[Tensor, "*N"]:
    """dFL/dx = y (1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1), Eq. 10; gamma >= 0."""
    _require_signs("focal_loss_derivative", y)
    if not 0 <= gamma < float("inf"):
        raise ConfigError(f"focal_loss_derivative needs gamma >= 0; got {gamma}")
    x_t = y * x
    modulating = torch.exp(gamma * logsigmoid(-x_t))
    return y * modulating * (gamma * torch.sigmoid(x_t) * logsigmoid(x_t) - torch.sigmoid(-x_t))


def focal_star_loss_derivative(
    x: Float[Tensor, "*N"], y: Float[Tensor, "*N"], gamma: float = 2, beta: float = 1
) -> Float[Tensor, "*N"]:
    """dFL*/dx = y (p_t* - 1) with p_t* = sigmoid(gamma y x + beta), Eq. 11; gamma > 0, any finite beta; in (-1, 1)."""
    _require_signs("focal_star_loss_derivative", y)
    if not 0 < gamma < float("inf"):
        raise ConfigError(f"focal_star_loss_derivative needs gamma > 0; got {gamma}")
    if not abs(beta) < float("inf"):
        raise ConfigError(f"focal_star_loss_derivative needs a finite beta; got {beta}")
    return -y * torch.sigmoid(-(gamma * y * x + beta))


def _require_signs(who: str, y: Tensor) -> None:
    if known(y) and not (y.abs() == 1).all():
        wrong = float(y[y.abs() != 1][0])
        raise ConfigError(f"{who} needs y of +1 (an object) or -1 (background); got {wrong:g}")
