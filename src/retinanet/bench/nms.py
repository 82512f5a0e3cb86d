"""`bench nms`: per-class NMS at 0.5."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from retinanet.anchors import CPU
from retinanet.bench.inputs import CLASSES, SIDE, boxes, distinct_scores, labels
from retinanet.bench.measuring import Contest
from retinanet.boxes import nms

COUNTS = (1000, 5000)
THRESHOLD = 0.5


def contests(
    side: int = SIDE, counts: tuple[int, ...] = COUNTS, *, device: torch.device = CPU
) -> Iterator[Contest]:
    """Ours and torchvision's `batched_nms`, with many classes and with one.

    On a CPU also OpenCV's `NMSBoxesBatched`, where OpenCV is installed.
    """
    opencv = _opencv()
    for classes in (CLASSES, 1):
        for count in counts:
            of = (
                boxes(count, side, device=device),
                distinct_scores(count, device=device),
                labels(count, classes, device=device),
            )
            peers: dict[str, Callable[[], Tensor]] = {
                "torchvision": lambda of=of: batched_nms(*of, THRESHOLD)  # type: ignore[misc]
            }
            if opencv is not None and device.type == "cpu":
                peers["opencv"] = _with_opencv(opencv, *of)
            ours = nms(*of, threshold=THRESHOLD)
            yield Contest(
                "nms",
                f"{count:,} boxes, {classes} {'classes' if classes > 1 else 'class'}",
                lambda of=of: nms(*of, threshold=THRESHOLD),  # type: ignore[misc]
                peers,
                {name: torch.equal(ours, call()) for name, call in peers.items()},
            )


def _opencv() -> ModuleType | None:
    try:
        import cv2
    except ImportError:
        return None
    found: ModuleType = cv2
    return found


def _with_opencv(cv2: ModuleType, boxes: Tensor, scores: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Return the call on the boxes as OpenCV takes them: x, y, width, height, which its binding reads each time."""
    sized = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    of = sized.double().numpy(), scores.numpy(), labels.int().numpy()
    return lambda: torch.as_tensor(cv2.dnn.NMSBoxesBatched(*of, 0.0, THRESHOLD), dtype=torch.int64)
