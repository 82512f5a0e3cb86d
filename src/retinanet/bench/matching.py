"""`bench matching`: IoU and matching of all anchors of an image, low-quality matches included; and ATSS beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from retinanet.anchors import CPU
from retinanet.atss import match_atss
from retinanet.batches import MatchState
from retinanet.bench.inputs import SIDE, TORCHVISION_ANCHORS, anchors_of, boxes
from retinanet.bench.measuring import Contest
from retinanet.matching import Matches, match_anchors

COUNTS = (8, 50, 200, 1000)


def contests(
    side: int = SIDE, counts: tuple[int, ...] = COUNTS, *, device: torch.device = CPU
) -> Iterator[Contest]:
    """Ours and torchvision's `box_iou` with its `Matcher`, for one image; and ATSS, which no peer has, beside ours by
    IoU."""
    anchors = anchors_of(side, device=device)
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    for count in counts:
        given = boxes(count, side, device=device)

        def ours(given: Tensor = given) -> Matches:
            return match_anchors(anchors, given, low_quality=True)

        def theirs(given: Tensor = given) -> Tensor:
            found: Tensor = matcher(box_iou(given, anchors))
            return found

        yield Contest(
            "matching",
            f"{len(anchors):,} anchors, {count:,} boxes",
            ours,
            {"torchvision": theirs},
            {"torchvision": _agree(ours(), theirs())},
        )

        def adaptively(given: Tensor = given) -> Matches:
            none = torch.zeros(1, len(given), dtype=torch.bool, device=device)
            return match_atss(TORCHVISION_ANCHORS, side, side, given[None], none)

        yield Contest(
            "matching",
            f"{len(anchors):,} anchors, {count:,} boxes, ATSS",
            adaptively,
            {"ours by IoU": ours},
            {"ours by IoU": None},
        )


def _agree(ours: Matches, theirs: Tensor) -> bool:
    said = torch.where(ours.state == MatchState.POSITIVE, ours.index, -1)
    return torch.equal(torch.where(ours.state == MatchState.IGNORED, -2, said), theirs)
