"""Optimiser and schedule."""

from __future__ import annotations

import math
from typing import Generic, Literal, TypeVar

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

M = TypeVar("M", bound=nn.Module)


def build_optimizer(
    model: nn.Module, *, name: Literal["sgd", "adamw"], lr: float, weight_decay: float, decay_all: bool
) -> Optimizer:
    """Return SGD (momentum 0.9) or AdamW over the parameters that train.

    Unless `decay_all`, norms and biases (tensors of one dimension) are not decayed: shrinking a scale or an
    offset does not make a function simpler.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if decay_all or p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if not decay_all and p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=0.9, fused=True)
    return AdamW(groups, lr=lr, fused=True)


def rate(
    step: int,
    steps: int,
    *,
    schedule: Literal["step", "cosine"],
    warmup_steps: int,
    warmup_from: float,
) -> float:
    """Return the factor on the learning rate at a step 0..steps-1.

    step: 1, a tenth from 2/3 of the run and a hundredth from 8/9 (the paper's 60k and 80k of 90k).
    cosine: from 1 to 0 along half a cosine. Over `warmup_steps` the factor rises from `warmup_from` to it.
    """
    if schedule == "step":
        factor = 0.1 ** ((step >= steps * 2 / 3) + (step >= steps * 8 / 9))
    else:
        factor = (1 + math.cos(math.pi * step / steps)) / 2
    if step < warmup_steps:
        factor *= warmup_from + (1 - warmup_from) * step / warmup_steps
    return factor


def set_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class WeightAverage(Generic[M]):
    """Exponential moving average of a model's weights: a <- a + (1 - d) (w - a), d = min(decay, (1 + t) / (10 + t)).

    The short memory at the start keeps the initial weights out of it. Buffers (running statistics) are copied.
    """

    def __init__(self, average: M, decay: float) -> None:
        self.model = average
        average.requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        for kept, new in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(new)
