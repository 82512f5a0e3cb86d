"""A study, measured: which runs it takes, what is known so far, and its page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.data import open_dataset
from retinanet.data.shapes import generate_shapes, holds_shapes
from retinanet.errors import ConfigError, DataError, did_you_mean
from retinanet.paper.comparison import Interval, compare_order, interval
from retinanet.paper.page import COLOURS, Page, Picture, Table, new_figure, write_page
from retinanet.paper.running import Job, Store, run_all
from retinanet.paper.settings import Scale, Setting, change_of, options_of
from retinanet.paper.tables import STUDIES, Row, Study
from retinanet.training.optimizer import drops_of
from retinanet.training.planning import plan_run
from retinanet.training.progress import plain_console

HEADINGS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "APs",
    "ap_medium": "APm",
    "ap_large": "APl",
}


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Args:
        rows: names, or parts of names, of the rows to train; empty is all.
        seeds: how many; the first chooses the rate.
    """

    scale: Scale
    data: Path | None
    output: Path
    seeds: int
    rows: tuple[str, ...]
    parallel: int
    pretrained: str = "auto"

    def job(self, setting: Setting, rate: float, seed: int) -> Job:
        """Return the run of a setting."""
        return Job(setting, self.scale.name, str(self.data), rate, seed, self.pretrained)


@dataclass(frozen=True)
class Measured:
    """What is known of a setting: AP at each rate with the first seed, the best rate, and the results at it."""

    rates: dict[float, float]
    rate: float | None
    results: list[dict[str, Any]]

    def of(self, figure: str) -> Interval | None:
        values = [result[figure] for result in self.results if result.get(figure) is not None]
        return interval(values) if values else None


def prepare(request: Request, say: Callable[[str], None]) -> Request:
    """Return the request with a data set: without --data the scale's synthetic images, made where they are missing."""
    if request.data is not None:
        return request
    assert request.scale.shapes is not None  # else --data was asked for
    spec, train, val = request.scale.shapes
    folder = request.output / "data" / f"shapes-{request.scale.name}"
    if not folder.exists():
        say(f"drawing {train + val:,} synthetic images: {folder}")
        generate_shapes(folder, train=train, val=val, spec=spec)
    elif not holds_shapes(folder, train=train, val=val, spec=spec):
        raise DataError(
            f"{folder} holds other images than this version draws for --scale {request.scale.name}; remove it, or "
            "choose another --output"
        )
    return replace(request, data=folder)


def dry_run(names: Sequence[str], request: Request) -> None:
    """Print the runs that the studies take, and the plan of the first of them."""
    studies = [STUDIES[name](request.scale) for name in names]
    store, console = Store(request.output), plain_console()
    settings = _settings(studies, request.rows)
    jobs = search_jobs(settings, request)
    done = sum(store.result(job) is not None for job in jobs)
    seeds = len(settings) * (request.seeds - 1)
    rates = len(request.scale.rates)
    console.print(
        f"{len(settings)} settings, each at {rates} rate{'s' if rates > 1 else ''} with the first seed ({done} of "
        f"{len(jobs)} runs done) and at the best with {request.seeds - 1} more ({seeds} runs); "
        f"{request.parallel} at a time",
        highlight=False,
        soft_wrap=True,
    )
    for setting in settings:
        console.print(f"  {setting.key}", highlight=False)
    first = jobs[0]
    options = options_of(
        first.setting, request.scale, first.data, seed=first.seed, pretrained=first.pretrained
    )
    train = open_dataset(first.data, "train")
    plan = plan_run(options, train, change_of(first.setting, first.rate)).lasting(
        options.steps or 1, "the scale"
    )
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


