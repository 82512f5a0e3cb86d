"""`bench step`: a whole training step, images in memory to updated weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from retinanet.batches import Batch, Targets
from retinanet.bench.inputs import CLASSES, boxes, labels
from retinanet.bench.measuring import Contest
from retinanet.bench.torchvision_model import twins
from retinanet.devices import Precision, autocast, choose_device
from retinanet.objective import Objective, smooth_l1_of_deltas
from retinanet.training.step import TrainingStep

LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-4


@dataclass(frozen=True)
class StepCase:
    """What a step is timed on."""

    backbone: str = "resnet50"
    side: int = 512
    batch_size: int = 2
    boxes: int = 10
    precision: Precision = "fp32"

    def __str__(self) -> str:
        return (
            f"{self.backbone}, {self.side} px, batch {self.batch_size}, {self.boxes} boxes, {self.precision}"
        )


def cases(precision: Precision = "fp32") -> list[StepCase]:
    """Return the cases of the published table."""
    return [
        StepCase(backbone, batch_size=batch_size, boxes=count, precision=precision)
        for backbone in ("resnet18", "resnet50")
        for batch_size in (2, 8)
        for count in (10, 200)
    ]


def contests(chosen: list[StepCase], device: str = "auto") -> Iterator[Contest]:
    """Ours and torchvision's RetinaNet with the same weights, images, boxes and optimiser.

    The peer computes in fp32 on a CPU, where its reference script has no autocast, and on CUDA in our precision.
    """
    for case in chosen:
        ours, theirs = our_step(case, device), their_step(case, device)
        yield Contest(
            "step",
            str(case),
            ours,
            {"torchvision": theirs},
            # The first step of both, from the same weights.
            {"torchvision": _agree(ours(), theirs())},
        )


def our_step(case: StepCase, device: str = "auto", *, compile: bool = False) -> Callable[[], float]:
    """Return our training step, which returns the loss before it."""
    where = choose_device(device)
    network, _, spec = twins(case.backbone, CLASSES, case.side)
    objective = Objective(
        anchors=spec.anchors, coding=spec.coding, box_loss=smooth_l1_of_deltas(0), low_quality=True
    )
    train_on = TrainingStep(
        network,
        objective,
        optimizer="sgd",
        weight_decay=WEIGHT_DECAY,
        decay_all=True,
        device=where,
        precision=case.precision,
        compile=compile,
    )
    batch = batch_of(case)
    return lambda: train_on(batch, LEARNING_RATE).total.item()


def their_step(case: StepCase, device: str = "auto") -> Callable[[], float]:
    """Return torchvision's training step as its reference training script takes it."""
    where = choose_device(device)
    _, model, _ = twins(case.backbone, CLASSES, case.side)
    model = model.to(where).train()
    # Its images come normalised; what its transform does to them is its own work, and ours sees the same pixels.
    model.transform.image_mean, model.transform.image_std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    optimizer = SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=LEARNING_RATE,
        momentum=0.9,
        weight_decay=WEIGHT_DECAY,
    )
    batch = batch_of(case)
    images = [image.to(where) for image in batch.images]
    targets = [
        {"boxes": of.to(where), "labels": classes.to(where)}
        for of, classes in zip(batch.targets.boxes, batch.targets.classes, strict=True)
    ]
    precision: Precision = case.precision if where.type == "cuda" else "fp32"

    def step() -> float:
        with autocast(where, precision):
            losses: dict[str, Tensor] = model(images, targets)
        total = sum(losses.values(), start=torch.zeros((), device=where))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total.item()

    return step


def batch_of(case: StepCase) -> Batch:
    """Return the images and boxes of a case."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(case.batch_size, 3, case.side, case.side, generator=generator)
    given = torch.stack([boxes(case.boxes, case.side, seed) for seed in range(case.batch_size)])
    classes = torch.stack([labels(case.boxes, CLASSES, seed) for seed in range(case.batch_size)])
    ignored = torch.zeros(given.shape[:2], dtype=torch.bool)
    return Batch(images, Targets(given, classes, ignored), tuple(range(case.batch_size)))


def _agree(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) <= 1e-3 * abs(theirs)


def profile(case: StepCase, rows: int = 20) -> str:
    """Return where the time of our step goes, operation by operation."""
    from torch.profiler import ProfilerActivity

    run = our_step(case)
    run()
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        run()
    events: list[Any] = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    lines = [str(case), f"{'operation':<52} {'calls':>6} {'ms':>9} {'share':>6}"]
    for event in events[:rows]:
        time = event.self_cpu_time_total
        lines.append(f"{event.key[:52]:<52} {event.count:>6} {time / 1e3:>9.1f} {time / total:>6.1%}")
    return "\n".join(lines)
