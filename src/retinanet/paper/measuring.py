"""Measuring studies: the data they are measured on, their runs, their pages after every run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.anchors import AnchorSpec
from retinanet.data import Dataset, open_dataset
from retinanet.data.shapes import generate_shapes, holds_shapes
from retinanet.devices import choose_device, resolve_precision
from retinanet.errors import ConfigError, DataError, did_you_mean
from retinanet.images import Preprocessing
from retinanet.paper.page import write_page
from retinanet.paper.results import Request, search_jobs, seed_jobs, seeds_of, what_is_known
from retinanet.paper.running import Job, Store, run_all
from retinanet.paper.settings import Scale, Setting, by_the_papers_thresholds, focal, longest_of, options_of
from retinanet.paper.study_page import page_of
from retinanet.paper.tables import Row, Study
from retinanet.training.optimizer import drops_of
from retinanet.training.planning import plan_run
from retinanet.training.progress import plain_console
from retinanet.training.recipes import paper, small
from retinanet.training.sizing import coverage


def prepare(request: Request, say: Callable[[str], None], *, draw: bool) -> Request:
    """Return the request with a data set and what is to be known of it.

    Args:
        draw: without --data make the scale's synthetic images where they are missing; else that is an error.
    """
    data = request.data
    if data is None:
        assert request.scale.shapes is not None  # else --data was asked for
        spec, train, val = request.scale.shapes
        data = request.output / "data" / f"shapes-{request.scale.name}"
        if not data.exists():
            if not draw:
                raise ConfigError(
                    f"nothing is trained at scale {request.scale.name} in {request.output} yet; train a table first: "
                    f"{request.command('table1b')}"
                )
            say(f"drawing {train + val:,} synthetic images: {data}")
            generate_shapes(data, train=train, val=val, spec=spec)
        elif not holds_shapes(data, train=train, val=val, spec=spec):
            raise DataError(
                f"{data} holds other images than this version draws for --scale {request.scale.name}; remove it, or "
                "choose another --output"
            )
    splits = [open_dataset(data, split) for split in ("train", "val")]
    empty = float((np.diff(splits[0].offsets) == 0).mean())
    return replace(
        request,
        data=data,
        about_data=(
            f"{data.name}: {len(splits[0]):,} training images, {empty:.0%} without objects, anchors with IoU 0.5 for "
            f"{_covered(request.scale, splits[0]):.0%} of the objects"
        ),
        images=len(splits[0]),
        conditions=_digest(request, splits),
    )


def _covered(scale: Scale, train: Dataset) -> float:
    """Return the share of the objects that the anchors of most rows can be positive for by the paper's threshold."""
    sizes = tuple(float(size) for size in scale.options["anchors"].split(","))
    frame = Preprocessing(image_size=scale.side, max_size=longest_of(scale.side))
    return coverage(AnchorSpec(sizes=sizes), train, frame)


def _digest(request: Request, splits: Sequence[Dataset]) -> str:
    """Return a short name of the annotations, the recipe, the scale's numbers and the weights: equal ones, equal
    results. Which rates are tried changes none.
    """
    aside = ("what", "shapes", "rates", "first_rates")
    numbers = {name: value for name, value in asdict(request.scale).items() if name not in aside}
    if not numbers["sgd"]:  # results outlive a new field that is off
        del numbers["sgd"]
    classes, base = splits[0].classes, request.scale.base
    recipe = (
        small(classes, base, "cpu") if numbers["options"]["recipe"] == "small" else paper(classes, base, None)
    )
    usual = replace(by_the_papers_thresholds(recipe), loss="focal")  # every setting says its own
    decided = [numbers, without_defaults(usual), request.pretrained]
    if "precision" not in numbers["options"]:  # then the machine says it
        decided.append(resolve_precision(choose_device("auto"), "auto"))
    digest = hashlib.sha256(json.dumps(decided, sort_keys=True).encode())
    for split in splits:
        for values in (split.widths, split.heights, split.offsets, split.boxes, split.labels, split.ignore):
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:8]


def without_defaults(value: Any) -> Any:
    """Return a dataclass as plain values, without what is as it is by default: results outlive a new setting that is
    off. A default that changes changes results: its recipe has to name the value then.
    """
    if not is_dataclass(value):
        return [without_defaults(item) for item in value] if isinstance(value, tuple) else value
    kept = {}
    for one in fields(value):
        usual = one.default if one.default_factory is MISSING else one.default_factory()
        if getattr(value, one.name) != usual:
            kept[one.name] = without_defaults(getattr(value, one.name))
    return kept


def dry_run(names: Sequence[str], request: Request) -> None:
    """Print the runs that the studies take, and the plan of the first of them where there are images to plan for."""
    if request.data is not None or (request.output / "data" / f"shapes-{request.scale.name}").exists():
        request = prepare(request, lambda _: None, draw=False)
    studies = [request.study(name) for name in names]
    store, console = Store(request.output), plain_console()
    settings = _settings(studies, request.rows)
    console.print(_runs_in_words(settings, request, store), highlight=False, soft_wrap=True)
    for setting in settings:
        names = [row.name for study in studies for row in study.rows if row.setting == setting]
        console.print(f"  {' = '.join(dict.fromkeys(names))}", highlight=False)
    if request.data is None:
        console.print("the plan is known when the images are drawn: without --dry-run", highlight=False)
    if request.data is None or not settings:
        return
    first = request.job(settings[0], request.scale.first_rates[0], 0)
    options = options_of(
        first.setting, request.scale, first.data, seed=first.seed, pretrained=first.pretrained
    )
    train = open_dataset(first.data, "train")
    plan = plan_run(options, train, first.change).lasting(options.steps or 1, "the scale")
    console.print(f"The plan of {first.name}:", highlight=False)
    plan.show(console)
    if plan.recipe.schedule == "step":
        drops = " and ".join(f"{step:,}" for step in drops_of(plan.steps))
        console.print(
            f"rate {plan.lr:g}, a tenth of it from steps {drops}; {plan.steps:,} steps of {plan.batch_size} images",
            highlight=False,
        )
    if request.scale.name == "paper":
        console.print(
            "COCO's train2017 is the paper's trainval35k (the 80k of train2014 and 35k of val2014), val2017 its "
            "minival (the other 5k): the same images under other names.",
            highlight=False,
            soft_wrap=True,
        )


