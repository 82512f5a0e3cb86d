"""Ablations of the recipe for training from scratch: one change at a time, on several data sets, with several seeds.

    python bench/recipes.py --data bccd=PATH nuclei=PATH --seeds 0 1 2 --variants base adamw

Runs follow one another, each in a process of its own, as a user's run would. A finished run is a line of
`bench/recipes.jsonl` and is never repeated; one that was interrupted starts anew. After every run `docs/recipes.md` is
written from all lines. `--images` shortens every run, so that more variants fit into a night: only runs of equal length
are compared. `--list` says what there is and what is done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from objectives import AdaptiveObjective, AdaptiveVarifocalObjective, VarifocalObjective

from retinanet.objective import Objective
from retinanet.training import objectives as of_training
from retinanet.training.configuration import TrainingOptions
from retinanet.training.recipes import Recipe
from retinanet.training.run import run_training

ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / "bench" / "recipes.jsonl", ROOT / "docs" / "recipes.md"
BASE = "base"
# What the recipe was when a row was measured: to be changed with the recipe, so that like is compared with like.
RECIPE = "80 objects and 4 images a step at most, 150 megapixels of 30,000 objects"


@dataclass(frozen=True)
class Variant:
    """One change to the recipe: of its fields, of its model's, of the command's options, or of how losses are made."""

    what: str
    recipe: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    objective: Callable[..., Objective] = Objective

    def __call__(self, recipe: Recipe) -> Recipe:
        model = replace(recipe.model, head=replace(recipe.model.head, **self.head))
        augmentation = replace(recipe.augmentation, **self.recipe.get("augmentation", {}))
        return replace(recipe, **{**self.recipe, "model": model, "augmentation": augmentation})


VARIANTS = {
    BASE: Variant("the recipe as it is"),
    "adamw": Variant("AdamW at 2e-3 in place of Muon", {"optimizer": "adamw", "lr": 2e-3}),
    "rate-half": Variant("half the rate", {"lr": 0.002}),
    "rate-double": Variant("twice the rate", {"lr": 0.008}),
    "batch-2": Variant("2 images a step", {"batch_size": 2}),
    "batch-8": Variant("8 images a step", {"batch_size": 8}),
    "batch-8-linear": Variant("8 images a step, twice the rate", {"batch_size": 8, "lr": 0.004 * 2**0.5}),
    "no-average": Variant("without averaged weights", {"average_decay": None}),
    "depth-2": Variant("heads of 2 convolutions", head={"depth": 2}),
    "channels-128": Variant("pyramid and heads 128 wide", options={"channels": 128}),
    "smooth-l1": Variant(
        "smooth L1 at 1/9, weight 1", {"box_loss": "smooth-l1", "box_beta": 1 / 9, "box_weight": 1.0}
    ),
    "box-weight-1": Variant("box loss weighed 1", {"box_weight": 1.0}),
    "box-weight-4": Variant("box loss weighed 4", {"box_weight": 4.0}),
    "by-image": Variant("losses divided by the positives of the image", {"normalizer": "image"}),
    "no-low-quality": Variant("no low-quality matches", {"low_quality": False}),
    "atss": Variant("anchors assigned by ATSS", objective=AdaptiveObjective),
    "varifocal": Variant("class targets that say how good the box is", objective=VarifocalObjective),
    "atss-varifocal": Variant("ATSS and varifocal", objective=AdaptiveVarifocalObjective),
    "iou-0.4": Variant(
        "positive from IoU 0.4, negative below 0.3",
        objective=partial(Objective, positive_iou=0.4, negative_iou=0.3),
    ),
    "no-zoom": Variant("flips alone", {"augmentation": {"zoom": (1.0, 1.0)}}),
    "zoom-wide": Variant("zoom 0.5 to 2", {"augmentation": {"zoom": (0.5, 2.0)}}),
    "gamma-1.5": Variant("gamma 1.5", {"loss_settings": {"gamma": 1.5}}),
    "weight-decay-0.1": Variant("weight decay 0.1", {"weight_decay": 0.1}),
}


@dataclass(frozen=True)
class Job:
    """One run of the sweep."""

    data: str
    variant: str
    seed: int
    images: int | None

    def folder(self, runs: Path) -> Path:
        length = f"-{self.images}" if self.images else ""
        return runs / f"{self.data}-{self.variant}{length}-{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--images", type=int, help="images each run sees; by default as many as the recipe says"
    )
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "recipes")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folders = dict(pair.split("=", 1) for pair in given.data)
    if given.job:
        run(Job(**json.loads(given.job)), folders, given.backbone, given.runs)
        return
    rows = known_rows()
    done = {
        (row["data"], row["variant"], row["seed"], row["images"]) for row in rows if row["recipe"] == RECIPE
    }
    jobs = [
        Job(data, variant, seed, given.images)
        for seed in given.seeds  # a first look at everything before a second one at anything
        for variant in given.variants
        for data in folders
    ]
    for number, job in enumerate(jobs, 1):
        finished = tuple(asdict(job).values()) in done
        print(
            f"{number}/{len(jobs)} {job.folder(given.runs).name}{' (done)' if finished else ''}", flush=True
        )
        if finished or given.list:
            continue
        shutil.rmtree(job.folder(given.runs), ignore_errors=True)
        began = time.monotonic()
        command = [sys.executable, __file__, "--job", json.dumps(asdict(job)), "--data", *given.data]
        command += ["--backbone", given.backbone, "--runs", str(given.runs)]
        given.runs.mkdir(parents=True, exist_ok=True)
        with (given.runs / "log.txt").open("a") as log:
            outcome = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
        if outcome.returncode:
            print(f"  failed: see {given.runs / 'log.txt'}", flush=True)
            continue
        row = {**asdict(job), **result_of(job.folder(given.runs)), "seconds": round(time.monotonic() - began)}
        row |= {
            "recipe": RECIPE,
            "what": VARIANTS[job.variant].what,
            "backbone": given.backbone,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        rows.append(row)
        with KEPT.open("a") as file:
            file.write(json.dumps(row) + "\n")
        PAGE.write_text(page(rows))
        print(f"  AP {row['ap']:.3f}, AP50 {row['ap50']:.3f}, {row['seconds'] / 60:.1f} min", flush=True)


def known_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []


def run(job: Job, folders: dict[str, str], backbone: str, runs: Path) -> None:
    """Train as `retinanet train DATA --backbone NAME` does, with the variant's change."""
    variant = VARIANTS[job.variant]

    def change(recipe: Recipe) -> Recipe:
        changed = variant(recipe)
        return (
            changed
            if job.images is None
            else replace(changed, images_seen=job.images, pixels_seen=0, epochs=0)
        )

    options = TrainingOptions(
        data=folders[job.data],
        output=str(job.folder(runs)),
        backbone=backbone,
        recipe="small",
        device="cpu",
        seed=job.seed,
        log_to="none",
        **variant.options,
    )
    with patch.object(of_training, "Objective", variant.objective):
        run_training(options, change=change)


