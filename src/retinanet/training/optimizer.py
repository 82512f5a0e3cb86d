"""Optimiser and schedule."""

from __future__ import annotations

import math
from typing import Generic, Literal, TypeVar

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from retinanet.model import RetinaNet
from retinanet.training.muon import Muon

M = TypeVar("M", bound=nn.Module)


# What Muon does not train (norms, biases, the first and the last convolutions) takes AdamW steps of this share.
ADAMW_SHARE = 0.25


def build_optimizers(
    network: RetinaNet,
    *,
    name: Literal["sgd", "adamw", "muon"],
    lr: float,
    weight_decay: float,
    decay_all: bool,
) -> list[Optimizer]:
    """Return what steps the parameters that train: SGD (momentum 0.9), AdamW, or Muon with AdamW beside it.

    Unless `decay_all`, norms and biases (tensors of one dimension) are not decayed: shrinking a scale or an
    offset does not make a function simpler. Muon trains the convolutions inside; it is not meant for those
    that read pixels or give the outputs, nor for depthwise ones, which are no matrices.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    inside = hidden_weights(network) if name == "muon" else []
    beside = [parameter for parameter in trained if not any(parameter is weight for weight in inside)]
    groups = [
        {"params": [p for p in beside if decay_all or p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in beside if not decay_all and p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "sgd":
        return [SGD(groups, lr=lr, momentum=0.9, fused=True)]
    if name == "adamw" or not inside:
        return [AdamW(groups, lr=lr, fused=True)]
    for group in groups:
        group["share"] = ADAMW_SHARE
    return [Muon(inside, lr=lr, weight_decay=weight_decay), AdamW(groups, lr=lr * ADAMW_SHARE, fused=True)]


def hidden_weights(network: RetinaNet) -> list[nn.Parameter]:
    """Return the weights that Muon trains: matrices between features, neither from pixels nor to the outputs."""
    outputs = [network.class_head.last.weight, network.box_head.last.weight]
    return [
        p
        for p in network.parameters()
        if p.requires_grad
        and p.ndim > 1
        and min(p.shape[:2]) > 3
        and not any(p is output for output in outputs)
    ]


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


def set_rate(optimizers: list[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1.0)


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
