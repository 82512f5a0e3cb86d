"""The training loop, to be read top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console

from retinanet.batches import Batch
from retinanet.checkpoint import Model, find_model, load_model, save_model
from retinanet.data import Dataset
from retinanet.data.loading import training_batches
from retinanet.errors import CheckpointError, DivergedError, Stopped
from retinanet.folders import write_json
from retinanet.inference import Detector, Validation, validate
from retinanet.model import RetinaNet
from retinanet.processes import ALONE, Processes
from retinanet.training.folder import RunFolder, go_on
from retinanet.training.meter import Meter
from retinanet.training.optimizer import rate
from retinanet.training.patience import EarlyStop, early_stop
from retinanet.training.planning import Plan
from retinanet.training.progress import plain_console
from retinanet.training.signals import StopRequest
from retinanet.training.skipping import SkippedSteps, UnreadableImages, tell_skipped
from retinanet.training.state import State, optimizer_tensors, restore_optimizers, save_state
from retinanet.training.step import TrainingStep
from retinanet.training.story import RunStory

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
    processes: Processes = ALONE,
) -> Validation:
    """Train a network by a plan: validate, log and save on the way. Return the best validation.

    `best/` in the folder is the model of that validation, `last/` the newest, `checkpoints/` what it takes to go on.

    Args:
        stop: a signal that came is obeyed at the end of the step, or at once in a validation; either way the run can
            be resumed where it stopped.
        state: where an earlier process stopped; None starts at step 0.
        processes: that train together; each takes its share of every step and of every validation, and the main one
            writes.
    """
    recipe, seed = plan.recipe, plan.options.seed
    train_on = TrainingStep.of(
        plan, network, processes, _line_of(console if processes.main else plain_console())
    )
    judge = Judge(plan, train_on.shipped, val, folder, processes)
    meter, skipped, unreadable = Meter(), SkippedSteps(processes), UnreadableImages(processes)
    saving = Saving(plan, folder, train_on, meter, skipped, unreadable, processes)
    first = 0
    if state is not None:
        first = saving.restore(state)
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
        rank=processes.rank,
        processes=processes.count,
        pin_memory=plan.device.type == "cuda",
        repeat_rare=plan.recipe.repeat_rare,
    )
    how = f"go on with: {go_on(folder)}"

    with RunStory(plan, train, val, folder, console, first, early=judge.early, main=processes.main) as story:
        processes.wait()  # for writers that open and a page that is drawn
        if plan.judges(first) and not judge.knows(first):  # stopped before that validation was done
            with stop.at_once(f"stopped by a signal in the validation of step {first}; {how}"):
                judge(first, story)
        for step, batch in enumerate(story.batches(judge.until_enough(batches)), start=first + 1):
            _seed_step(seed, step, processes.rank)
            lr = plan.lr * rate(
                step - 1,
                plan.steps,
                schedule=recipe.schedule,
                warmup_steps=plan.warmup_steps,
                warmup_from=recipe.warmup_from,
            )
            done = train_on(batch, lr)

            meter.add(done, plan.batch_size)
            skipped.note(step, batch.indices, done.finite, done.total)
            unreadable.note(batch.failed)
            # A signal to any process stops all, after the same step; the main one's clock says when a state is due.
            signal, due = processes.largest(stop.number or 0, processes.main and saving.due(step))
            judging = plan.judges(step)
            # When something is told does not depend on when states are saved: a log is the same however often its run
            # was stopped.
            telling, saves = step % LOG_EVERY == 0 or judging, judging or due or signal
            if telling or saves or not train_on.decides_on_device:
                for one in skipped.read():
                    if processes.main:
                        story.say(tell_skipped(folder, one, plan, train))
                skipped.require_few(lr)
            if telling:
                story.unreadable(step, unreadable.take())
                story.trained(step, {**meter.read(), "lr": lr})
            if saves:
                with story.clock.during("saving"):
                    saving.save(step)
            if judging:
                with stop.at_once(f"stopped by a signal in the validation of step {step}; {how}"):
                    judge(step, story)
                meter.restart_clock()
            if signal and step < plan.steps:
                if not judging and processes.main:  # else it was just saved, with its thresholds
                    save_model(folder.last, judge.model(step))
                processes.wait()  # for what is written: where one process ends, torchrun ends the others
                raise Stopped(signal, f"stopped by a signal at step {step} of {plan.steps}; {how}")
        with stop.at_once(f"stopped by a signal after the last step; {how}"):
            return judge.best()


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Let what is random in a step (stochastic depth) follow from the step, not from what ran before."""
    words = (seed, step, rank) if rank else (seed, step)
    torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))


def _line_of(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, soft_wrap=True)


