"""Peak memory of a training step, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

from retinanet.anchors import CPU
from retinanet.bench.measuring import Row
from retinanet.bench.step import StepCase, our_step, their_step

STEPS = 2
# Large enough for the convolutions of our own.
WARM_UP = StepCase("resnet18", side=128, batch_size=2, boxes=2)
# Linux alone tells the peak since a moment of one's choice.
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def rows(cases: list[StepCase]) -> Iterator[Row]:
    """Compare how much more memory two steps need than the process held before the first; on Linux."""
    for case in cases if RESET.exists() else []:
        ours, peer = (_in_process(who, case) for who in ("ours", "torchvision"))
        yield Row("step", f"{case}, peak memory", "torchvision", ours, peer, None, unit="MiB")


def _in_process(who: str, case: StepCase) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (who, case))


def _peak(who: str, case: StepCase) -> float:
    build = {"ours": our_step, "torchvision": their_step}[who]
    build(WARM_UP, CPU)()  # libraries and compiled code take their memory once, whatever the step
    step = build(case, CPU)
    before = _resident("VmRSS")
    RESET.write_text("5")
    for _ in range(STEPS):
        step()
    return _resident("VmHWM") - before


def _resident(what: str) -> float:
    """Return the memory that the process holds, or held at most, MiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024
