"""What one needs to read the paper: IoU, GIoU, smooth L1, NMS, average precision. Each is a page with a figure."""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from retinanet.boxes import cxcywh_to_xyxy, giou, iou, nms, pairwise
from retinanet.losses import smooth_l1
from retinanet.paper.page import COLOURS, Page, Picture, Table, new_figure

TRUTH, FOUND = COLOURS[2], COLOURS[3]

# The usual picture: how good an IoU is.
GRADES = ((0.4034, "poor"), (0.7330, "good"), (0.9264, "excellent"))

# Boxes (xc, yc, w, h) of one L1 distance, 9.07, from the first, and of unlike overlap.
GIOU_TRUTH = (0.0, 0.0, 9.9045, 19.2682)
GIOU_FOUND = (
    (-5.0402, -0.7253, 8.4476, 17.4206),
    (-0.2864, 1.7995, 7.8406, 14.3479),
    (0.1379, 0.9174, 8.3900, 25.7684),
)


def iou_page() -> Page:
    """IoU: overlap by union."""
    figure = new_figure(8, 3.4)
    rows = []
    for axes, (wanted, grade) in zip(figure.subplots(1, 3), GRADES, strict=True):
        # Two unit squares, the second moved by (d, d), share (1 - d)^2 of 2 - (1 - d)^2.
        shift = 1 - math.sqrt(2 * wanted / (1 + wanted))
        truth = torch.tensor([0.0, 0, 1, 1], dtype=torch.float64)
        found = truth + shift
        value = float(iou(truth, found))
        _draw(axes, truth.tolist(), TRUTH, "ground truth")
        _draw(axes, found.tolist(), FOUND, "detection", "--")
        low, high = found[:2].tolist(), truth[2:].tolist()
        axes.add_patch(
            Rectangle((low[0], low[1]), high[0] - low[0], high[1] - low[1], color=COLOURS[0], alpha=0.15)
        )
        middle = (1 + shift) / 2  # the boxes are in the middle of their panel, all panels are of one scale
        axes.set(
            title=f"IoU {value:.4f}: {grade}",
            xlim=(middle - 0.74, middle + 0.74),
            ylim=(middle + 0.74, middle - 0.74),
        )
        _bare(axes)
        rows.append((grade, f"{shift:.4f}", f"{value:.4f}"))
    _legend(figure)
    return Page(
        "iou",
        "Intersection over union",
        (
            "How well two boxes agree is the area they share, divided by the area they cover together: 1 for equal "
            "boxes, 0 for boxes apart, whatever their size. An anchor belongs to an object from IoU 0.5 on (equal to "
            "0.5 is enough) and to the background below 0.4; a detection counts as right from a threshold on that COCO "
            "moves from 0.5 to 0.95.",
            Picture(
                figure,
                "Three detections of one object. Shaded: the intersection; the union is all that they cover.",
            ),
            Table(("", "shift, sides", "IoU"), rows),
        ),
    )


def giou_page() -> Page:
    """GIoU: the same L1 distance, unlike overlap."""
    figure = new_figure(8.4, 4.4)
    truth = cxcywh_to_xyxy(torch.tensor(GIOU_TRUTH, dtype=torch.float64))
    rows = []
    for number, (axes, box) in enumerate(zip(figure.subplots(1, 3), GIOU_FOUND, strict=True), 1):
        given = torch.tensor(box, dtype=torch.float64)
        found = cxcywh_to_xyxy(given)
        distance = float((given - torch.tensor(GIOU_TRUTH, dtype=torch.float64)).abs().sum())
        smooth = float(smooth_l1(given, torch.tensor(GIOU_TRUTH, dtype=torch.float64)))
        values = (distance, smooth, float(iou(truth, found)), float(giou(truth, found)))
        around = [*torch.minimum(truth, found)[:2].tolist(), *torch.maximum(truth, found)[2:].tolist()]
        _draw(axes, around, "#888888", "enclosing box", ":")
        _draw(axes, truth.tolist(), TRUTH, "ground truth")
        _draw(axes, found.tolist(), FOUND, "detection", "--")
        axes.set(title=f"IoU {values[2]:.2f}, GIoU {values[3]:.2f}", xlim=(-10.5, 6.5), ylim=(15, -13))
        _bare(axes)
        rows.append((f"{number}", *(f"{value:.2f}" for value in values)))
    _legend(figure)
    return Page(
        "giou",
        "Equal L1 distance, unequal overlap",
        (
            "L1 and smooth L1 compare the numbers of two boxes. These three detections are all at the same L1 distance "
            "from the ground truth (in centre, width and height), and an L1 loss likes them equally; smooth L1 (beta "
            "1) likes the worst of them best. How much they overlap is not equal at all. GIoU = IoU - (enclosing - "
            "union) / enclosing is a measure of overlap that still says how far apart boxes are that do not meet, "
            "where IoU is 0; 1 - GIoU is our box loss in recipes `modern` and `small`.",
            Picture(figure, "Three detections of one object at one L1 distance."),
            Table(("detection", "L1 distance", "smooth L1", "IoU", "GIoU"), rows),
        ),
    )


