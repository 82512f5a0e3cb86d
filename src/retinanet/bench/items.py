"""What `retinanet bench` can measure, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from retinanet.anchors import CPU
from retinanet.bench import (
    checkpointing,
    convolution,
    data,
    importing,
    loss,
    matching,
    memory,
    nms,
    postprocess,
    step,
)
from retinanet.bench.measuring import Contest, Row, measure
from retinanet.devices import Precision


@dataclass(frozen=True)
class Settings:
    """How often and for how long, and on what."""

    repeats: int = 10
    seconds: float = 60.0
    precision: Precision = "fp32"
    steps: tuple[step.StepCase, ...] = ()
    device: torch.device = CPU

    def step_cases(self) -> list[step.StepCase]:
        return list(self.steps) or step.cases(self.precision)


def run(items: Sequence[str], settings: Settings) -> Iterator[Row]:
    """Yield the rows of some items, each as soon as it is measured."""
    device = settings.device
    contests: dict[str, Callable[[], Iterator[Contest]]] = {
        "loss": lambda: loss.contests(device=device),
        "matching": lambda: matching.contests(device=device),
        "nms": lambda: nms.contests(device=device),
        "postprocess": lambda: postprocess.contests(device=device),
        "convolution": lambda: convolution.contests(device=device),
        "step": lambda: chain(
            step.contests(settings.step_cases(), device=device),
            step.compiled_contests(settings.step_cases(), device=device),
        ),
        "data": data.contests,
        "import": importing.contests,
    }
    for item in items:
        if item == "checkpointing":
            yield from checkpointing.rows(turns=min(settings.repeats, checkpointing.TURNS))
            continue
        for contest in contests[item]():
            yield from measure(contest, repeats=settings.repeats, seconds=settings.seconds, device=device)
        if item == "step" and device.type == "cpu":
            yield from memory.rows(settings.step_cases())
