"""Figure 4: where the loss of a trained model comes from, positives and negatives apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from retinanet.batches import MatchState
from retinanet.checkpoint import Model, load_model
from retinanet.data import Dataset, open_dataset
from retinanet.data.loading import training_batches
from retinanet.data.transforms import Augmentation
from retinanet.devices import choose_device
from retinanet.errors import ConfigError, DataError
from retinanet.losses import sigmoid_focal_loss
from retinanet.objective import Objective
from retinanet.paper.curves import DASHES
from retinanet.paper.page import COLOURS, Page, Picture, Table, new_figure

GAMMAS = (0.0, 0.5, 1.0, 2.0)
# The paper draws about as many negative windows of many images.
MOST_NEGATIVES = 10_000_000
# Of which the shares are told: the hardest fifth of the positives, the hardest hundredth of the negatives.
HARDEST = {"positives": 0.2, "negatives": 0.01}


@dataclass(frozen=True)
class Windows:
    """Losses of anchors at each gamma, ascending: `[gammas, P]` of positives and `[gammas, N]` of negatives."""

    positives: NDArray[np.float32]
    negatives: NDArray[np.float32]
    images: int


def fig4(model: Path, data: str, split: str = "val", *, called: str | None = None) -> Page:
    """Figure 4: the cumulative loss of positives and of negatives, for several gammas, of one trained model.

    Args:
        model: a run or model file.
        data: with the model's classes.
        called: what the page calls the model, by default its file or folder.
    """
    dataset = open_dataset(data, split)
    loaded = load_model(model)
    windows = losses_of(loaded, dataset)
    figure = new_figure(9, 3.8)
    for axes, kind in zip(figure.subplots(1, 2), HARDEST, strict=True):
        for sums, gamma, colour, dash in zip(
            _cumulative(windows, kind), GAMMAS, COLOURS, DASHES, strict=False
        ):
            shares = np.linspace(0, 1, len(sums))
            axes.plot(
                shares, sums, color=colour, linestyle=dash, linewidth=1.8, label=f"$\\gamma$ = {gamma:g}"
            )
        axes.set(
            title=f"{getattr(windows, kind).shape[1]:,} {kind}",
            xlabel=f"share of the {kind}, the easiest first",
            ylabel="share of their loss",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    shares_of = {
        kind: [hardest_share(of, part) for of in getattr(windows, kind)] for kind, part in HARDEST.items()
    }
    rows = [
        (f"{gamma:g}", *(f"{100 * shares_of[kind][i]:.1f} %" for kind in HARDEST))
        for i, gamma in enumerate(GAMMAS)
    ]
    return Page(
        "fig4",
        "Figure 4: where the loss comes from",
        (
            f"The anchors of {windows.images:,} images of {dataset.name}, {split}, as {called or model.name} sees "
            f"them ({loaded.spec.backbone.name}, trained by recipe {loaded.training.get('recipe', 'unknown')}), "
            "matched by the paper's thresholds, whatever the model was trained with. For each gamma the losses of the "
            "positives, and those of the negatives, are sorted and summed up from the easiest to the hardest, and "
            "divided by their sum.",
            Picture(figure, "Cumulative share of the loss over the share of anchors."),
            Table(
                ("gamma", "loss on the hardest 20 % of positives", "on the hardest 1 % of negatives"), rows
            ),
            in_words(shares_of),
        ),
        {"gammas": list(GAMMAS), "shares": shares_of, "images": windows.images},
    )


def in_words(shares: Mapping[str, Sequence[float]]) -> str:
    """Return what the paper says of its figure, and what this model's shares, a gamma each, say of that."""
    positives, negatives = shares["positives"], shares["negatives"]
    spread = f"{100 * min(positives):.0f} to {100 * max(positives):.0f} %"
    first, last = (f"{100 * share:.0f} %" for share in (negatives[0], negatives[-1]))
    half = all(0.4 <= share <= 0.6 for share in positives)
    return (
        "The paper's model, a ResNet-101 trained on COCO, has about half of the positives' loss on the hardest fifth "
        f"of them, and gamma matters little there: here they have {spread}, so that the half is "
        f"{'seen here, too' if half else 'not seen here'}. Of the negatives gamma 2 puts nearly all of the loss on a "
        f"small fraction: here the hardest hundredth has {first} of it at gamma 0, and {last} at gamma 2."
    )


