r"""Ablations of the recipe for training from scratch: one change at a time, on several data sets, with several seeds.

    python bench/recipes.py --data bccd=PATH nuclei=PATH --seeds 0 1 2 --variants base adamw
    python bench/recipes.py --data bccd=PATH nuclei=PATH --backbone resnet10t --channels 64 --parallel 2

Runs follow one another, each in a process of its own, as a user's run would; with `--parallel` some run side by side,
each with its share of the cores, and their rows say nothing of time. `--background` leaves the whole to itself and
prints where its log is. A finished run is a line of `bench/recipes.jsonl` and is never repeated; one that was
interrupted goes on from its last state when the command is given again, and says nothing of time. What a variant leaves
as it is with these data and this network is told and not run. After every run `docs/recipes.md` is written from all
lines. `--images` shortens every run, and a smaller network does, so that more variants fit into a night: only runs of
equal length, network and batch are compared. But for those of sides, variants train at the side that the recipe plans.
`--list` says what there is and what is done.

    python bench/recipes.py --data shapes=runs/demo-shapes-4000-0 --backbone test_resnet --channels 64 --batch-size 8 \
        --images 8320 --parallel 2

is the demo, whose length goes with the clock, as long as it was on a usual day.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from torch import nn

from retinanet.atss import match_atss
from retinanet.data import open_dataset
from retinanet.devices import resolve_precision
from retinanet.errors import ConfigError
from retinanet.model import heads
from retinanet.objective import Matching, Objective
from retinanet.processes import available_cores
from retinanet.training import objectives as of_training
from retinanet.training.configuration import TrainingOptions
from retinanet.training.folder import RunFolder
from retinanet.training.plan import Plan
from retinanet.training.planning import plan_run
from retinanet.training.recipes import Recipe
from retinanet.training.run import resume_training, run_training
from retinanet.training.state import newest_state

ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / "bench" / "recipes.jsonl", ROOT / "docs" / "recipes.md"
BASE = "base"
# Exit codes of a variant that changes nothing with these data and this network, and of one that cannot be.
AS_IT_IS, IMPOSSIBLE = 3, 4
NOT_RUN = {AS_IT_IS: "changes nothing here", IMPOSSIBLE: "cannot be here"}
# What the recipe was when a row was measured: to be changed with the recipe, so that like is compared with like.
RECIPE = "80 objects and 4 images a step at most, 150 megapixels of 30,000 objects, ATSS of 2 deviations, varifocal"


@dataclass(frozen=True)
class Variant:
    """One change to the recipe: of its fields, of its model's, of the command's options, or of how losses are made.

    Args:
        width: factor on the width of pyramid and heads.
        side: factor on the planned shortest side, rounded to 32 px; pixels in all stay as many, but for a recipe's
            least number of images.
        start: how the heads' inner convolutions begin, in place of what `model.heads` does.
    """

    what: str
    recipe: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    objective: Callable[..., Objective] = Objective
    width: float = 1
    side: float = 1
    start: Callable[[nn.Conv2d], None] | None = None

    def __call__(self, recipe: Recipe) -> Recipe:
        model = replace(
            recipe.model,
            backbone=replace(recipe.model.backbone, **self.backbone),
            head=replace(recipe.model.head, **self.head),
        )
        augmentation = replace(recipe.augmentation, **self.recipe.get("augmentation", {}))
        return replace(recipe, **{**self.recipe, "model": model, "augmentation": augmentation})


def start_as_the_paper(convolution: nn.Conv2d) -> None:
    nn.init.normal_(convolution.weight, std=0.01)


def with_matching(own: Matching, **settings: Any) -> Objective:
    return Objective(**{**settings, "matching": own})


VARIANTS = {
    BASE: Variant("the recipe as it is"),
    "adamw": Variant("AdamW at 2e-3 in place of Muon", {"optimizer": "adamw", "lr": 2e-3}),
    "rate-half": Variant("half the rate", {"lr": 0.002}),
    "rate-double": Variant("twice the rate", {"lr": 0.008}),
    "batch-2": Variant("2 images a step", options={"batch_size": 2}),
    "batch-8": Variant("8 images a step", options={"batch_size": 8}),
    "batch-8-linear": Variant(
        "8 images a step, at twice the rate where 4 are planned",
        {"lr": 0.004 * 2**0.5},
        options={"batch_size": 8},
    ),
    "no-average": Variant("without averaged weights", {"average_decay": None}),
    "schedule-step": Variant("rate dropped twice in place of a cosine", {"schedule": "step"}),
    "no-clip": Variant("gradients as long as they are", {"clip_norm": None}),
    "depth-0": Variant("heads of an output layer alone, as SSD's", head={"depth": 0}),
    "depth-1": Variant("heads of 1 convolution", head={"depth": 1}),
    "depth-2": Variant("heads of 2 convolutions", head={"depth": 2}),
    "depth-6": Variant("heads of 6 convolutions", head={"depth": 6}),
    "width-half": Variant("pyramid and heads half as wide", width=0.5),  # of 128 channels or more
    "width-double": Variant("pyramid and heads twice as wide", width=2),
    # Of a backbone that can have GroupNorm: test_resnet and resnet10t cannot.
    "batch-norm": Variant("BatchNorm in the backbone", backbone={"norm": "native"}),
    "no-head-norm": Variant("no norm in the heads, started as in the paper", head={"norm": "none"}),
    "start-0.01": Variant("heads with GroupNorm started at N(0, 0.01)", start=start_as_the_paper),
    "side-smaller": Variant("sides about a quarter smaller, as many pixels in all", side=0.75),
    "side-larger": Variant("sides about a third larger, as many pixels in all", side=4 / 3),
    "anchors-32": Variant("the paper's anchors, from 32 px, whatever fits", {"anchors_fit": False}),
    "smooth-l1": Variant(
        "smooth L1 at 1/9, weight 1", {"box_loss": "smooth-l1", "box_beta": 1 / 9, "box_weight": 1.0}
    ),
    "box-weight-1": Variant("box loss weighed 1", {"box_weight": 1.0}),
    "box-weight-4": Variant("box loss weighed 4", {"box_weight": 4.0}),
    "by-image": Variant("losses divided by the positives of the image", {"normalizer": "image"}),
    "iou-0.5": Variant("the paper's matching, with low-quality matches", {"matching": "iou"}),
    "no-low-quality": Variant("the paper's matching", {"matching": "iou", "low_quality": False}),
    "iou-0.4": Variant(
        "positive from IoU 0.4, negative below 0.3",
        {"matching": "iou", "positive_iou": 0.4, "negative_iou": 0.3},
    ),
    "iou-0.3": Variant(
        "positive from IoU 0.3, negative below 0.2",
        {"matching": "iou", "positive_iou": 0.3, "negative_iou": 0.2},
    ),
    "atss-0": Variant(
        "ATSS with 0 deviations", objective=partial(with_matching, partial(match_atss, deviations=0.0))
    ),
    "atss-1": Variant(
        "ATSS with 1 deviation", objective=partial(with_matching, partial(match_atss, deviations=1.0))
    ),
    "atss-1.5": Variant(
        "ATSS with 1.5 deviations", objective=partial(with_matching, partial(match_atss, deviations=1.5))
    ),
    "atss-3": Variant(
        "ATSS with 3 deviations", objective=partial(with_matching, partial(match_atss, deviations=3.0))
    ),
    "focal": Variant("the focal loss", {"loss": "focal"}),
    # As options, which hold whatever the number of passes; the recipe's zoom waits for the third.
    "no-zoom": Variant("flips alone", options={"zoom": "1,1"}),
    "zoom": Variant("zoom 0.8 to 1.4, also below 3 passes", options={"zoom": "0.8,1.4"}),
    "zoom-wide": Variant("zoom 0.5 to 2", options={"zoom": "0.5,2"}),
    "sizes": Variant(
        "each batch at 0.8, 0.9 or 1 of the side", {"augmentation": {"scales": (0.8, 0.9, 1.0)}}
    ),
    "photometric": Variant("half of the images in other colours", {"augmentation": {"photometric": 0.5}}),
    "mosaic": Variant("half of the images mosaics", {"augmentation": {"mosaic": 0.5}}),
    "turned": Variant(
        "quarter turns and upside down", {"augmentation": {"flip_vertical": 0.5, "quarter_turn": 0.5}}
    ),
    "gamma-1": Variant("gamma 1", {"loss_settings": {"alpha": 0.25, "gamma": 1.0}}),
    "alpha-0.5": Variant("alpha 0.5", {"loss_settings": {"alpha": 0.5, "gamma": 2.0}}),
    "weight-decay-0.1": Variant("weight decay 0.1", {"weight_decay": 0.1}),
}


@dataclass(frozen=True)
class Job:
    """One run of the sweep."""

    data: str
    variant: str
    seed: int
    images: int | None
    backbone: str = "resnet18"
    channels: int = 256
    batch_size: int | None = None

    def folder(self, runs: Path) -> Path:
        settings = [
            self.backbone,
            self.channels,
            self.data,
            self.variant,
            self.images,
            self.batch_size,
            self.seed,
        ]
        # What an older recipe left unfinished must not go on as a run of this one.
        recipe = hashlib.sha256(RECIPE.encode()).hexdigest()[:6]
        return runs / "-".join(str(one) for one in [*settings, recipe] if one is not None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--images", type=int, help="images each run sees; by default as many as the recipe says"
    )
    parser.add_argument("--backbone", default=Job.backbone)
    parser.add_argument("--channels", type=int, default=Job.channels, help="of pyramid and heads")
    parser.add_argument("--batch-size", type=int, help="images a step; by default the recipe's")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time; more than one are not timed")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "recipes")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--background", action="store_true", help="go on when the terminal is closed")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folders = dict(pair.split("=", 1) for pair in given.data)
    if given.job:
        sys.exit(run(Job(**json.loads(given.job)), folders, given.runs))
    if given.background:
        given.runs.mkdir(parents=True, exist_ok=True)
        log, command = given.runs / "sweep.log", [one for one in sys.argv if one != "--background"]
        with log.open("a") as said:
            started = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        print(f"process {started.pid}; what it says is in {log}")
        return
    done = {job_of(row) for row in known_rows() if row["recipe"] == RECIPE}
    jobs = [
        Job(data, variant, seed, given.images, given.backbone, given.channels, given.batch_size)
        for seed in given.seeds  # a first look at everything before a second one at anything
        for variant in given.variants
        for data in folders
    ]
    lock = threading.Lock()

    def finish(number: int, job: Job) -> bool:
        line = f"{number}/{len(jobs)} {job.folder(given.runs).name}"
        print(f"{line}{' (done)' if job in done else ''}", flush=True)
        if job in done or given.list:
            return True
        code, row = outcome_of(job, given.data, given.runs, given.parallel)
        if code in NOT_RUN:
            print(f"{line} {NOT_RUN[code]}: see {log_of(job, given.runs)}", flush=True)
            return True
        if row is None:
            folder = job.folder(given.runs)
            begins = (
                f"; it goes on where it was; to begin it anew, remove {folder}" if has_state(folder) else ""
            )
            print(f"{line} failed: see {log_of(job, given.runs)}{begins}", flush=True)
            return False
        with lock:
            keep(row)
        print(
            f"{line}: AP {row['ap']:.3f}, AP50 {row['ap50']:.3f}, {row['seconds'] / 60:.1f} min", flush=True
        )
        return True

    with ThreadPoolExecutor(given.parallel) as pool:
        finished = list(pool.map(finish, range(1, len(jobs) + 1), jobs))
    if not all(finished):
        sys.exit(f"{finished.count(False)} of {len(jobs)} runs failed; the same command tries them again")


def outcome_of(job: Job, data: list[str], runs: Path, parallel: int) -> tuple[int, dict[str, Any] | None]:
    """Run a job in a process of its own; return its exit code, and its row if it came to its end."""
    goes_on = has_state(job.folder(runs))
    runs.mkdir(parents=True, exist_ok=True)
    threads = max(1, len(available_cores()) // parallel)
    began = time.monotonic()
    command = [
        sys.executable,
        __file__,
        "--job",
        json.dumps(asdict(job)),
        "--data",
        *data,
        "--runs",
        str(runs),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if parallel > 1 else None
    with log_of(job, runs).open("w") as log:
        outcome = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if outcome.returncode:
        return outcome.returncode, None
    shutil.rmtree(job.folder(runs) / "checkpoints", ignore_errors=True)
    what = VARIANTS[job.variant].what
    if VARIANTS[job.variant].side != 1:
        plan = json.loads((job.folder(runs) / "plan.json").read_text())
        what += f" ({plan['spec']['preprocessing']['image_size']} px)"
    row = row_of(
        job,
        what=what,
        metrics=json.loads((job.folder(runs) / "metrics.json").read_text()),
        seconds=time.monotonic() - began,
        threads=threads,
    )
    return 0, row | ({"timed": False} if parallel > 1 or goes_on else {})


def has_state(folder: Path) -> bool:
    """Return whether a run was interrupted that can go on; those that are finished keep no state."""
    return newest_state(RunFolder(folder).checkpoints)[0] is not None


def row_of(job: Job, *, what: str, metrics: dict[str, Any], seconds: float, threads: int) -> dict[str, Any]:
    """Return what is kept of a run."""
    return {
        **asdict(job),
        "ap": metrics["ap"],
        "ap50": metrics["ap50"],
        "seconds": round(seconds),
        "recipe": RECIPE,
        "what": what,
        "threads": threads,
        "precision": resolve_precision(torch.device("cpu"), "auto"),
        "torch": str(torch.__version__),
    }


def keep(row: dict[str, Any]) -> None:
    """Add a row to those kept, and write the page anew, with what other processes kept meanwhile."""
    with KEPT.open("a") as file:
        file.write(json.dumps(row) + "\n")
    PAGE.write_text(page(known_rows()))


def log_of(job: Job, runs: Path) -> Path:
    folder = job.folder(runs)
    return folder.with_name(f"{folder.name}.log")


def job_of(row: dict[str, Any]) -> Job:
    """Return the run of a row; the first rows do not name the width, which was the usual one."""
    return Job(**{name: row[name] for name in Job.__dataclass_fields__ if name in row})


def known_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []


def run(job: Job, folders: dict[str, str], runs: Path) -> int:
    """Train as `retinanet train DATA --backbone NAME` does, with the variant's change; return the exit code."""
    variant, folder = VARIANTS[job.variant], job.folder(runs)
    usual = TrainingOptions(
        data=folders[job.data],
        output=str(folder),
        backbone=job.backbone,
        channels=job.channels,
        recipe="small",
        device="cpu",
        seed=job.seed,
        log_to="none",
        batch_size=job.batch_size,
    )
    with ExitStack() as changes:
        changes.enter_context(patch.object(of_training, "Objective", variant.objective))
        if variant.start is not None:
            changes.enter_context(patch.object(heads, "start_before_norm", variant.start))
        if has_state(folder):
            resume_training(folder, change=variant)
            return 0
        shutil.rmtree(folder, ignore_errors=True)
        train = open_dataset(usual.data, "train")
        base = plan_run(usual, train)
        try:
            options = replace(usual, channels=round(job.channels * variant.width), **variant.options)
            options = of_length(options, plan_run(options, train, variant), base, job.images, variant.side)
        except ConfigError as error:
            print(error)
            return IMPOSSIBLE
        if job.variant != BASE and (variant.objective, variant.start) == (Objective, None):
            as_usual = of_length(usual, base, base, job.images)
            if not differ(plan_run(options, train, variant), plan_run(as_usual, train)):
                print("the recipe is as it was")
                return AS_IT_IS
        run_training(options, change=variant)
    return 0