def smooth_l1_page() -> Page:
    """Smooth L1 beside L1 and L2."""
    figure = new_figure(8, 3.4)
    left, right = figure.subplots(1, 2)
    x = torch.linspace(-2.5, 2.5, 501, dtype=torch.float64)
    curves = {
        "L2: 0.5 $x^2$": 0.5 * x**2,
        "L1: |x|": x.abs(),
        "smooth L1, beta 1": _smooth_l1(x, 1.0),
        "smooth L1, beta 1/9": _smooth_l1(x, 1 / 9),
    }
    for (label, values), colour, dash in zip(curves.items(), COLOURS, ("-", "--", "-.", ":"), strict=False):
        left.plot(x.numpy(), values.numpy(), color=colour, linestyle=dash, label=label, linewidth=1.8)
        right.plot(
            x.numpy(), np.gradient(values.numpy(), x.numpy()), color=colour, linestyle=dash, linewidth=1.8
        )
    left.set(title="loss", xlabel="x = predicted - wanted delta", ylim=(0, 2.5))
    right.set(title="derivative", xlabel="x", ylim=(-2.2, 2.2))
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    at = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    rows = [
        (
            f"{value:g}",
            f"{0.5 * value**2:.3f}",
            f"{value:.3f}",
            *(f"{float(_smooth_l1(at, beta)[i]):.3f}" for beta in (1.0, 1 / 9)),
        )
        for i, value in enumerate(at.tolist())
    ]
    return Page(
        "smoothl1",
        "Smooth L1",
        (
            "Smooth L1 is 0.5 x^2 / beta where |x| < beta, else |x| - 0.5 beta: near the goal its slope fades, so that "
            "steps become small, and far from it its slope is at most 1, so that one bad box does not drown the rest. "
            "The paper's switch is at 1; Detectron's code uses 1/9. Some explanations call it plain L1, which it is "
            "only for beta = 0.",
            Picture(figure, "Box losses and their derivatives over one delta."),
            Table(("x", "L2", "L1", "smooth L1, beta 1", "beta 1/9"), rows),
        ),
    )


def _smooth_l1(x: Tensor, beta: float) -> Tensor:
    """Return the loss of boxes of which one delta is off by x."""
    deltas = torch.nn.functional.pad(x[:, None], (0, 3))
    return smooth_l1(deltas, torch.zeros_like(deltas), beta)


