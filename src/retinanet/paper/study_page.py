"""The page of a study: published rows beside measured ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from retinanet.losses import sigmoid_cross_entropy, sigmoid_focal_star_loss
from retinanet.model import fitting_norm
from retinanet.paper.comparison import Spread, compare_order, difference, interval
from retinanet.paper.page import COLOURS, Page, Picture, Table, new_figure
from retinanet.paper.results import Measured, Request, common_spread, what_is_known
from retinanet.paper.running import Store
from retinanet.paper.settings import Scale
from retinanet.paper.tables import Row, Study
from retinanet.records import Classes
from retinanet.training.plan import FEW_PASSES
from retinanet.training.recipes import small

HEADINGS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "APs",
    "ap_medium": "APm",
    "ap_large": "APl",
    "ms": "ms",
}
# What is not measured with AP: Figure 2 measures the speed of models.
PUBLISHED_ONLY = ("ms",)
# In what all rows alike differ from the paper's training, by recipe.
DIFFERS = {
    "small": " Unlike the paper, in all rows alike: from scratch, {norm} in the backbone and GroupNorm in the heads"
    "{channels}, an object's best anchors are its own even below IoU 0.5, boxes are learned by GIoU weighted "
    "{recipe.box_weight:g}, losses are divided by the positives of the step, {rates}, a warm-up of {warm_up} steps, "
    "averaged weights{zoomed}.",
    "paper": "",
}
# How Figure 7 draws a setting that is above cross entropy, below it, or not told apart from it.
JUDGED = {True: (COLOURS[0], "-"), False: (COLOURS[3], "--"), None: ("#888888", ":")}


def page_of(study: Study, request: Request, store: Store) -> Page:
    """Return the page of a study with what is known so far."""
    known = {
        row.name: what_is_known(row.setting, request, store) for row in study.rows if row.setting is not None
    }
    figures = ("ap", *study.figures)
    measured = [figure for figure in figures if figure not in PUBLISHED_ONLY]
    # Other detectors than ours may spread otherwise.
    peers = any(row.setting is not None and row.setting.peer is not None for row in study.rows)
    spreads = {figure: None if peers else common_spread(known.values(), figure) for figure in measured}
    spread = spreads["ap"]
    head = ["row", *(f"{HEADINGS[figure]}, paper" for figure in figures), *(HEADINGS[f] for f in measured)]
    table = Table(
        [*head, "rate", "seeds"],
        [
            [row.name, *_published(row, figures), *_measured(known.get(row.name), spreads)]
            for row in study.rows
        ],
    )
    finished = [row for row in study.rows if row.name in known and known[row.name].results]
    parts: list[str | Table | Picture] = [
        study.about,
        f"{_how(request)}{_intervals(spread, alike=not peers)}",
        table,
        *_divergences(study, known),
    ]
    ordered = [row for row in finished if row.published.ap is not None]
    numbers: dict[str, Any] = {"scale": request.scale.name, "data": request.about_data}
    if study.ordered and len(ordered) > 2:
        order = compare_order(
            [row.published.ap or 0.0 for row in ordered],
            [known[row.name].seeds("ap") for row in ordered],
            spread,
        )
        parts.append(order.in_words())
        numbers["order"] = asdict(order)
    compared = [pair for pair in study.against if all(name in known and known[name].results for name in pair)]
    if compared:
        table, numbers["against"] = _differences(study, compared, known, spread)
        many = f", wide enough that all {len(study.against)} hold at once" if len(study.against) > 1 else ""
        kind = "Student's t" if spread else "Welch's t"
        least = ""
        if spread is not None:
            half = spread.half(2 / request.seeds, comparisons=len(study.against))
            seeds = "1 seed" if request.seeds == 1 else f"{request.seeds} seeds"
            least = (
                f" Of {seeds} each, two rows have to be {100 * half:.1f} AP apart to be told from each other."
            )
        parts += [
            f"Differences of rows with their 95 % intervals ({kind}{many}).{least} The last column is of their "
            "direction alone, not of their size:",
            table,
            *_steps(study, known),
        ]
    if study.stars and len(finished) > 1 and known["CE"].results:
        parts.append(_stars(study, known, spread))
    elif len(finished) > 1:
        parts.append(_picture(study, finished, known, spread))
    tried = [row for row in study.rows if row.name in known and known[row.name].rates]
    if len(request.scale.rates) > 1 and tried:
        parts += _rates(tried, known, request.scale)
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


def _how(request: Request) -> str:
    scale, options = request.scale, request.scale.options
    first = " and ".join(f"{rate:g}" for rate in scale.first_rates)
    chosen = (
        " The rate of a row is the best on val with a seed of its own, looked for alike with every loss: at x "
        f"{first}, then beside the best until it has no better neighbour. The figures are of other seeds; what another "
        "choice would have given is not in their intervals."
    )
    recipe = small(Classes(("any",)), scale.base, "cpu")
    rates = "a cosine for the rate of the paper's SGD"
    if not scale.sgd:
        rates = f"Muon with a cosine, decay {recipe.weight_decay:g} and gradients clipped at norm {recipe.clip_norm:g}"
    passes = scale.steps * options["batch_size"] / max(request.images, 1)
    differs = DIFFERS[options["recipe"]].format(
        recipe=recipe,
        norm="GroupNorm" if fitting_norm(scale.base, "group") == "group" else "BatchNorm",
        rates=rates,
        warm_up=min(recipe.warmup_steps, scale.steps // 20),
        channels=f", {options['channels']} channels" if "channels" in options else "",
        zoomed=", images zoomed" if passes >= FEW_PASSES else "",
    )
    return (
        f"Measured at scale {scale.name} ({scale.what}) on {request.about_data}; {scale.steps:,} steps of "
        f"{options['batch_size']}, recipe {options['recipe']}, {scale.side} px, anchors from "
        f"{options['anchors'].split(',')[0]} px, where the row does not say otherwise.{differs} "
        f"AP is in percent, on val.{chosen if len(scale.rates) > 1 else ''} What was published is of COCO."
    )


def _intervals(spread: Spread | None, *, alike: bool) -> str:
    """Return what stands behind the mean of a row."""
    if not alike:
        return " Means are of seeds, ± half of a 95 % interval by the seeds of the row (Student's t)."
    if spread is None:
        return " A single seed does not say how far others are from it."
    return (
        " Means are of seeds, ± half of a 95 % interval (Student's t), for which the seeds of all rows are taken to "
        f"spread alike: their AP is {100 * spread.deviation:.1f} from the mean of their row (standard deviation, "
        f"{spread.freedom} degrees of freedom)."
    )


def _published(row: Row, figures: Sequence[str]) -> list[str]:
    values = [getattr(row.published, figure) for figure in figures]
    cells = [
        "-" if value is None else f"{value:.0f}" if figure == "ms" else f"{value:.1f}"
        for figure, value in zip(figures, values, strict=True)
    ]
    return [row.published.said if row.published.ap is None else cells[0], *cells[1:]]


def _measured(found: Measured | None, spreads: Mapping[str, Spread | None]) -> list[str]:
    """Return the cells of a row: each figure with its interval, the rate, the number of seeds."""
    if found is None:
        return ["-"] * (len(spreads) + 2)
    if not found.results:
        return ["not measured" if figure == "ap" else "" for figure in spreads] + ["", ""]
    cells = []
    for figure, spread in spreads.items():
        known = found.of(figure, spread)
        cells.append("-" if known is None else known.percent())
    return [*cells, f"x {found.rate:g}", f"{len(found.results)}"]


def _rates(rows: Sequence[Row], known: dict[str, Measured], scale: Scale) -> list[str | Table]:
    """Return what was found at every rate that was tried, and rows whose best is at the edge of the grid."""
    tried = sorted({rate for row in rows for rate in known[row.name].rates})
    parts: list[str | Table] = [
        "AP at the rates that were tried, with a seed of its own (factors on the recipe's rate; the seeds of the table "
        "are trained at the best):",
        Table(
            ["row", *(f"rate x {rate:g}" for rate in tried)],
            [[row.name, *(_rate(known[row.name], rate, scale) for rate in tried)] for row in rows],
        ),
    ]
    names = [row.name for row in rows if known[row.name].rate in (scale.rates[0], scale.rates[-1])]
    if names:
        parts.append(
            f"The best rate is at the edge of the grid, and one beyond might be better, of: {'; '.join(names)}."
        )
    return parts


def _rate(found: Measured, rate: float, scale: Scale) -> str:
    if rate in found.rates:
        return "diverged" if rate in found.diverged else f"{100 * found.rates[rate]:.1f}"
    return "not yet" if rate in scale.next_rates(found.rates) else ""


def _differences(
    study: Study, pairs: Sequence[tuple[str, str]], known: dict[str, Measured], spread: Spread | None
) -> tuple[Table, list[dict[str, Any]]]:
    """Return the differences of pairs of rows as a table, and as values."""
    published = {row.name: row.published for row in study.rows}
    rows, values = [], []
    for first, second in pairs:
        seeds = [known[name].seeds("ap") for name in (first, second)]
        found = difference(*seeds, comparisons=len(study.against), spread=spread)
        there, other = published[first].ap, published[second]
        wanted = None if there is None or other.ap is None else there - other.ap
        # What has diverged, say, is below.
        direction = math.inf if wanted is None and other.said != "-" else wanted
        shown = other.said if wanted is None else f"{wanted:+.1f}"
        names = [study.here.get(name, name) for name in (first, second)]
        rows.append([" over ".join(names), shown, *found.cells(), found.verdict(direction)])
        values.append({"first": first, "second": second, "published": wanted, **asdict(found)})
    return Table(("difference", "AP, paper", "AP", "95 % interval", "direction"), rows), values


def _steps(study: Study, known: dict[str, Measured]) -> list[str]:
    """Return how far peers came in our time, and what time that was."""
    lines, ours = [], {row.setting: known[row.name].seconds for row in study.rows if row.setting is not None}
    for row in study.rows:
        if row.setting is not None and row.setting.peer is not None:
            done = [result for result in known[row.name].results if "steps" in result]
            own, took = ours.get(row.setting.ours), known[row.name].seconds
            if done:
                steps = ", ".join(f"{result['steps']:,}" for result in done)
                means = "" if None in (own, took) else f" (on average {took:,.0f} s, ours {own:,.0f} s)"
                lines.append(f"{study.here[row.name]} took {steps} steps in our time{means}.")
    return lines


def _divergences(study: Study, known: dict[str, Measured]) -> list[str]:
    """Return a paragraph for each row with runs that diverged, or that did in the paper."""
    lines = []
    expected = [row.name for row in study.rows if row.published.said == "diverged"]
    for name, found in known.items():
        messages = [result["diverged"] for result in found.results if "diverged" in result]
        if messages:
            lines.append(f"{name}: {len(messages)} of {len(found.results)} runs diverged ({messages[0]}).")
        elif name in expected and found.results:
            lines.append(f"{name}: diverged in the paper, and in none of these {len(found.results)} runs.")
    return lines


def _picture(study: Study, rows: Sequence[Row], known: dict[str, Measured], spread: Spread | None) -> Picture:
    """Published and measured AP of the rows, side by side."""
    figure = new_figure(8.4, 0.34 * len(rows) + 1.2)
    left, right = figure.subplots(1, 2, sharey=True)
    places = list(range(len(rows)))
    left.barh(places, [row.published.ap or 0 for row in rows], color="#bbbbbb", height=0.6)
    for place, row in zip(places, rows, strict=True):
        if not row.published.ap:  # a bar of no length says nothing
            said = "not published" if row.published.said == "-" else row.published.said
            left.text(0.5, place, said if row.published.ap is None else "0.0", va="center", fontsize=8)
    left.set(title="published, COCO", xlabel="AP, %", yticks=places, yticklabels=[row.name for row in rows])
    left.invert_yaxis()
    intervals = [interval(known[row.name].seeds("ap"), spread) for row in rows]
    right.barh(
        places,
        [100 * one.mean for one in intervals],
        xerr=[100 * (one.half or 0) for one in intervals],
        color=COLOURS[0],
        height=0.6,
        capsize=3,
    )
    for place, row in zip(places, rows, strict=True):
        seeds = [100 * ap for ap in known[row.name].seeds("ap")]
        right.plot(seeds, [place] * len(seeds), "o", color=COLOURS[1], markersize=4)
    right.set(title="measured", xlabel="AP, %", xlim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    return Picture(figure, "AP of the rows. Dots: seeds. Lines: 95 % intervals of the mean.")


def _stars(study: Study, known: dict[str, Measured], spread: Spread | None) -> Picture:
    """The losses of the rows over x_t, blue where they beat cross entropy."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    x = torch.linspace(-4, 5, 300, dtype=torch.float64)
    ones = torch.ones_like(x)
    least = known["CE"].of("ap", spread)
    assert least is not None  # it has results
    axes.plot(x.numpy(), sigmoid_cross_entropy(x, ones).numpy(), color="#000000", linewidth=2.2, label="CE")
    for name, star in study.stars.items():
        found = known[name].of("ap", spread) if name in known else None
        if found is not None:
            seeds = [one.seeds("ap") for one in (known[name], known["CE"])]
            colour, dash = JUDGED[difference(*seeds, comparisons=len(study.stars), spread=spread).above]
            axes.plot(
                x.numpy(),
                sigmoid_focal_star_loss(x, ones, None, *star).numpy(),
                color=colour,
                linestyle=dash,
                linewidth=1.3,
                label=f"$\\gamma$ {star[0]:g}, $\\beta$ {star[1]:g}: {found.percent()}",
            )
    axes.axvline(0, color="#8888", linewidth=1)
    axes.set(xlim=(-4, 5), ylim=(-0.1, 4.2), xlabel="$x_t = y\\,x$", ylabel="loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    caption = (
        f"FL* by setting: blue is above cross entropy (AP {least.percent()}), dashed red below it, dotted grey not "
        "told apart, as the interval of the difference holds 0 (95 % for all of them together), or of one seed."
    )
    return Picture(figure, caption)