def measure(names: Sequence[str], request: Request, say: Callable[[str], None]) -> list[str]:
    """Run what the studies lack and write their pages after every run; return what failed."""
    studies = [STUDIES[name](request.scale) for name in names]
    store = Store(request.output)
    wanted = [
        row.setting for study in studies for row in _asked(study, request.rows) if row.setting is not None
    ]
    settings = list(dict.fromkeys(wanted))

    def write() -> None:
        for study in studies:
            write_page(page_of(study, request, store), request.output)

    write()
    # First every setting at every rate with one seed, then the other seeds at the best.
    failures = run_all(search_jobs(settings, request), store, parallel=request.parallel, say=say, done=write)
    return failures + run_all(
        seed_jobs(settings, request, store), store, parallel=request.parallel, say=say, done=write
    )


def search_jobs(settings: Iterable[Setting], request: Request) -> list[Job]:
    """Return the runs that find each setting's rate."""
    return [request.job(setting, rate, 0) for setting in settings for rate in request.scale.rates]


def seed_jobs(settings: Iterable[Setting], request: Request, store: Store) -> list[Job]:
    """Return the runs of the other seeds, of settings whose rate is known."""
    jobs = []
    for setting in settings:
        rate = what_is_known(setting, request, store).rate
        if rate is not None:
            jobs += [request.job(setting, rate, seed) for seed in range(1, request.seeds)]
    return jobs


def what_is_known(setting: Setting, request: Request, store: Store) -> Measured:
    """Return the results of a setting so far. The best rate is known when all were tried."""
    found = {job.rate: store.result(job) for job in search_jobs([setting], request)}
    rates = {rate: float(result["ap"]) for rate, result in found.items() if result is not None}
    if len(rates) < len(found):
        return Measured(rates, None, [])
    rate = max(rates, key=lambda rate: rates[rate])
    others = [store.result(request.job(setting, rate, seed)) for seed in range(1, request.seeds)]
    first = found[rate]
    assert first is not None  # all of them are there
    return Measured(rates, rate, [first, *(result for result in others if result is not None)])


def _settings(studies: Sequence[Study], rows: Sequence[str]) -> list[Setting]:
    """Return what has to be trained, equal settings once."""
    wanted = [row.setting for study in studies for row in _asked(study, rows)]
    return list(dict.fromkeys(setting for setting in wanted if setting is not None))


def _asked(study: Study, rows: Sequence[str]) -> list[Row]:
    """Return the rows that `--rows` names in full or in part."""
    return [row for row in study.rows if not rows or any(part in row.name for part in rows)]


def check_rows(names: Sequence[str], scale: Scale, rows: Sequence[str]) -> None:
    """Refuse a part of a name that no row has."""
    every = [row.name for name in names for row in STUDIES[name](scale).rows]
    for part in rows:
        if not any(part in row for row in every):
            raise ConfigError(
                f"--rows {part!r} is part of no row's name.{did_you_mean(part, every)} There are: {'; '.join(every)}"
            )


def page_of(study: Study, request: Request, store: Store) -> Page:
    """Return the page of a study with what is known so far."""
    known = {
        row.name: what_is_known(row.setting, request, store) for row in study.rows if row.setting is not None
    }
    figures = ("ap", *study.figures)
    head = ["row", *(f"{HEADINGS[figure]}, paper" for figure in figures), *(HEADINGS[f] for f in figures)]
    table = Table(
        [*head, "rate", "seeds"],
        [
            [row.name, *_published(row, figures), *_measured(known.get(row.name), figures)]
            for row in study.rows
        ],
    )
    finished = [row for row in study.rows if row.name in known and known[row.name].rate is not None]
    parts: list[str | Table | Picture] = [study.about, _how(request), table, *_divergences(study, known)]
    ordered = [row for row in finished if row.published.ap is not None]
    numbers: dict[str, Any] = {"scale": request.scale.name, "data": _name(request)}
    if study.ordered and len(ordered) > 2:
        order = compare_order(
            [row.published.ap or 0.0 for row in ordered],
            [[result["ap"] for result in known[row.name].results] for row in ordered],
        )
        parts.append(order.in_words())
        numbers["order"] = asdict(order)
    if len(finished) > 1:
        parts.append(_picture(study, finished, known))
    tried = [row for row in study.rows if row.name in known and known[row.name].rates]
    if len(request.scale.rates) > 1 and tried:
        parts += [
            "AP at every rate that was tried, with the first seed (factors on the recipe's rate; the best is used for "
            "the other seeds):",
            Table(
                ["row", *(f"rate x {rate:g}" for rate in request.scale.rates)],
                [
                    [row.name, *(_rate(known[row.name], rate) for rate in request.scale.rates)]
                    for row in tried
                ],
            ),
        ]
    numbers["rows"] = [
        {
            "name": row.name,
            "setting": asdict(row.setting) if row.setting else None,
            "published": asdict(row.published),
            "rates": {f"{rate:g}": ap for rate, ap in known[row.name].rates.items()}
            if row.name in known
            else {},
            "results": known[row.name].results if row.name in known else [],
        }
        for row in study.rows
    ]
    return Page(study.name, study.title, parts, numbers)