def nms_page() -> Page:
    """NMS, one decision at a time."""
    boxes = torch.tensor(
        [
            [10.0, 14, 50, 66],
            [16, 20, 57, 71],
            [5, 8, 45, 60],
            [66, 22, 98, 70],
            [61, 28, 93, 75],
            [36, 8, 76, 52],
        ]
    )
    scores = torch.tensor([0.95, 0.9, 0.71, 0.85, 0.62, 0.5])
    kept = nms(boxes, scores, torch.zeros(len(boxes), dtype=torch.int64), 0.5).tolist()
    overlaps = pairwise(iou, boxes, boxes)
    steps: list[tuple[str, list[int], list[int]]] = []  # what happened, kept so far, dropped so far
    rows: list[tuple[str, str, str]] = []
    chosen: list[int] = []
    dropped: list[int] = []
    alive = scores.argsort(descending=True).tolist()
    while alive:
        best = alive.pop(0)
        chosen.append(best)
        gone = [other for other in alive if overlaps[best, other] > 0.5]
        alive = [other for other in alive if other not in gone]
        dropped += gone
        told = (
            ", ".join(f"{float(scores[o]):.2f} (IoU {float(overlaps[best, o]):.2f})" for o in gone) or "none"
        )
        rows.append((f"{len(rows) + 1}", f"{float(scores[best]):.2f}", told))
        steps.append((f"{len(rows)}. keep {float(scores[best]):.2f}", list(chosen), list(dropped)))
    assert chosen == kept
    figure = new_figure(2.6 * (len(steps) + 1), 2.7)
    panels = figure.subplots(1, len(steps) + 1)
    for axes, (title, keep, drop) in zip(panels, [("before", [], []), *steps], strict=True):
        for number, box in enumerate(boxes.tolist()):
            colour = TRUTH if number in keep else "#bbbbbb" if number in drop else FOUND
            _draw(axes, box, colour, None, ":" if number in drop else "-")
            label = axes.text(
                box[0] + 1, box[1] - 1, f"{float(scores[number]):.2f}", fontsize=7, color=colour
            )
            label.set_bbox({"facecolor": "white", "pad": 0.5, "linewidth": 0})
        axes.set(title=title, xlim=(2, 102), ylim=(76, 0))
        _bare(axes)
    return Page(
        "nms",
        "Non-maximum suppression, step by step",
        (
            "Neighbouring anchors find the same object. NMS takes the boxes of a class in order of score, keeps each, "
            "and drops the later ones that overlap it by more than the threshold, here and in the paper 0.5.",
            Picture(figure, "Green: kept. Grey: dropped. Red: not yet looked at."),
            Table(("step", "kept score", "dropped"), rows),
        ),
    )


# The detections of the example, best first: right or wrong, and how many objects there are.
AP_RIGHT = (True, True, False, True, False, True, False, False, True, False)
AP_OBJECTS = 6


def ap_page() -> Page:
    """Average precision from ranked detections."""
    right = np.array(AP_RIGHT)
    found = right.cumsum()
    precision, recall = found / np.arange(1, len(right) + 1), found / AP_OBJECTS
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.linspace(0, 1, 101)
    places = np.searchsorted(recall, at - 1e-12)
    interpolated = np.where(places < len(right), envelope[np.minimum(places, len(right) - 1)], 0)
    ap = float(interpolated.mean())
    figure = new_figure(6, 3.8)
    axes = figure.subplots()
    axes.fill_between(at, interpolated, color=COLOURS[0], alpha=0.15, step="pre", linewidth=0)
    axes.plot(
        at,
        interpolated,
        color=COLOURS[0],
        label=f"best precision from here on: AP {ap:.3f}",
        linewidth=1.8,
        drawstyle="steps-pre",
    )
    axes.plot(
        recall, precision, "o--", color=COLOURS[3], markersize=4, label="after each detection", linewidth=1
    )
    axes.set(xlim=(0, 1.02), ylim=(0, 1.05), xlabel="recall", ylabel="precision")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    rows = [
        (f"{rank}", "right" if ok else "wrong", f"{p:.3f}", f"{r:.3f}", f"{e:.3f}")
        for rank, (ok, p, r, e) in enumerate(zip(right, precision, recall, envelope, strict=True), 1)
    ]
    return Page(
        "ap",
        "Average precision",
        (
            "Detections of a class are ranked by score. After each one, precision is the share of them that are right, "
            f"recall the share of the {AP_OBJECTS} objects found. AP is the mean, over 101 levels of recall, of the "
            "best precision that is reached at that recall or above; what is never found counts as 0. Of this ranking "
            f"it is {ap:.3f}. COCO's AP is the mean of this over IoU thresholds 0.50, 0.55 ... 0.95 and over the "
            "classes, often called mAP.",
            Picture(figure, "Precision over recall of ten ranked detections."),
            Table(("rank", "detection", "precision", "recall", "best from here on"), rows),
        ),
        {"ap": ap},
    )


def _draw(axes: Axes, box: list[float], colour: str, label: str | None, dash: str = "-") -> None:
    x1, y1, x2, y2 = box
    axes.add_patch(
        Rectangle(
            (x1, y1),
            x2 - x1,
            y2 - y1,
            fill=False,
            edgecolor=colour,
            linestyle=dash,
            linewidth=1.8,
            label=label,
        )
    )


def _legend(figure: Figure) -> None:
    """Name the boxes of the first panel below the picture."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)


def _bare(axes: Axes) -> None:
    axes.set_aspect("equal")
    axes.set_axis_off()
