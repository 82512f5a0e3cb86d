"""Figure 3: the architecture, drawn from the live model."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import nn

from retinanet.model import ModelSpec, build_retinanet
from retinanet.model.presets import paper as paper_model
from retinanet.paper.page import COLOURS, Page, Picture, Table, new_figure
from retinanet.records import Classes

# The paper's tables are of COCO: 80 classes.
COCO_CLASSES = Classes(tuple(f"class {number}" for number in range(1, 81)))
SIDE = 800
# Where the picture has the line that joins the levels, and the two heads.
BUS, HEADS = 7.1, (3.6, 0.9)


def fig3(spec: ModelSpec | None = None, side: int = SIDE) -> Page:
    """Figure 3: backbone, pyramid and heads, with the shape of every map, the parameters and the anchors.

    Args:
        spec: the model; by default the paper's, ResNet-50 with 80 classes.
        side: of the square image, pixels; a multiple of 128.
    """
    spec = spec or paper_model(COCO_CLASSES)
    with torch.device("meta"):  # shapes and counts need no memory and no weights
        network = build_retinanet(spec)
        image = torch.zeros(1, 3, side, side).to(memory_format=torch.channels_last)
        features = network.backbone(image)
        levels = network.pyramid(features)
        predictions = network(image)
    maps = [
        *((f"C{n}", 2**n, tuple(f.shape[1:])) for n, f in enumerate(features, 3)),
        *((f"P{n}", 2**n, tuple(f.shape[1:])) for n, f in enumerate(levels, 3)),
    ]
    anchors = []
    for number, (stride, (rows, columns), logits) in enumerate(
        zip(spec.anchors.strides, predictions.grids, predictions.logits, strict=True)
    ):
        sides = [spec.anchors.sizes[number] * scale for scale in spec.anchors.scales]
        anchors.append(
            (
                f"P{number + 3}",
                f"{stride}",
                f"{rows} x {columns}",
                f"{logits.shape[1]:,}",
                ", ".join(f"{s:.0f}" for s in sides),
            )
        )
    total = sum(logits.shape[1] for logits in predictions.logits)
    smallest = spec.anchors.sizes[0] * min(spec.anchors.scales)
    largest = spec.anchors.sizes[-1] * max(spec.anchors.scales)
    parts = {
        f"backbone ({spec.backbone.name})": network.backbone,
        "pyramid": network.pyramid,
        "class head": network.class_head,
        "box head": network.box_head,
    }
    counts = {name: _count(module) for name, module in parts.items()}
    per_location, classes = spec.anchors.per_location, len(spec.classes)
    figure = new_figure(10, 4.6)
    _draw(figure.subplots(), maps, spec, per_location, classes)
    return Page(
        "fig3",
        "Figure 3: the architecture",
        (
            f"RetinaNet with {spec.backbone.name} for an image of {side} x {side} pixels and {classes} classes. The "
            "backbone gives C3 to C5, the pyramid P3 to P7, and two small convolutional heads, shared by all levels "
            "but not with each other, give at every location the scores of the classes and the four deltas of each "
            "anchor. Shapes, counts, depth and anchors are read off the model that trains; how its parts are joined "
            "is drawn by hand.",
            Picture(
                figure,
                "Backbone, feature pyramid and heads. What goes down from P5 to P3 are the sums, before the 3 x 3 "
                "convolution that each of these levels ends with.",
            ),
            Table(
                ("map", "stride", "channels", "height x width"),
                [(name, f"{stride}", f"{c}", f"{h} x {w}") for name, stride, (c, h, w) in maps],
            ),
            Table(
                ("part", "parameters, without the numbers of frozen BatchNorm"),
                [
                    *((name, f"{count:,}") for name, count in counts.items()),
                    ("in all", f"{sum(counts.values()):,}"),
                ],
            ),
            f"{total:,} anchors, {per_location} at each location, with sides (the root of the area) from "
            f"{smallest:.0f} to {largest:.0f} pixels:",
            Table(("level", "stride", "locations", "anchors", "sides, px"), anchors),
        ),
        {"parameters": counts, "anchors": total, "smallest": smallest, "largest": largest},
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _draw(
    axes: Axes,
    maps: list[tuple[str, int, tuple[int, ...]]],
    spec: ModelSpec,
    per_location: int,
    classes: int,
) -> None:
    bottom_up, pyramid = maps[:3], maps[3:]
    places = {f"P{n}": (4.6, 0.3 + 1.25 * (n - 3)) for n in range(3, 8)}
    for name, _, (channels, height, width) in bottom_up:
        y = places["P" + name[1]][1]
        _box(axes, 1.0, y, 2.0, 0.85, COLOURS[5], f"{name}\n{channels} x {height} x {width}")
        _arrow(axes, (3.05, y + 0.42), (4.55, y + 0.42))
        axes.text(3.8, y + 0.5, "1 x 1", ha="center", fontsize=7)
    for low, high in (("C3", "C4"), ("C4", "C5")):
        y = places["P" + low[1]][1] + 0.85
        _arrow(axes, (2.0, y), (2.0, places["P" + high[1]][1]))
    for name, _, (channels, height, width) in pyramid:
        x, y = places[name]
        _box(axes, x, y, 2.0, 0.85, COLOURS[1], f"{name}\n{channels} x {height} x {width}")
        axes.plot([6.65, BUS], [y + 0.42, y + 0.42], color="#444444", linewidth=1)
    for high, low in (("P5", "P4"), ("P4", "P3")):
        _arrow(axes, (5.6, places[high][1]), (5.6, places[low][1] + 0.85))
        axes.text(5.7, places[low][1] + 0.97, "x 2, +", fontsize=7)
    for name in ("P3", "P4", "P5"):  # what is joined goes through one more convolution
        axes.text(places[name][0] + 1.95, places[name][1] + 0.07, "3 x 3", fontsize=6, ha="right")
    six = places["P6"]
    if spec.pyramid.p6_from == "c5":
        _arrow(axes, (2.0, places["P5"][1] + 0.87), (4.55, six[1] + 0.42))
    else:
        _arrow(axes, (5.6, places["P5"][1] + 0.87), (5.6, six[1]))
    axes.text(2.9, six[1] + 0.2, "3 x 3, stride 2", fontsize=7, rotation=12)
    _arrow(axes, (5.6, six[1] + 0.87), (5.6, places["P7"][1]))
    relu = "ReLU, " if spec.pyramid.relu_before_p7 else ""
    axes.text(5.7, six[1] + 0.97, f"{relu}3 x 3, stride 2", fontsize=7)
    # Every level goes to both heads.
    ends = [y + 0.42 for _, y in places.values()]
    axes.plot([BUS, BUS], [min(ends), max(ends)], color="#444444", linewidth=2.5)
    for y in HEADS:
        _arrow(axes, (BUS, y + 0.95), (7.55, y + 0.95))
    _draw_heads(axes, spec, per_location, classes)
    axes.text(2.0, -0.25, spec.backbone.name, ha="center", fontsize=9)
    axes.text(5.6, -0.25, "feature pyramid", ha="center", fontsize=9)
    axes.set(xlim=(0.7, 13.1), ylim=(-0.5, 6.4))
    axes.set_axis_off()


def _draw_heads(axes: Axes, spec: ModelSpec, per_location: int, classes: int) -> None:
    width, depth = spec.pyramid.channels, spec.head.depth
    for y, name, values, colour in (
        (HEADS[0], "class head", f"{classes} x {per_location}", COLOURS[2]),
        (HEADS[1], "box head", f"4 x {per_location}", COLOURS[4]),
    ):
        axes.add_patch(
            FancyBboxPatch(
                (7.6, y), 5.2, 1.9, boxstyle="round,pad=0.05", facecolor=colour, alpha=0.18, edgecolor=colour
            )
        )
        axes.text(7.75, y + 1.6, f"{name}, shared by all levels", fontsize=9)
        for n in range(depth + 1):
            last = n == depth
            text = f"h x w\nx {values if last else width}"
            _box(
                axes,
                7.75 + 5.0 * n / (depth + 1),
                y + 0.25,
                4.6 / (depth + 1),
                1.0,
                colour,
                text,
                size=6 if last else 7,
            )


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#444444"})


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str, *, size: float = 8
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, alpha=0.45, edgecolor="#444444"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)