def result_of(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {"ap": metrics["ap"], "ap50": metrics["ap50"]}


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page of all rows: a table for each data set and length."""
    lines = [
        "# Recipes: what was tried",
        "",
        "Made by `python bench/recipes.py` from `bench/recipes.jsonl`. Every row changes one thing of the recipe",
        "`small` as it was then, which the heading says; AP is COCO's on the split val, mean and half the range over",
        "seeds; minutes are of whole processes that had the machine to themselves, where there were any.",
        "",
    ]
    groups = dict.fromkeys((row["recipe"], row["data"], row["images"]) for row in reversed(rows))
    for recipe, data, images in groups:
        of_group = [
            row for row in rows if (row["recipe"], row["data"], row["images"]) == (recipe, data, images)
        ]
        base = [row["ap"] for row in of_group if row["variant"] == BASE]
        length = f"{images:,} images seen" if images else "the recipe's length"
        lines += [f"## {recipe}: {data}, {length}", ""]
        lines += [
            "| variant | seeds | AP | against base | AP50 | minutes |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name in sorted({row["variant"] for row in of_group}, key=lambda name: (name != BASE, name)):
            found = [row for row in of_group if row["variant"] == name]
            ap = statistics.mean(row["ap"] for row in found)
            against = f"{ap - statistics.mean(base):+.3f}" if base and name != BASE else ""
            # A run that others' work delayed says how good, not how long.
            timed = [row["seconds"] for row in found if row.get("timed", True)]
            cells = [
                f"{name}: {found[-1]['what']}",
                str(len(found)),
                spread([row["ap"] for row in found]),
                against,
                spread([row["ap50"] for row in found]),
                f"{statistics.mean(timed) / 60:.1f}" if timed else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.3f}"


if __name__ == "__main__":
    main()
