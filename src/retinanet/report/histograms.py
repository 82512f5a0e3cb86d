"""Small histograms for a page, drawn into a PNG without a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from retinanet.report.curves import BLUE

BINS = 24
COLUMNS = 3


@dataclass(frozen=True)
class Histogram:
    """One panel: values above 0, on an axis of logarithms."""

    title: str
    label: str
    values: NDArray[Any]


def draw_histograms(panels: Sequence[Histogram]) -> bytes:
    """Return the panels beside each other as a PNG file; equal input makes equal files."""
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(11, 2.6 * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)  # draws without a display, and without pyplot's global state
    for place, panel in enumerate(panels):
        _draw(figure.add_subplot(rows, COLUMNS, place + 1), panel)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Axes, panel: Histogram) -> None:
    values = panel.values[panel.values > 0]
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if not len(values):
        axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes)
        return
    least, most = float(values.min()) / 1.1, float(values.max()) * 1.1
    axes.set_xscale("log")
    axes.hist(values, bins=np.geomspace(least, most, BINS + 1).tolist(), color=BLUE)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
