"""The page of `retinanet data check`, for who knows the pictures and not the program: what matters first, in sentences.

One file, without script and with nothing loaded from elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from retinanet.folders import write_text
from retinanet.report.page import STYLE, data_url

# Rows of faults and of images in two splits on the page; report.json has them all.
FAULTS_SHOWN, PAIRS_SHOWN, CLASSES_SHOWN = 300, 50, 100
LEVELS = {"stop": "cannot be used", "look": "worth a look", "good": "fine"}
OF_CHECK = """
.said { list-style: none; padding: 0; } .said li { border-left: .4rem solid #009E73; padding: .3rem 0 .3rem 1rem;
margin: .75rem 0; overflow-wrap: anywhere; } .said .look { border-color: #E69F00; }
.said .stop { border-color: #D55E00; }
.said b { font-size: .8rem; text-transform: uppercase; letter-spacing: .05em; display: block; opacity: .75; }
details { margin: .5rem 0; } summary { cursor: pointer; } .listed td { text-align: left; vertical-align: top; }
.listed th { text-align: left; } td { overflow-wrap: anywhere; } figure { margin: 1.5rem 0; }
"""


def write_data_page(
    path: Path,
    found: Mapping[str, Any],
    *,
    sentences: Sequence[tuple[str, str]],
    pictures: Mapping[str, tuple[bytes, Literal["png", "jpeg"]]],
) -> None:
    """Write the page.

    Args:
        found: what `report.json` holds.
        sentences: (level, text), level one of "stop", "look", "good".
        pictures: "boxes" and "histograms", each where there is one: the file's content and its kind.
    """
    said = "".join(
        f'<li class="{level}"><b>{LEVELS[level]}</b>{escape(text)}</li>' for level, text in sentences
    )
    blocks = [
        f'<ul class="said">{said}</ul>',
        _contents(found),
        _stored(found["stored"]),
        _pictures(found, pictures),
        _faults(found["faults"], found["fault_counts"]),
        _leaks(found["leaks"]),
        _anchors(found["anchors"]) if found["anchors"] else "",
        _measures(found["spreads"], pictures),
    ]
    data = str(found["data"])
    title = f"Data check: {escape(Path(data).name or data)}"
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}{OF_CHECK}</style></head><body>
<h1>{title}</h1><p class="note">{escape(data)}, {escape(str(found["read_as"]))}</p>
{chr(10).join(block for block in blocks if block)}
</body></html>
""",
    )


def _contents(found: Mapping[str, Any]) -> str:
    splits = found["splits"]
    head = [
        "split",
        "images",
        "of them without objects",
        "not readable",
        "objects",
        "to be ignored",
        "most in one image",
    ]
    rows = [
        [
            split["split"],
            *(
                f"{split[name]:,}"
                for name in ("images", "empty", "unreadable", "objects", "ignored", "fullest")
            ),
        ]
        for split in splits
    ]
    # A split may have classes of its own, which is a fault, and just what one wants to see then.
    known = dict.fromkeys([*found["classes"], *(name for split in splits for name in split["per_class"])])
    names = sorted(known, key=lambda name: -sum(s["per_class"].get(name, 0) for s in splits))
    of_classes = [
        [name, *(f"{split['per_class'].get(name, 0):,}" for split in splits)]
        for name in names[:CLASSES_SHOWN]
    ]
    more = _more(len(names) - CLASSES_SHOWN, "classes")
    return (
        "<h2>What is in it</h2><p>A split is a part of the data with one purpose: the network learns from "
        "<i>train</i>, is judged by <i>val</i>, and <i>test</i> is kept for the end. Boxes to be ignored (crowds, "
        "objects marked as difficult) count neither as objects nor as background.</p>"
        + _table(head, rows)
        + "<h3>Boxes of each class</h3>"
        + _table(["class", *(split["split"] for split in splits)], of_classes)
        + more
    )


def _stored(stored: Sequence[Mapping[str, Any]]) -> str:
    if not stored:
        return ""
    rows = [[row["how"], f"{row['images']:,}", row["becomes"]] for row in stored]
    return (
        "<h3>How images are stored</h3><p>The network sees three channels, red, green and blue, of 8 bits each, and "
        "every picture as a viewer shows it.</p>"
        + _table(["stored as", "images", "what becomes of it"], rows, "listed")
    )


def _pictures(found: Mapping[str, Any], pictures: Mapping[str, tuple[bytes, Literal["png", "jpeg"]]]) -> str:
    if "boxes" not in pictures:
        return ""
    at = found["anchors"]
    return (
        f"<h2>Some of the images</h2><p>Green: an anchor fits the object (at {at['image_size']} pixels, see below). "
        "Red: none does, so that it is learned late or never. Grey: to be ignored. The first images stand at equal "
        f"distances in {escape(at['split'])}; then those with most red. Are the boxes where you drew them?</p>"
        f'<img alt="Images with their boxes" src="{data_url(*pictures["boxes"])}">'
    )


def _faults(faults: Sequence[Mapping[str, Any]], counts: Sequence[Mapping[str, Any]]) -> str:
    if not counts:
        return ""
    of_kinds: Counter[str] = Counter()
    for of in counts:
        of_kinds[of["kind"]] += of["count"]
    kinds = of_kinds.most_common()
    # Every kind has its first rows on the page, however many there are of another.
    room = max(3, FAULTS_SHOWN // len(kinds))
    blocks = []
    for kind, count in kinds:
        own = [fault for fault in faults if fault["kind"] == kind]
        fix = next((fault["fix"] for fault in own if fault["fix"]), "")
        rows = [
            [f"{f['split']} {f['file']}".strip(), f["record"], f["reason"], f["action"]] for f in own[:room]
        ]
        blocks.append(
            f"<details{' open' if len(kinds) < 5 else ''}><summary>{escape(kind)}: {count:,}</summary>"
            + (f"<p>What to do: {escape(fix)}.</p>" if fix else "")
            + _table(["file", "where in it", "what is wrong", "what was done"], rows, "listed")
            + _more(min(len(own), count) - room, f"rows in report.json, kind {kind}")
            + "</details>"
        )
    return (
        "<h2>What was repaired or left out</h2><p>An entry with one possible meaning was repaired, one without any was "
        "dropped: training and evaluation go on without it. Your files were not changed.</p>"
        + _cut(len(faults), of_kinds.total())
        + "".join(blocks)
    )


def _cut(kept: int, total: int) -> str:
    if kept == total:
        return ""
    return f"<p>There are {total:,} in all; the first {kept:,} are shown, here or in report.json.</p>"


def _leaks(leaks: Sequence[Mapping[str, Any]]) -> str:
    if not leaks:
        return ""
    rows = [
        [
            f"{leak['split_a']}: {leak['file_a']}",
            f"{leak['split_b']}: {leak['file_b']}",
            "the same file" if leak["equal"] else f"{64 - leak['bits']} of 64 marks agree",
        ]
        for leak in sorted(leaks, key=lambda leak: (not leak["equal"], leak["bits"]))[:PAIRS_SHOWN]
    ]
    return (
        "<h2>Images that stand in two splits</h2><p>Images are compared byte by byte, and by 64 marks of where they "
        "become brighter or darker. Look-alikes may be different pictures after all: open both.</p>"
        + _table(["image", "its double", "how alike"], rows, "listed")
        + _more(len(leaks) - PAIRS_SHOWN, "pairs in report.json")
    )


def _anchors(at: Mapping[str, Any]) -> str:
    classes = sorted(at["per_class"].items(), key=lambda item: _sort_key(item[1]["coverage"]))[:CLASSES_SHOWN]
    positives = at["positives"]
    suggested = "; ".join(
        f"{value[0]} pixels on a {'CPU' if device == 'cpu' else 'GPU'} ({value[1]})"
        for device, value in at["suggested"].items()
    )
    compared = [
        [f"{row['image_size']}", row["anchors"]["name"], _sizes(row["anchors"]), *_shares(row["coverage"])]
        for row in at["compared"]
    ]
    return (
        "<h2>Do the anchors fit?</h2><p>The network does not draw boxes out of nothing: it starts from a grid of boxes "
        "of fixed sizes and shapes, the anchors, and moves the nearest ones onto an object. How well an anchor fits is "
        "measured by IoU, the area that it and the object share, divided by the area that they cover together: 1 is "
        "perfect; from 0.5 on an anchor fits, as the paper has it. Images are resized first, so it is the size in the "
        "network that counts. Training from scratch has a threshold for each object (ATSS), so that one that nothing "
        "fits is learned, too, from the nearest anchors; other recipes leave it out or learn it from one.</p>"
        f"<p>Here: shortest side {at['image_size']} pixels, longest at most {at['max_size']} ({escape(at['why'])}); "
        f"anchors: {escape(at['anchors']['name'])}, {escape(_sizes(at['anchors']))}. Of {positives['anchors']:,.0f} "
        f"anchors an image, {positives['mean']:,.0f} on average learn to find an object (at least "
        f"{positives['least']:,}).</p>"
        + _table(
            [
                "class",
                "objects",
                "best anchor below 0.4",
                "below 0.5",
                "smaller than all anchors",
                "larger",
                "too long",
            ],
            [
                [
                    name,
                    f"{fit['coverage']['objects']:,}",
                    *_lacking(fit["coverage"]),
                    *(_percent(fit[cause]) for cause in ("too_small", "too_large", "too_long")),
                ]
                for name, fit in classes
            ],
        )
        + _more(len(at["per_class"]) - CLASSES_SHOWN, "classes in report.json")
        + "<h3>By size</h3><p>Small objects have an annotated area of up to 32 x 32 pixels in the original image, "
        "medium ones up to 96 x 96, as COCO counts them.</p>"
        + _table(
            ["size", "objects", "best anchor below 0.4", "below 0.5"],
            [[name, f"{of['objects']:,}", *_lacking(of)] for name, of in at["per_size"].items()],
        )
        + "<h3>Other sizes, other anchors</h3><p>The share of objects with an anchor that fits. Fitted anchors are "
        "what <code>retinanet data anchors</code> finds for these very boxes.</p>"
        + _table(["shortest side", "anchors", "sizes", "from 0.5", "from 0.4"], compared, "listed")
        + f"<p>Image size that training from scratch takes if nobody says: {escape(suggested)}.</p>"
    )


def _measures(
    spreads: Mapping[str, Any], pictures: Mapping[str, tuple[bytes, Literal["png", "jpeg"]]]
) -> str:
    names = {
        "image_side": "shortest side of an image, pixels",
        "image_ratio": "height / width of an image",
        "object_side": "side of an object (root of its area), pixels",
        "object_ratio": "height / width of an object",
        "objects_per_image": "objects in an image",
    }
    rows = [
        [
            names[name],
            *(_number(of[part]) for part in ("least", "quarter", "half", "three_quarters", "most")),
        ]
        for name, of in spreads.items()
        if of
    ]
    drawn = pictures.get("histograms")
    image = "" if drawn is None else f'<img alt="Histograms of the same" src="{data_url(*drawn)}">'
    return (
        "<h2>Sizes and shapes</h2><p>Half of all values lie between those under <i>a quarter below</i> and <i>three "
        "quarters below</i>.</p>"
        + _table(["", "smallest", "a quarter below", "half below", "three quarters below", "largest"], rows)
        + image
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value > 100 else f"{value:.4g}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><tr>{top}</tr>{body}</table>'


def _more(number: int, what: str) -> str:
    return f'<p class="note">and {number:,} more {escape(what)}</p>' if number > 0 else ""


def _sizes(anchors: Mapping[str, Any]) -> str:
    sides = ", ".join(f"{side:g}" for side in anchors["sizes"])
    times = ", ".join(f"{scale:.3g}" for scale in anchors["scales"])
    slants = ", ".join(f"{ratio:.3g}" for ratio in anchors["ratios"])
    return f"{sides} pixels times {times}, height / width {slants}"


def _sort_key(coverage: Mapping[str, Any]) -> float:
    return 2.0 if coverage["at_50"] is None else float(coverage["at_50"])


def _shares(coverage: Mapping[str, Any]) -> list[str]:
    return [_percent(coverage["at_50"]), _percent(coverage["at_40"])]


def _lacking(coverage: Mapping[str, Any]) -> list[str]:
    return [_percent(None if coverage[at] is None else 1 - coverage[at]) for at in ("at_40", "at_50")]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}\u00a0%"