@dataclass
class Saving:
    """When a training state is saved, what is in it, and how a run takes it up again."""

    plan: Plan
    folder: RunFolder
    train_on: TrainingStep
    meter: Meter
    skipped: SkippedSteps
    unreadable: UnreadableImages
    processes: Processes = ALONE
    saved_at: float = field(default_factory=time.monotonic)

    def due(self, step: int) -> bool:
        """Return whether the steps or the minutes between two states are over."""
        options = self.plan.options
        by_steps = options.save_every_steps is not None and step % options.save_every_steps == 0
        return by_steps or time.monotonic() - self.saved_at >= 60 * options.save_every_minutes

    def save(self, step: int) -> None:
        """Save everything that the next step depends on, and what has been told: what every process has alike.

        Raises:
            DivergedError: a weight is not finite; the states before stay.
            DiskError: the disk has no room or refuses.
        """
        train_on = self.train_on
        for name, weight in train_on.network.named_parameters():
            if not torch.isfinite(weight).all():
                raise DivergedError(
                    f"the weights are no longer finite at step {step}, {name} for one; start anew with a lower --lr"
                )
        train_on.share_statistics()
        self.unreadable.share()
        parts = {
            "network": train_on.network.state_dict(),
            "optimizer": optimizer_tensors(train_on.optimizers),
            "meter": {} if self.meter.sums is None else {"sums": self.meter.sums},
        }
        (in_parts,) = self.processes.largest(train_on.parts)
        values = {
            "skipped_in_a_row": self.skipped.in_a_row,
            "unreadable": sorted(self.unreadable.told),
            "unreadable_untold": sorted(self.unreadable.untold),
            "parts_of_a_step": in_parts,
        }
        if train_on.average is not None:
            parts["average"] = train_on.average.model.state_dict()
            values["averaged"] = int(train_on.average.updates)
        if self.processes.main:
            save_state(self.folder.checkpoints, State(step, parts, values))
        self.processes.wait()  # in a step, where they would meet next, none waits for a slow disk
        self.saved_at = time.monotonic()

    def restore(self, state: State) -> int:
        """Put a state back into place; return its step.

        Raises:
            CheckpointError: it is of another network or optimiser.
        """
        try:
            self._restore(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"--resume needs the state of this very network and optimiser; that of step {state.step} in "
                f"{self.folder.checkpoints} is of others: {reason}"
            ) from None
        return state.step

    def _restore(self, state: State) -> None:
        train_on, values = self.train_on, state.values
        train_on.network.load_state_dict(state.parts["network"])
        restore_optimizers(train_on.optimizers, state.parts["optimizer"])
        if train_on.average is not None:
            train_on.average.model.load_state_dict(state.parts["average"])
            train_on.average.updates.fill_(values["averaged"])
        sums = state.parts["meter"].get("sums")
        self.meter.sums = None if sums is None else sums.to(train_on.device)
        self.skipped.in_a_row = values["skipped_in_a_row"]
        self.unreadable.told.update(values["unreadable"])
        # The first states of this format do not have the rest.
        self.unreadable.untold.update(values.get("unreadable_untold", ()))
        # Where memory ran out it would again.
        train_on.parts = max(train_on.parts, values.get("parts_of_a_step", 1))


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
    processes: Processes = ALONE
    steps: set[int] = field(default_factory=set)
    best_ap: float = 0.0
    newest_best: Validation | None = None
    early: EarlyStop | None = None

    def remember(self) -> None:
        """Take up what an earlier process of this run judged, as the main process reads it: a shared disk may show
        others what it was a moment ago."""
        validations = self.folder.validations() if self.processes.main else []
        judged = self.processes.told([(record["step"], record["ap"] or 0.0) for record in validations])
        self.steps.update(step for step, _ in judged)
        self.best_ap = max((ap for _, ap in judged), default=0.0)
        self._decide()

    def until_enough(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches until validations say that the run stops early."""
        waiting = iter(batches)
        while self.early is None and (batch := next(waiting, None)) is not None:
            yield batch

    def _decide(self) -> None:
        """Find out whether the run stops early; the main process knows what was told."""
        patience = self.plan.options.patience
        if patience is not None:
            validations = self.folder.validations() if self.processes.main else []
            self.early = self.processes.told(early_stop(validations, patience))

    def knows(self, step: int) -> bool:
        """Return whether the weights of a step are judged."""
        return step in self.steps

    def best(self) -> Validation:
        """Return the best validation; that of an earlier process is made again from its model."""
        if self.newest_best is None:
            detector = Detector(load_model(find_model(self.folder.path)), device=str(self.plan.device))
            self.newest_best = self._validated(detector)
        return self.newest_best

    def __call__(self, step: int, story: RunStory) -> None:
        with story.clock.during("validating"):
            self._judge(step, story)
            self._decide()
            story.early = self.early

    def _judge(self, step: int, story: RunStory) -> None:
        began = time.monotonic()
        # Just as `retinanet evaluate` will do it with the saved file, fp32 included: the figures must agree.
        detector = Detector(self.model(step), device=str(self.plan.device))
        found = self._validated(detector)
        self.steps.add(step)
        best = (found.ap or 0) >= self.best_ap
        if best:
            self.newest_best, self.best_ap = found, found.ap or 0.0
        if self.processes.main:
            self._keep(step, found, best, story, time.monotonic() - began)
        self.processes.wait()  # for what it writes and draws

    def _validated(self, detector: Detector) -> Validation:
        # As many at once as in a step: what fits there fits here, where no gradients are kept.
        at_once = -(-self.plan.batch_size // (self.processes.count * self.plan.options.accumulate))
        return validate(detector, self.val, batch_size=at_once, processes=self.processes)

    def _keep(self, step: int, found: Validation, best: bool, story: RunStory, seconds: float) -> None:
        """Save and tell a validation; its line in the log comes last and says that the models are there."""
        save_model(self.folder.last, self.model(step, found))
        if best:
            save_model(self.folder.best, self.model(step, found))
            write_json(self.folder.path / "metrics.json", found.metrics.to_json())
        story.validated(step, found, seconds)

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
