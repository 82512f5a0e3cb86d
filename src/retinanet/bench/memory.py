"""Peak memory of a training step, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import TypeAlias

from retinanet.anchors import CPU
from retinanet.bench.measuring import Row
from retinanet.bench.step import StepCase, Stepper, our_step, their_step
from retinanet.training.memory import peak_resident, resident, restart_peak

STEPS = 2
MIB = 2**20
# Large enough for the convolutions of our own.
WARM_UP = StepCase("resnet18", side=128, batch_size=2, boxes=2)
Builder: TypeAlias = Callable[[StepCase], Stepper]


def ours(case: StepCase) -> Stepper:
    return our_step(case, CPU)


def torchvisions(case: StepCase) -> Stepper:
    return their_step(case, CPU)


def checkpointed(case: StepCase) -> Stepper:
    return our_step(case, CPU, checkpoint_gradients=True)


def rows(
    item: str, cases: list[StepCase], peer: str = "torchvision", build: Builder = torchvisions
) -> Iterator[Row]:
    """Compare how much more memory two steps need than the process held before the first; on Linux."""
    for case in cases if restart_peak() else []:
        our_peak, peers = (_in_process(builder, case) for builder in (ours, build))
        yield Row(item, f"{case}, peak memory", peer, our_peak, peers, None, unit="MiB")


def _in_process(build: Builder, case: StepCase) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (build, case))


def _peak(build: Builder, case: StepCase) -> float:
    build(WARM_UP)()  # libraries and compiled code take their memory once, whatever the step
    step = build(case)
    before = resident() or 0
    restart_peak()
    for _ in range(STEPS):
        step()
    return ((peak_resident() or 0) - before) / MIB