def losses_of(model: Model, dataset: Dataset) -> Windows:
    """Return the losses of the anchors of all images, each image as validation sees it.

    Anchors are matched as in the paper, without low-quality matches. Of very many negatives a part is drawn.
    """
    classes = _classes(model, dataset)
    device = choose_device("auto")
    network = model.network.to(device).eval()
    objective = Objective(anchors=model.spec.anchors, coding=model.spec.coding)
    still = Augmentation(flip=0.0)
    batches = training_batches(
        dataset,
        model.spec.preprocessing,
        still,
        batch_size=1,  # beside others an image would be padded to the largest, and padding is easy background
        seed=0,
        steps=len(dataset),
    )
    random = torch.Generator().manual_seed(0)
    kept: dict[str, list[torch.Tensor]] = {"positives": [], "negatives": []}
    seen: set[int] = set()
    for batch in batches:
        images = batch.images.to(device, memory_format=torch.channels_last)
        with torch.inference_mode():
            predictions = network(images)
        logits = torch.cat(predictions.logits, dim=1).float().cpu()
        targets = batch.targets
        state, assigned, _ = objective.assign(targets, height=images.shape[2], width=images.shape[3])
        labels = torch.where(assigned >= 0, classes[assigned.clamp(min=0)], -1)
        for row, index in enumerate(batch.indices):
            if index in seen:  # the stream has begun anew
                continue
            seen.add(index)
            each = torch.stack([_losses(logits[row], labels[row], gamma) for gamma in GAMMAS])
            negative = state[row] == MatchState.NEGATIVE
            share = MOST_NEGATIVES / (len(dataset) * state.shape[1])
            if share < 1:
                negative &= torch.rand(state.shape[1], generator=random) < share
            kept["positives"].append(each[:, state[row] == MatchState.POSITIVE])
            kept["negatives"].append(each[:, negative])
    positives, negatives = (torch.cat(kept[kind], dim=1).sort(dim=1).values.numpy() for kind in kept)
    if not positives.shape[1]:
        raise DataError(
            f"fig4 needs objects that anchors reach; {dataset.name} has none in its split {dataset.split}"
        )
    return Windows(positives, negatives, len(seen))


def _losses(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the focal loss of every anchor, alpha 0.25, summed over the classes."""
    return sigmoid_focal_loss(logits, labels, 0.25, gamma).sum(dim=1)


def _classes(model: Model, dataset: Dataset) -> torch.Tensor:
    """Return the model's index of each class of the data set."""
    known = list(model.spec.classes.names)
    missing = [name for name in dataset.classes.names if name not in known]
    if missing:
        raise ConfigError(
            f"fig4 needs a model that knows the data's classes; it knows {', '.join(known)}, "
            f"and not {', '.join(missing)}"
        )
    return torch.tensor([known.index(name) for name in dataset.classes.names])


def hardest_share(losses: NDArray[np.float32], part: float) -> float:
    """Return the share of the sum that the largest `part` of sorted losses carries."""
    count = max(1, round(part * len(losses)))
    total = float(losses.sum(dtype=np.float64))
    return float(losses[len(losses) - count :].sum(dtype=np.float64)) / total if total else 0.0


def _cumulative(windows: Windows, kind: str, points: int = 1001) -> Sequence[NDArray[np.float64]]:
    """Return for each gamma the share of the loss below each of evenly spaced shares of the anchors."""
    found = []
    for losses in getattr(windows, kind):
        sums = np.concatenate(([0.0], np.cumsum(losses, dtype=np.float64)))
        at = np.linspace(0, len(losses), points)
        found.append(np.interp(at, np.arange(len(sums)), sums) / max(sums[-1], np.finfo(np.float64).tiny))
    return found
