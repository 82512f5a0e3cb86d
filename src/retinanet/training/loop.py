"""The training loop, to be read top to bottom."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console

from retinanet.checkpoint import save_model
from retinanet.data.loading import training_batches
from retinanet.errors import Stopped
from retinanet.inference import Validation
from retinanet.processes import ALONE, Processes
from retinanet.training.deadline import MOST
from retinanet.training.folder import RunFolder, go_on
from retinanet.training.judging import Judge
from retinanet.training.meter import Meter
from retinanet.training.optimizer import rate
from retinanet.training.preparation import Prepared
from retinanet.training.progress import plain_console
from retinanet.training.saving import Saving
from retinanet.training.signals import StopRequest
from retinanet.training.skipping import SkippedSteps, UnreadableImages, tell_skipped
from retinanet.training.state import State
from retinanet.training.step import TrainingStep
from retinanet.training.story import RunStory

# Steps between two lines of metrics.jsonl.
LOG_EVERY = 10


def train_network(
    prepared: Prepared,
    folder: RunFolder,
    console: Console,
    stop: StopRequest,
    state: State | None = None,
    processes: Processes = ALONE,
) -> Validation:
    """Train a network by its plan: validate, log and save on the way. Return the best validation.

    `best/` in the folder is the model of that validation, `last/` the newest, `checkpoints/` what it takes to go on.

    Args:
        stop: a signal that came is obeyed at the end of the step, or at once in a validation; either way the run can
            be resumed where it stopped.
        state: where an earlier process stopped; None starts at step 0.
        processes: that train together; each takes its share of every step and of every validation, and the main one
            writes.
    """
    plan, train, val, deadline = prepared.plan, prepared.train_set, prepared.val_set, prepared.deadline
    recipe, seed = plan.recipe, plan.options.seed
    train_on = TrainingStep.of(
        plan, prepared.network, processes, _line_of(console if processes.main else plain_console())
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
        steps=MOST * plan.schedule_steps if deadline else plan.steps,
        first_step=first,
        workers=plan.workers,
        rank=processes.rank,
        processes=processes.count,
        pin_memory=plan.device.type == "cuda",
        repeat_rare=plan.recipe.repeat_rare,
    )
    how = f"go on with: {go_on(folder)}"

    with RunStory(
        plan,
        train,
        val,
        folder,
        console,
        first,
        tried=prepared.estimate,
        early=judge.early,
        main=processes.main,
    ) as story:
        processes.wait()  # for writers that open and a page that is drawn
        if plan.judges(first) and not judge.knows(first):  # stopped before that validation was done
            with stop.at_once(f"stopped by a signal in the validation of step {first}; {how}"):
                judge(first, story)
        for step, batch in enumerate(story.batches(judge.until_enough(batches, first)), start=first + 1):
            _seed_step(seed, step, processes.rank)
            lr = plan.lr * rate(
                plan.place(step - 1),
                plan.schedule_steps,
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
            if deadline and telling:
                steps = processes.told(deadline.steps(plan, step, story.left.pace()))
                if steps != plan.steps:
                    plan = judge.plan = saving.plan = plan.turned(step, steps)
                    story.turned(plan)
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
