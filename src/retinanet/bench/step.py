"""`bench step`: a whole training step, images in memory to updated weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from retinanet.anchors import CPU
from retinanet.batches import Batch, Targets
from retinanet.bench.inputs import CLASSES, boxes, labels
from retinanet.bench.measuring import Contest, can_compile
from retinanet.bench.torchvision_model import our_name, twins
from retinanet.bench.utilisation import utilisation
from retinanet.devices import Precision, autocast, resolve_precision
from retinanet.objective import ByIou, Objective, smooth_l1_of_deltas
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


def contests(chosen: list[StepCase], *, device: torch.device = CPU) -> Iterator[Contest]:
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
            {"torchvision": agree(ours, theirs)},
        )


def compiled_contests(chosen: list[StepCase], *, device: torch.device = CPU) -> Iterator[Contest]:
    """Our step with `train --compile` beside our step without: where the ratio is above 1, compiling does not pay.

    Of each backbone and batch size the case with fewest boxes, as what is compiled sees none.
    """
    fewest = {(case.backbone, case.batch_size): case for case in sorted(chosen, key=lambda case: -case.boxes)}
    for case in fewest.values() if can_compile(device) else []:
        # Otherwise torch takes the batch size for one that varies, once it has compiled for another.
        torch.compiler.reset()
        ours, compiled = our_step(case, device), our_step(case, device, compile=True)
        peer = "ours compiled"
        yield Contest("step", str(case), ours, {peer: compiled}, {peer: agree(ours, compiled, str)})


@dataclass(frozen=True)
class Stepper:
    """A training step that returns the loss before it, and what it trains."""

    step: Callable[[], float]
    network: nn.Module
    optimizer: Optimizer

    def __call__(self) -> float:
        return self.step()

    def directions(self) -> dict[str, Tensor]:
        """Return what SGD with momentum went along, by parameter: after one step the gradient, decay included."""
        state = self.optimizer.state
        return {
            name: state[p]["momentum_buffer"] for name, p in self.network.named_parameters() if p in state
        }


def our_step(
    case: StepCase, device: torch.device, *, compile: bool = False, checkpoint_gradients: bool = False
) -> Stepper:
    """Return our training step."""
    network, _, spec = twins(case.backbone, CLASSES, case.side)
    objective = Objective(
        anchors=spec.anchors,
        coding=spec.coding,
        matching=ByIou(low_quality=True),
        box_loss=smooth_l1_of_deltas(0),
    )
    train_on = TrainingStep(
        network,
        objective,
        optimizer="sgd",
        weight_decay=WEIGHT_DECAY,
        decay_all=True,
        device=device,
        precision=case.precision,
        compile=compile,
        checkpoint_gradients=checkpoint_gradients,
    )
    batch = batch_of(case, device)
    (optimizer,) = train_on.optimizers
    return Stepper(lambda: train_on(batch, LEARNING_RATE).total.item(), network, optimizer)


def their_step(case: StepCase, device: torch.device) -> Stepper:
    """Return torchvision's training step as its reference training script takes it."""
    _, model, _ = twins(case.backbone, CLASSES, case.side)
    model = model.to(device).train()
    # Its images come normalised; what its transform does to them is its own work, and ours sees the same pixels.
    model.transform.image_mean, model.transform.image_std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    optimizer = SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=LEARNING_RATE,
        momentum=0.9,
        weight_decay=WEIGHT_DECAY,
    )
    batch = batch_of(case, device)
    images = list(batch.images)
    targets = [
        {"boxes": of, "labels": classes}
        for of, classes in zip(batch.targets.boxes, batch.targets.classes, strict=True)
    ]
    precision: Precision = case.precision if device.type == "cuda" else "fp32"

    def step() -> float:
        with autocast(device, precision):
            losses: dict[str, Tensor] = model(images, targets)
        total = sum(losses.values(), start=torch.zeros((), device=device))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total.item()

    return Stepper(step, model, optimizer)


def batch_of(case: StepCase, device: torch.device) -> Batch:
    """Return the images and boxes of a case."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(case.batch_size, 3, case.side, case.side, generator=generator)
    seeds = range(case.batch_size)
    given = torch.stack([boxes(case.boxes, case.side, device=device, seed=seed) for seed in seeds])
    classes = torch.stack([labels(case.boxes, CLASSES, device=device, seed=seed) for seed in seeds])
    ignored = torch.zeros(given.shape[:2], dtype=torch.bool, device=device)
    return Batch(images.to(device), Targets(given, classes, ignored), tuple(seeds))


def agree(ours: Stepper, theirs: Stepper, ours_of: Callable[[str], str] = our_name) -> bool:
    """Take the first step of both; return whether loss and every parameter's gradient are equal to rounding.

    Args:
        ours_of: their name of a parameter -> ours.
    """
    losses = ours(), theirs()
    found, wanted = ours.directions(), {ours_of(name): of for name, of in theirs.directions().items()}
    if found.keys() != wanted.keys():
        return False
    # ReLUs at the edge of 0 open in one and not in the other, and a gradient of few large terms shows it.
    near = (float((found[name] - of).norm()) <= 1e-2 * float(of.norm()) for name, of in wanted.items())
    return abs(losses[0] - losses[1]) <= 1e-3 * abs(losses[1]) and all(near)


def profile(case: StepCase, rows: int = 20, *, device: torch.device = CPU) -> str:
    """Return where the time of our step goes, operation by operation, and its share of what the device can do."""
    from torch.profiler import ProfilerActivity

    run = our_step(case, device)
    dtype = torch.bfloat16 if resolve_precision(device, case.precision) == "bf16" else torch.float32
    used = utilisation(run, device, dtype)
    activities = [ProfilerActivity.CPU]
    kind = "self_cpu_time_total"
    if device.type == "cuda":
        # The processor only launches: what counts is the time of the kernels that an operation launched.
        activities.append(ProfilerActivity.CUDA)
        kind = "self_device_time_total"
    with torch.profiler.profile(activities=activities) as found:
        run()
    # The kernels stand beside the operations, too; counted as well, they would count twice.
    events: list[Any] = [event for event in found.key_averages() if event.device_type.name == "CPU"]
    times = {event.key: getattr(event, kind) for event in events}
    total = sum(times.values())
    lines = [str(case), str(used), f"{'operation':<52} {'calls':>6} {'ms':>9} {'share':>6}"]
    for event in sorted(events, key=lambda event: -times[event.key])[:rows]:
        time = times[event.key]
        lines.append(f"{event.key[:52]:<52} {event.count:>6} {time / 1e3:>9.1f} {time / total:>6.1%}")
    return "\n".join(lines)
