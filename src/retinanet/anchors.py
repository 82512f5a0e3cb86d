"""Anchors: the boxes of fixed shape, nine at each location of each pyramid level, that predictions refine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from retinanet import kernels
from retinanet.errors import ConfigError


@dataclass(frozen=True)
class AnchorSpec:
    """Which anchors stand where. The defaults are the paper's (Section 4): 9 a location, 32 to 813 px.

    Args:
        sizes: side of the base square in pixels, a level (P3 first).
        scales: factors on the size within a level.
        ratios: height / width; the area stays size^2 scale^2.
        strides: pixels between locations, a level.
        center: position of the first location in strides. 0.5 puts it in the middle of its cell (Detectron,
            ODTK); detectron2, torchvision and MMDetection use 0.
        rounding: "none"; "torchvision": size * scale cut to an integer, half sides rounded;
            "detectron": sides rounded at stride size, before they are scaled up.
        order: which index runs slowest within a location, "scale-major" (detectron2) or "ratio-major"
            (torchvision, MMDetection).
        stride_rule: "fixed" uses `strides`; "image" spaces a level's locations by padded size // grid size,
            as torchvision does, which differs where the padded size is no multiple of the stride.
    """

    sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    scales: tuple[float, ...] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    center: float = 0.5
    rounding: Literal["none", "torchvision", "detectron"] = "none"
    order: Literal["scale-major", "ratio-major"] = "scale-major"
    stride_rule: Literal["fixed", "image"] = "fixed"

    def __post_init__(self) -> None:
        for name in ("sizes", "scales", "ratios", "strides"):
            values = getattr(self, name)
            if not values or not all(math.isfinite(value) and value > 0 for value in values):
                raise ConfigError(f"AnchorSpec.{name} needs positive numbers; got {values}")
        if len(self.sizes) != len(self.strides):
            raise ConfigError(
                f"AnchorSpec needs one size a stride; got sizes {self.sizes} and strides {self.strides}"
            )
        if not 0 <= self.center < 1:
            raise ConfigError(f"AnchorSpec.center needs a share of the stride in [0, 1); got {self.center}")

    @property
    def per_location(self) -> int:
        """A, the number of anchors of a location."""
        return len(self.scales) * len(self.ratios)

    def grids(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Return (rows, columns) of every level for a padded image size: ceil(size / stride)."""
        return tuple((-(-height // stride), -(-width // stride)) for stride in self.strides)

    def steps(self, level: int, height: int, width: int) -> tuple[int, int]:
        """Return the pixels between a level's rows and between its columns, for a padded image size."""
        if self.stride_rule == "fixed":
            return self.strides[level], self.strides[level]
        rows, columns = self.grids(height, width)[level]
        return height // rows, width // columns

    def count(self, height: int, width: int) -> int:
        """R, the number of anchors of an image of that padded size."""
        return self.per_location * sum(rows * columns for rows, columns in self.grids(height, width))

    def shapes(self, level: int) -> Tensor:
        """Return `[A, 2]` width and height in pixels of one location's anchors, in their order."""
        pairs = [(scale, ratio) for scale in self.scales for ratio in self.ratios]
        if self.order == "ratio-major":
            pairs = [(scale, ratio) for ratio in self.ratios for scale in self.scales]
        return torch.tensor([self._shape(level, scale, ratio) for scale, ratio in pairs], dtype=torch.float32)

    def _shape(self, level: int, scale: float, ratio: float) -> tuple[float, float]:
        size = self.sizes[level]
        if self.rounding == "torchvision":
            side = int(size * scale)
            # Python's round and torch's both take halves to the even neighbour.
            return 2.0 * round(side / math.sqrt(ratio) / 2), 2.0 * round(side * math.sqrt(ratio) / 2)
        if self.rounding == "detectron":
            width = round(self.strides[level] / math.sqrt(ratio))
            factor = size * scale / self.strides[level]
            return width * factor, round(width * ratio) * factor
        return size * scale / math.sqrt(ratio), size * scale * math.sqrt(ratio)


CPU = torch.device("cpu")


@lru_cache(maxsize=32)
def anchors_of_image(
    spec: AnchorSpec, height: int, width: int, device: torch.device = CPU
) -> tuple[Tensor, ...]:
    """Return the anchors of an image of a padded size: per level `[h*w*A, 4]` xyxy float32.

    Rows run over y, then x, then the anchors of a location, the order of `RawPredictions`. Anchors may
    reach over the border. The result is cached by its arguments and shared: do not write to it.
    """
    per_level = [spec.per_location * rows * columns for rows, columns in spec.grids(height, width)]
    levels: tuple[Tensor, ...] = all_anchors_of_image(spec, height, width, device).split(per_level)
    return levels


@lru_cache(maxsize=32)
def all_anchors_of_image(
    spec: AnchorSpec, height: int, width: int, device: torch.device = CPU
) -> Float32[Tensor, "R 4"]:
    """Return the same anchors, all levels in one tensor, prepared for matching. Do not write to it."""
    # Cached while a caller is in inference mode, the anchors could never serve a gradient.
    with torch.inference_mode(False):
        levels = [_anchors_of_level(spec, level, height, width) for level in range(len(spec.sizes))]
        anchors = torch.cat(levels).to(device)
    kernels.prepare(anchors)
    return anchors


def _anchors_of_level(spec: AnchorSpec, level: int, height: int, width: int) -> Tensor:
    rows, columns = spec.grids(height, width)[level]
    step_y, step_x = spec.steps(level, height, width)
    y = (torch.arange(rows) + spec.center) * step_y
    x = (torch.arange(columns) + spec.center) * step_x
    centers = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flip(-1)[:, :, None]
    half = spec.shapes(level) / 2
    return torch.cat((centers - half, centers + half), dim=-1).reshape(-1, 4)