def of_length(
    options: TrainingOptions, plan: Plan, base: Plan, images: int | None, factor: float = 1
) -> TrainingOptions:
    """Return the options of a run that sees so many images, as large as those of the base's plan, or `factor` times as
    large with as many pixels in all."""
    usual, planned = (one.spec.preprocessing.image_size for one in (base, plan))
    side = max(64, round(usual * factor / 32) * 32) if factor != 1 else usual
    if images is not None:
        steps = math.ceil(images * (usual / side) ** 2 / plan.batch_size)
        return replace(options, image_size=side, steps=steps)
    return options if side == planned else replace(options, image_size=side)


def differ(plan: Plan, usual: Plan) -> bool:
    """Return whether plans differ in anything but what they say of it."""
    values = [{**one.to_json(), "reasons": None} for one in (plan, usual)]
    return values[0] != values[1]


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page of all rows: a table for each data set and length."""
    lines = [
        "# Recipes: what was tried",
        "",
        "Made by `python bench/recipes.py` from `bench/recipes.jsonl`. Every row changes one thing of the recipe",
        "`small` as it was then, which the line below a heading tells apart, or is torchvision's RetinaNet beside it.",
        "Headings name the data set, the backbone and the width of pyramid and heads; `shapes` is the demo's images,",
        "`tiny` those of `retinanet paper --scale tiny`. AP is COCO's on the split val,",
        "mean and half the range over seeds, against the base's of the same seeds in the same precision, if there are",
        "any (of how many where not of all; torchvision's, which has no seed in common with ours, against all of the",
        "base's). Minutes are of whole processes that had the machine to themselves (of torchvision's, those after its",
        "images were read); a CPU that computes in bf16 is named.",
        "",
        *in_short([row for row in rows if row["recipe"] == RECIPE]),
    ]
    for group in dict.fromkeys(map(group_of, reversed(rows))):
        of_group = [row for row in rows if group_of(row) == group]
        base = [row for row in of_group if row["variant"] == BASE]
        lines += [f"## {heading(group)}", "", f"Recipe: {group[0]}.", ""]
        lines += [
            "| variant | seeds | AP | against base | AP50 | minutes |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name in sorted({row["variant"] for row in of_group}, key=lambda name: (name != BASE, name)):
            found = [row for row in of_group if row["variant"] == name]
            against = "" if name == BASE else against_base(found, base)
            # A run that others' work delayed says how good, not how long.
            timed = [row for row in found if row.get("timed", True)]
            cells = [
                f"{name}: {found[-1]['what']}",
                str(len(found)),
                spread([row["ap"] for row in found]),
                against,
                spread([row["ap50"] for row in found]),
                minutes(timed) if timed else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def in_short(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of everything that was tried with one recipe, a column for each data set."""
    by_group: dict[Group, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        by_group.setdefault(group_of(row), {}).setdefault(row["variant"], []).append(row)
    if not by_group:
        return []
    bases = [[row["ap"] for row in found.get(BASE, [])] for found in by_group.values()]
    apart = max((max(values) - min(values) for values in bases if values), default=0.0)
    lines = [
        "## Today's recipe, and what each change of it did",
        "",
        "AP of the base, and by how much a change was above it, or below; the tables that follow say with how many",
        f"seeds, of most one. The base's are up to {apart:.3f} apart: what is nearer to 0 is not told from it.",
        "",
        f"| change | {' | '.join(map(heading, by_group))} |",
        f"| --- |{' ---: |' * len(by_group)}",
    ]
    tried = [name for name in VARIANTS if any(name in found for found in by_group.values())]
    for name in tried:
        cells = []
        for found in by_group.values():
            here, base = found.get(name, []), found.get(BASE, [])
            if name == BASE:
                cells.append(spread([row["ap"] for row in base]) if base else "")
            else:
                cells.append(against_base(here, base) if here else "")
        lines.append(f"| {name}: {VARIANTS[name].what} | {' | '.join(cells)} |")
    return [*lines, ""]


def against_base(rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Return by how much AP is above the base's, mean over the seeds that both have in one precision, and how many
    those are if not all; of torchvision's, which has no seed in common with ours, above the mean of all."""
    if base and rows[0]["variant"].startswith("torchvision"):
        means = [statistics.mean(row["ap"] for row in each) for each in (rows, base)]
        return f"{means[0] - means[1]:+.3f}"
    known = {(row["seed"], row.get("precision", "fp32")): row["ap"] for row in base}
    differences = [
        row["ap"] - known[pair]
        for row in rows
        if (pair := (row["seed"], row.get("precision", "fp32"))) in known
    ]
    if not differences:
        return ""
    of = "" if len(differences) == len(rows) else f" ({len(differences)} of {len(rows)})"
    return f"{statistics.mean(differences):+.3f}{of}"


Group: TypeAlias = tuple[str, str, int, int | None, str, int | None]


def heading(group: Group) -> str:
    """Return what tells a group from the others of its recipe."""
    _, backbone, channels, batch_size, data, images = group
    length = f"{images:,} images seen" if images else "the recipe's length"
    step = f", {batch_size} a step" if batch_size else ""
    return f"{data}: {backbone}, {channels} wide, {length}{step}"


def group_of(row: dict[str, Any]) -> Group:
    """Return what rows have in common that are compared."""
    job = job_of(row)
    return row["recipe"], job.backbone, job.channels, job.batch_size, job.data, job.images


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.3f}"


def minutes(rows: list[dict[str, Any]]) -> str:
    """Return how long runs took, those apart whose CPU computed in bf16; the first rows do not say and were fp32."""
    taken = {"fp32": [], "bf16": []}
    for row in rows:
        taken[row.get("precision", "fp32")].append(row["seconds"] / 60)
    return "; ".join(
        f"{statistics.mean(times):.1f}{'' if precision == 'fp32' else f' {precision}'}"
        for precision, times in taken.items()
        if times
    )


if __name__ == "__main__":
    main()
