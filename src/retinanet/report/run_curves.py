"""The curves of a run's page, each a small PNG: AP, losses, learning rate, AP of classes. Drawn without a display.

Names of classes stand beside the pictures, in the page: no font has the letters of every script.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from retinanet.report.curves import BLUE, GREEN, ORANGE

Records: TypeAlias = Sequence[dict[str, Any]]
Points: TypeAlias = list[tuple[float, float]]

GREY = "#6b7075"
# Points of a line; where a run has more, neighbours are averaged.
MOST_POINTS = 300


def draw_quality(history: Records, resumed: Sequence[int]) -> bytes:
    """Draw AP, AP50 and AP75 of the validations; a ring marks the best AP."""
    figure, axes = _new_figure(history, resumed)
    everything: Points = []
    for name, label, colour in (("ap50", "AP50", ORANGE), ("ap75", "AP75", GREEN), ("ap", "AP", BLUE)):
        points = points_of(history, name)
        everything += points
        _line(axes, points, colour, label, marker="o")
    if points:
        # The later of equals: its model is the one that was kept.
        step, ap = max(points, key=lambda point: (point[1], point[0]))
        axes.plot([step], [ap], "o", markersize=11, markerfacecolor="none", color=BLUE, markeredgewidth=1.5)
    axes.set_ylim(0, _above(everything))
    return _png(figure, axes)


def draw_losses(history: Records, resumed: Sequence[int]) -> bytes:
    """Draw the parts of the training loss and their sum."""
    figure, axes = _new_figure(history, resumed)
    for name, label, colour in (
        ("loss", "sum", BLUE),
        ("loss_class", "what is it? (class)", ORANGE),
        ("loss_box", "where is it? (box)", GREEN),
    ):
        _line(axes, averaged(points_of(history, name)), colour, label)
    axes.set_ylim(0, None)
    return _png(figure, axes)


def draw_rate(history: Records, resumed: Sequence[int]) -> bytes:
    """Draw the learning rate."""
    figure, axes = _new_figure(history, resumed)
    _line(axes, averaged(points_of(history, "lr")), BLUE)
    axes.set_ylim(0, None)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return _png(figure, axes)


def draw_classes(
    history: Records, resumed: Sequence[int], shown: Sequence[tuple[str, tuple[int, int, int]]]
) -> bytes:
    """Draw the AP of some classes over the validations.

    Args:
        shown: (name, RGB) of each.
    """
    figure, axes = _new_figure(history, resumed)
    everything: Points = []
    for name, (red, green, blue) in shown:
        points = [
            (record["step"], record["per_class"][name]["ap"])
            for record in history
            if record.get("per_class", {}).get(name, {}).get("ap") is not None
        ]
        everything += points
        _line(axes, points, (red / 255, green / 255, blue / 255), marker="o")
    axes.set_ylim(0, _above(everything))
    return _png(figure, axes)


def points_of(history: Records, name: str) -> Points:
    """Return (step, value) of every line that has such a figure."""
    return [(record["step"], record[name]) for record in history if record.get(name) is not None]


def averaged(points: Points) -> Points:
    """Return at most `MOST_POINTS` points: neighbours become their mean."""
    if len(points) <= MOST_POINTS:
        return points
    parts = np.array_split(np.array(points, np.float64), MOST_POINTS)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def _new_figure(history: Records, resumed: Sequence[int]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 2.7), dpi=130)
    FigureCanvasAgg(figure)  # draws without a display, and without pyplot's global state
    # By hand: a layout that is worked out takes longer than the drawing.
    axes = figure.add_axes((0.1, 0.13, 0.87, 0.82))
    last = max((record["step"] for record in history), default=1)
    axes.set_xlim(0, max(last, 1) * 1.02)
    for step in sorted({step for step in resumed if 0 < step <= last}):
        axes.axvline(step, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    return figure, axes


def _line(axes: Axes, points: Points, colour: Any, label: str | None = None, marker: str = "") -> None:
    if points:
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            label=label,
            marker=marker,
            markersize=3.5,
            linewidth=1.6,
        )


def _above(points: Points) -> float:
    """Return a limit above all figures, at most 1: those of a hard task should be no line along the bottom."""
    return min(1.0, max(0.05, 1.15 * max((value for _, value in points), default=1.0)))


def _png(figure: Figure, axes: Axes) -> bytes:
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
