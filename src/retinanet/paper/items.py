"""Every item of the paper by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from retinanet.paper import architecture, balance, curves, explanations, imbalance, loss_shares, speed
from retinanet.paper.measuring import trained_model
from retinanet.paper.page import Page
from retinanet.paper.results import Request


@dataclass(frozen=True)
class Item:
    """One table, figure or explanation: what it shows, in a line, and the function that makes it."""

    what: str
    make: Callable[[], Page]


@dataclass(frozen=True)
class OfResults:
    """An item about what was trained: the rows of tables, or a model of one's own."""

    what: str
    make: Callable[[Request], Page]


def fig4(request: Request) -> Page:
    """Figure 4 of `--model`, or of the row of the focal loss."""
    if request.model:
        return loss_shares.fig4(Path(request.model), str(request.data))
    return loss_shares.fig4(
        trained_model(request), str(request.data), called="the model of table1b's row gamma 2"
    )


ITEMS: dict[str, Item] = {
    "iou": Item("intersection over union, from poor to excellent", explanations.iou_page),
    "giou": Item("boxes at one L1 distance whose overlap is not one", explanations.giou_page),
    "smoothl1": Item("smooth L1 beside L1 and L2", explanations.smooth_l1_page),
    "nms": Item("non-maximum suppression, step by step", explanations.nms_page),
    "ap": Item("average precision from ranked detections", explanations.ap_page),
    "inliers": Item("fifty easy examples against five hard ones", curves.inliers),
    "sampling": Item("sampling, mining and weighing: whose loss a step follows", balance.sampling),
    "start": Item("the first step's loss, with the prior and without", balance.start),
    "fig1": Item("the focal loss over p_t, gamma from 0 to 5", curves.fig1),
    "fig3": Item("the architecture, drawn from the live model", architecture.fig3),
    "fig5": Item("FL and FL* over the logit", curves.fig5),
    "fig6": Item("derivatives of CE, FL and FL*", curves.fig6),
    "setting": Item("how the images of the tiny scale were chosen: by their imbalance", imbalance.setting),
}

OF_RESULTS: dict[str, OfResults] = {
    "fig2": OfResults("speed against accuracy, from the rows of table1e", speed.fig2),
    "fig4": OfResults("where the loss of a trained model comes from, for several gammas", fig4),
}
