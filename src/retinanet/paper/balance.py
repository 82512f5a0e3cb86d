"""The imbalance and what is done about it: who makes up the loss under sampling, mining and weighing, and what the
prior does to the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retinanet.losses import (
    balanced_sample,
    hardest,
    hardest_one_to_three,
    sigmoid_balanced_cross_entropy,
    sigmoid_cross_entropy,
    sigmoid_focal_loss,
)
from retinanet.paper.page import COLOURS, Page, Picture, Table, new_figure

# The example: a detector half-way through its training. Logits are normal; the mean and the spread of each side.
ANCHORS, OBJECTS = 100_000, 100
OF_OBJECTS, OF_BACKGROUND = (0.0, 1.5), (-4.5, 1.5)
# The first step of the paper's model on COCO: anchors x classes, of which so many are an object's.
SCORES, POSITIVES = 100_000 * 80, 50
PRIORS = (0.5, 0.1, 0.01, 0.001)


def sampling() -> Page:
    """Sampling, mining and weighing: whose loss a step follows."""
    logits, positive = _example()
    targets = positive.double()
    entropy = sigmoid_cross_entropy(logits, targets)
    apart = torch.arange(ANCHORS, dtype=torch.float32)[:, None] * 10
    boxes = torch.cat((apart, torch.zeros_like(apart), apart + 5, torch.full_like(apart, 5)), dim=1)
    everyone = torch.ones_like(positive)
    drawn = balanced_sample(positive, everyone, generator=torch.Generator().manual_seed(0))
    mined = entropy.float()
    ways = {
        "all, cross entropy": entropy,
        "all, alpha 0.75": sigmoid_balanced_cross_entropy(logits, targets, 0.75),
        "256 at random, 1:3": _only(entropy, drawn),
        "OHEM, the hardest 128": _only(entropy, hardest(mined, boxes, batch=128)),
        "OHEM 1:3": _only(entropy, hardest_one_to_three(mined, boxes, positive, batch=128)),
        "all, focal loss": sigmoid_focal_loss(logits, targets, 0.25, 2.0),
    }
    hard = ~positive & (logits > 0)
    groups = {"objects": positive, "hard background": hard, "easy background": ~positive & ~hard}
    shares = {
        way: [float(loss[of].sum() / loss.sum()) for of in groups.values()] for way, loss in ways.items()
    }
    figure = new_figure(7.6, 3.4)
    axes = figure.subplots()
    left = [0.0] * len(shares)
    for number, (group, colour) in enumerate(zip(groups, (COLOURS[0], COLOURS[3], "#bbbbbb"), strict=True)):
        widths = [100 * share[number] for share in shares.values()]
        axes.barh(list(shares), widths, left=left, color=colour, label=group, height=0.65)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="share of the loss, %", xlim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    easy = float(groups["easy background"].double().mean())
    rows = [
        (way, f"{int((loss > 0).sum()):,}", f"{int(((loss > 0) & positive).sum()):,}", *_percent(shares[way]))
        for way, loss in ways.items()
    ]
    return Page(
        "sampling",
        "Whose loss a step follows",
        (
            f"A made-up detector half-way through training: {ANCHORS:,} anchors, {OBJECTS} of them of an object, "
            f"logits normal with mean {OF_OBJECTS[0]:g} for objects and {OF_BACKGROUND[0]:g} for the background, "
            f"spread {OF_OBJECTS[1]:g} for both, and no two boxes that overlap. Background is hard where its p is "
            f"above 0.5: {int(hard.sum()):,} anchors. Under cross entropy the easy ones are most of the loss.",
            Picture(figure, "Shares of the loss, by what is done about the imbalance."),
            Table(("loss", "anchors with a loss", "of objects", *groups), rows),
            "Balanced sampling draws a minibatch in which a quarter are objects: an alpha that depends on how many "
            "there happen to be, and hardly any of the hard background is drawn, as it is rare. Mining finds it, and "
            "forgets the rest: which anchors are hard, and how many, changes from step to step. The focal loss keeps "
            "every anchor and weighs it by what the detector knows of it already: the easy ones, "
            f"{easy:.1%} of all, keep {shares['all, focal loss'][2]:.0%} of the loss in this example. (The "
            "argument is that of Sections 2 and 3.4 of the paper, the numbers are ours.)",
        ),
        {"shares": {way: dict(zip(groups, share, strict=True)) for way, share in shares.items()}},
    )


def _example() -> tuple[Tensor, Tensor]:
    """Return the logits `[ANCHORS]`, and which are of an object."""
    random = torch.Generator().manual_seed(0)
    positive = torch.arange(ANCHORS) < OBJECTS
    noise = torch.randn(ANCHORS, generator=random, dtype=torch.float64)
    mean, spread = (torch.where(positive, a, b) for a, b in zip(OF_OBJECTS, OF_BACKGROUND, strict=True))
    return mean + spread * noise, positive


def _only(losses: Tensor, chosen: Tensor) -> Tensor:
    kept = torch.zeros_like(losses)
    kept[chosen] = losses[chosen]
    return kept


def _percent(shares: Sequence[float]) -> list[str]:
    return [f"{100 * share:.1f} %" for share in shares]


def start() -> Page:
    """The prior: what the first step's loss is made of."""
    losses = {"cross entropy": (None, 0.0), "focal loss, gamma 2, alpha 0.25": (0.25, 2.0)}
    figure = new_figure(8, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    priors = torch.logspace(-4, math.log10(0.5), 200, dtype=torch.float64)
    for axes, (name, settings) in zip(panels, losses.items(), strict=True):
        background, objects = first_loss(priors, *settings)
        axes.loglog(priors.numpy(), background.numpy(), color=COLOURS[3], label="background", linewidth=1.8)
        axes.loglog(
            priors.numpy(), objects.numpy(), color=COLOURS[0], linestyle="--", label="objects", linewidth=1.8
        )
        axes.axvline(0.01, color="#8888", linewidth=1)
        axes.set(title=name, xlabel="prior, $\\pi$", ylim=(1e-6, 1e6))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss of the first step, per object")
    panels[0].legend(frameon=False)
    rows = []
    for prior in PRIORS:
        at = torch.tensor([prior], dtype=torch.float64)
        found = [tuple(float(part) for part in first_loss(at, *settings)) for settings in losses.values()]
        cells = [cell for background, objects in found for cell in (f"{background:,.4g}", f"{objects:.3g}")]
        rows.append((f"{prior:g}", *cells))
    return Page(
        "start",
        "The first step, with a prior and without",
        (
            f"At the start every score is the prior, whatever the image shows. With {ANCHORS:,} anchors of 80 classes, "
            f"of which {POSITIVES} scores are an object's, the loss (divided by the number of objects, as in "
            "training) is that of the background alone when scores begin at 0.5: the first steps throw the network to "
            "and fro, and with cross entropy the paper's training diverged. At 0.01 the background costs 70 times "
            "less under cross entropy; under the focal loss the objects make up most of the first step. "
            "`retinanet paper prior` trains "
            "with both.",
            Picture(figure, "Loss of the first step over the prior. The line marks the paper's 0.01."),
            Table(("prior", "CE, background", "CE, objects", "FL, background", "FL, objects"), rows),
        ),
    )


def first_loss(priors: Tensor, alpha: float | None, gamma: float) -> tuple[Tensor, Tensor]:
    """Return what the background and the objects cost at the first step, divided by the number of objects."""
    logits = torch.logit(priors)
    of_background, of_object = (
        sigmoid_focal_loss(logits, target, alpha, gamma)
        for target in (torch.zeros_like(logits), torch.ones_like(logits))
    )
    return of_background * (SCORES - POSITIVES) / POSITIVES, of_object
