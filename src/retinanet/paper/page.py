"""What an item of the paper makes: a page of paragraphs, tables and pictures, as Markdown, HTML and JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from retinanet.folders import write_bytes, write_text
from retinanet.report.page import STYLE

# Blue, orange, green, vermillion, purple and sky blue of Okabe and Ito, told apart by people with any kind of
# colour vision; in lines the order of dashes helps those who print without colours.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Table:
    """Cells as text; a column of numbers is aligned to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A drawn figure and what it shows."""

    figure: Figure
    caption: str


@dataclass(frozen=True)
class Interactive:
    """Something to play with: HTML and script of its own, in the HTML form alone, and what Markdown says instead."""

    html: str
    instead: str


@dataclass(frozen=True)
class Page:
    """An item, made. `parts` are paragraphs (str), tables, pictures and what one can play with, in their order.

    `numbers` is what the JSON file holds beside the tables.
    """

    name: str
    title: str
    parts: Sequence[Part]
    numbers: Mapping[str, Any] = field(default_factory=dict)


Part: TypeAlias = str | Table | Picture | Interactive


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of that size in inches, which draws without a display and without global state."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def write_page(page: Page, folder: Path) -> list[Path]:
    """Write NAME.md, NAME.html, NAME.json and a PNG file a picture into a folder; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_png(part.figure) for part in page.parts if isinstance(part, Picture)]
    names = [f"{page.name}{f'-{n}' if n else ''}.png" for n in range(len(drawn))]
    for name, content in zip(names, drawn, strict=True):
        write_bytes(folder / name, content)
    write_text(folder / f"{page.name}.md", _markdown(page, names))
    write_text(folder / f"{page.name}.html", _html(page, drawn))
    tables = [
        [dict(zip(t.head, row, strict=True)) for row in t.rows] for t in page.parts if isinstance(t, Table)
    ]
    values = {"item": page.name, "title": page.title, **page.numbers, "tables": tables}
    write_text(folder / f"{page.name}.json", json.dumps(values, indent=1, allow_nan=False) + "\n")
    return [folder / name for name in (*(f"{page.name}.{kind}" for kind in ("md", "html", "json")), *names)]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of matplotlib, so that equal pictures are equal files.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _markdown(page: Page, pictures: Sequence[str]) -> str:
    left = list(pictures)
    blocks = [f"# {page.title}"]
    for part in page.parts:
        if isinstance(part, str):
            blocks.append(part)
        elif isinstance(part, Table):
            rule = ["---", *("---:" for _ in part.head[1:])]
            blocks.append("\n".join("| " + " | ".join(row) + " |" for row in (part.head, rule, *part.rows)))
        elif isinstance(part, Interactive):
            blocks.append(part.instead)
        else:
            blocks.append(f"![{part.caption}]({left.pop(0)})\n\n*{part.caption}*")
    return "\n\n".join(blocks) + "\n"


def _html(page: Page, pictures: Sequence[bytes]) -> str:
    left = list(pictures)
    blocks = []
    for part in page.parts:
        if isinstance(part, str):
            blocks.append(f"<p>{escape(part)}</p>")
        elif isinstance(part, Table):
            head = "".join(f"<th>{escape(cell)}</th>" for cell in part.head)
            rows = "".join(
                "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in part.rows
            )
            blocks.append(f"<table><tr>{head}</tr>{rows}</table>")
        elif isinstance(part, Interactive):
            blocks.append(part.html)
        else:
            source = f"data:image/png;base64,{base64.b64encode(left.pop(0)).decode()}"
            caption = escape(part.caption)
            blocks.append(
                f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'
            )
    title = escape(page.title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE} figure {{ margin: 1.5rem 0; }}</style></head><body>
<h1>{title}</h1>
{chr(10).join(blocks)}
</body></html>
"""
