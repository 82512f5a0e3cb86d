"""Optimiser and schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from retinanet.training.muon import Muon

M = TypeVar("M", bound=nn.Module)


# Muon's rate is this many times AdamW's: the best of 1, 2 and 4 tried (decision 0006).
MUON_FACTOR = 4.0


def build_optimizers(
    network: nn.Module,
    *,
    outputs: Sequence[nn.Module],
    name: Literal["sgd", "adamw", "muon"],
    lr: float,
    weight_decay: float,
    decay_all: bool,
) -> list[Optimizer]:
    """Return what steps the parameters that train: SGD (momentum 0.9), AdamW, or Muon with AdamW beside it.

    Unless `decay_all`, norms and biases (tensors of one dimension) are not decayed: shrinking a scale or an
    offset does not make a function simpler. With "muon", `lr` is AdamW's and `MUON_FACTOR` times it is Muon's;
    `outputs` are the layers that it leaves to AdamW (`hidden_weights`).
    """
    inside = hidden_weights(network, outputs) if name == "muon" else []
    of_muon = {id(weight) for weight in inside}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in of_muon]
    groups = [
        {"params": [p for p in rest if decay_all or p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if not decay_all and p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "sgd":
        sgd = SGD(groups, lr=lr, momentum=0.9, fused=True)
        for parameter in rest:
            # Torch makes it in the first step, of memory as it lies there; where that step is skipped, it stays so.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return [sgd]
    adamw = AdamW(groups, lr=lr, fused=True)
    if name == "adamw":
        return [adamw]
    return [
        Muon([{"params": inside, "factor": MUON_FACTOR}], lr=lr * MUON_FACTOR, weight_decay=weight_decay),
        adamw,
    ]


def hidden_weights(network: nn.Module, outputs: Sequence[nn.Module]) -> list[Tensor]:
    """Return the weights that Muon trains: matrices between features.

    Not the first convolution, which reads pixels, nor those of `outputs`, the last ones: their rows and
    columns are no interchangeable features. Nor grouped and depthwise convolutions, which are many matrices.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    ends = {layers[0], *(layer for output in outputs for layer in output.modules())}
    inner = [layer for layer in layers if layer not in ends and getattr(layer, "groups", 1) == 1]
    return [layer.weight for layer in inner if layer.weight.requires_grad]


def rate(
    step: float,
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
        factor = 0.1 ** sum(step >= drop for drop in drops_of(steps))
    else:
        factor = (1 + math.cos(math.pi * step / steps)) / 2
    if step < warmup_steps:
        factor *= warmup_from + (1 - warmup_from) * step / warmup_steps
    return factor


def drops_of(steps: int) -> tuple[int, int]:
    """Return the steps from which schedule "step" divides the rate by ten: 60k and 80k of 90k."""
    return math.ceil(steps * 2 / 3), math.ceil(steps * 8 / 9)


def set_rate(optimizers: list[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)


class WeightAverage(Generic[M]):
    """Exponential moving average of a model's weights: a <- a + (1 - d) (w - a), d = min(decay, (1 + t) / (10 + t))
    in update t = 1, 2, ...

    The short memory at the start keeps the initial weights out of it. Buffers (running statistics) are copied.
    """

    def __init__(self, average: M, decay: float) -> None:
        self.model = average
        average.requires_grad_(False)
        self.decay = decay
        # On the device, which alone knows in time whether a step counts.
        self.updates = torch.zeros((), dtype=torch.int64, device=next(average.parameters()).device)

    @torch.no_grad()
    def update(self, model: nn.Module, taken: Tensor | bool = True) -> None:
        """Follow the model by one step; nothing moves or counts where that was not `taken`, a scalar."""
        self.updates += taken
        follows = (9 / (10 + self.updates)).clamp(min=1 - self.decay) * taken
        averaged: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(averaged, list(model.parameters()), [follows] * len(averaged))
        for kept, new in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(new)
