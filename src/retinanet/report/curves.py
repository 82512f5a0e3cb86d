"""Curves of a run: losses and validation AP over steps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from retinanet.folders import write_bytes

# Blue, orange and green of Okabe and Ito's palette, told apart by people with any kind of colour vision.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"


def draw_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the lines of `metrics.jsonl` into a PNG file: losses left, AP right."""
    steps = [line for line in history if "loss" in line]
    evaluations = [line for line in history if "ap" in line]
    figure = Figure(figsize=(10, 3.6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)  # draws without a display, and without pyplot's global state
    left, right = figure.subplots(1, 2)
    for name, label, colour in (
        ("loss", "sum", BLUE),
        ("loss_class", "class", ORANGE),
        ("loss_box", "box", GREEN),
    ):
        _line(left, steps, name, label, colour)
    left.set(title="Training loss", xlabel="step", ylim=(0, None))
    for name, label, colour in (("ap", "AP", BLUE), ("ap50", "AP50", ORANGE), ("ap75", "AP75", GREEN)):
        _line(right, evaluations, name, label, colour, marker="o")
    right.set(title="Validation", xlabel="step", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(path, picture.getvalue())


def _line(
    axes: Axes, records: Sequence[dict[str, Any]], name: str, label: str, colour: str, marker: str = ""
) -> None:
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    if points:
        axes.plot(
            *zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=4, linewidth=1.5
        )
