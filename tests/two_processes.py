"""What two processes do together; `test_processes.py` starts it and judges what each writes.

WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python two_processes.py DATA OUT CASE...

The second is forked from the first when everything is imported and nothing has run yet: imports take longer than cases.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from rich.console import Console

from retinanet.batches import Batch, Targets
from retinanet.checkpoint import Model
from retinanet.data import open_dataset
from retinanet.data.loading import training_batches
from retinanet.errors import ConfigError, DataError, LostProcessError, RetinaNetError, Stopped
from retinanet.inference import Detector, validate
from retinanet.model import RetinaNet
from retinanet.processes import Processes, joined_processes
from retinanet.training import batch_size, judging, timing
from retinanet.training import run as run_module
from retinanet.training.batch_size import Need
from retinanet.training.configuration import TrainingOptions
from retinanet.training.deadline import Deadline
from retinanet.training.gradients import GradientSum
from retinanet.training.memory import Limit
from retinanet.training.plan import Plan
from retinanet.training.planning import plan_run
from retinanet.training.recipes import Recipe
from retinanet.training.run import resume_training, run_training
from retinanet.training.starting import build_network
from retinanet.training.state import optimizer_tensors
from retinanet.training.step import Stepped, TrainingStep
from retinanet.training.time_left import Pace

TINY: dict[str, Any] = {
    "precision": "fp32",  # what is compared is equal to its rounding
    "backbone": "test_resnet",
    "pretrained": "none",
    "channels": 64,
    "image_size": 64,
    "batch_size": 3,
    "device": "cpu",
    "workers": 0,
    "steps": 6,
    "validate_every_steps": 4,
    "zoom": "1,1",
    "log_to": "none",
}
STEPS = 3
Spoil = Literal["image", "loss", "gradient"]


def steps_of(
    plan: Plan, processes: Processes, *, parts: int = 1, spoil: Callable[[int, Batch], Batch] | None = None
) -> dict[str, Any]:
    """Train for some steps; return the weights, their average and what the steps said."""
    torch.manual_seed(0)
    network = build_network(plan)
    train_on = TrainingStep.of(plan, network, processes)
    train_on.parts = parts
    said = []
    began = {name: value.clone() for name, value in network.state_dict().items()}
    batches = batches_of(plan, processes, plan.steps)
    for step, batch in enumerate(batches):
        done = train_on(batch if spoil is None else spoil(step, batch), plan.lr)
        said.append({name: getattr(done, name).clone() for name in ("total", "positives", "finite")})
    assert train_on.average is not None
    moved = [(value - began[name]).flatten() for name, value in network.state_dict().items()]
    return {
        "said": said,
        "moved": torch.cat(moved),
        "weights": {name: value.clone() for name, value in network.state_dict().items()},
        "average": train_on.average.model.state_dict(),
    }


def batches_of(plan: Plan, processes: Processes, steps: int) -> Iterator[Batch]:
    """Return this process's share of a run's first steps."""
    return training_batches(
        open_dataset(plan.options.data, "train"),
        plan.preprocessing,
        plan.augmentation,
        batch_size=plan.batch_size,
        seed=0,
        steps=steps,
        rank=processes.rank,
        processes=processes.count,
    )


def handed_over(data: str, output: str) -> TrainingOptions:
    """Return a run to be changed by `exact`, by SGD: it does not make much of what is nearly nothing, as AdamW and Muon
    do."""
    told = {**TINY, "backbone": "test_efficientnet_gn", "optimizer": "sgd"}
    return TrainingOptions(data=data, output=output, **told)


def exact(recipe: Recipe) -> Recipe:
    """Leave the norms out of the heads: on P7 of an image of 64 pixels a group is two numbers, and where they are
    nearly equal, to normalise them makes a difference of rounding a hundred times as large."""
    model = recipe.model
    return replace(recipe, model=replace(model, head=replace(model.head, norm="none")))


def plan_of(
    data: str,
    batch_size: int | Literal["auto"] = 4,
    normalizer: str = "all-processes",
    steps: int = STEPS,
    *,
    side: int = 64,
    head_norms: bool = False,
) -> Plan:
    """Return a plan of few steps without BatchNorm, whose statistics are of each process's own images."""
    options = replace(handed_over(data, ""), batch_size=batch_size, steps=steps, image_size=side)

    def change(recipe: Recipe) -> Recipe:
        return replace(recipe if head_norms else exact(recipe), normalizer=normalizer)  # type: ignore[arg-type]

    return plan_run(options, open_dataset(data, "train"), change)


