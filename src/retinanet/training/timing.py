"""What a run takes on this machine, by a trial before it: `--time` plans by that, `--dry-run` says it."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import time

from retinanet.checkpoint import Model
from retinanet.data import Dataset
from retinanet.data.loading import training_batches
from retinanet.errors import ConfigError
from retinanet.inference import Detector
from retinanet.model import RetinaNet
from retinanet.processes import ALONE, Processes
from retinanet.training.deadline import Deadline, reserve
from retinanet.training.estimate import Estimate
from retinanet.training.memory import (
    Limit,
    limit_of,
    peak_memory,
    resident,
    restart_peak_memory,
    return_freed,
)
from retinanet.training.plan import Plan
from retinanet.training.sizing import PIXELS_A_SECOND, padded_pixels
from retinanet.training.step import TrainingStep

LEAST_STEPS = 10
# The trial goes on for this share of the time, within limits: a machine that others use too is not known after
# ten steps, and nobody wants to wait for minutes to see a plan.
TRIAL, LONGEST_TRIAL = 0.03, 60.0
VALIDATION_IMAGES = 16
# Share of the time for validations, of which the last one always takes place.
VALIDATED = 0.05
# Seconds of steps of one image, of steps of more, and of validating in the trial of a dry run, which need not be exact:
# with what has to be done once, a usual CPU takes about ten. A slow one tries fewer images, so that the two steps of
# them take no longer than the last number.
FIRST, TOGETHER, LOOKING, PATIENCE = 0.5, 2.0, 1.5, 30.0
# Share of the memory that such a trial may take.
CAREFUL = 0.5


def try_out(
    plan: Plan,
    network: RetinaNet,
    train: Dataset,
    val: Dataset,
    deadline: Deadline,
    processes: Processes = ALONE,
) -> Estimate:
    """Return what a trial of a run with a deadline measures.

    A copy of the network takes a few steps and looks at a few images; the network itself is not touched. What the main
    process finds counts for all.
    """
    began = time.monotonic()
    trial = copy.deepcopy(network)
    step = _step_seconds(plan, trial, train, min(LONGEST_TRIAL, TRIAL * (deadline.at - began)), processes)
    validation = _validation_seconds(plan, trial, val, math.inf) / processes.count
    memory, tried = peak_memory(plan.device), time.monotonic() - began
    step, validation = processes.told((step, validation))
    return Estimate(step, validation, memory, limit_of(plan.device, processes.here), tried)


def fit_to_time(plan: Plan, tried: Estimate, deadline: Deadline, processes: Processes = ALONE) -> Plan:
    """Return the plan with as many steps as end before the deadline, validations included.

    Raises:
        ConfigError: not even one step and a validation end in that time.
    """
    step, validation = tried.step, tried.validation
    seconds = processes.told(deadline.at - time.monotonic())
    every = plan.options.validate_every_steps
    if every:
        validations, per_step = 1, step + validation / every
    else:
        validations = max(1, min(plan.usual_validations, int(VALIDATED * seconds / max(validation, 1e-9))))
        per_step = step
    steps = math.floor((seconds - reserve(seconds) - validations * validation) / per_step)
    if steps < 1:
        raise ConfigError(
            f"--time {plan.options.time} is too short: a step takes {step:.1f} s here and a validation "
            f"{validation:.0f} s, and {max(0, seconds):.0f} s are left; give more time, or a smaller --image-size, "
            "--batch-size or backbone"
        )
    # Three digits are enough, and make runs on one machine comparable.
    steps = int(float(f"{steps:.3g}"))
    why = f"fit into the {seconds:.0f} s left: {step:.2f} s a step, {validation:.0f} s a validation"
    return plan.lasting(steps, why, validations)


def pixels_a_second(plan: Plan, tried: Estimate, train: Dataset) -> float:
    """Return how many pixels a second the trial trained, as the guess times a power of 2: a machine is not equally fast
    every time, and runs of one command should be of one size.
    """
    pixels = plan.batch_size * padded_pixels(train, plan.spec.preprocessing, plan.batch_size)
    return PIXELS_A_SECOND * 2.0 ** round(math.log2(pixels / tried.step / PIXELS_A_SECOND))


def estimate_run(
    plan: Plan, network: RetinaNet, train: Dataset, val: Dataset, processes: Processes = ALONE
) -> Estimate:
    """Return what a run will take, by a trial of a few seconds: about what is usual, not the worst that can happen.

    A copy of the network is tried, of several processes by each for itself; with `--compile` as it is, not compiled.
    """
    began = time.monotonic()
    trial, limit = copy.deepcopy(network), limit_of(plan.device, processes.here)
    tried = dataclasses.replace(uncompiled(plan), batch_size=-(-plan.batch_size // processes.count))
    train_on = TrainingStep.of(tried, trial)
    if plan.device.type == "cpu":
        step, memory = _by_few_images(tried, train_on, train, limit)
    else:
        step, memory = _tried(tried, train_on, train, TOGETHER)
    validation = _validation_seconds(tried, trial, val, LOOKING) / processes.count
    return Estimate(step, validation, memory or None, limit, time.monotonic() - began)


def _by_few_images(
    plan: Plan, train_on: TrainingStep, train: Dataset, limit: Limit | None
) -> tuple[float, float]:
    """Return the time of a step and its memory, by steps of one image and then of the batch, or of as much of it as
    there is time and, with care, memory for. The rest follows from a line through both: what a step takes whatever its
    images (gradients, the optimiser) is in both.
    """
    alone, first = _tried(dataclasses.replace(plan, batch_size=1), train_on, train, FIRST)
    return_freed()
    held = resident() or 0
    room = (CAREFUL * limit.bytes - held) / max(1, first - held) if limit else plan.batch_size
    images = min(plan.batch_size, int(PATIENCE / (2 * alone)), int(room))
    at_once = [-(-n // plan.options.accumulate) for n in (1, images, plan.batch_size)]
    if images <= 1:
        return alone * plan.batch_size, first + (at_once[-1] - 1) * max(0, first - held)
    # A run of a minute need not wait for seconds.
    seconds = min(TOGETHER, TRIAL * plan.steps * plan.batch_size * alone)
    step, peak = _tried(dataclasses.replace(plan, batch_size=images), train_on, train, seconds)
    return (
        _on_line(plan.batch_size, images, step, 1, alone, 0.0),
        _on_line(at_once[2], at_once[1], peak, at_once[0], first, held),
    )


def _on_line(wanted: int, many: int, taken: float, few: int, taken_by_few: float, least: float) -> float:
    """Return what is on the line through two points at a third, or on that from `least` at 0 where both are one.

    Times and peaks waver: the line rises, and no more than that from `least` does.

    >>> _on_line(16, 4, 7.0, 1, 4.0, 0.0), _on_line(16, 4, 7.0, 1, 1.0, 0.0), _on_line(16, 4, 7.0, 4, 7.0, 1.0)
    (19.0, 28.0, 25.0)
    """
    most = (taken - least) / many
    each = (taken - taken_by_few) / (many - few) if many > few else most
    return taken + (wanted - many) * min(most, max(0.0, each))


def uncompiled(plan: Plan) -> Plan:
    """Return the plan for a trial that has no minutes for compiling."""
    return dataclasses.replace(plan, options=dataclasses.replace(plan.options, compile=False))


def _tried(plan: Plan, train_on: TrainingStep, train: Dataset, seconds: float) -> tuple[float, int]:
    """Return the time of a step and the most memory meanwhile; 0 where the system does not tell."""
    return _seconds_of(train_on, plan, train, seconds), peak_memory(plan.device) or 0


def _step_seconds(
    plan: Plan, network: RetinaNet, train: Dataset, seconds: float, processes: Processes = ALONE
) -> float:
    """Return the time of a step of several processes together."""
    return _seconds_of(TrainingStep.of(plan, network, processes), plan, train, seconds, processes)


def _seconds_of(
    train_on: TrainingStep, plan: Plan, train: Dataset, seconds: float, processes: Processes = ALONE
) -> float:
    """Return the mean time of the later half of the steps that fit into `seconds`, of at least `LEAST_STEPS`.

    The first step, which may compile kernels, counts neither there nor in the peak of memory that is measured next.
    """
    batches = training_batches(
        train,
        plan.preprocessing,
        plan.augmentation,
        batch_size=plan.batch_size,
        seed=plan.options.seed,
        steps=sys.maxsize,  # the time ends it
        rank=processes.rank,
        processes=processes.count,
        workers=plan.workers,
        pin_memory=plan.device.type == "cuda",
        repeat_rare=plan.recipe.repeat_rare,
    )
    taken: list[float] = []
    began = None
    for batch in batches:
        train_on(batch, lr=0.0)
        now = time.monotonic()
        if began is None:
            return_freed()
            restart_peak_memory(plan.device)
        else:
            taken.append(now - began)
        began = now
        enough = len(taken) >= LEAST_STEPS and sum(taken) >= seconds
        # A slow machine must not lose its time to the trial: there the second step has to do.
        if processes.told(bool(enough or (taken and sum(taken) >= 2 * seconds))):
            break
    timed = taken[len(taken) // 2 :]  # caches and clocks take a while to warm up
    return sum(timed) / len(timed)


def _validation_seconds(plan: Plan, network: RetinaNet, val: Dataset, seconds: float) -> float:
    """Return the time of a validation, from a few images; of as many as fit into `seconds`, but at least one.

    Nothing that a fresh network sees scores above the threshold; here everything does, as the slowest case.
    """
    spec = dataclasses.replace(plan.spec, post_processing=plan.spec.post_processing.lowered(0.0))
    detector = Detector(Model(network, spec), device=str(plan.device))
    few = [val.path(i) for i in range(min(VALIDATION_IMAGES, len(val)))]
    list(detector.detect_all(few[:1]))  # what is slow once only
    began = time.monotonic()
    if seconds < math.inf:
        list(detector.detect_all(few[:1]))
        few = few[: max(1, int(seconds / (time.monotonic() - began)))]
        began = time.monotonic()
    list(detector.detect_all(few, batch_size=plan.batch_size))
    return (time.monotonic() - began) / len(few) * len(val)
