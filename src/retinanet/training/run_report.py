"""What a run leaves for people: curves, pictures and a page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.data import Dataset
from retinanet.inference import Validation
from retinanet.records import Ignore
from retinanet.report.curves import draw_curves
from retinanet.report.run_curves import best_validation
from retinanet.report.run_page import RunPage, Share, Status, write_run_page
from retinanet.training.examples import Examples
from retinanet.training.folder import RunFolder
from retinanet.training.memory import most_held
from retinanet.training.pictures import draw_validation
from retinanet.training.plan import Plan
from retinanet.training.time_left import RECENT, in_time

# Columns of example pictures on the page, that of the ground truth among them.
COLUMNS = 6
ACTIVITIES = (
    ("step", "training steps", "#0072B2"),
    ("data", "waiting for images", "#E69F00"),
    ("validating", "validations", "#009E73"),
    ("saving", "saving", "#CC79A7"),
)


def draw_run(best: Validation, val_set: Dataset, folder: RunFolder) -> None:
    """Draw the curves of a run and its best model's validation into its folder."""
    draw_curves(folder.history(), folder.path / "curves.png")
    draw_validation(val_set, best, folder.path / "pictures.png")


def write_report(
    plan: Plan, train: Dataset, val: Dataset, folder: RunFolder, examples: Examples, status: Status
) -> None:
    """Write the page of a run as it stands, from what its folder holds."""
    history = folder.history()
    best = best_validation(history)
    columns = examples.columns([record["step"] for record in history if "ap" in record], COLUMNS)
    shares = shares_of(history)
    write_run_page(
        folder.report,
        RunPage(
            title=f"RetinaNet run {folder.path.name}",
            lead=f"{plan.spec.backbone.name}; {plan.steps:,} steps of {plan.batch_size} images; {Path(val.name).name}: "
            f"{len(train):,} images to learn from, {len(val):,} to be tried on.",
            status=status,
            history=history,
            resumes=[(record["step"], _when(record["at"])) for record in folder.resumes()],
            facts=_facts(plan, history, folder.memory(), round(status.done * plan.steps)),
            classes=_objects(val),
            examples=[(_caption(step, history, best), file) for step, file in columns],
            shares=shares,
            advice=f"{slowest_part(shares)} {advice_on(shares, plan.workers)}".strip(),
            left_out=_left_out(train, val),
            settings=plan.reasons,
            commands=folder.commands(),
            environment=folder.environment(),
            written=f"{datetime.now().astimezone():%d %B %Y, %H:%M}",
        ),
    )


def shares_of(history: Sequence[dict[str, Any]]) -> list[Share]:
    """Return where the time of a run went, as far as its log tells."""
    shares = []
    for name, what, colour in ACTIVITIES:
        seconds = sum(record.get(f"seconds_{name}", 0.0) for record in history)
        if seconds > 0:
            shares.append(Share(what, seconds, in_time(seconds), colour))
    return shares


def slowest_part(shares: Sequence[Share]) -> str:
    """Return a sentence about what a step mostly does; "" where none is done."""
    of = {share.what: share.seconds for share in shares}
    computing, waiting = of.get("training steps", 0.0), of.get("waiting for images", 0.0)
    if not computing + waiting:
        return ""
    part, rest = (
        ("computing", "waits for images") if computing >= waiting else ("waiting for images", "computes")
    )
    most = max(computing, waiting) / (computing + waiting)
    return f"The slowest part of a step is {part}, {100 * most:.0f} % of it; the rest {rest}."


def advice_on(shares: Sequence[Share], workers: int) -> str:
    """Return a sentence about the slowest thing that something can be done about."""
    whole = sum(share.seconds for share in shares)
    of = {share.what: share.seconds / whole for share in shares} if whole else {}
    waiting, validating, saving = (
        of.get(what, 0.0) for what in ("waiting for images", "validations", "saving")
    )
    if waiting >= max(0.15, validating, saving):
        more = f"more --workers than {workers}" if workers else "some --workers, which take other cores"
        return f"{100 * waiting:.0f} % of the time waits for images: {more}, or smaller image files, make it less."
    if validating >= max(0.25, saving):
        fewer = "a larger --validate-every-steps makes it less"
        return f"{100 * validating:.0f} % of the time goes into validations: {fewer}."
    if saving >= 0.1:
        return f"{100 * saving:.0f} % of the time goes into saving: fewer states, or a faster disk, make it less."
    return "Most of the time goes into the training steps themselves, as it should."


def _facts(
    plan: Plan, history: Sequence[dict[str, Any]], memory: Sequence[dict[str, Any]], step: int
) -> list[tuple[str, str]]:
    seconds = sum(share.seconds for share in shares_of(history))
    speeds = [record["images_per_second"] for record in history if "images_per_second" in record][-RECENT:]
    passes = step * plan.batch_size / plan.train_images
    facts = [
        ("steps", f"{step:,}"),
        ("passes over the images", f"{passes:.1f}" if passes < 100 else f"{passes:,.0f}"),
        ("time in training", in_time(seconds)),
    ]
    if speeds:
        facts.append(("images a second", f"{float(np.median(speeds)):.3g}"))
    return [*facts, *most_held(memory)]


def _objects(val: Dataset) -> dict[str, int]:
    counts = np.bincount(val.labels[val.ignore == Ignore.NO], minlength=len(val.classes))
    return dict(zip(val.classes.names, counts.tolist(), strict=True))


def _caption(step: int | None, history: Sequence[dict[str, Any]], best: dict[str, Any] | None) -> str:
    if step is None:
        return "annotated"
    ap = next(record["ap"] for record in history if "ap" in record and record["step"] == step)
    is_best = ", the best" if best is not None and best["step"] == step else ""
    return f"step {step:,}: AP {'-' if ap is None else f'{ap:.3f}'}{is_best}"


def _left_out(train: Dataset, val: Dataset) -> list[str]:
    """Return a sentence for each split of which something was repaired or dropped."""
    sentences = []
    for dataset in (train, val):
        if dataset.fault_total:
            dropped = sum(n for (_, action), n in dataset.fault_counts.items() if action == "dropped")
            entries = "1 entry was" if dropped == 1 else f"{dropped:,} entries were"
            sentences.append(
                f"Of the annotations of {dataset.split}, {entries} left out and "
                f"{dataset.fault_total - dropped:,} repaired before the first step; retinanet data check names them."
            )
    return sentences


def _when(at: str) -> str:
    return f"{datetime.fromisoformat(at):%d %b, %H:%M}"
