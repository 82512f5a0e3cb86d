"""Choosing examples instead of weighing them, what the focal loss makes unnecessary (Sections 2, 3.4, 5.1, Table 1d).

Sampling (Girshick, "Fast R-CNN", 2015; Ren, He, Girshick, Sun, "Faster R-CNN", 2015) draws a minibatch in which
positives have a fixed share.

OHEM (Shrivastava, Gupta, Girshick, "Training Region-based Object Detectors with Online Hard Example Mining", CVPR
2016) scores each example by its loss, applies NMS, and makes a minibatch of the hardest that are left. "OHEM 1:3"
enforces, after NMS, a ratio of 1:3 between positives and negatives, as SSD does. Easy examples are discarded; the
focal loss keeps them all, at a small weight.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from retinanet.boxes import nms
from retinanet.errors import ConfigError


@torch.no_grad()
def hardest(
    losses: Float[Tensor, "R"], boxes: Float[Tensor, "R 4"], *, batch: int = 128, nms_iou: float = 0.5
) -> Int64[Tensor, "N"]:
    """Return the indices of the minibatch of OHEM, hardest first: at most `batch`, after NMS by loss.

    Args:
        losses: of each example, summed over its classes. What must not be chosen (ignored anchors) is left out by
            the caller, or has loss 0: no example without loss is hard.
        boxes: of the examples, xyxy.
        batch: examples in the minibatch, 1 or more; the paper tries 128, 256 and 512.
        nms_iou: in [0, 1]; an example that overlaps a harder one by more than this is dropped; the paper tries 0.7
            and 0.5.

    Raises:
        ConfigError: batch or nms_iou out of range.
    """
    _require(batch, 1, nms_iou)
    able = torch.nonzero(losses > 0)[:, 0]
    kept = nms(boxes[able], losses[able], torch.zeros_like(able), nms_iou, max_kept=batch)
    return able[kept]


@torch.no_grad()
def balanced_sample(
    positive: Bool[Tensor, "R"],
    able: Bool[Tensor, "R"],
    *,
    batch: int = 256,
    positive_share: float = 0.25,
    generator: torch.Generator | None = None,
) -> Int64[Tensor, "N"]:
    """Return the indices of a random minibatch of at most `batch`, first positives: up to their share, as far as there
    are so many; negatives fill it up.

    Args:
        positive: which examples are of an object.
        able: which may be chosen at all (not ignored).
        batch: examples; Faster R-CNN's proposer draws 256.
        positive_share: at most, in (0, 1): a quarter for 1:3 (Fast R-CNN), a half for 1:1 (the proposer).
        generator: of the random numbers; torch's global one by default.
    """
    if batch < 1:
        raise ConfigError(f"balanced_sample needs a batch of 1 or more; got {batch}")
    if not 0 < positive_share < 1:
        raise ConfigError(f"balanced_sample needs positive_share in (0, 1); got {positive_share}")
    positives, negatives = (torch.nonzero(able & of)[:, 0] for of in (positive, ~positive))
    wanted = min(len(positives), round(batch * positive_share))
    shuffled = [of[torch.randperm(len(of), generator=generator)] for of in (positives, negatives)]
    return torch.cat((shuffled[0][:wanted], shuffled[1][: batch - wanted]))


@torch.no_grad()
def hardest_one_to_three(
    losses: Float[Tensor, "R"],
    boxes: Float[Tensor, "R 4"],
    positive: Bool[Tensor, "R"],
    *,
    batch: int = 128,
    nms_iou: float = 0.5,
) -> Int64[Tensor, "N"]:
    """Return the indices of the minibatch of OHEM 1:3: first positives, then three times as many negatives.

    NMS by loss is over all examples together, as in `hardest`; of those it keeps, the hardest positives make up to a
    quarter of the minibatch, the hardest negatives three times their number (three where there is no positive). The
    arguments are those of `hardest`, a batch of 4 or more, and which examples are positive.
    """
    _require(batch, 4, nms_iou)
    able = torch.nonzero(losses > 0)[:, 0]
    most, limit = batch // 4, 4 * batch
    while True:
        # What NMS keeps first is the same for any limit; most images have enough among the hardest.
        kept = able[nms(boxes[able], losses[able], torch.zeros_like(able), nms_iou, max_kept=limit)]
        positives = kept[positive[kept]][:most]
        negatives = kept[~positive[kept]][: 3 * max(1, len(positives))]
        whole = len(positives) == most and len(negatives) == 3 * most
        if whole or len(kept) < limit:
            return torch.cat((positives, negatives))
        limit *= 8


def _require(batch: int, least: int, nms_iou: float) -> None:
    if batch < least:
        raise ConfigError(f"hard example mining needs a batch of {least} or more; got {batch}")
    if not 0 <= nms_iou <= 1:
        raise ConfigError(f"hard example mining needs nms_iou in [0, 1]; got {nms_iou}")
