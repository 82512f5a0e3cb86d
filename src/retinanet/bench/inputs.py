"""The inputs that all contestants get, drawn from fixed seeds.

They are drawn on the CPU, so that every device sees the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retinanet.anchors import AnchorSpec, all_anchors_of_image, anchors_of_image

# What torchvision's anchors are in our words, so that both see the same boxes in the same order.
TORCHVISION_ANCHORS = AnchorSpec(center=0.0, rounding="torchvision", order="ratio-major", stride_rule="image")
SIDE, CLASSES = 800, 80


def levels_of(side: int, *, device: torch.device) -> tuple[Tensor, ...]:
    """Return the anchors of a square image, per level."""
    return anchors_of_image(TORCHVISION_ANCHORS, side, side, device)


def anchors_of(side: int, *, device: torch.device) -> Tensor:
    """Return the same, of all levels, as a training step has them: made once for every image of that size."""
    return all_anchors_of_image(TORCHVISION_ANCHORS, side, side, device)


def boxes(count: int, side: int, *, device: torch.device, seed: int = 0) -> Tensor:
    """Return boxes `[count, 4]` of 20 to 170 pixels, all inside the image."""
    generator = torch.Generator().manual_seed(seed)
    size = 20 + 150 * torch.rand(count, 2, generator=generator)
    size = size.clamp(max=side - 1)
    corner = torch.rand(count, 2, generator=generator) * (side - size)
    return torch.cat([corner, corner + size], dim=1).to(device)


def labels(count: int, classes: int, *, device: torch.device, seed: int = 1) -> Tensor:
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed)).to(device)


def logits(
    rows: int, classes: int, mean: float, deviation: float, *, device: torch.device, seed: int = 2
) -> Tensor:
    """Return Gaussian logits `[rows, classes]`: around -4.6, the prior's, as a network has them at first."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, classes, generator=generator) * deviation + mean).to(device)


def distinct_scores(count: int, *, device: torch.device, seed: int = 3) -> Tensor:
    """Return scores in (0, 1) of which no two are equal: the peers leave the order of equal ones open."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return ((order + 1) / (count + 1)).to(device)
