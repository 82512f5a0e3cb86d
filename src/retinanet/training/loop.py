"""The training loop, to be read top to bottom."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from retinanet.checkpoint import Model, save_model
from retinanet.data import Dataset
from retinanet.data.loading import training_batches
from retinanet.errors import Stopped, TrainingError
from retinanet.folders import write_json
from retinanet.inference import Detector, Validation, validate
from retinanet.model import RetinaNet
from retinanet.training.folder import RunFolder
from retinanet.training.optimizer import rate
from retinanet.training.planning import Plan
from retinanet.training.progress import TrainingProgress
from retinanet.training.signals import noted_signals
from retinanet.training.step import TrainingStep

# Steps between two lines of metrics.jsonl.
LOG_EVERY = 10


def train_network(
    plan: Plan, network: RetinaNet, train: Dataset, val: Dataset, folder: RunFolder, console: Console
) -> Validation:
    """Train a network by a plan: validate, log and save on the way. Return the best validation.

    `best/` in the folder is the model of that validation, `last/` the newest.
    """
    recipe, seed = plan.recipe, plan.options.seed
    train_on = TrainingStep.of(plan, network)
    batches = training_batches(
        train,
        plan.preprocessing,
        plan.augmentation,
        batch_size=plan.batch_size,
        seed=seed,
        steps=plan.steps,
        workers=plan.workers,
        pin_memory=plan.device.type == "cuda",
        repeat_rare=plan.recipe.repeat_rare,
    )
    judge = Judge(plan, train_on.shipped, val, folder)
    meter = Meter()
    unreadable: set[str] = set()

    with noted_signals() as stop, TrainingProgress(console, plan.steps) as progress:
        for step, batch in enumerate(batches, start=1):
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
            judging = step % plan.validate_every == 0 or step == plan.steps
            if step % LOG_EVERY == 0 or judging or stop.number is not None:  # before anything is saved
                figures = meter.read()
                if not np.isfinite(figures["loss"]):
                    files = ", ".join(str(train.files[index]) for index in batch.indices)
                    raise TrainingError(
                        f"the loss is {figures['loss']} at step {step} (images now: {files}); lower --lr, now {lr:g}"
                    )
                record = {
                    "step": step,
                    "epoch": step * plan.batch_size / plan.train_images,
                    **figures,
                    "lr": lr,
                }
                folder.log(record)
                progress.step(step, record)
            if judging:
                judge(step, progress)
                meter.restart_clock()
            if stop.number is not None and step < plan.steps:
                if not judging:  # else it was just saved, with its thresholds
                    save_model(folder.last, judge.model(step))
                message = (
                    f"stopped by a signal at step {step} of {plan.steps}; the weights are in {folder.last}"
                )
                raise Stopped(stop.number, message)
    assert judge.best is not None  # the last step validates
    return judge.best


@dataclass
class Judge:
    """Validates the weights that will be shipped (the average where there is one) and keeps the best."""

    plan: Plan
    network: RetinaNet
    val: Dataset
    folder: RunFolder
    best: Validation | None = None

    def __call__(self, step: int, progress: TrainingProgress) -> None:
        began = time.monotonic()
        # Just as `retinanet evaluate` will do it with the saved file, fp32 included: the figures must agree.
        detector = Detector(self.model(step), device=str(self.plan.device))
        found = validate(detector, self.val, batch_size=self.plan.batch_size)
        metrics = found.metrics.to_json()
        figures = {name: value for name, value in metrics.items() if name.startswith(("ap", "ar"))}
        self.folder.log(
            {"step": step, "epoch": step * self.plan.batch_size / self.plan.train_images, **figures}
        )
        progress.evaluated(step, found.metrics, time.monotonic() - began)
        for file, failure in found.failed.items():
            progress.say(f"left out of the validation: {file}: {failure}")
        save_model(self.folder.last, self.model(step, found))
        if self.best is None or (found.ap or 0) >= (self.best.ap or 0):
            self.best = found
            save_model(self.folder.best, self.model(step, found))
            write_json(self.folder.path / "metrics.json", metrics)

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

    def read(self) -> dict[str, float]:
        assert self.sums is not None
        total, classes, boxes = (self.sums / self.steps).tolist()
        speed = self.timed_images / max(1e-9, time.monotonic() - self.began)
        self.sums, self.steps = None, 0
        self.restart_clock()
        return {"loss": total, "loss_class": classes, "loss_box": boxes, "images_per_second": speed}
