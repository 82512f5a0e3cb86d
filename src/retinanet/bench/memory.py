"""Time and peak memory of training steps, each network in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeAlias, TypeVar

from retinanet.anchors import CPU
from retinanet.bench.measuring import Row, seconds_of
from retinanet.bench.step import StepCase, Stepper, our_step, their_step
from retinanet.training.memory import peak_resident, resident, restart_peak, return_freed

STEPS = 2
MIB = 2**20
# Large enough for the convolutions of our own.
WARM_UP = StepCase("resnet18", side=128, batch_size=2, boxes=2)
Builder: TypeAlias = Callable[[StepCase], Stepper]
P = ParamSpec("P")
T = TypeVar("T")


def ours(case: StepCase) -> Stepper:
    return our_step(case, CPU)


def torchvisions(case: StepCase) -> Stepper:
    return their_step(case, CPU)


def rows(cases: list[StepCase]) -> Iterator[Row]:
    """Compare how much more memory two steps need than the process held before the first; on Linux."""
    for case in cases if restart_peak() else []:
        our_peak, peers = (in_process(taken, builder, case, STEPS)[0] for builder in (ours, torchvisions))
        yield Row("step", f"{case}, peak memory", "torchvision", our_peak, peers, None, unit="MiB")


def in_process(call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Return the result of a call in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, args, options)


def taken(build: Builder, case: StepCase, steps: int) -> tuple[float, list[float]]:
    """Return how much more memory steps need than the process held before the first, MiB, and their times, ms."""
    build(WARM_UP)()  # libraries and compiled code take their memory once, whatever the step
    step = build(case)
    return_freed()
    before = resident() or 0
    restart_peak()
    times = [seconds_of(step, CPU) * 1e3 for _ in range(steps)]
    return ((peak_resident() or 0) - before) / MIB, times
