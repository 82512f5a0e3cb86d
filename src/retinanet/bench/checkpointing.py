"""`bench checkpointing`: our training step with `train --checkpoint-gradients` beside our step without, on a CPU."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from retinanet.anchors import CPU
from retinanet.bench.measuring import Row
from retinanet.bench.memory import Builder, in_process, ours, taken
from retinanet.bench.step import StepCase, Stepper, agree, our_step
from retinanet.training.memory import restart_peak

PEER = "ours, checkpointed"
CASES = (StepCase("resnet18", batch_size=4), StepCase("resnet50", batch_size=4))
# Steps of a process, and how many of them are not timed: they take memory from the system for the first time.
STEPS, FIRST = 5, 2
# Processes of each at most; every one takes its time to begin.
TURNS = 3


def checkpointed(case: StepCase) -> Stepper:
    return our_step(case, CPU, checkpoint_gradients=True)


def rows(cases: Sequence[StepCase] = CASES, *, turns: int) -> Iterator[Row]:
    """Compare time and peak memory in processes of their own, in turns, on Linux: on a CPU checkpointing changes how
    the memory of the whole process is kept.
    """
    for case in cases if restart_peak() else []:
        equal = in_process(_equal, checkpointed, case)
        peaks: dict[Builder, float] = {}
        times: dict[Builder, list[float]] = {ours: [], checkpointed: []}
        for _ in range(turns):
            for build, of in times.items():
                peak, every = in_process(taken, build, case, STEPS)
                peaks[build] = max(peak, peaks.get(build, 0.0))
                of += every[FIRST:]
        first, second = times.values()
        yield Row(
            "checkpointing",
            str(case),
            PEER,
            statistics.median(first),
            statistics.median(second),
            equal,
            min(first),
            min(second),
        )
        yield Row(
            "checkpointing", f"{case}, peak memory", PEER, peaks[ours], peaks[checkpointed], None, unit="MiB"
        )


def _equal(build: Builder, case: StepCase) -> bool:
    return agree(ours(case), build(case), str)
