"""The curves of a run's page: AP, AP of classes, losses, learning rate; each with what it says, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

from retinanet.drawing import class_colour
from retinanet.report.charts import Line, Points, averaged, line_chart
from retinanet.report.curves import BLUE, GREEN, ORANGE

Records: TypeAlias = Sequence[dict[str, Any]]

# Up to so many classes every one has a curve; of more, so many of the best and of the worst.
EVERY_CLASS, OF_EACH_END = 10, 4


@dataclass(frozen=True)
class Curves:
    """A chart with its heading, an explanation and the key to its lines."""

    heading: str
    said: str
    chart: str
    key: str


def best_validation(history: Records) -> dict[str, Any] | None:
    """Return the line of the validation whose model is kept: the highest AP, the later of equals."""
    validations = [record for record in history if "ap" in record]
    return max(validations, key=lambda record: (record["ap"] or 0.0, record["step"])) if validations else None


def curves_of(history: Records, classes: Sequence[str], resumed: Sequence[int]) -> list[Curves]:
    """Return the charts of a run; without a line in its log none.

    Args:
        history: the lines of `metrics.jsonl`.
        classes: names, in the model's order.
        resumed: steps after which the run went on.
    """
    best = best_validation(history)
    found = [] if best is None else [_quality(history, resumed, best)]
    if best is not None and len(classes) > 1 and "per_class" in best:
        found.append(_classes(history, resumed, best, classes))
    if any("loss" in record for record in history):
        found += [_losses(history, resumed), _rate(history, resumed)]
    return found


def key_of(entries: Sequence[tuple[str, str]], more: str = "") -> str:
    """Return coloured squares with names, for (CSS colour, name); `more` has no square."""
    items = "".join(f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for colour, name in entries)
    return f'<ul class="key">{items}{f"<li>{escape(more)}</li>" if more else ""}</ul>'


def colour_of_class(index: int) -> str:
    """Return the CSS colour that a class has in pictures."""
    return "rgb({},{},{})".format(*class_colour(index))


def number(value: float | None) -> str:
    """Return a figure in [0, 1] for people."""
    return "-" if value is None else f"{value:.3f}"


def _quality(history: Records, resumed: Sequence[int], best: Mapping[str, Any]) -> Curves:
    lines = [
        Line(label, colour, _points(history, name))
        for name, label, colour in (("ap", "AP", BLUE), ("ap50", "AP50", ORANGE), ("ap75", "AP75", GREEN))
    ]
    return Curves(
        "How good it is",
        "AP on the validation images: higher is better. The ring is the best model.",
        line_chart(lines, last=_last(history), highest=_room_above(lines), marks=resumed, ring=0),
        key_of([(line.colour, f"{line.name} {number(best[line.name.lower()])}") for line in lines]),
    )


def _classes(
    history: Records, resumed: Sequence[int], best: Mapping[str, Any], classes: Sequence[str]
) -> Curves:
    now = {
        name: of["ap"] for name, of in best["per_class"].items() if of["ap"] is not None and name in classes
    }
    shown = [name for name in classes if name in now]
    which = "AP of a class alone. One that stays low needs more examples, or clearer ones."
    if len(shown) > EVERY_CLASS:
        ordered = sorted(shown, key=lambda name: -now[name])
        shown, which = [*ordered[:OF_EACH_END], *ordered[-OF_EACH_END:]], f"{which} The best and the worst."
    lines = [
        Line(
            name,
            colour_of_class(classes.index(name)),
            [
                (record["step"], ap)
                for record in history
                if (ap := record.get("per_class", {}).get(name, {}).get("ap")) is not None
            ],
        )
        for name in shown
    ]
    return Curves(
        "How good in each class",
        which,
        line_chart(lines, last=_last(history), highest=_room_above(lines), marks=resumed, shaded=True),
        key_of([(line.colour, f"{line.name} {number(now[line.name])}") for line in lines]),
    )


def _losses(history: Records, resumed: Sequence[int]) -> Curves:
    lines = [
        Line(label, colour, averaged(_points(history, name)))
        for name, label, colour in (
            ("loss", "together, weighted", BLUE),
            ("loss_class", "what is it? (class)", ORANGE),
            ("loss_box", "where is it? (box)", GREEN),
        )
    ]
    return Curves(
        "What it still gets wrong",
        "The training loss in its parts: it should fall. It jitters, as every step sees other images.",
        line_chart(lines, last=_last(history), highest=_most(lines), marks=resumed),
        key_of([(line.colour, line.name) for line in lines]),
    )


def _rate(history: Records, resumed: Sequence[int]) -> Curves:
    line = Line("learning rate", BLUE, averaged(_points(history, "lr")))
    return Curves(
        "How boldly it learns",
        "The learning rate, how far a step moves the weights: it rises in the beginning and then falls, by plan.",
        line_chart([line], last=_last(history), highest=_most([line]), marks=resumed),
        key_of([(BLUE, line.name)]),
    )


def _points(history: Records, name: str) -> Points:
    return [(record["step"], record[name]) for record in history if record.get(name) is not None]


def _last(history: Records) -> float:
    return max((record["step"] for record in history), default=1)


def _most(lines: Sequence[Line]) -> float:
    return max((value for line in lines for _, value in line.points), default=0.0) * 1.05 or 1.0


def _room_above(lines: Sequence[Line]) -> float:
    """Return an upper end for figures up to 1: those of a hard task should be no line along the bottom."""
    return min(1.0, max(0.05, 1.1 * _most(lines)))
