"""Muon: gradient descent whose steps have all singular values equal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# The quintic of Keller Jordan: five rounds of s <- a s + b s^3 + c s^5 bring every singular value above about 0.0015
# of the matrix's norm into 0.68..1.2. It does not converge to 1, and need not: that is why five rounds are enough.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon(Optimizer):
    """MomentUm Orthogonalised by Newton-Schulz, for convolutions: a weight `[out, in, h, w]` is the matrix
    `[out, in h w]`.

    m <- momentum m + (1 - momentum) g;  U = the orthogonal factor of (1 - momentum) g + momentum m (Nesterov);
    w <- (1 - lr weight_decay) w - lr 0.2 sqrt(max(out, in h w)) U.

    The factor gives an element of the step a root mean square of 0.14 to 0.24 lr whatever the shape, near AdamW's
    0.2 lr (Liu et al., "Muon is Scalable for LLM Training", 2025). A gradient of a convolution has few large
    singular values; equal ones let the rare directions learn as fast as the common ones.

    Args:
        params: parameters of two or more dimensions, or groups of them.
        lr: > 0.
        momentum: in [0, 1).
        weight_decay: >= 0, decoupled.

    Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    # What fused optimisers of torch have, too: a scalar on the device, not 0 where nothing is to change in a step.
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Equal shapes share one batched product: a pyramid and its heads have a dozen of the same.
            alike: defaultdict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                gradient = parameter.grad
                if self.found_inf is not None:  # the momentum itself moves the momentum by nothing
                    gradient = torch.where(self.found_inf != 0, state["momentum"], gradient)
                average = state["momentum"].lerp_(gradient, 1 - group["momentum"])
                ahead = gradient.lerp(average, group["momentum"])
                # Channels last, as the weights lie in memory; the order of columns does not matter to U V^T.
                matrix = ahead.movedim(1, -1).flatten(1)
                alike[(matrix.shape[0], matrix.shape[1])].append((parameter, matrix))
            for shape, members in alike.items():
                steps = orthogonal_factor(torch.stack([matrix for _, matrix in members]))
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for (parameter, _), step in zip(members, steps, strict=True):
                    decay = group["lr"] * group["weight_decay"]
                    if self.found_inf is None:
                        parameter.mul_(1 - decay)
                    else:
                        taken = self.found_inf == 0
                        parameter.mul_(torch.where(taken, 1 - decay, 1.0))
                        step = step * taken
                    last = step.view(parameter.movedim(1, -1).shape)
                    parameter.sub_(last.movedim(-1, 1), alpha=scale)
        return loss


def orthogonal_factor(matrices: Tensor) -> Tensor:
    """Return U V^T, nearly, of each matrix U S V^T in `[N, rows, columns]`; a zero matrix gives zeros.

    The usual form is X <- a X + (b A + c A^2) X with A = X X^T, five times. Here the rounds run on A alone, the Gram
    matrix of the shorter side: for a 3x3 convolution with as many outputs as inputs 2.6 times less arithmetic.
    It needs float32 with all its bits (torch's default; TF32 is not enough): rounding makes the zero
    eigenvalues of a matrix without full rank slightly negative, and every round enlarges them tenfold.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).float()
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-20)[:, None, None]
    a, b, c = QUINTIC
    gram = x @ x.mT
    product = identity = torch.eye(x.shape[1], device=x.device).expand_as(gram)
    for i in range(ROUNDS):
        polynomial = torch.baddbmm(a * identity + b * gram, gram, gram, alpha=c)
        product = polynomial if i == 0 else polynomial @ product
        if i < ROUNDS - 1:
            gram = polynomial @ gram @ polynomial  # all of them commute: the next round's Gram matrix
    factor: Tensor = (product @ x).to(matrices.dtype)
    return factor if wide else factor.mT