def _name(request: Request) -> str:
    return "" if request.data is None else request.data.name


def _how(request: Request) -> str:
    scale = request.scale
    assert request.data is not None
    data = open_dataset(request.data, "train")
    empty = float((np.diff(data.offsets) == 0).mean())
    options = scale.options
    return (
        f"Measured at scale {scale.name} ({scale.what}) on {_name(request)}: {len(data):,} training images, "
        f"{empty:.0%} without objects; {scale.steps:,} steps of {options['batch_size']}, recipe {options['recipe']}, "
        f"{scale.side} px. AP is in percent, on val: the mean of seeds ± half of its 95 % interval (Student's t). "
        "What was published is of COCO."
    )


def _published(row: Row, figures: Sequence[str]) -> list[str]:
    values = [getattr(row.published, figure) for figure in figures]
    return ["-" if value is None else f"{value:.1f}" for value in values]


def _measured(found: Measured | None, figures: Sequence[str]) -> list[str]:
    if found is None:
        return ["-"] * (len(figures) + 2)
    if found.rate is None:
        return ["not yet" if figure == "ap" else "" for figure in figures] + ["", ""]
    cells = []
    for figure in figures:
        known = found.of(figure)
        cells.append("-" if known is None else known.percent())
    return [*cells, f"x {found.rate:g}", f"{len(found.results)}"]


def _rate(found: Measured, rate: float) -> str:
    return f"{100 * found.rates[rate]:.1f}" if rate in found.rates else "not yet"


def _divergences(study: Study, known: dict[str, Measured]) -> list[str]:
    """Return a paragraph for each row with runs that diverged."""
    lines = []
    for name, found in known.items():
        messages = [result["diverged"] for result in found.results if "diverged" in result]
        if messages:
            lines.append(f"{name}: {len(messages)} of {len(found.results)} runs diverged ({messages[0]}).")
    return lines


def _picture(study: Study, rows: Sequence[Row], known: dict[str, Measured]) -> Picture:
    """Published and measured AP of the rows, side by side."""
    figure = new_figure(8.4, 0.34 * len(rows) + 1.2)
    left, right = figure.subplots(1, 2, sharey=True)
    places = list(range(len(rows)))
    left.barh(places, [row.published.ap or 0 for row in rows], color="#bbbbbb", height=0.6)
    left.set(title="published, COCO", xlabel="AP, %", yticks=places, yticklabels=[row.name for row in rows])
    left.invert_yaxis()
    intervals = [interval([result["ap"] for result in known[row.name].results]) for row in rows]
    right.barh(
        places,
        [100 * one.mean for one in intervals],
        xerr=[100 * (one.half or 0) for one in intervals],
        color=COLOURS[0],
        height=0.6,
        capsize=3,
    )
    for place, row in zip(places, rows, strict=True):
        seeds = [100 * result["ap"] for result in known[row.name].results]
        right.plot(seeds, [place] * len(seeds), "o", color=COLOURS[1], markersize=4)
    right.set(title="measured", xlabel="AP, %", xlim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    return Picture(figure, "AP of the rows. Dots: seeds. Lines: 95 % intervals of the mean.")
