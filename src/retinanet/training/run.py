"""`retinanet.train`: from options to a finished run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ParamSpec, TypeVar, get_args

import torch
from rich.console import Console

from retinanet.devices import Precision, deterministic_algorithms
from retinanet.errors import CheckpointError, ConfigError, LostProcessError, RetinaNetError
from retinanet.folders import read_json
from retinanet.inference import Detector, Validation, load
from retinanet.processes import ALONE, Processes, joined_processes
from retinanet.training.configuration import ALSO_RESUMED, TrainingOptions, nothing_else
from retinanet.training.folder import RunFolder, from_anywhere, go_on
from retinanet.training.hints import option
from retinanet.training.loop import train_network
from retinanet.training.memory import most_held
from retinanet.training.preparation import Prepared, prepare
from retinanet.training.progress import plain_console, silent_console
from retinanet.training.recipes import Recipe
from retinanet.training.run_report import draw_run
from retinanet.training.signals import StopRequest, noted_signals
from retinanet.training.state import State, newest_state
from retinanet.version import __version__

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

    A run that this very `torchrun` began, before it started its processes again, goes on.

    Args:
        change: see `plan_run`.
        folder: of this run, where it is made already.
    """
    console = console or plain_console()
    if options.resume is not None:
        _require_nothing_else(options)
        return resume_training(Path(options.resume), console, change, asked=options)
    made = folder
    try:
        with _processes_and_signals() as (processes, stop):
            console = console if processes.main else silent_console()
            where = ""
            if not options.dry_run:
                folder, begun = _folder_of(options, folder, processes)
                if begun:
                    return _go_on(folder, console, change, options, processes, stop)
                made = folder if processes.main else None
                where = f"; start it again with: {go_on(folder)}"
            with _held(folder, processes):
                with stop.at_once(f"stopped by a signal before the first step{where}"):
                    prepared = prepare(from_anywhere(options), console, change, folder, processes=processes)
                if folder is None:
                    return None
                return _train(prepared, folder, console, stop, processes=processes)
    except RetinaNetError as error:
        lost = isinstance(error, LostProcessError)  # torchrun may start it again
        if made is not None and not lost and not made.plan.exists():
            made.take_back()
        raise


@contextmanager
def _processes_and_signals() -> Iterator[tuple[Processes, StopRequest]]:
    """Join the other processes, which must be of the same versions, and listen for signals."""
    with joined_processes() as processes, noted_signals(patient=processes.several) as stop:
        processes.require_alike({"retinanet": __version__, "torch": str(torch.__version__)})
        yield processes, stop


def _folder_of(
    options: TrainingOptions, folder: RunFolder | None, processes: Processes
) -> tuple[RunFolder, bool]:
    """Return the run's folder, which the main process makes unless it is made already, and whether the run is begun.

    The main process alone looks at what there is: the others may see another state of a shared disk.
    """
    begun = False
    with processes.main_first():
        if processes.main and folder is None:
            folder = RunFolder.begun_by_this_launch(options)
            begun = folder is not None
            folder = folder or RunFolder.create(options.output, options)
    path, begun = processes.told(("" if folder is None else os.path.abspath(folder.path), begun))
    return folder or RunFolder(Path(path)), begun


def _held(folder: RunFolder | None, processes: Processes) -> AbstractContextManager[None]:
    """Keep other runs out of the folder; the main process does it for all."""
    return folder.held() if folder is not None and processes.main else nullcontext()


def _require_nothing_else(options: TrainingOptions) -> None:
    """Refuse settings beside `resume`: the run has its own."""
    for one in fields(options):
        if one.name not in ("data", "resume", *ALSO_RESUMED) and getattr(options, one.name) != one.default:
            raise nothing_else(option(one.name))


def resume_training(
    path: Path,
    console: Console | None = None,
    change: Callable[[Recipe], Recipe] | None = None,
    *,
    asked: TrainingOptions | None = None,
) -> Run:
    """Go on with a run from its newest sound state, to the same weights as if it had never stopped.

    One without a state starts at its first step. A run that is finished is validated and reported again.

    Args:
        change: the one that the run was started with.
        asked: has those of `ALSO_RESUMED` that are to be others from now on; what is trained depends on none of them,
            but for rounding.

    Raises:
        ConfigError: there is no run, or its data, this version or this machine would make it another.
    """
    console = console or plain_console()
    folder = RunFolder.existing(path)
    with _processes_and_signals() as (processes, stop):
        return _go_on(folder, console if processes.main else silent_console(), change, asked, processes, stop)


def _go_on(
    folder: RunFolder,
    console: Console,
    change: Callable[[Recipe], Recipe] | None,
    asked: TrainingOptions | None,
    processes: Processes,
    stop: StopRequest,
) -> Run:
    with _held(folder, processes):
        with stop.at_once(f"stopped by a signal; go on with: {go_on(folder)}"):
            with processes.main_first():  # what is damaged is told once, and put aside once
                folder = RunFolder.existing(folder.path)
                options = folder.options()
                if asked is not None:
                    options = options.resumed_with(asked)
                    if processes.main:
                        folder.keep(options)
                state = _state_of(folder, console)
                if state is None:
                    _require_weights(options)
                step = 0 if state is None else state.step
                begun = read_json(folder.plan) if folder.plan.is_file() else None
                if begun is not None and begun.get("precision") in get_args(Precision):
                    # That of the machine where it began; this one might take the other by itself.
                    options = replace(options, precision=begun["precision"])
                if begun is None and state is not None:
                    raise ConfigError(f"--resume needs the run's plan.json; {folder.path} has none")
            processes.require_alike({"step to go on from": step, "plan.json": begun})
            trained = state is not None
            prepared = prepare(options, console, change, folder, begun, processes, trained=trained)
            if processes.main:
                folder.note_command()
                folder.forget_after(step)
            plan = prepared.plan
            epoch, epochs = (int(done * plan.batch_size / plan.train_images) for done in (step, plan.steps))
            console.print(f"resuming at epoch {epoch}/{epochs}, step {step}", highlight=False)
            if step == plan.steps:
                console.print("all steps are done: the best model is judged and told once more")
            processes.wait()  # until the log is cut, which all read
        return _train(prepared, folder, console, stop, state, processes)


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


def _require_weights(options: TrainingOptions) -> None:
    """Refuse to begin a run anew whose model to start from has gone; a training state needs it no more."""
    if options.weights is not None and not Path(options.weights).exists():
        raise ConfigError(
            f"--resume needs the model of --weights once more, as the run has no training state yet; {options.weights} "
            "does not exist. Put it back, or start a new run"
        )


def _train(
    prepared: Prepared,
    folder: RunFolder,
    console: Console,
    stop: StopRequest,
    state: State | None = None,
    processes: Processes = ALONE,
) -> Run:
    plan, val_set = prepared.plan, prepared.val_set
    # Steps seed torch's generator; the caller's is given back as it was.
    with deterministic_algorithms(plan.options.deterministic), torch.random.fork_rng(devices=[]):
        best = train_network(prepared, folder, console, stop, state, processes)
    with stop.at_once(f"stopped by a signal after the last step; draw its pictures with: {go_on(folder)}"):
        if processes.main:
            draw_run(best, val_set, folder)
        processes.wait()  # for the files of the main one
    console.print(best.metrics.table(), highlight=False, soft_wrap=True)
    if memory := most_held(folder.memory()):
        console.print(", ".join(f"{what} {size}" for what, size in memory), highlight=False)
    console.print(f"best model: {folder.best}", highlight=False, soft_wrap=True)
    return Run(folder.path, load(folder.best, device=str(plan.device)), best)
