"""The training loop, to be read top to bottom."""

from __future__ import annotations

import shlex
import time
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from retinanet.checkpoint import Model, find_model, load_model, save_model
from retinanet.data import Dataset
from retinanet.data.loading import training_batches
from retinanet.errors import CheckpointError, DivergedError, Stopped
from retinanet.folders import write_json
from retinanet.inference import Detector, Validation, validate
from retinanet.model import RetinaNet
from retinanet.training.folder import RunFolder
from retinanet.training.memory import MemoryLog
from retinanet.training.optimizer import rate
from retinanet.training.planning import Plan
from retinanet.training.progress import TrainingProgress
from retinanet.training.signals import StopRequest
from retinanet.training.state import State, optimizer_tensors, restore_optimizers, save_state
from retinanet.training.step import TrainingStep

# Steps between two lines of metrics.jsonl.
LOG_EVERY = 10


def train_network(
    plan: Plan,
    network: RetinaNet,
    train: Dataset,
    val: Dataset,
    folder: RunFolder,
    console: Console,
    stop: StopRequest,
    state: State | None = None,
) -> Validation:
    """Train a network by a plan: validate, log and save on the way. Return the best validation.

    `best/` in the folder is the model of that validation, `last/` the newest, `checkpoints/` what it takes to go on.

    Args:
        stop: a signal that came is obeyed at the end of the step, or at once in a validation; either way the run can
            be resumed where it stopped.
        state: where an earlier process stopped; None starts at step 0.
    """
    recipe, seed = plan.recipe, plan.options.seed
    train_on = TrainingStep.of(plan, network)
    judge = Judge(plan, train_on.shipped, val, folder)
    meter, memory, saving = Meter(), MemoryLog(plan.device), Saving(plan, folder)
    unreadable: set[str] = set()
    first = 0
    if state is not None:
        first = saving.restore(state, train_on, meter, unreadable)
        judge.remember()
    batches = training_batches(
        train,
        plan.preprocessing,
        plan.augmentation,
        batch_size=plan.batch_size,
        seed=seed,
        steps=plan.steps,
        first_step=first,
        workers=plan.workers,
        pin_memory=plan.device.type == "cuda",
        repeat_rare=plan.recipe.repeat_rare,
    )
    how = f"go on with: {go_on(folder)}"

    with TrainingProgress(console, plan.steps, first) as progress:
        if plan.judges(first) and not judge.knows(first):  # stopped before that validation was done
            with stop.at_once(f"stopped by a signal in the validation of step {first}; {how}"):
                judge(first, progress)
        for step, batch in enumerate(batches, start=first + 1):
            # Whatever is random in a step (stochastic depth) follows from the step, not from what ran before.
            torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))
            lr = plan.lr * rate(
                step - 1,
                plan.steps,
                schedule=recipe.schedule,
                warmup_steps=plan.warmup_steps,
                warmup_from=recipe.warmup_from,
            )
            losses = train_on(batch, lr)

            meter.add(losses.total, losses.classes, losses.boxes, len(batch.indices))
            for failure in set(batch.failed) - unreadable:
                progress.say(f"skipped, and replaced by the next image: {failure}")
            unreadable.update(batch.failed)
            judging, saves = plan.judges(step), saving.due(step) or stop.number is not None
            if step % LOG_EVERY == 0 or judging or saves:
                loss = meter.mean()
                if not np.isfinite(loss):  # before it is saved
                    files = ", ".join(str(train.files[index]) for index in batch.indices)
                    raise DivergedError(
                        f"the loss is {loss} at step {step} (images now: {files}); lower --lr, now {lr:g}"
                    )
            if step % LOG_EVERY == 0 or judging:
                epoch = step * plan.batch_size / plan.train_images
                record = {"step": step, "epoch": epoch, **meter.read(), "lr": lr, **memory.read()}
                folder.log(record)
                progress.step(step, record)
            if judging or saves:
                saving.save(step, train_on, meter, unreadable)
            if judging:
                with stop.at_once(f"stopped by a signal in the validation of step {step}; {how}"):
                    judge(step, progress)
                meter.restart_clock()
            if stop.number is not None and step < plan.steps:
                if not judging:  # else it was just saved, with its thresholds
                    save_model(folder.last, judge.model(step))
                raise Stopped(stop.number, f"stopped by a signal at step {step} of {plan.steps}; {how}")
    with stop.at_once(f"stopped by a signal after the last step; {how}"):
        return judge.best()


def go_on(folder: RunFolder) -> str:
    """Return the command that resumes a run."""
    return f"retinanet train --resume {shlex.quote(str(folder.path))}"


