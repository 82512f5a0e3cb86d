"""Figures 1, 5 and 6 of the paper, drawn by the functions that train: the focal loss over p_t, and FL* beside it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from torch import Tensor

from retinanet.losses import (
    cross_entropy_derivative,
    focal_loss_derivative,
    focal_star_loss_derivative,
    sigmoid_cross_entropy,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
)
from retinanet.paper.page import COLOURS, Interactive, Page, Picture, Table, new_figure

PLAYGROUND = Path(__file__).with_name("playground.html")
# The gammas of Figure 1, and the settings of FL* in Figures 5 and 6 and in Table 3.
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
STARS = ((2.0, 1.0), (4.0, 0.0))
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def loss_at(p_t: Tensor, gamma: float) -> Tensor:
    """Return FL(p_t) without alpha, by the loss that trains."""
    return sigmoid_focal_loss(torch.logit(p_t), torch.ones_like(p_t), None, gamma)


def fig1() -> Page:
    """Figure 1: gamma > 0 lowers the loss of well-classified examples."""
    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    p_t = torch.linspace(0.004, 0.9999, 600, dtype=torch.float64)
    for gamma, colour, dash in zip(GAMMAS, COLOURS, DASHES, strict=False):
        label = "$\\gamma$ = 0 (cross entropy)" if gamma == 0 else f"$\\gamma$ = {gamma:g}"
        axes.plot(
            p_t.numpy(), loss_at(p_t, gamma).numpy(), color=colour, linestyle=dash, linewidth=1.8, label=label
        )
    axes.axvspan(0.6, 1, color=COLOURS[2], alpha=0.1, linewidth=0)
    axes.text(0.8, 1.35, "well-classified\nexamples", ha="center")
    axes.set(xlim=(0, 1), ylim=(0, 5), xlabel="probability of the true class, $p_t$", ylabel="loss")
    axes.text(0.3, 4.1, "CE$(p_t)=-\\log(p_t)$\nFL$(p_t)=-(1-p_t)^\\gamma\\,\\log(p_t)$", fontsize=11)
    _tidy(axes)
    points = torch.tensor([0.25, 0.5, 0.9, 0.968, 0.99], dtype=torch.float64)
    rows = [
        (
            f"{float(p):g}",
            *(f"{float(loss_at(p, gamma)):.2g}" for gamma in GAMMAS),
            f"{float(loss_at(p, 0) / loss_at(p, 2)):,.1f}",
        )
        for p in points
    ]
    return Page(
        "fig1",
        "Figure 1: the focal loss",
        (
            "The focal loss multiplies cross entropy by (1 - p_t)^gamma. What is classified well already costs next "
            "to nothing, and what is not keeps its loss: with gamma = 2 an example at p_t = 0.9 costs 100 times less "
            "than with cross entropy, one at 0.968 about 1,000 times less, and one below 0.5 at most 4 times less "
            "(Section 3.2; the last column).",
            Picture(
                figure, "Loss over the probability of the true class, for the gammas of the paper's Figure 1."
            ),
            Table(("p_t", *(f"gamma {gamma:g}" for gamma in GAMMAS), "CE / FL, gamma 2"), rows),
        ),
        {
            "curves": {
                f"{gamma:g}": [[round(float(p), 4), round(float(loss_at(p, gamma)), 6)] for p in p_t[::25]]
                for gamma in GAMMAS
            }
        },
    )


def fig5() -> Page:
    """Figure 5: FL and FL* over x_t."""
    x = torch.linspace(-4, 5, 500, dtype=torch.float64)
    y = torch.ones_like(x)
    curves = {
        "CE": sigmoid_cross_entropy(x, y),
        "FL, $\\gamma$ = 2": sigmoid_focal_loss(x, y, None, 2),
        **{_star(*star): sigmoid_focal_star_loss(x, y, None, *star) for star in STARS},
    }
    return Page(
        "fig5",
        "Figure 5: the focal loss and its other form",
        (
            "FL* = -log(p_t*) / gamma with p_t* = sigmoid(gamma x_t + beta) (Appendix A) is another loss that is small "
            "as soon as an example is classified correctly, x_t > 0. x_t = y x is the logit of the true class.",
            _over_x(x, curves, "loss", (-0.1, 4.2), "Loss over the logit of the true class."),
        ),
    )


def fig6() -> Page:
    """Figure 6: the derivatives of the same losses, in closed form."""
    x = torch.linspace(-4, 5, 500, dtype=torch.float64)
    y = torch.ones_like(x)
    curves = {
        "CE": cross_entropy_derivative(x, y),
        "FL, $\\gamma$ = 2": focal_loss_derivative(x, y, 2),
        **{_star(*star): focal_star_loss_derivative(x, y, *star) for star in STARS},
    }
    at = torch.tensor([-4.0, 0.0, 2.0, 4.0], dtype=torch.float64)
    ones = torch.ones_like(at)
    rows = [
        ("CE", *_numbers(cross_entropy_derivative(at, ones))),
        ("FL, gamma 2", *_numbers(focal_loss_derivative(at, ones, 2))),
        *(
            (
                f"FL*, gamma {star[0]:g}, beta {star[1]:g}",
                *_numbers(focal_star_loss_derivative(at, ones, *star)),
            )
            for star in STARS
        ),
    ]
    return Page(
        "fig6",
        "Figure 6: derivatives",
        (
            "The derivatives with respect to x of a positive example (Appendix B, Eq. 9 to 11). All tend to -1 where "
            "the example is misclassified and to 0 where it is classified with confidence; those of FL and FL* are "
            "small as soon as x_t > 0, which is what the two forms have in common.",
            _over_x(x, curves, "derivative", (-1.25, 0.1), "Derivative over the logit of the true class."),
            Table(("loss", *(f"x_t = {value:g}" for value in at.tolist())), rows),
        ),
    )


def _star(gamma: float, beta: float) -> str:
    return f"FL*, $\\gamma$ = {gamma:g}, $\\beta$ = {beta:g}"


def _numbers(values: Tensor) -> list[str]:
    return [f"{value:.3f}" for value in values.tolist()]


def _over_x(
    x: Tensor, curves: dict[str, Tensor], what: str, limits: tuple[float, float], caption: str
) -> Picture:
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for (label, values), colour, dash in zip(curves.items(), COLOURS, DASHES, strict=False):
        axes.plot(x.numpy(), values.numpy(), color=colour, linestyle=dash, linewidth=1.8, label=label)
    axes.axvline(0, color="#8888", linewidth=1)
    axes.set(xlim=(float(x[0]), float(x[-1])), ylim=limits, xlabel="$x_t = y\\,x$", ylabel=what)
    _tidy(axes)
    return Picture(figure, caption)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def inliers() -> Page:
    """Why many easy examples drown few hard ones, and what the focal loss does about it."""
    easy, hard = (torch.tensor(math.exp(-loss), dtype=torch.float64) for loss in (1.0, 5.0))
    figure = new_figure(7.6, 3.4)
    rows = []
    panels = figure.subplots(1, 3, sharey=True)
    for axes, gamma in zip(panels, (0.0, 1.0, 2.0), strict=True):
        sums = [50 * float(loss_at(easy, gamma)), 5 * float(loss_at(hard, gamma))]
        bars = axes.bar(["50 easy", "5 hard"], sums, color=COLOURS[:2], width=0.6)
        axes.bar_label(bars, fmt="%.1f")
        axes.set(title="cross entropy" if gamma == 0 else f"focal loss, $\\gamma$ = {gamma:g}", ylim=(0, 58))
        axes.spines[["top", "right"]].set_visible(False)
        rows.append((f"{gamma:g}", f"{sums[0]:.1f}", f"{sums[1]:.1f}", f"{sums[0] / sums[1]:.2f}"))
    panels[0].set_ylabel("sum of the losses")
    effects = [
        (f"{state}, {kind} class", p_t, alpha)
        for state, p_t in (("well classified", 0.9), ("misclassified", 0.1))
        for kind, alpha in (("frequent", 0.25), ("rare", 0.75))
    ]
    return Page(
        "inliers",
        "Fifty easy examples against five hard ones",
        (
            "Fifty examples of loss 1 (p_t = 0.37), easy beside the others, together cost 50; five hard ones of loss 5 "
            "(p_t = 0.007) cost 25: under cross entropy the step follows the many. With gamma = 2 the hard ones weigh "
            "more. In a detector the easy ones are far easier, and a hundred thousand.",
            Picture(figure, "Sums of the losses of 50 easy and 5 hard examples."),
            Table(("gamma", "50 easy", "5 hard", "easy / hard"), rows),
            "With a weight for the rare class as well (here 0.75, and 0.25 for the frequent one), the ratio of the "
            "alpha-balanced focal loss with gamma = 2 to cross entropy is, by class and by how well an example is "
            "classified (p_t = 0.9 and 0.1):",
            Table(
                ("example", "p_t", "alpha_t", "FL / CE"),
                [
                    (
                        name,
                        f"{p_t:g}",
                        f"{alpha:g}",
                        f"{_ratio(p_t, alpha):.4f}",
                    )
                    for name, p_t, alpha in effects
                ],
            ),
            "So the loss of what is frequent and classified well falls a lot, that of what is rare and misclassified "
            "hardly. In the detector itself the best alpha for objects, the rare class, is 0.25: gamma has done the "
            "balancing already (Section 4.1).",
            Interactive(
                PLAYGROUND.read_text(encoding="utf-8"),
                "The HTML form of this page has sliders for gamma, alpha, and how many easy and hard examples there "
                "are: `retinanet paper inliers`.",
            ),
        ),
        {"ratios": {name: _ratio(p_t, alpha) for name, p_t, alpha in effects}},
    )


def _ratio(p_t: float, alpha_t: float) -> float:
    at = torch.tensor(p_t, dtype=torch.float64)
    return alpha_t * float(loss_at(at, 2.0) / loss_at(at, 0.0))
