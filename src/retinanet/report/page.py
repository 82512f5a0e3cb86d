"""A self-contained HTML page about a run: figures, curves, pictures. No script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from retinanet.folders import write_text

HEADLINE = (
    ("ap", "AP"),
    ("ap50", "AP50"),
    ("ap75", "AP75"),
    ("ap_small", "AP small"),
    ("ap_medium", "AP medium"),
    ("ap_large", "AP large"),
)
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } .note { opacity: .75; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; }
.figures div { border: 1px solid #8884; border-radius: .5rem; padding: .75rem 1rem; }
.figures b { display: block; font-size: 1.6rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; } td, th { padding: .35rem .75rem; text-align: right; }
td:first-child, th:first-child, .settings td { text-align: left; } tr { border-bottom: 1px solid #8884; }
img { max-width: 100%; background: white; border-radius: .5rem; }
"""


def write_page(
    path: Path,
    *,
    title: str,
    lead: str,
    metrics: Mapping[str, Any],
    pictures: Sequence[tuple[str, Path]],
    settings: Mapping[str, Any],
) -> None:
    """Write the page.

    Args:
        lead: one paragraph below the title.
        metrics: what `metrics.json` holds.
        pictures: (heading, PNG or JPEG file); the files' content goes into the page.
        settings: name -> value, for the last table.
    """
    figures = "".join(f"<div>{label}<b>{_number(metrics.get(name))}</b></div>" for name, label in HEADLINE)
    classes = "".join(
        f"<tr><td>{escape(name)}</td><td>{_number(of['ap'])}</td><td>{_number(of['ap50'])}</td>"
        f"<td>{_number(of['ap75'])}</td><td>{of['ground_truths']:,}</td></tr>"
        for name, of in metrics["per_class"].items()
    )
    shown = "".join(
        f'<h2>{escape(heading)}</h2><img alt="{escape(heading)}" src="{_url_of(file)}">'
        for heading, file in pictures
    )
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>"
        for name, value in settings.items()
    )
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1><p class="note">{escape(lead)}</p>
<div class="figures">{figures}</div>
<p class="note">AP is the mean over IoU thresholds 0.50 to 0.95 and over the classes; AP50 and AP75 are at one
threshold. Small is below 32&#178; pixels, large above 96&#178;. {metrics["images"]:,} images,
{metrics["ground_truths"]:,} objects, at most {metrics["max_detections"]} detections an image.</p>
<table><tr><th>class</th><th>AP</th><th>AP50</th><th>AP75</th><th>objects</th></tr>{classes}</table>
{shown}
<h2>Settings</h2><table class="settings">{rows}</table>
</body></html>
""",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _url_of(file: Path) -> str:
    return data_url(file.read_bytes(), "jpeg" if file.suffix in (".jpg", ".jpeg") else "png")


def data_url(picture: bytes, kind: Literal["png", "jpeg"]) -> str:
    """Return the address that holds a picture itself."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
