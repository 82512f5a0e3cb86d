"""`bench nms`: per-class NMS at 0.5."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torchvision.ops import batched_nms

from retinanet.anchors import CPU
from retinanet.bench.inputs import CLASSES, SIDE, boxes, distinct_scores, labels
from retinanet.bench.measuring import Contest
from retinanet.boxes import nms

COUNTS = (1000, 5000)


def contests(
    side: int = SIDE, counts: tuple[int, ...] = COUNTS, *, device: torch.device = CPU
) -> Iterator[Contest]:
    """Ours and torchvision's `batched_nms`, with many classes and with one."""
    for classes in (CLASSES, 1):
        for count in counts:
            of = (
                boxes(count, side, device=device),
                distinct_scores(count, device=device),
                labels(count, classes, device=device),
            )
            ours, theirs = nms(*of, threshold=0.5), batched_nms(*of, 0.5)
            yield Contest(
                "nms",
                f"{count:,} boxes, {classes} {'classes' if classes > 1 else 'class'}",
                lambda of=of: nms(*of, threshold=0.5),  # type: ignore[misc]
                {"torchvision": lambda of=of: batched_nms(*of, 0.5)},  # type: ignore[misc]
                {"torchvision": torch.equal(ours, theirs)},
            )