class Saving:
    """When a training state is saved, what is in it, and how a run takes it up again."""

    def __init__(self, plan: Plan, folder: RunFolder) -> None:
        self.every_steps = plan.options.save_every_steps
        self.every_seconds = 60 * plan.options.save_every_minutes
        self.folder = folder.checkpoints
        self.saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Return whether the steps or the minutes between two states are over."""
        by_steps = self.every_steps is not None and step % self.every_steps == 0
        return by_steps or time.monotonic() - self.saved_at >= self.every_seconds

    def save(self, step: int, train_on: TrainingStep, meter: Meter, unreadable: Collection[str]) -> None:
        """Save everything that the next step depends on, and what has been told.

        Raises:
            DivergedError: a weight is not finite; the states before stay.
            TrainingError: the disk has no room or refuses.
        """
        for name, weight in train_on.network.named_parameters():
            if not torch.isfinite(weight).all():
                raise DivergedError(
                    f"the weights are no longer finite at step {step}, {name} for one; start anew with a lower --lr"
                )
        parts = {
            "network": train_on.network.state_dict(),
            "optimizer": optimizer_tensors(train_on.optimizers),
            "meter": {} if meter.sums is None else {"sums": meter.sums},
        }
        values = {"meter_steps": meter.steps, "unreadable": sorted(unreadable)}
        if train_on.average is not None:
            parts["average"] = train_on.average.model.state_dict()
            values["averaged"] = train_on.average.updates
        save_state(self.folder, State(step, parts, values))
        self.saved_at = time.monotonic()

    def restore(self, state: State, train_on: TrainingStep, meter: Meter, unreadable: set[str]) -> int:
        """Put a state back into place; return its step.

        Raises:
            CheckpointError: it is of another network or optimiser.
        """
        try:
            return self._restore(state, train_on, meter, unreadable)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"--resume needs the state of this very network and optimiser; that of step {state.step} in "
                f"{self.folder} is of others: {reason}"
            ) from None

    def _restore(self, state: State, train_on: TrainingStep, meter: Meter, unreadable: set[str]) -> int:
        train_on.network.load_state_dict(state.parts["network"])
        restore_optimizers(train_on.optimizers, state.parts["optimizer"])
        if train_on.average is not None:
            train_on.average.model.load_state_dict(state.parts["average"])
            train_on.average.updates = state.values["averaged"]
        sums = state.parts["meter"].get("sums")
        meter.sums = None if sums is None else sums.to(train_on.device)
        meter.steps = state.values["meter_steps"]
        unreadable.update(state.values["unreadable"])
        return state.step


@dataclass
class Judge:
    """Validates the weights that will be shipped (the average where there is one) and keeps the best.

    What was judged before the run was resumed is known from `metrics.jsonl`; a line there says that the models of that
    validation are written.
    """

    plan: Plan
    network: RetinaNet
    val: Dataset
    folder: RunFolder
    steps: set[int] = field(default_factory=set)
    best_ap: float = 0.0
    newest_best: Validation | None = None

    def remember(self) -> None:
        """Take up what an earlier process of this run judged."""
        for record in self.folder.validations():
            self.steps.add(record["step"])
            self.best_ap = max(self.best_ap, record["ap"] or 0.0)

    def knows(self, step: int) -> bool:
        """Return whether the weights of a step are judged."""
        return step in self.steps

    def best(self) -> Validation:
        """Return the best validation; that of an earlier process is made again from its model."""
        if self.newest_best is None:
            detector = Detector(load_model(find_model(self.folder.path)), device=str(self.plan.device))
            self.newest_best = validate(detector, self.val, batch_size=self.plan.batch_size)
        return self.newest_best

    def __call__(self, step: int, progress: TrainingProgress) -> None:
        began = time.monotonic()
        # Just as `retinanet evaluate` will do it with the saved file, fp32 included: the figures must agree.
        detector = Detector(self.model(step), device=str(self.plan.device))
        found = validate(detector, self.val, batch_size=self.plan.batch_size)
        metrics = found.metrics.to_json()
        progress.evaluated(step, found.metrics, time.monotonic() - began)
        for file, failure in found.failed.items():
            progress.say(f"left out of the validation: {file}: {failure}")
        save_model(self.folder.last, self.model(step, found))
        if (found.ap or 0) >= self.best_ap:
            self.newest_best, self.best_ap = found, found.ap or 0.0
            save_model(self.folder.best, self.model(step, found))
            write_json(self.folder.path / "metrics.json", metrics)
        figures = {name: value for name, value in metrics.items() if name.startswith(("ap", "ar"))}
        self.folder.log(
            {"step": step, "epoch": step * self.plan.batch_size / self.plan.train_images, **figures}
        )
        self.steps.add(step)

    def model(self, step: int, found: Validation | None = None) -> Model:
        """Return the model file's content after a step."""
        summary = {
            "step": step,
            "steps": self.plan.steps,
            "images_seen": step * self.plan.batch_size,
            "recipe": self.plan.recipe.name,
            "data": self.val.name,
        }
        if self.plan.options.weights is not None:
            summary["weights"] = self.plan.options.weights
        if found is None:
            return Model(self.network, self.plan.spec, training=summary)
        return Model(
            self.network,
            self.plan.spec,
            found.operating_points,
            {**summary, "ap": found.ap, "ap50": found.metrics.ap50},
        )


class Meter:
    """Means of the losses and the speed since the last reading. Sums stay on the device until read."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.steps = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last reading (a validation) out of the speed."""
        self.began = time.monotonic()
        self.timed_images = 0

    def add(self, total: Tensor, classes: Tensor, boxes: Tensor, images: int) -> None:
        values = torch.stack([total.detach(), classes.detach(), boxes.detach()])
        self.sums = values if self.sums is None else self.sums + values
        self.steps += 1
        self.timed_images += images

    def mean(self) -> float:
        """Return the mean loss since the last reading."""
        assert self.sums is not None
        return float(self.sums[0]) / self.steps

    def read(self) -> dict[str, float]:
        assert self.sums is not None
        total, classes, boxes = (self.sums / self.steps).tolist()
        speed = self.timed_images / max(1e-9, time.monotonic() - self.began)
        self.sums, self.steps = None, 0
        self.restart_clock()
        return {"loss": total, "loss_class": classes, "loss_box": boxes, "images_per_second": speed}
