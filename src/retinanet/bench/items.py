"""What `retinanet bench` can measure, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from retinanet.bench import importing, loss, matching, memory, nms, postprocess, step
from retinanet.bench.measuring import Contest, Row, measure
from retinanet.devices import Precision


@dataclass(frozen=True)
class Settings:
    """How often and for how long, and on what."""

    repeats: int = 10
    seconds: float = 60.0
    precision: Precision = "fp32"
    steps: tuple[step.StepCase, ...] = ()

    def step_cases(self) -> list[step.StepCase]:
        return list(self.steps) or step.cases(self.precision)


def run(items: Sequence[str], settings: Settings) -> Iterator[Row]:
    """Yield the rows of some items, each as soon as it is measured."""
    contests: dict[str, Callable[[], Iterator[Contest]]] = {
        "loss": loss.contests,
        "matching": matching.contests,
        "nms": nms.contests,
        "postprocess": postprocess.contests,
        "step": lambda: step.contests(settings.step_cases()),
        "import": importing.contests,
    }
    for item in items:
        for contest in contests[item]():
            yield from measure(contest, repeats=settings.repeats, seconds=settings.seconds)
        if item == "step" and not torch.cuda.is_available():
            yield from memory.rows(settings.step_cases())
