"""`--batch-size auto`: as many images a step as fit into memory.

A batch size is the images of a step, of all processes together; each finds out what fits for itself, and what fits
for all is taken. With `--accumulate` a step passes in parts, in the trial as in the run. What has to fit is the worst
step that a run can meet: every image as large as preprocessing and augmentation can make it, with as many boxes as the
fullest has.

On CUDA it is tried, with twice as many images each time, until the device refuses. On a CPU nothing refuses: the
kernel kills. There steps of one, two and four images are measured, each when the ones before say that it fits, and the
rest follows from a straight line: what the process holds between steps, and as much for every image as for those of
the largest step measured. That is a little too much, as part of a step's memory (gradients, what the optimiser needs)
does not grow with its images. What no short trial sees, the margin is for: memory that freed tensors leave in pieces,
and the pictures and pages at the end of a run.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from retinanet.batches import Batch, Targets
from retinanet.data import Dataset
from retinanet.errors import ConfigError, TrainingError
from retinanet.model import RetinaNet
from retinanet.processes import ALONE, Processes
from retinanet.training.choosing import choose_rate
from retinanet.training.memory import (
    Limit,
    gigabytes,
    limit_of,
    peak_resident,
    resident,
    restart_peak,
    return_freed,
)
from retinanet.training.plan import Plan
from retinanet.training.planning import shares_in_words
from retinanet.training.sizing import choose_steps
from retinanet.training.step import TrainingStep
from retinanet.training.timing import uncompiled

# Share of what there is that is planned with.
PLANNED = {"cpu": 0.8, "cuda": 0.9}
# Images a step and device at most on CUDA. On a CPU the recipe's are the most: a step costs what its images cost, so
# that more of them only mean fewer steps (decision 0008).
MOST = 64
# Steps that are measured on a CPU, beside one of a smaller image.
MEASURED = (1, 2, 4)


@dataclass(frozen=True)
class WorstCase:
    """The largest padded input, in pixels, and the most boxes of an image in it."""

    height: int
    width: int
    boxes: int
    divisor: int = 32

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def halved(self) -> WorstCase:
        """Return an input with about half of each side."""
        least = 2 * self.divisor  # BatchNorm needs more than one place of the last map
        height, width = (
            min(side, max(least, -(-side // least) * self.divisor)) for side in (self.height, self.width)
        )
        return dataclasses.replace(self, height=height, width=width)

    def batch(self, images: int, classes: int) -> Batch:
        """Return so many of such images: noise, and boxes of many sizes."""
        random = torch.Generator().manual_seed(0)
        shape = (images, 3, self.height, self.width)
        pixels = torch.empty(shape, memory_format=torch.channels_last).normal_(generator=random)
        corners = torch.rand(2, images, self.boxes, 2, generator=random).sort(dim=0).values
        boxes = torch.cat((0.9 * corners[0], 0.1 + 0.9 * corners[1]), dim=2)
        return Batch(
            images=pixels,
            targets=Targets(
                boxes * torch.tensor([self.width, self.height] * 2),
                torch.randint(classes, (images, self.boxes), generator=random),
                torch.zeros(images, self.boxes, dtype=torch.bool),
            ),
            indices=tuple(range(images)),
        )


def worst_case(plan: Plan, train: Dataset) -> WorstCase:
    """Return the largest input that training on a data set can give, to the rounding of a zoomed window's sides.

    Zooming, flips and mosaics leave the range of shapes as it is; quarter turns do not. A batch is as wide as its
    widest image and as high as its highest, which need not be the same.
    """
    usual, augmentation = plan.preprocessing, plan.augmentation
    side = max(augmentation.image_sizes(usual.image_size))
    frame = dataclasses.replace(usual, image_size=side, max_size=max(side, usual.max_size))
    shapes = np.unique(np.stack((train.widths, train.heights)), axis=1).T
    if augmentation.quarter_turn:
        shapes = np.concatenate((shapes, shapes[:, ::-1]))
    sizes = np.array([frame.resized_size(int(width), int(height)) for width, height in shapes])
    width, height = (int(-(-most // frame.divisor) * frame.divisor) for most in sizes.max(axis=0))
    boxes = int(np.diff(train.offsets).max(initial=0)) * (4 if augmentation.mosaic else 1)
    return WorstCase(height, width, boxes, frame.divisor)


@dataclass(frozen=True)
class Need:
    """What steps take, in bytes.

    Args:
        peaks: images -> the most that was held in a step of them.
        held: between two steps.
        loading: for each image of a batch while it is made, where no worker does that.
        waiting: for each image of a step, in workers and in the batches that wait.
    """

    peaks: dict[int, int]
    held: float = 0.0
    loading: float = 0.0
    waiting: float = 0.0

    def of(self, images: int) -> float:
        """Return what so many images take: as measured, else by a line from what is held through the largest step."""
        largest = max(self.peaks)
        line = self.held + images * (self.peaks[largest] - self.held) / largest
        step = self.peaks.get(images, line) + images * self.waiting
        return max(step, self.held + images * self.loading)

    def figures(self, images: int) -> str:
        """Return "1 takes 0.90 GB, 4 take 2.1 GB, 16 by that 6.9 GB"."""
        ends = sorted({min(self.peaks), max(self.peaks)})
        known = [f"{n} take{'s' if n == 1 else ''} {gigabytes(self.of(n))}" for n in ends]
        return ", ".join(
            [*known, *([] if images in ends else [f"{images} by that {gigabytes(self.of(images))}"])]
        )


class Trial(Protocol):
    """Takes steps and tells what they took."""

    def held(self) -> int: ...

    def peak(self, case: WorstCase, images: int) -> int: ...


class CpuTrial:
    """Steps of a copy of a network with a learning rate of 0, and what the process held at most."""

    def __init__(self, plan: Plan, network: RetinaNet) -> None:
        self.classes = len(plan.spec.classes)
        self.step = TrainingStep.of(uncompiled(plan), copy.deepcopy(network))

    def held(self) -> int:
        """Return what the process holds between steps."""
        return_freed()
        return resident() or 0

    def peak(self, case: WorstCase, images: int) -> int:
        """Return what it holds at most in a step."""
        return_freed()
        restart_peak()
        self.step(case.batch(images, self.classes), 0.0)
        return peak_resident() or 0


def fit_batch(plan: Plan, network: RetinaNet, train: Dataset, processes: Processes = ALONE) -> Plan:
    """Return the plan with as many images a step as fit, and with the rate and the steps that follow from it.

    The network is not touched. With `--compile` it is tried as it is, not compiled.

    Raises:
        ConfigError: not even one image fits, or the system does not say.
    """
    case, limit = worst_case(plan, train), limit_of(plan.device, processes.here)
    processes.wait()  # all have read what is left before one of them takes some of it
    search = _on_cuda if plan.device.type == "cuda" else _on_cpu
    each = dataclasses.replace(plan, batch_size=-(-plan.batch_size // processes.count))
    images, why = 0, ""
    try:
        with torch.random.fork_rng(devices=[]):
            images, why = search(each, network, train, case, limit)
    except ConfigError as error:
        why = str(error)
    # Nobody waits for one that has given up: all hear of it.
    images, why = min(processes.gathered((images, why)))
    if not images:
        raise ConfigError(why)
    together = images * processes.count
    if plan.device.type == "cpu":
        together = min(together, plan.batch_size)
        why = f"{why}; {plan.batch_size}, the plan's, at most on a CPU"
    return with_batch(plan, train, together, why, processes)


def with_batch(plan: Plan, train: Dataset, images: int, why: str, processes: Processes = ALONE) -> Plan:
    """Return the plan with so many images a step.

    Raises:
        ConfigError: they are not enough for all processes.
    """
    recipe = dataclasses.replace(plan.recipe, batch_size=images)
    lr, of_rate = choose_rate(recipe)
    rows = {"batch size": (str(images), why), "lr": (f"{lr:g}", of_rate)}
    if processes.several:
        rows["processes"] = (shares_in_words(images, processes), "torchrun")
    reasons = tuple((setting, *rows.get(setting, (value, of))) for setting, value, of in plan.reasons)
    changed = dataclasses.replace(plan, recipe=recipe, batch_size=images, lr=lr, reasons=reasons)
    return changed.lasting(*choose_steps(recipe, plan.options, train, plan.preprocessing))


def with_stored_batch(
    plan: Plan, train: Dataset, stored: dict[str, Any], processes: Processes = ALONE
) -> Plan:
    """Return the plan with the images a step that `plan.json` holds; nothing is tried."""
    images = stored.get("batch_size")
    if not isinstance(images, int) or images < 1:
        return plan  # which is then found to be another
    return with_batch(plan, train, images, "as the run began", processes)


def _on_cpu(
    plan: Plan, network: RetinaNet, train: Dataset, case: WorstCase, limit: Limit | None
) -> tuple[int, str]:
    if limit is None or not restart_peak():
        raise ConfigError(
            "--batch-size auto on a CPU needs a system that tells how much memory a process held at most (Linux); "
            "give a number of images"
        )
    need = measured(CpuTrial(plan, network), case, limit, most=plan.batch_size)
    loading, waiting = _of_loader(plan, train, case)
    need = dataclasses.replace(need, loading=loading, waiting=waiting)
    return_freed()  # of the trial, which is gone
    restart_peak()
    images = largest(need, limit, plan.batch_size)
    if images is None:
        raise refusal(need.of(1), limit, case)
    return images, in_words(need, images, limit, case)


def measured(trial: Trial, case: WorstCase, limit: Limit, *, most: int) -> Need:
    """Measure steps of `MEASURED` images, but of no more than `most`, and of none that might not fit.

    Raises:
        ConfigError: one image does not fit, by what a smaller one took.
    """
    small = case.halved()
    trial.peak(small, 1)  # kernels are compiled and the optimiser gets its state
    held = trial.held()
    expected = held + (trial.peak(small, 1) - held) * case.pixels / small.pixels
    if expected > limit.bytes:
        raise refusal(expected, limit, case)
    one, *more = MEASURED
    need = Need({one: trial.peak(case, one)}, held)
    for images in more:
        if images <= most and need.of(images) <= PLANNED["cpu"] * limit.bytes:
            need.peaks[images] = trial.peak(case, images)
    return need


def largest(need: Need, limit: Limit, most: int) -> int | None:
    """Return `most`, else the largest power of two below it that fits; None where not even one does."""
    powers = [2**power for power in range(int(math.log2(most)), -1, -1)]
    return next((n for n in (most, *powers) if need.of(n) <= PLANNED["cpu"] * limit.bytes), None)


def _of_loader(plan: Plan, train: Dataset, case: WorstCase) -> tuple[float, float]:
    """Return what an image takes before it reaches the network (decoded, on its canvas, and prepared): while it is made
    in this process, and what waits in workers.
    """
    augmentation = plan.augmentation
    canvas = 4.0 if augmentation.mosaic else max(1.0, augmentation.zoom[0] ** -2)
    decoded = 3 * canvas * float((train.widths.astype(float) * train.heights).max(initial=0))
    prepared = 3 * 4 * case.pixels
    if not plan.workers:
        return decoded + prepared, 0.0
    # Each worker makes one batch and has four ready.
    return 0.0, plan.workers * (decoded + 4 * prepared)


def _on_cuda(
    plan: Plan, network: RetinaNet, train: Dataset, case: WorstCase, limit: Limit | None
) -> tuple[int, str]:
    assert limit is not None
    device = plan.device
    step = TrainingStep.of(uncompiled(plan), copy.deepcopy(network))

    def attempt(images: int) -> int | None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step(case.batch(images, len(plan.spec.classes)), 0.0)
            torch.cuda.synchronize(device)
        except TrainingError:  # no room for one at once
            return None
        # A step that finds no room takes more parts, and finds it then.
        return torch.cuda.max_memory_reserved(device) if step.parts == plan.options.accumulate else None

    taken = doubled(attempt, limit)
    del step
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    if not taken:
        raise refusal(None, limit, case)
    return max(taken), f"{in_words(Need(taken), max(taken), limit, case)}; {MOST} at most"


def doubled(attempt: Callable[[int], int | None], limit: Limit) -> dict[int, int]:
    """Try 1, 2, 4 ... `MOST` images; return what each took that fitted into its share of the limit.

    Args:
        attempt: returns what a step took, or None where it was too much.
    """
    taken: dict[int, int] = {}
    images = 1
    while images <= MOST:
        bytes = attempt(images)
        if bytes is None or bytes > PLANNED["cuda"] * limit.bytes:
            break
        taken[images] = bytes
        images *= 2
    return taken


def in_words(need: Need, images: int, limit: Limit, case: WorstCase) -> str:
    """Return the figures behind a choice."""
    return (
        f"auto: of images of {case.width} x {case.height} with {case.boxes:,} boxes {need.figures(images)}, "
        f"{limit.share(need.of(images))}"
    )


def refusal(bytes: float | None, limit: Limit, case: WorstCase) -> ConfigError:
    """Return the error of a device on which not even one image fits."""
    takes = "more than there is" if bytes is None else limit.share(bytes)
    return ConfigError(
        f"--batch-size auto finds no room for one image of {case.width} x {case.height} (width x height): a step takes "
        f"{takes}. Give a smaller --image-size or --max-size, another --backbone, or --checkpoint-gradients"
    )
