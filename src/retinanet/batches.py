"""Tensors that travel between rooms: targets and images of a batch, raw predictions, match states.

`Targets` live in the frame of the network input; see `records` for the frame of the original image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor


class MatchState(IntEnum):
    """What an anchor is in training, whatever object it may have been compared with."""

    NEGATIVE = 0
    POSITIVE = 1
    IGNORED = 2


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch, padded to the largest number of boxes G.

    Args:
        boxes: `[B, G, 4]` xyxy in pixels of the network input; a padding row is all zero, and since an
            empty box overlaps nothing it needs no mask.
        classes: `[B, G]` class indices; 0 in padding rows.
        ignored: `[B, G]` true for regions where anchors are to be ignored (crowd, difficult, cut away).
    """

    boxes: Float32[Tensor, "B G 4"]
    classes: Int64[Tensor, "B G"]
    ignored: Bool[Tensor, "B G"]

    def to(self, device: torch.device) -> Targets:
        return Targets(
            self.boxes.to(device, non_blocking=True),
            self.classes.to(device, non_blocking=True),
            self.ignored.to(device, non_blocking=True),
        )

    def __getitem__(self, images: slice) -> Targets:
        """Return those of some images."""
        return Targets(self.boxes[images], self.classes[images], self.ignored[images])

    def pin_memory(self) -> Targets:
        return Targets(self.boxes.pin_memory(), self.classes.pin_memory(), self.ignored.pin_memory())


@dataclass(frozen=True)
class Batch:
    """What the loader hands to a training step.

    Args:
        images: `[B, 3, H, W]` float32, normalised, padded right and bottom.
        targets: the padded ground truth.
        indices: the position in the data set of each image.
        failed: what was wrong with images that could not be read and were replaced.
    """

    images: Float32[Tensor, "B 3 H W"]
    targets: Targets
    indices: tuple[int, ...]
    failed: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """Return it in memory that a CUDA device reads by itself; from any other memory the host waits for the copy."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


@dataclass(frozen=True)
class RawPredictions:
    """What the network says, level by level (P3 first), before any decoding.

    Args:
        logits: per level `[B, h*w*A, K]`; rows run over y, then x, then the anchors of a location.
        deltas: per level `[B, h*w*A, 4]` (t_x, t_y, t_w, t_h), rows in the same order.
        grids: per level (h, w).
    """

    logits: tuple[Tensor, ...]
    deltas: tuple[Tensor, ...]
    grids: tuple[tuple[int, int], ...]
