"""Online hard example mining, what the focal loss makes unnecessary (Section 5.1, Table 1d).

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
        batch: examples in the minibatch; the paper tries 128, 256 and 512.
        nms_iou: an example that overlaps a harder one by more than this is dropped; the paper tries 0.7 and 0.5.
    """
    _require(losses, batch, nms_iou)
    able = torch.nonzero(losses > 0)[:, 0]
    kept = nms(boxes[able], losses[able], torch.zeros_like(able), nms_iou, max_kept=batch)
    return able[kept]


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
    arguments are those of `hardest`, and which examples are positive.
    """
    _require(losses, batch, nms_iou)
    able = torch.nonzero(losses > 0)[:, 0]
    kept = able[nms(boxes[able], losses[able], torch.zeros_like(able), nms_iou)]
    positives = kept[positive[kept]][: batch // 4]
    negatives = kept[~positive[kept]][: 3 * max(1, len(positives))]
    return torch.cat((positives, negatives))


def _require(losses: Tensor, batch: int, nms_iou: float) -> None:
    if batch < 4:
        raise ConfigError(f"hard example mining needs a batch of 4 or more; got {batch}")
    if not 0 <= nms_iou <= 1:
        raise ConfigError(f"hard example mining needs nms_iou in [0, 1]; got {nms_iou}")
