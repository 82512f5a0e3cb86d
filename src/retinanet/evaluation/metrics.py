"""The outcome of an evaluation: what `metrics.json` holds and what a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict

from retinanet.errors import DataError

FIGURES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
)
COUNTS = ("max_detections", "images", "ground_truths", "detections", "unmatched_detections")


class ClassMetrics(TypedDict):
    """One class: AP over IoU 0.50:0.95, AP at 0.50 and 0.75, and how many boxes there were of it."""

    ap: float | None
    ap50: float | None
    ap75: float | None
    ground_truths: int
    detections: int


@dataclass(frozen=True)
class Metrics:
    """COCO's twelve figures for boxes, in [0, 1], None where undefined (no ground truth of that kind).

    `ap`, `ap50`, `ap75`, `ap_small` ... and `ar_small` ... take the best `max_detections` detections of
    each class in each image; `ar1`, `ar10` and `ar100` the best 1, 10 and 100, whatever that number is.
    `ap` is the mean over IoU thresholds 0.50, 0.55 ... 0.95 and over the classes with ground truth.

    Args:
        ground_truths: boxes that are not ignored.
        detections: detections of the data set's classes, before any cap.
        unmatched_detections: detections whose class name the data set does not have; they are left out.
        per_class: by class name, in the data set's order.
        at_100: the twelve figures at COCO's own 100 detections; None when `max_detections` is 100.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    max_detections: int
    images: int
    ground_truths: int
    detections: int
    unmatched_detections: int
    per_class: dict[str, ClassMetrics]
    at_100: dict[str, float | None] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `metrics.json` holds: the fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Metrics:
        """Return the metrics that `to_json` wrote.

        Raises:
            DataError: a field is missing, unknown or not of its kind.
        """
        if not isinstance(values, Mapping):
            raise DataError(f"Metrics needs an object with named fields; got {type(values).__name__}")
        known = {field.name for field in fields(cls)}
        for problem, names in (
            ("lacks", known - {"at_100"} - set(values)),
            ("does not know", set(values) - known),
        ):
            if names:
                raise DataError(
                    f"Metrics {problem} {', '.join(sorted(names))}; write it with Metrics.to_json"
                )
        for name in FIGURES:
            _check_figure(name, values[name])
        for name in COUNTS:
            _check_count(name, values[name])
        _check_object("per_class", values["per_class"])
        for name, of_class in values["per_class"].items():
            where = f"per_class[{name!r}]"
            _check_object(where, of_class, required=frozenset(ClassMetrics.__annotations__))
            for key in ("ap", "ap50", "ap75"):
                _check_figure(f"{where}.{key}", of_class[key])
            for key in ("ground_truths", "detections"):
                _check_count(f"{where}.{key}", of_class[key])
        at_100 = values.get("at_100")
        if at_100 is not None:
            _check_object("at_100", at_100, required=frozenset(FIGURES))
            for name in FIGURES:
                _check_figure(f"at_100.{name}", at_100[name])
        return cls(**values)

    def table(self) -> str:
        """Return the figures as a few lines for people, one line a class."""
        figures = self.to_json()
        cap = f"(at most {self.max_detections} detections of a class in an image)"
        lines = [_figure_line(figures, "ap"), _figure_line(figures, "ar"), cap]
        if self.at_100 is not None:
            lines += [_figure_line(self.at_100, "ap"), _figure_line(self.at_100, "ar"), "(at most 100)"]
        counts = (
            f"{self.images} images, {self.ground_truths} ground-truth boxes, {self.detections} detections"
        )
        if self.unmatched_detections:
            counts += f", {self.unmatched_detections} detections of classes that the data set does not have"
        width = max([len("class"), *map(len, self.per_class)])
        lines += [
            counts,
            f"{'class':<{width}}  {'AP':>5}  {'AP50':>5}  {'AP75':>5}  {'boxes':>7}  {'found':>7}",
        ]
        for name, of in self.per_class.items():
            shown = "  ".join(_shown(value) for value in (of["ap"], of["ap50"], of["ap75"]))
            lines.append(f"{name:<{width}}  {shown}  {of['ground_truths']:>7}  {of['detections']:>7}")
        lines.append("(found: every detection, right or wrong, however low its score)")
        return "\n".join(lines)


def _figure_line(figures: Mapping[str, Any], start: str) -> str:
    names = [name for name in FIGURES if name.startswith(start)]
    shown = [f"{start.upper()}{name.removeprefix(start).replace('_', ' ')}" for name in names]
    return "  ".join(f"{name} {_shown(figures[key])}" for name, key in zip(shown, names, strict=True))


def _shown(value: float | None) -> str:
    return "    -" if value is None else f"{value:5.3f}"


def _check_figure(name: str, value: Any) -> None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1):
        return
    raise DataError(f"Metrics.{name} needs a number in [0, 1] or null; got {value!r}")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"Metrics.{name} needs a whole number from 0; got {value!r}")


def _check_object(name: str, value: Any, required: frozenset[str] = frozenset()) -> None:
    if not isinstance(value, Mapping) or (required and set(value) != required):
        fields_named = f" with the fields {', '.join(sorted(required))}" if required else ""
        raise DataError(f"Metrics.{name} needs an object{fields_named}; got {value!r}")
