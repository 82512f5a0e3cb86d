"""A run before its first step: data opened, everything planned, the network built, all of it said."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from rich.console import Console

from retinanet.checkpoint import find_model
from retinanet.data import Dataset, available_splits, open_dataset, read_as
from retinanet.devices import choose_device, fix_cublas_memory, fix_matrix_products
from retinanet.errors import ConfigError, DataError
from retinanet.folders import write_json
from retinanet.model import RetinaNet
from retinanet.model.backbone import require_backbone
from retinanet.processes import ALONE, Processes
from retinanet.records import Ignore
from retinanet.training.batch_size import fit_batch, with_stored_batch
from retinanet.training.configuration import TrainingOptions
from retinanet.training.deadline import Deadline
from retinanet.training.estimate import Estimate
from retinanet.training.folder import RunFolder
from retinanet.training.parts import batch_norm_in_words, table_of_parts, trained_in_words
from retinanet.training.plan import OF_A_MACHINE, Plan
from retinanet.training.planning import plan_run
from retinanet.training.recipes import Recipe
from retinanet.training.sizing import PIXELS_A_SECOND, sized_by_pixels
from retinanet.training.starting import build_network
from retinanet.training.timing import estimate_run, fit_to_time, pixels_a_second, try_out
from retinanet.training.writers import chosen_writers

# Faults printed one by one; the rest is counted.
FAULTS_SHOWN = 5
# What processes of one run may have decided each for itself: the main one gives its weights to all.
OWN = (*OF_A_MACHINE, "weights_file")


@dataclass(frozen=True)
class Prepared:
    """A run before its first step, what its trial measured, if there was one, and when it has to be over; one that was
    resumed has no deadline any more."""

    plan: Plan
    network: RetinaNet
    train_set: Dataset
    val_set: Dataset
    estimate: Estimate | None = None
    deadline: Deadline | None = None


def prepare(
    options: TrainingOptions,
    console: Console,
    change: Callable[[Recipe], Recipe] | None,
    folder: RunFolder | None,
    stored: dict[str, Any] | None = None,
    processes: Processes = ALONE,
    *,
    trained: bool = False,
) -> Prepared:
    """Read the data, plan and build the network; say all of it.

    Args:
        folder: None is a dry run.
        stored: the plan of the run that goes on.
        trained: it has a training state, and what it started from is not read again.
    """
    began = time.monotonic()
    fix_matrix_products()
    if options.deterministic:
        fix_cublas_memory()
    with processes.main_first():
        # What is missing is told before anything is read.
        writers = chosen_writers(options)
        choose_device(options.device)
        if options.weights is None:
            require_backbone(options.backbone_name())
        elif not trained:
            find_model(options.weights)
        train_set, val_set = open_splits(
            options.data, image_root=options.image_root, box_format=options.box_format, strict=options.strict
        )
        console.print(read_as(train_set, val_set), highlight=False, soft_wrap=True)
        for dataset in (train_set, val_set):
            _tell(dataset, console)
        speed = (stored or {}).get("speed") or PIXELS_A_SECOND
        plan = plan_run(options, train_set, change, processes, stored if trained else None, speed)
        data = {"train": train_set.digest(), "val": val_set.digest()}
        network = build_network(plan, load=not trained)
    decided = {name: value for name, value in plan.to_json().items() if name not in OWN}
    processes.require_alike({"data": data, "plan": decided})
    seconds = options.seconds()
    deadline = None if seconds is None or stored is not None else Deadline(began + seconds, seconds)
    estimate = None
    if options.batch_size == "auto" and stored is not None:
        plan = with_stored_batch(plan, train_set, stored, processes)
    elif options.batch_size == "auto":
        console.print("finding out how many images fit into memory", highlight=False)
        plan = fit_batch(plan, network, train_set, processes)
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
        plan = plan.as_begun(stored, but=OF_A_MACHINE if processes.main else OWN)
    elif deadline is None:
        plan = plan.validating(len(val_set))
    else:
        estimate = try_out(plan, network, train_set, val_set, deadline, processes)
        # How large images may be in the time was planned by a guess of how fast the machine is.
        speed = pixels_a_second(plan, estimate, train_set)
        if sized_by_pixels(plan.recipe, plan.device) and speed != PIXELS_A_SECOND:
            again = plan_run(options, train_set, change, processes, speed=speed)
            if again.spec != plan.spec:
                network = build_network(again)
                plan = again
                if options.batch_size == "auto":
                    plan = fit_batch(again, network, train_set, processes)
                estimate = try_out(plan, network, train_set, val_set, deadline, processes)
        plan = fit_to_time(plan, estimate, deadline, processes)
    if row := batch_norm_in_words(network, plan.batch_size, processes.count, options.accumulate):
        plan = replace(plan, reasons=(*plan.reasons, row))
    plan.show(console)
    if plan.recipe.freeze != "none":
        console.print(table_of_parts(network))
    console.print(trained_in_words(network), highlight=False)
    if folder is None and estimate is None:
        estimate = estimate_run(plan, network, train_set, val_set, processes)
    if estimate is not None:
        console.print(estimate.line(plan), highlight=False, soft_wrap=True)
    if folder is None:
        console.print("dry run: nothing was written", highlight=False)
    else:
        if stored is None and processes.main:
            write_json(folder.plan, {**plan.to_json(), "data": data})
        also = f", and to {', '.join(writers)}" if writers else ""
        console.print(f"writing to {folder.path}{also}", highlight=False, soft_wrap=True)
    return Prepared(plan, network, train_set, val_set, estimate, deadline)


def _tell(dataset: Dataset, console: Console) -> None:
    """Print what a data set holds and what was wrong with it."""
    console.print(dataset.summary(), highlight=False, soft_wrap=True)
    for fault in dataset.faults[:FAULTS_SHOWN]:
        console.print(f"  {fault}", highlight=False, soft_wrap=True)
    more = dataset.fault_total - FAULTS_SHOWN
    if more > 0:
        console.print(f"  and {more:,} more", highlight=False)


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
        if not (dataset.ignore == Ignore.NO).any():
            left = f", besides {len(dataset.boxes):,} to be ignored" if len(dataset.boxes) else ""
            raise DataError(
                f"training needs boxes; the {dataset.split} split of {data} has none in {len(dataset)} images{left}"
            )
    return train_set, val_set
