"""The page of a run, for who knows the pictures and not the program: how far it is, how good, what it finds.

One file, without script and with nothing loaded from elsewhere. A page of a run that goes on loads itself anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from retinanet.folders import write_text
from retinanet.report.charts import STYLE as OF_CHARTS
from retinanet.report.page import STYLE, data_url
from retinanet.report.run_curves import (
    EVERY_CLASS,
    Records,
    best_validation,
    colour_of_class,
    curves_of,
    key_of,
    number,
)

HEADLINE = (
    ("ap", "AP"),
    ("ap50", "AP50"),
    ("ap75", "AP75"),
    ("ap_small", "AP small"),
    ("ap_medium", "AP medium"),
    ("ap_large", "AP large"),
)
# Rows of what was skipped, files of one row, classes of the table: the rest is counted.
ROWS_SHOWN, FILES_SHOWN, CLASSES_SHOWN = 50, 8, 100
# Seconds after which a browser loads the page of a run that goes on again.
RELOADED = 60
OF_RUN = """
.status { border-left: .4rem solid #0072B2; padding: .5rem 0 .5rem 1rem; margin: 1rem 0 1.5rem; font-size: 1.1rem; }
.status.finished { border-color: #009E73; } .status.stopped { border-color: #E69F00; }
.status.failed { border-color: #D55E00; } code { background: #8882; padding: .1rem .3rem; border-radius: .25rem; }
.status p { margin: .5rem 0 0; font-size: .95rem; } code { overflow-wrap: anywhere; }
.done { height: .5rem; border-radius: .25rem; background: #8883; margin-top: .5rem; overflow: hidden; }
.done i { display: block; height: 100%; background: #0072B2; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1.5rem; }
.curves h3 { margin: 0; } .curves p { margin: .1rem 0 .5rem; font-size: .9rem; opacity: .75; }
.key { font-size: .9rem; margin: .5rem 0; padding: 0; } .key li { display: inline-block; margin-right: 1rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .35rem;
vertical-align: -.05rem; border: 1px solid #8886; }
.strips { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 12rem); gap: .75rem; }
.strips figure { margin: 0; } .strips figcaption { font-size: .9rem; } .strips img { display: block; width: 100%; }
.bar { display: flex; height: 1.6rem; border-radius: .4rem; overflow: hidden; margin: .75rem 0; }
.facts { margin-top: 1rem; } .facts b { font-size: 1.25rem; } .listed td:first-child { white-space: nowrap; }
.listed td, .listed th { text-align: left; vertical-align: top; } td { overflow-wrap: anywhere; }
.why td { text-align: left; } .why td:first-child { white-space: nowrap; }
.why td:last-child { opacity: .75; } details { margin: .75rem 0; }
summary { cursor: pointer; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Status:
    """Where a run stands, in a sentence.

    Args:
        done: share of the steps, in [0, 1].
        hint: when one would give the command, "" where there is none.
    """

    kind: Literal["running", "finished", "stopped", "failed"]
    text: str
    done: float
    hint: str = ""
    command: str = ""


@dataclass(frozen=True)
class Share:
    """What part of the time something took."""

    what: str
    seconds: float
    in_words: str
    colour: str


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """What the page tells.

    Args:
        lead: one line below the title.
        history: the lines of `metrics.jsonl`.
        resumes: (step, when) of each time that the run went on.
        facts: (what, value) beside the figures.
        classes: name -> objects in the validation split, in the model's order.
        examples: (caption, JPEG file) of each column; the first is the ground truth.
        shares: where the time went, in the order of the bar, and `advice` about it.
        left_out: sentences about entries of the annotations.
        settings: (setting, value, why).
        commands: how the run was started and resumed.
        environment: versions and machine.
        written: when the page was written.
    """

    title: str
    lead: str
    status: Status
    history: Records
    resumes: Sequence[tuple[int, str]]
    facts: Sequence[tuple[str, str]]
    classes: Mapping[str, int]
    examples: Sequence[tuple[str, Path]]
    shares: Sequence[Share]
    advice: str
    left_out: Sequence[str]
    settings: Sequence[tuple[str, str, str]]
    commands: Sequence[str]
    environment: Mapping[str, Any]
    written: str


def write_run_page(path: Path, page: RunPage) -> None:
    """Write the page, whole or not at all."""
    best = best_validation(page.history)
    again = f'<meta http-equiv="refresh" content="{RELOADED}">' if page.status.kind == "running" else ""
    blocks = [
        _status(page.status),
        _figures(best, page),
        _curves(page),
        _examples(page),
        _time(page),
        _skipped(page),
        _classes(page, best),
        _settings(page),
    ]
    title = escape(page.title)
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{again}<title>{title}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}{OF_CHARTS}{OF_RUN}</style></head><body>
<h1>{title}</h1><p class="note">{escape(page.lead)}</p>
{chr(10).join(block for block in blocks if block)}
<p class="note">Written {escape(page.written)}.</p>
</body></html>
""",
    )


def _status(status: Status) -> str:
    hint = f"<p>{escape(status.hint)} <code>{escape(status.command)}</code></p>" if status.hint else ""
    bar = ""
    if status.kind in ("running", "stopped"):
        bar = f'<div class="done"><i style="width:{100 * status.done:.1f}%"></i></div>'
    return f'<div class="status {status.kind}">{escape(status.text)}{bar}{hint}</div>'


def _figures(best: Mapping[str, Any] | None, page: RunPage) -> str:
    facts = "".join(f"<div>{escape(what)}<b>{escape(value)}</b></div>" for what, value in page.facts)
    facts = f'<div class="figures facts">{facts}</div>'
    if best is None:
        return f'{facts}<p class="note">The model has not been tried on the validation images yet.</p>'
    so_far = "" if page.status.kind == "finished" else " so far"
    figures = "".join(f"<div>{label}<b>{number(best.get(name))}</b></div>" for name, label in HEADLINE)
    return (
        f'<h2>The best model{so_far}</h2><div class="figures">{figures}</div>'
        f"<p>It is that of step {best['step']:,}, tried on images that it never learned from. <b>AP</b>, average "
        "precision, says how many of the objects are found, how few boxes are wrong and how well boxes fit: 0 is "
        "nothing, 1 is perfect. AP50 asks for boxes that overlap the object by half and AP75 by three quarters; AP is "
        "the mean from 0.50 to 0.95. Small objects have less than 32&#178; pixels, large ones more than 96&#178;; "
        f"a dash means that there are none.</p>{facts}"
    )


def _curves(page: RunPage) -> str:
    curves = curves_of(page.history, list(page.classes), [step for step, _ in page.resumes])
    if not curves:
        return ""
    drawn = "".join(
        f"<div><h3>{escape(one.heading)}</h3><p>{escape(one.said)}</p>{one.chart}{one.key}</div>"
        for one in curves
    )
    resumed = ", ".join(f"after step {step:,} ({escape(when)})" for step, when in page.resumes)
    dashes = f" Dashed lines: the run had stopped, and went on {resumed}." if resumed else ""
    return (
        f'<h2>Over time</h2><p class="note">Left to right: the steps of training.{dashes}</p>'
        f'<div class="curves">{drawn}</div>'
    )


def _examples(page: RunPage) -> str:
    if len(page.examples) < 2:
        return ""
    columns = "".join(
        f'<figure><img alt="{escape(caption)}" src="{data_url(file.read_bytes(), "jpeg")}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, file in page.examples
    )
    names = list(page.classes)[:EVERY_CLASS]
    more = f"and {len(page.classes) - len(names)} more classes" if len(page.classes) > len(names) else ""
    key = key_of([(colour_of_class(place), name) for place, name in enumerate(names)], more)
    return (
        "<h2>What it finds</h2><p>The same validation images each time, not chosen by how well they are done: on the "
        "left the boxes as they are annotated, then what the model found as it was then.</p>"
        f'<div class="strips">{columns}</div>{key}'
    )


def _time(page: RunPage) -> str:
    whole = sum(share.seconds for share in page.shares)
    if not whole:
        return ""
    bar = "".join(
        f'<i style="flex:{share.seconds:.4g};background:{share.colour}"></i>' for share in page.shares
    )
    key = key_of(
        [
            (share.colour, f"{share.what} {_percent(share.seconds / whole)} ({share.in_words})")
            for share in page.shares
        ]
    )
    return f'<h2>Where the time goes</h2><div class="bar">{bar}</div>{key}<p>{escape(page.advice)}</p>'


def _skipped(page: RunPage) -> str:
    steps = [
        [
            f"{record['step']:,}",
            str(record["skipped"].get("reason", "")),
            _few(record["skipped"].get("files", [])),
        ]
        for record in page.history
        if isinstance(record.get("skipped"), dict)
    ]
    images = list(dict.fromkeys(said for record in page.history for said in record.get("unreadable", [])))
    parts = [f"<p>{escape(sentence)}</p>" for sentence in page.left_out]
    if images:
        rows = "".join(f"<li>{escape(said)}</li>" for said in images[:ROWS_SHOWN])
        more = _more(len(images) - ROWS_SHOWN)
        parts.append(
            "<p>Images that could not be read. In training the next image took the place of each; to validations they "
            f"do not count:</p><ul>{rows}</ul>{more}"
        )
    if steps:
        parts.append(
            "<p>Steps that were left out, as if they had not been; the weights stayed as they were:</p>"
            + _table(["step", "why", "its images"], steps[:ROWS_SHOWN], "listed")
            + _more(len(steps) - ROWS_SHOWN)
        )
    return "<h2>What was skipped</h2>" + (
        "".join(parts) or "<p>Nothing: every image and every step was used.</p>"
    )


def _classes(page: RunPage, best: Mapping[str, Any] | None) -> str:
    if best is None or "per_class" not in best:
        return ""
    names = list(page.classes)
    rows = [
        [name, number(of["ap"]), number(of["ap50"]), f"{page.classes[name]:,}"]
        for name in names[:CLASSES_SHOWN]
        if (of := best["per_class"].get(name)) is not None
    ]
    return (
        "<h2>Class by class</h2>"
        + _table(["class", "AP", "AP50", "objects to find"], rows)
        + _more(len(names) - CLASSES_SHOWN)
    )


def _settings(page: RunPage) -> str:
    settings = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td><td>{escape(why)}</td></tr>"
        for name, value, why in page.settings
    )
    machine = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>"
        for name, value in page.environment.items()
    )
    commands = escape("\n".join(page.commands))
    return (
        f"<h2>How it was made</h2><pre>{commands}</pre><details open><summary>Every setting, and why</summary>"
        f'<table class="why"><tr><th>setting</th><td><b>value</b></td><td>why</td></tr>{settings}</table></details>'
        f'<details><summary>Versions and machine</summary><table class="settings">{machine}</table></details>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><tr>{top}</tr>{body}</table>'


def _few(files: Sequence[str]) -> str:
    more = f" and {len(files) - FILES_SHOWN} more" if len(files) > FILES_SHOWN else ""
    return ", ".join(map(str, files[:FILES_SHOWN])) + more


def _more(number: int) -> str:
    return f'<p class="note">and {number:,} more in metrics.jsonl</p>' if number > 0 else ""


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "below 1 %"