def _runs_in_words(settings: Sequence[Setting], request: Request, store: Store) -> str:
    """Return how many runs the settings take."""
    scale = request.scale
    seeds = "1 seed" if request.seeds == 1 else f"{request.seeds} seeds"
    rates = f"at rate x {scale.rates[0]:g} with {seeds}"
    if len(scale.rates) > 1:
        first = " and ".join(f"{rate:g}" for rate in scale.first_rates)
        rates = (
            f"at rates x {first}, and beside the best of x {scale.rates[0]:g} to {scale.rates[-1]:g} until it has no "
            f"better neighbour, with a seed of its own, and at the best with {seeds}"
        )
    done = _done_in_words(settings, request, store)
    return f"{len(settings)} settings, each {rates}; {done}; {request.parallel} at a time"


def _done_in_words(settings: Sequence[Setting], request: Request, store: Store) -> str:
    """Return how many runs are done, which the images are needed for: results are of these and no others."""
    if request.data is None:
        return "which are done is not known before the images are drawn"
    known = [what_is_known(setting, request, store) for setting in settings]
    searched = len(request.scale.rates) > 1  # else a row's first seed is the one run at the one rate
    done = sum(len(one.results) + searched * len(one.rates) for one in known)
    finished = sum(one.rate is not None and len(one.results) == request.seeds for one in known)
    return f"{done} runs are done, {finished} settings finished"


def trained_model(request: Request) -> Path:
    """Return the model of the row "FL, gamma 2" of the tables, of the seed that its rate was chosen by."""
    setting, store = focal(2), Store(request.output)
    rate = what_is_known(setting, request, store).rate
    if rate is None:
        raise ConfigError(
            "fig4 needs --model RUN --data DATA, or the row `gamma 2` of table1b, which is not trained yet in "
            f"{request.output}: {request.command('table1b', 'gamma 2')}"
        )
    return store.model(request.job(setting, rate, 0))


def measure(names: Sequence[str], request: Request, say: Callable[[str], None]) -> list[str]:
    """Run what the studies lack and write their pages after every run; return what failed."""
    studies = [request.study(name) for name in names]
    store = Store(request.output)
    settings = _settings(studies, request.rows)

    def write() -> None:
        for study in studies:
            write_page(page_of(study, request, store), request.output)

    def run(jobs: Sequence[Job]) -> list[str]:
        return run_all(jobs, store, parallel=request.parallel, say=say, done=write)

    write()
    failures: list[str] = []
    # Peers come last: they train for as long as ours did.
    for group in ([one for one in settings if one.peer is None], [one for one in settings if one.peer]):
        # First a rate for every setting, with a seed of its own, then the seeds at it.
        tried: set[Job] = set()
        while jobs := [
            job for job in timed(search_jobs(group, request, store), request, store) if job not in tried
        ]:
            failures += run(jobs)
            tried.update(jobs)  # one that failed is not tried again
        failures += run(timed(seed_jobs(group, request, store), request, store))
    for one in settings:
        ours = what_is_known(one.ours, request, store)
        if one.peer and ours.seconds is None:
            why = "how long ours took is not known, as its row has no result of a run that was never interrupted"
            if ours.rate is not None and ours.results:
                file = store.file(request.job(one.ours, ours.rate, seeds_of(request)[0]))
                why += f": remove {file}, and it is trained again"
            failures.append(f"{one.key}: {why}")
    return failures


def timed(jobs: Sequence[Job], request: Request, store: Store) -> list[Job]:
    """Return the jobs with the time that peers have; a peer of a row without results is left out."""
    known: dict[Setting, float | None] = {}
    for job in jobs:
        if job.setting.peer is not None and job.setting.ours not in known:
            known[job.setting.ours] = what_is_known(job.setting.ours, request, store).seconds
    seconds = [0.0 if job.setting.peer is None else known[job.setting.ours] for job in jobs]
    return [replace(job, seconds=s) for job, s in zip(jobs, seconds, strict=True) if s is not None]


def _settings(studies: Sequence[Study], rows: Sequence[str]) -> list[Setting]:
    """Return what has to be trained, equal settings once; with a peer the row of ours that says how long."""
    wanted = [row.setting for study in studies for row in _asked(study, rows)]
    found = [setting for setting in wanted if setting is not None]
    return list(dict.fromkeys(one for setting in found for one in (setting.ours, setting)))


def _asked(study: Study, rows: Sequence[str]) -> list[Row]:
    """Return the rows that `--rows` names: in full, or where no row has that name, in part."""
    return [row for row in study.rows if not rows or any(_names(part, row, study) for part in rows)]


def _names(part: str, row: Row, study: Study) -> bool:
    return part == row.name if any(part == other.name for other in study.rows) else part in row.name


def check_rows(names: Sequence[str], request: Request) -> None:
    """Refuse a part of a name that no row has which can be trained."""
    every = [row.name for name in names for row in request.study(name).rows if row.setting is not None]
    for part in request.rows:
        if not any(part in row for row in every):
            raise ConfigError(
                f"--rows: no row that is trained has a name with {part!r} in it.{did_you_mean(part, every)} "
                f"There are: {'; '.join(every)}"
            )
