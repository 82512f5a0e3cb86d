"""`retinanet.train`: from options to a finished run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from rich.console import Console

from retinanet.data import Dataset, available_splits, open_dataset, read_as
from retinanet.devices import deterministic_algorithms
from retinanet.errors import ConfigError, DataError, RetinaNetError
from retinanet.folders import require_new, write_json
from retinanet.inference import Detector, Validation, load
from retinanet.report.curves import draw_curves
from retinanet.report.page import write_page
from retinanet.training.configuration import TrainingOptions
from retinanet.training.folder import RunFolder
from retinanet.training.loop import train_network
from retinanet.training.pictures import draw_validation
from retinanet.training.planning import Plan, plan_run
from retinanet.training.progress import plain_console
from retinanet.training.recipes import Recipe
from retinanet.training.starting import build_network
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
) -> Run | None:
    """Plan, train and validate; return None after a dry run. `change`: see `plan_run`."""
    began = time.monotonic()
    console = console or plain_console()
    if options.output:
        require_new(Path(options.output))
    train_set, val_set = open_splits(options.data, strict=options.strict)
    console.print(read_as(train_set, val_set), highlight=False, soft_wrap=True)
    for dataset in (train_set, val_set):
        console.print(dataset.summary(), highlight=False, soft_wrap=True)
        for fault in dataset.faults[:FAULTS_SHOWN]:
            console.print(f"  {fault}", highlight=False, soft_wrap=True)
        if len(dataset.faults) > FAULTS_SHOWN:
            console.print(f"  and {len(dataset.faults) - FAULTS_SHOWN} more", highlight=False)
    plan = plan_run(options, train_set, change)
    network = build_network(plan)
    folder = None if options.dry_run else RunFolder.create(options.output, options)
    seconds = options.seconds()
    if seconds is None:
        plan = plan.validating(len(val_set))
    else:
        try:
            plan = fit_to_time(plan, network, train_set, val_set, began + seconds)
        except RetinaNetError:
            if folder is not None:  # nothing is in it that the same command would not write again
                shutil.rmtree(folder.path)
            raise
    plan.show(console)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in network.parameters())
    of_them = "all" if trained == whole else f"{trained:,}"
    console.print(f"{whole:,} parameters, {of_them} of them trained", highlight=False)
    if folder is None:
        console.print("dry run: nothing was written", highlight=False)
        return None
    write_json(folder.path / "plan.json", plan.to_json())
    console.print(f"writing to {folder.path}", highlight=False, soft_wrap=True)
    # Steps seed torch's generator; the caller's is given back as it was.
    with deterministic_algorithms(options.deterministic), torch.random.fork_rng(devices=[]):
        best = train_network(plan, network, train_set, val_set, folder, console)
    _report(plan, best, val_set, folder)
    console.print(best.metrics.table(), highlight=False, soft_wrap=True)
    console.print(f"best model: {folder.best}", highlight=False, soft_wrap=True)
    return Run(folder.path, load(folder.best, device=options.device), best)


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


def open_splits(data: str, *, strict: bool = False) -> tuple[Dataset, Dataset]:
    """Open `train` and `val` of a data set; both must be there, with the same classes and some objects."""
    splits = available_splits(data)
    train_set = open_dataset(
        data, "train", strict=strict
    )  # what cannot be opened has a better message of its own
    if "val" not in splits:
        has = f"has {', '.join(splits)}" if splits else "is one set without splits"
        raise DataError(
            f"training needs the splits train and val; {data} {has}. Make them, a fifth of the images for val: "
            f"retinanet data convert {data} OUT --format coco --split-shares 0.8,0.2"
        )
    val_set = open_dataset(data, "val", strict=strict)
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
