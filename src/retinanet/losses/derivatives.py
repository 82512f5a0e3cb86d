"""The closed-form derivatives of Appendix B, of the losses without alpha, with respect to the logit x.

y is +1 for an object and -1 for background; p_t = sigmoid(y x). All of them tend to 0 where the answer is right beyond
doubt; where it is wrong beyond doubt, to -y. Stable for any finite logit; equal to autograd (tested).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def cross_entropy_derivative(x: Float[Tensor, "*N"], y: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """dCE/dx = y (p_t - 1), Eq. 9."""
    return -y * torch.sigmoid(-y * x)


def focal_loss_derivative(
    x: Float[Tensor, "*N"], y: Float[Tensor, "*N"], gamma: float = 2
) -> Float[Tensor, "*N"]:
    """dFL/dx = y (1 - p_t)^gamma (gamma p_t log(p_t) + p_t - 1), Eq. 10."""
    x_t = y * x
    modulating = torch.exp(gamma * logsigmoid(-x_t))
    return y * modulating * (gamma * torch.sigmoid(x_t) * logsigmoid(x_t) - torch.sigmoid(-x_t))


def focal_star_loss_derivative(
    x: Float[Tensor, "*N"], y: Float[Tensor, "*N"], gamma: float = 2, beta: float = 1
) -> Float[Tensor, "*N"]:
    """dFL*/dx = y (p_t* - 1) with p_t* = sigmoid(gamma y x + beta), Eq. 11."""
    return -y * torch.sigmoid(-(gamma * y * x + beta))
