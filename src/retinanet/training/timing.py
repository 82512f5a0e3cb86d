"""`--time`: how many steps fit, measured on this machine before the run."""

from __future__ import annotations

import copy
import dataclasses
import math
import time

import torch

from retinanet.checkpoint import Model
from retinanet.data import Dataset
from retinanet.data.loading import training_batches
from retinanet.devices import autocast
from retinanet.inference import Detector
from retinanet.model import RetinaNet
from retinanet.training.optimizer import build_optimizers
from retinanet.training.planning import VALIDATIONS, Plan, warmup_of

WARM_STEPS, TIMED_STEPS = 3, 8
# The trial goes on for this share of the time: a machine that others use too is not known after eight steps.
TRIAL = 0.03
VALIDATION_IMAGES = 16
# Share of the time that is planned; the rest is for what differs between a trial and a run.
PLANNED = 0.92
# Share of the time for validations, of which the last one always takes place.
VALIDATED = 0.05


def fit_to_time(plan: Plan, network: RetinaNet, train: Dataset, val: Dataset, deadline: float) -> Plan:
    """Return the plan with as many steps as end before `deadline` (of `time.monotonic`), validations included.

    A copy of the network takes a few steps and looks at a few images; the network itself is not touched.
    """
    trial = copy.deepcopy(network)
    step = _step_seconds(plan, trial, train, TRIAL * (deadline - time.monotonic()))
    few = [val.path(i) for i in range(min(VALIDATION_IMAGES, len(val)))]
    detector = Detector(Model(trial, plan.spec), device=str(plan.device))
    list(detector.detect_all(few[:1]))  # what is slow once only
    began = time.monotonic()
    list(detector.detect_all(few, batch_size=plan.batch_size))
    validation = (time.monotonic() - began) / len(few) * len(val)
    every = plan.options.validate_every_steps
    seconds = deadline - time.monotonic()
    if every:
        validations, per_step = 0, step + validation / every
    else:
        affordable = int(VALIDATED * seconds / validation)
        validations, per_step = max(1, min(VALIDATIONS, affordable)), step
    steps = max(1, math.floor((seconds * PLANNED - validations * validation) / per_step))
    # Three digits are enough, and make runs on one machine comparable.
    steps = max(1, int(float(f"{steps:.3g}")))
    why = f"fit into the {seconds:.0f} s left: {step:.2f} s a step, {validation:.0f} s a validation"
    return dataclasses.replace(
        plan,
        steps=steps,
        warmup_steps=warmup_of(plan.recipe, steps),
        validate_every=every or math.ceil(steps / validations),
        reasons=tuple(
            ("steps", f"{steps:,}", why) if setting == "steps" else (setting, value, reason)
            for setting, value, reason in plan.reasons
        ),
    )


def _step_seconds(plan: Plan, network: RetinaNet, train: Dataset, seconds: float) -> float:
    """Return the mean time of the steps that fit into `seconds`, at least of `TIMED_STEPS`."""
    network.to(plan.device).to(memory_format=torch.channels_last).train()
    recipe = plan.recipe
    optimizers = build_optimizers(
        network, name=recipe.optimizer, lr=0.0, weight_decay=0.0, decay_all=recipe.decay_all
    )
    batches = training_batches(
        train,
        plan.spec.preprocessing,
        recipe.augmentation,
        batch_size=plan.batch_size,
        seed=plan.options.seed,
        steps=plan.steps + WARM_STEPS + TIMED_STEPS,
        workers=0,  # the time of a worker that shares the cores is part of the step
    )
    taken = []
    began = time.monotonic()
    for batch in batches:
        images = batch.images.to(plan.device, memory_format=torch.channels_last)
        with autocast(plan.device, plan.options.precision):
            predictions = network(images)
        targets = batch.targets.to(plan.device)
        losses = plan.objective(predictions, targets, height=images.shape[2], width=images.shape[3])
        losses.total.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        now = time.monotonic()
        taken.append(now - began)
        began = now
        timed = taken[WARM_STEPS:]
        if len(timed) >= TIMED_STEPS and sum(taken) >= seconds:
            break
    return sum(timed) / len(timed)
