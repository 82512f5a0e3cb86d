"""Line charts as SVG inside a page: sharp at any size, in the page's letters, on light or dark ground.

A picture by matplotlib takes a tenth of a second: too long for the several of a page that is written while a run
trains. These take a thousandth. Where the round numbers of an axis lie is still matplotlib's knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

import numpy as np
from matplotlib.ticker import MaxNLocator

Points: TypeAlias = Sequence[tuple[float, float]]

# Pixels of the drawing, which the page scales, and of the frame inside.
WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 12, 26
# Distances of numbers on an axis, times powers of ten.
ROUND = (1, 2, 5, 10)
# Points of a line; where there are more, neighbours are averaged.
MOST_POINTS = 300
# Up to so many, each has a dot.
MOST_DOTS = 40

STYLE = """
.chart { width: 100%; height: auto; display: block; font: 11px system-ui, sans-serif; fill: currentColor; }
.chart .grid { stroke: currentColor; opacity: .15; } .chart .mark { stroke: currentColor; opacity: .6;
stroke-dasharray: 4 3; } .chart text { opacity: .7; } .chart polyline { stroke-linejoin: round; }
.chart .shade { stroke: currentColor; stroke-width: 3.5; opacity: .3; }
"""


@dataclass(frozen=True)
class Line:
    """A curve: its name, a CSS colour, and (x, y) in order."""

    name: str
    colour: str
    points: Points


def line_chart(
    lines: Sequence[Line],
    *,
    last: float,
    highest: float,
    marks: Sequence[float] = (),
    ring: int | None = None,
    shaded: bool = False,
) -> str:
    """Return the SVG of some lines over whole numbers from 0.

    Args:
        last: end of the axis of steps.
        highest: upper end of the axis of values, which begins at 0.
        marks: where dashed lines stand upright.
        ring: the line whose highest point, the last of equals, gets a ring around it.
        shaded: lines get a dark hair, for colours that are pale on paper.
    """
    frame = _Frame(max(last, 1.0), highest)
    places = [frame.x(x) for x in sorted({x for x in marks if 0 < x <= last})]
    upright = f'y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
    parts = [frame.grid(), *(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" {upright}/>' for x in places)]
    for number, line in enumerate(lines):
        parts.append(frame.line(line, shaded))
        if number == ring and line.points:
            x, y = max(line.points, key=lambda point: (point[1], point[0]))
            parts.append(
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="7" fill="none" stroke="{line.colour}" '
                'stroke-width="1.5"/>'
            )
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def averaged(points: Points) -> Points:
    """Return at most `MOST_POINTS` points: neighbours become their mean."""
    if len(points) <= MOST_POINTS:
        return points
    parts = np.array_split(np.array(points, np.float64), MOST_POINTS)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


@dataclass(frozen=True)
class _Frame:
    last: float
    highest: float

    def x(self, value: float) -> float:
        return LEFT + value / self.last * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - min(1.0, value / self.highest) * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> str:
        """Return lines across at round values, with their numbers, and round numbers below."""
        rises = [
            y
            for y in MaxNLocator(5, steps=ROUND).tick_values(0, self.highest)
            if 0 <= y <= 1.0001 * self.highest
        ]
        across = [
            x
            for x in MaxNLocator(6, steps=ROUND, integer=True).tick_values(0, self.last)
            if 0 <= x <= self.last
        ]
        return "".join(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(y):.1f}" y2="{self.y(y):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{self.y(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>'
            for y in rises
        ) + "".join(
            f'<text x="{self.x(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{x:,.0f}</text>' for x in across
        )

    def line(self, line: Line, shaded: bool) -> str:
        corners = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in line.points)
        # As attributes: what turns a page into a PDF or a mail often keeps its style sheet from drawings.
        drawn = f'<polyline fill="none" stroke-width="2" stroke="{line.colour}" points="{corners}"/>'
        if shaded:
            drawn = f'<polyline class="shade" fill="none" points="{corners}"/>{drawn}'
        if len(line.points) > MOST_DOTS:
            return drawn
        return drawn + "".join(
            f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3" fill="{line.colour}">'
            f"<title>{escape(line.name)}, step {x:,.0f}: {y:.4g}</title></circle>"
            for x, y in line.points
        )