def step_with(train_on: TrainingStep, batch: Batch, spoil: Spoil | None = None, lr: float = 0.01) -> Stepped:
    """Take a step, of which something is not finite in this process if wanted."""
    objective, hooks = train_on.objective, []

    def endless(logits: Any, targets: Any, weight: Any) -> Any:
        return (logits * float("inf")).sum()

    if spoil == "image":
        images = batch.images.clone()
        images[0, 0, 5, 5] = float("nan")
        batch = replace(batch, images=images)
    elif spoil == "loss":
        train_on.objective = replace(objective, class_loss=endless)
    elif spoil == "gradient":
        weight = train_on.network.class_head.last.weight
        hooks.append(weight.register_hook(lambda gradient: gradient * float("inf")))
    try:
        return train_on(batch, lr)
    finally:
        train_on.objective = objective
        for hook in hooks:
            hook.remove()


def everything(train_on: TrainingStep) -> dict[str, torch.Tensor]:
    """Return a copy of all that a step may change."""
    assert train_on.average is not None
    parts = {
        "network": train_on.network.state_dict(),
        "optimizer": optimizer_tensors(train_on.optimizers),
        "average": {**train_on.average.model.state_dict(), "updates": train_on.average.updates},
    }
    return {f"{part} {name}": value.clone() for part, of in parts.items() for name, value in of.items()}


def exchange(processes: Processes, *_: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "told": processes.told(f"rank {processes.rank}"),
        "gathered": processes.gathered(processes.rank),
        "here": (processes.here, processes.sharing),
        "largest": processes.largest(processes.rank, 5 - processes.rank),
        "added": processes.add(torch.full((3,), float(processes.rank + 1))).tolist(),
    }
    copied = torch.full((2,), float(processes.rank + 1))
    processes.copy_of_main(copied)
    found["copied"] = copied.tolist()
    order: list[str] = []
    with processes.main_first():
        order.append("body")
    found["order"] = order
    try:
        with processes.main_first():
            raise DataError("no data")
    except RetinaNetError as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    return found


def gradients(processes: Processes, *_: str) -> dict[str, Any]:
    """Sums over buckets of any size, over parts, with a parameter that no loss depends on."""
    found = {}
    for bucket in (1, 200, 10**9):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3), torch.nn.Linear(2, 2)
        )
        layers.to(memory_format=torch.channels_last)
        summed = GradientSum(layers.parameters(), processes, bucket=bucket)
        torch.manual_seed(1 + processes.rank)
        images = torch.randn(2, 3, 8, 8)
        for part in range(2):
            summed.begin(last=part == 1)
            layers[1](layers[0](images[part : part + 1])).square().sum().backward()
        summed.finish()
        found[bucket] = [None if p.grad is None else p.grad.clone() for p in layers.parameters()]
    found["taken again"], found["sent"] = taken_again(processes)
    return found


