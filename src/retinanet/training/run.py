"""`retinanet.train`: from options to a finished run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from rich.console import Console

from retinanet.devices import deterministic_algorithms
from retinanet.errors import CheckpointError, ConfigError, RetinaNetError
from retinanet.folders import read_json, require_new
from retinanet.inference import Detector, Validation, load
from retinanet.training.configuration import TrainingOptions, option, read_config
from retinanet.training.folder import RunFolder
from retinanet.training.loop import go_on, train_network
from retinanet.training.memory import memory_in_words
from retinanet.training.preparation import Prepared, prepare
from retinanet.training.progress import plain_console
from retinanet.training.recipes import Recipe
from retinanet.training.run_report import report_run
from retinanet.training.signals import StopRequest, noted_signals
from retinanet.training.state import State, newest_state

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its best model ready to use, and that model's validation."""

    path: Path
    detector: Detector
    validation: Validation

    @property
    def metrics(self) -> dict[str, object]:
        """What `metrics.json` holds."""
        return self.validation.metrics.to_json()


def _taking(_: Callable[P, TrainingOptions]) -> Callable[[Callable[[TrainingOptions], R]], Callable[P, R]]:
    """Give a function of options the options' own signature, so that names and defaults stand in one place."""

    def decorate(function: Callable[[TrainingOptions], R]) -> Callable[P, R]:
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(TrainingOptions(*args, **kwargs))  # type: ignore[arg-type]  # P is its signature

        call.__doc__ = function.__doc__
        return call

    return decorate


@_taking(TrainingOptions)
def train(options: TrainingOptions) -> Run:
    """Train a detector: `retinanet.train(data="data/", output="runs/x", backbone="resnet18", epochs=12)`.

    Takes the fields of `TrainingOptions` by keyword, which are the options of `retinanet train`.
    """
    run = run_training(options)
    if run is None:
        raise ConfigError(
            "retinanet.train needs dry_run=False; a dry run has no result. Use plan_run for a plan"
        )
    return run


def run_training(
    options: TrainingOptions,
    console: Console | None = None,
    change: Callable[[Recipe], Recipe] | None = None,
    folder: RunFolder | None = None,
) -> Run | None:
    """Plan, train and validate, or with `options.resume` go on with a run; return None after a dry run.

    Args:
        change: see `plan_run`.
        folder: of this run, where it is made already.
    """
    console = console or plain_console()
    if options.resume is not None:
        _require_nothing_else(options)
        return resume_training(Path(options.resume), console, change, workers=options.workers)
    if options.output and folder is None:
        require_new(Path(options.output))
    try:
        with noted_signals() as stop:
            if folder is None and not options.dry_run:
                folder = RunFolder.create(options.output, options)
            where = "" if folder is None else f"; start it again with: retinanet train --resume {folder.path}"
            with stop.at_once(f"stopped by a signal before the first step{where}"):
                if folder is None:
                    prepare(options, console, change, None)
                    return None
            with folder.held():
                with stop.at_once(f"stopped by a signal before the first step{where}"):
                    prepared = prepare(options, console, change, folder)
                return _train(prepared, folder, console, stop)
    except RetinaNetError:
        if folder is not None and not folder.plan.exists():
            folder.take_back()
        raise


def _require_nothing_else(options: TrainingOptions) -> None:
    """Refuse settings beside `resume`: the run has its own."""
    for one in fields(options):
        if one.name not in ("data", "resume", "workers") and getattr(options, one.name) != one.default:
            raise ConfigError(
                f"--resume goes on with the run's own settings and takes --workers alone; got {option(one.name)}"
            )


def resume_training(
    path: Path,
    console: Console | None = None,
    change: Callable[[Recipe], Recipe] | None = None,
    *,
    workers: int | None = None,
) -> Run:
    """Go on with a run from its newest sound state, to the same weights as if it had never stopped.

    One without a state starts at its first step. A run that is finished is validated and reported again.

    Args:
        change: the one that the run was started with.
        workers: for this time; what is trained does not depend on it.

    Raises:
        ConfigError: there is no run, or its data, this version or this machine would make it another.
    """
    console = console or plain_console()
    folder = RunFolder.existing(path)
    options = TrainingOptions(**{"data": "", **read_config(path / "config.yaml")})
    options = replace(options, workers=options.workers if workers is None else workers)
    with folder.held(), noted_signals() as stop:
        with stop.at_once(f"stopped by a signal; go on with: retinanet train --resume {path}"):
            state = _state_of(folder, console)
            begun = read_json(folder.plan) if folder.plan.is_file() else None
            if begun is None and state is not None:
                raise ConfigError(f"--resume needs the run's plan.json; {path} has none")
            prepared = prepare(options, console, change, folder, begun)
            folder.note_command()
            step = 0 if state is None else state.step
            folder.forget_after(step)
            plan = prepared.plan
            epoch, epochs = (int(done * plan.batch_size / plan.train_images) for done in (step, plan.steps))
            console.print(f"resuming at epoch {epoch}/{epochs}, step {step}", highlight=False)
        return _train(prepared, folder, console, stop, state)


def _state_of(folder: RunFolder, console: Console) -> State | None:
    """Return where a run stopped, None where it was stopped before its first state; say what is damaged.

    Raises:
        CheckpointError: it was trained, and no state of it can be read.
    """
    state, damaged = newest_state(folder.checkpoints)
    if state is None and (damaged or folder.validations()):
        what = f": {damaged[0]}" if damaged else f"; {folder.checkpoints} holds none"
        raise CheckpointError(
            f"--resume needs a training state that can be read{what}. The run stays as it is; its best model is a "
            f"start for a new one: --weights {folder.path}"
        )
    for message in damaged:
        console.print(f"{message}; the state before it is used")
    return state


def _train(
    prepared: Prepared, folder: RunFolder, console: Console, stop: StopRequest, state: State | None = None
) -> Run:
    plan, val_set = prepared.plan, prepared.val_set
    # Steps seed torch's generator; the caller's is given back as it was.
    with deterministic_algorithms(plan.options.deterministic), torch.random.fork_rng(devices=[]):
        best = train_network(
            plan, prepared.network, prepared.train_set, val_set, folder, console, stop, state
        )
    with stop.at_once(f"stopped by a signal after the last step; write the report with: {go_on(folder)}"):
        report_run(plan, best, val_set, folder)
    console.print(best.metrics.table(), highlight=False, soft_wrap=True)
    if memory := memory_in_words(folder.history()):
        console.print(f"memory: {memory}", highlight=False)
    console.print(f"best model: {folder.best}", highlight=False, soft_wrap=True)
    return Run(folder.path, load(folder.best, device=plan.options.device), best)
