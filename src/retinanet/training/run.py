"""`retinanet.train`: from options to a finished run."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from rich.console import Console

from retinanet.data import Dataset, available_splits, open_dataset, read_as
from retinanet.devices import deterministic_algorithms
from retinanet.errors import CheckpointError, ConfigError, DataError, RetinaNetError
from retinanet.folders import read_json, require_new, write_json
from retinanet.inference import Detector, Validation, load
from retinanet.model import RetinaNet
from retinanet.report.curves import draw_curves
from retinanet.report.page import write_page
from retinanet.training.configuration import TrainingOptions, option, read_config
from retinanet.training.folder import RunFolder
from retinanet.training.loop import go_on, train_network
from retinanet.training.pictures import draw_validation
from retinanet.training.planning import Plan, plan_run
from retinanet.training.progress import plain_console
from retinanet.training.recipes import Recipe
from retinanet.training.signals import StopRequest, noted_signals
from retinanet.training.starting import build_network
from retinanet.training.state import State, newest_state
from retinanet.training.timing import fit_to_time

P = ParamSpec("P")
R = TypeVar("R")

# Faults printed one by one; the rest is counted.
FAULTS_SHOWN = 5


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
                    _prepare(options, console, change, None)
                    return None
            with folder.held():
                with stop.at_once(f"stopped by a signal before the first step{where}"):
                    prepared = _prepare(options, console, change, folder)
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
            prepared = _prepare(options, console, change, folder, begun)
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


@dataclass(frozen=True)
class _Prepared:
    """A run before its first step."""

    plan: Plan
    network: RetinaNet
    train_set: Dataset
    val_set: Dataset


def _prepare(
    options: TrainingOptions,
    console: Console,
    change: Callable[[Recipe], Recipe] | None,
    folder: RunFolder | None,
    stored: dict[str, Any] | None = None,
) -> _Prepared:
    """Read the data, plan and build the network; say all of it.

    Args:
        folder: None is a dry run.
        stored: the plan of the run that goes on.
    """
    began = time.monotonic()
    train_set, val_set = open_splits(
        options.data, image_root=options.image_root, box_format=options.box_format, strict=options.strict
    )
    console.print(read_as(train_set, val_set), highlight=False, soft_wrap=True)
    for dataset in (train_set, val_set):
        _tell(dataset, console)
    plan = plan_run(options, train_set, change)
    data = {"train": train_set.digest(), "val": val_set.digest()}
    network = build_network(plan)
    seconds = options.seconds()
    if stored is not None:
        if "data" not in stored:
            raise ConfigError(
                "--resume needs a run of this version; its plan.json does not say which data it has"
            )
        if stored["data"] != data:
            raise DataError(
                f"--resume needs the data that the run began with; {options.data} has changed since. Put it back, or "
                "start a new run with --weights"
            )
        plan = plan.as_begun(stored)
    elif seconds is None:
        plan = plan.validating(len(val_set))
    else:
        plan = fit_to_time(plan, network, train_set, val_set, began + seconds)
    plan.show(console)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in network.parameters())
    of_them = "all" if trained == whole else f"{trained:,}"
    console.print(f"{whole:,} parameters, {of_them} of them trained", highlight=False)
    if folder is None:
        console.print("dry run: nothing was written", highlight=False)
    else:
        if stored is None:
            write_json(folder.plan, {**plan.to_json(), "data": data})
        console.print(f"writing to {folder.path}", highlight=False, soft_wrap=True)
    return _Prepared(plan, network, train_set, val_set)


def _tell(dataset: Dataset, console: Console) -> None:
    """Print what a data set holds and what was wrong with it."""
    console.print(dataset.summary(), highlight=False, soft_wrap=True)
    for fault in dataset.faults[:FAULTS_SHOWN]:
        console.print(f"  {fault}", highlight=False, soft_wrap=True)
    more = dataset.fault_total - FAULTS_SHOWN
    if more > 0:
        console.print(f"  and {more:,} more", highlight=False)


def _train(
    prepared: _Prepared, folder: RunFolder, console: Console, stop: StopRequest, state: State | None = None
) -> Run:
    plan, val_set = prepared.plan, prepared.val_set
    # Steps seed torch's generator; the caller's is given back as it was.
    with deterministic_algorithms(plan.options.deterministic), torch.random.fork_rng(devices=[]):
        best = train_network(
            plan, prepared.network, prepared.train_set, val_set, folder, console, stop, state
        )
    with stop.at_once(f"stopped by a signal after the last step; write the report with: {go_on(folder)}"):
        _report(plan, best, val_set, folder)
    console.print(best.metrics.table(), highlight=False, soft_wrap=True)
    console.print(f"best model: {folder.best}", highlight=False, soft_wrap=True)
    return Run(folder.path, load(folder.best, device=plan.options.device), best)


def _report(plan: Plan, best: Validation, val_set: Dataset, folder: RunFolder) -> None:
    curves, pictures = folder.path / "curves.png", folder.path / "pictures.png"
    draw_curves(folder.history(), curves)
    draw_validation(val_set, best, pictures)
    write_page(
        folder.path / "report.html",
        title=f"RetinaNet run {folder.path.name}",
        lead=f"{plan.spec.backbone.name}, {plan.steps:,} steps of {plan.batch_size} images, data {val_set.name}; "
        "figures and pictures are of the best model on the split val.",
        metrics=best.metrics.to_json(),
        pictures=[("Curves", curves), ("Ground truth and detections", pictures)],
        settings={setting: f"{value} ({why})" for setting, value, why in plan.reasons},
    )


def open_splits(
    data: str,
    *,
    image_root: str | None = None,
    box_format: Literal["auto", "xyxy", "xywh"] = "auto",
    strict: bool = False,
) -> tuple[Dataset, Dataset]:
    """Open `train` and `val` of a data set; both must be there, with the same classes and some objects.

    Args:
        image_root, box_format, strict: as in `open_dataset`.
    """

    def opened(split: str) -> Dataset:
        return open_dataset(data, split, image_root=image_root, box_format=box_format, strict=strict)

    splits = available_splits(data, image_root=image_root)
    train_set = opened("train")  # what cannot be opened has a better message of its own
    if "val" not in splits:
        has = f"has {', '.join(splits)}" if splits else "is one set without splits"
        raise DataError(
            f"training needs the splits train and val; {data} {has}. Make them, a fifth of the images for val: "
            f"retinanet data convert {shlex.quote(data)} OUT --format coco --split-shares 0.8,0.2"
        )
    val_set = opened("val")
    if train_set.classes != val_set.classes:
        raise DataError(
            f"{data} needs the same classes in train and val; got {', '.join(train_set.classes.names)} "
            f"and {', '.join(val_set.classes.names)}"
        )
    for dataset in (train_set, val_set):
        if not len(dataset.boxes):
            raise DataError(
                f"training needs boxes; the {dataset.split} split of {data} has none in {len(dataset)} images"
            )
    return train_set, val_set