def taken_again(processes: Processes) -> tuple[list[Any], int]:
    """The second process fails on its way back, where the other has sums of it already; how many is returned, too."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3))
    summed = GradientSum(layers.parameters(), processes, bucket=1)
    torch.manual_seed(1 + processes.rank)
    images = torch.randn(2, 3, 8, 8)
    sent = 0
    if processes.rank == 1:
        summed.begin(last=True)
        inside = layers[0](images)
        inside.register_hook(no_memory)
        with suppress(torch.cuda.OutOfMemoryError):
            layers[1](inside).square().sum().backward()
        sent = summed.sent
        summed.forget()
        layers.zero_grad(set_to_none=True)
    for part in range(2):
        summed.begin(last=part == 1)
        layers(images[part : part + 1]).square().sum().backward()
    summed.finish()
    return [p.grad for p in layers.parameters()], sent


def no_memory(_: torch.Tensor) -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def steps(processes: Processes, data: str, _: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for normalizer in ("image", "all-processes"):
        found[normalizer] = steps_of(plan_of(data, 4, normalizer), processes)
    with (
        room_for_one()
    ):  # the second process has two images of a step, and takes it in parts while the other waits
        found["uneven, in parts"] = steps_of(plan_of(data, 3), processes)
    with no_room_on_the_way_back() as sent:
        found["uneven, no room on the way back"] = steps_of(plan_of(data, 3), processes)
    found["sent before"] = sent
    found["whole heads"] = steps_of(whole_heads(data), processes)
    return found


def whole_heads(data: str) -> Plan:
    """Return a plan with the norms of the heads, of images so large that P7 has places enough for them."""
    return plan_of(data, 4, steps=1, side=256, head_norms=True)


def room_for_one() -> AbstractContextManager[Any]:
    """Let a network have no room for more than one image at once."""
    forward = RetinaNet.forward

    def refusing(self: RetinaNet, images: torch.Tensor) -> Any:
        if len(images) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, images)

    return mock.patch.object(RetinaNet, "forward", refusing)


@contextmanager
def no_room_on_the_way_back() -> Iterator[list[int]]:
    """Let memory end on the way back of more than one image, when gradients of the heads are sent already; return the
    list to which each time adds how many buckets are."""
    forward, forget = RetinaNet.forward, GradientSum.forget
    sent: list[int] = []

    def noting(self: GradientSum) -> None:
        sent.append(self.sent)
        forget(self)

    def passing(self: RetinaNet, images: torch.Tensor) -> Any:
        if len(images) > 1:

            def refuse(_: torch.Tensor) -> None:
                hook.remove()
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")

            hook = next(self.pyramid.parameters()).register_hook(refuse)
        return forward(self, images)

    small = mock.patch.dict(GradientSum.__init__.__kwdefaults__, bucket=2**16)
    with (
        small,
        mock.patch.object(RetinaNet, "forward", passing),
        mock.patch.object(GradientSum, "forget", noting),
    ):
        yield sent


def fitting(processes: Processes, data: str, _: str) -> dict[str, Any]:
    """As many images as fit: into the second process fewer than into the first, then none."""
    train, plan = open_dataset(data, "train"), plan_of(data, "auto")
    found: dict[str, Any] = {"asked": plan.batch_size}
    for case, room in (("fewer", 2), ("none", 1)):
        told = {
            "limit_of": lambda _, here, room=room: Limit(
                (10 if processes.main else room) * 10**12, f"rank {processes.rank}"
            ),
            "measured": lambda *_, **__: Need({1: 10**12}),
            "restart_peak": lambda: True,
        }
        try:
            with mock.patch.multiple(batch_size, **told):
                fitted = batch_size.fit_batch(plan, build_network(plan), train, processes)
            found[case] = (fitted.batch_size, fitted.lr, fitted.reasons)
        except ConfigError as error:
            found[case] = str(error)
    return found


def empty(processes: Processes, data: str, _: str) -> dict[str, Any]:
    """Twenty steps in which the second process never sees an object."""

    def without(_: int, batch: Batch) -> Batch:
        if processes.main:
            return batch
        none = Targets(
            torch.zeros(len(batch.images), 0, 4),
            torch.zeros(len(batch.images), 0, dtype=torch.int64),
            torch.zeros(len(batch.images), 0, dtype=torch.bool),
        )
        return Batch(batch.images, none, batch.indices)

    return steps_of(plan_of(data, 2, steps=20), processes, spoil=without)


def spoilt(processes: Processes, data: str, _: str) -> dict[str, Any]:
    """An image, the loss and a gradient are no numbers, in the second process alone."""
    train = open_dataset(data, "train")
    plan = plan_run(TrainingOptions(data=data, **TINY), train)
    train_on = TrainingStep.of(plan, build_network(plan), processes)
    found: dict[str, Any] = {"finite": [], "after": []}
    spoils: tuple[Spoil | None, ...] = (None, "image", "loss", "gradient", None)
    batches = batches_of(plan, processes, len(spoils))
    for spoil, batch in zip(spoils, batches, strict=True):
        done = step_with(train_on, batch, None if processes.main else spoil)
        found["finite"].append(bool(done.finite))
        found["after"].append(everything(train_on))
    return found


def skipped(processes: Processes, data: str, out: str) -> dict[str, Any]:
    """A run of which a step is skipped, as a gradient of the second process is no number; its batch, by rank."""
    call, seen, said = TrainingStep.__call__, [], io.StringIO()

    def stepping(self: TrainingStep, batch: Batch, lr: float) -> Any:
        seen.append(batch)
        TrainingStep.__call__ = call  # type: ignore[method-assign]
        try:
            spoil: Spoil | None = "gradient" if len(seen) == 2 and not processes.main else None
            return step_with(self, batch, spoil, lr)
        finally:
            TrainingStep.__call__ = stepping  # type: ignore[method-assign]

    TrainingStep.__call__ = stepping  # type: ignore[method-assign]
    try:
        options = TrainingOptions(data=data, output=f"{out}/skipped", **{**TINY, "steps": 2})
        run_training(options, Console(file=said, width=2000))
    finally:
        TrainingStep.__call__ = call  # type: ignore[method-assign]
    return {"images": seen[1].images, "indices": list(seen[1].indices), "said": said.getvalue()}


def validated(processes: Processes, data: str, _: str) -> dict[str, Any]:
    """What is found by a network that finds much, and how good that is."""
    val = open_dataset(data, "val")
    plan = plan_run(TrainingOptions(data=data, **TINY), open_dataset(data, "train"))
    network = build_network(plan)
    torch.nn.init.zeros_(network.class_head.last.bias)
    found = validate(
        Detector(Model(network, plan.spec), device="cpu"), val, batch_size=3, processes=processes
    )
    boxes = [one.boxes.tolist() for one in found.detections]
    return {"metrics": found.metrics.to_json(), "boxes": boxes, "capped": found.capped}


@contextmanager
def images_of_steps() -> Iterator[list[tuple[int, ...]]]:
    """Give the list to which every step adds the images that this process trained on."""
    seen: list[tuple[int, ...]] = []
    step = TrainingStep.__call__

    def noting(self: TrainingStep, batch: Batch, lr: float) -> Any:
        seen.append(tuple(batch.indices))
        return step(self, batch, lr)

    with mock.patch.object(TrainingStep, "__call__", noting):
        yield seen


def run(processes: Processes, data: str, out: str) -> dict[str, Any]:
    """A run, the same stopped by a signal to the second process and resumed, and one that is left stopped."""
    said = io.StringIO()
    told = Console(file=said, width=200)
    options = {**TINY, "data": data}
    with images_of_steps() as whole:
        run_training(TrainingOptions(output=f"{out}/whole", **options), told)
    with images_of_steps() as seen:
        stopped = stop(processes, 2, 1, lambda: TrainingOptions(output=f"{out}/stopped", **options))
        resume_training(Path(out) / "stopped", told)
    return {"stopped": stopped, "said": said.getvalue(), "images": seen, "images of the whole": whole}


def turned(processes: Processes, data: str, out: str) -> dict[str, Any]:
    """A timed run that takes fewer steps than planned, as the clock of the main process says."""

    def steps(_: Deadline, plan: Plan, step: int, pace: Pace | None) -> int:
        return 12 if pace is not None and step == 10 else plan.steps

    options = {**TINY, "data": data, "steps": None, "time": "60s"}
    with (
        mock.patch.object(timing, "_step_seconds", return_value=3.5),
        mock.patch.object(timing, "_validation_seconds", return_value=0.1),
        mock.patch.object(Deadline, "steps", steps),
        images_of_steps() as seen,
    ):
        run_training(TrainingOptions(output=f"{out}/turned", **options), Console(file=io.StringIO()))
    return {"steps": len(seen)}


def handed(processes: Processes, data: str, out: str) -> dict[str, Any]:
    """A run that one process began is gone on with by two, and one is begun by two and left."""
    resume_training(Path(out) / "one-two", Console(file=io.StringIO()), exact)
    code, _ = stop(processes, 3, 0, lambda: handed_over(data, f"{out}/two-one"), exact)
    return {"code": code}


def matrix(processes: Processes, data: str, out: str) -> dict[str, Any]:
    """Stopped anywhere by a signal to either, with and without workers."""
    options = {**TINY, "data": data, "accumulate": 2}
    quiet = Console(file=io.StringIO())
    with images_of_steps() as whole:
        run_training(TrainingOptions(output=f"{out}/whole-2", **options), quiet)
    found = {}
    for workers in (0, 2):
        # The first step; in a part; mid-epoch; an epoch's end; in a validation.
        for where in ("1", "part", "3", "2", "validation"):
            name = f"{where}-{workers}"
            told = TrainingOptions(output=f"{out}/{name}", **{**options, "workers": workers})
            rank = (workers // 2 + len(where)) % 2
            with images_of_steps() as seen:
                stopped = stop(processes, where, rank, lambda told=told: told)
                resume_training(Path(out) / name, quiet)
            found[name] = (*stopped, seen == whole)
    return found


def stop(
    processes: Processes,
    where: int | str,
    rank: int,
    options: Callable[[], TrainingOptions],
    change: Callable[[Recipe], Recipe] | None = None,
) -> tuple[int, str]:
    """Run until a process is stopped somewhere; return the exit code and the message."""
    step, validate, there = TrainingStep.__call__, judging.validate, TrainingStep._there_and_back
    made = [0]

    def signalled() -> None:
        if processes.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    def stepping(self: TrainingStep, batch: Batch, lr: float) -> Any:
        done = step(self, batch, lr)
        made[0] += 1
        if str(made[0]) == str(where):
            signalled()
        return done

    def in_a_part(self: TrainingStep, *given: Any) -> Any:
        begin = self.gradients.begin

        def begun(last: bool) -> None:
            if last and made[0] == 2:
                signalled()
            begin(last)

        self.gradients.begin = begun  # type: ignore[method-assign]
        try:
            return there(self, *given)
        finally:
            self.gradients.begin = begin  # type: ignore[method-assign]

    def validating(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun tells every process
        return validate(*args, **kwargs)

    TrainingStep.__call__ = stepping  # type: ignore[method-assign]
    if where == "part":
        TrainingStep._there_and_back = in_a_part  # type: ignore[method-assign]
    if where == "validation":
        judging.validate = validating  # type: ignore[assignment]
    try:
        run_training(options(), Console(file=io.StringIO()), change)
    except Stopped as stopped:
        return stopped.exit_code, str(stopped)
    finally:
        TrainingStep.__call__ = step  # type: ignore[method-assign]
        TrainingStep._there_and_back = there  # type: ignore[method-assign]
        judging.validate = validate  # type: ignore[assignment]
    return 0, "not stopped"


def left(processes: Processes, *_: str) -> dict[str, Any]:
    """The second process goes away; comes last."""
    if not processes.main:
        os._exit(0)
    try:
        processes.largest(1)
    except LostProcessError as error:
        return {"message": str(error)}
    return {}


CASES = {
    function.__name__: function
    for function in (
        exchange,
        gradients,
        fitting,
        steps,
        empty,
        spoilt,
        skipped,
        validated,
        run,
        turned,
        handed,
        matrix,
        left,
    )
}


def main() -> None:
    data, out, *cases = sys.argv[1:]
    second = os.fork()
    os.environ["RANK"] = "0" if second else "1"
    torch.set_num_threads(1)
    run_module.draw_run = lambda *_: None  # which takes as long as such a run
    with joined_processes() as processes:
        for case in cases:
            began = time.monotonic()
            found = CASES[case](processes, data, out)
            print(f"{case}: {time.monotonic() - began:.1f} s")
            torch.save(found, Path(out) / f"{case}-{processes.rank}.pt")
    if second:
        _, status = os.waitpid(second, 0)
        sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
