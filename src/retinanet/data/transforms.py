"""Augmentation: boxes and ignored areas travel with the pixels. NumPy only.

Every random number comes from the generator that is handed in, so that a picture is a function of
(seed, epoch, image) and of nothing that ran before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retinanet.data.photometric import jitter
from retinanet.errors import ConfigError
from retinanet.images import UInt8Array
from retinanet.records import GroundTruth, Ignore

# Pixels. A thinner box is no box: float32 could turn it inside out as it moves.
LEAST_SIDE = 0.01


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image before it is resized for the network.

    Args:
        flip: probability of a horizontal flip; the paper's only augmentation, at 0.5.
        zoom: (least, most) factor of a random zoom, log-uniform. Above 1 a random window of the image is
            cropped; below 1 the image is placed at random on a larger plain canvas. The network's input
            keeps its size.
        min_visible: an object of which a crop leaves less than this share is ignored from then on
            (`Ignore.CUT`), neither an object nor background; one of which nothing is left disappears.
        scales: factors on the network input's size, of which each batch draws one, rounded to multiples of 32
            pixels.
        flip_vertical: probability of an upside-down flip, for pictures without an above and below: micrographs,
            aerial photographs.
        quarter_turn: probability of a turn by 90 degrees, for the same pictures; with both flips all eight views of
            a picture occur.
        photometric: probability that brightness, contrast, saturation and hue change; see `photometric.jitter`.
        mosaic: probability that a picture becomes one of four: see `mosaic`.
    """

    flip: float = 0.5
    zoom: tuple[float, float] = (1.0, 1.0)
    min_visible: float = 0.3
    scales: tuple[float, ...] = (1.0,)
    flip_vertical: float = 0.0
    quarter_turn: float = 0.0
    photometric: float = 0.0
    mosaic: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "min_visible", "flip_vertical", "quarter_turn", "photometric", "mosaic"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"Augmentation.{name} needs [0, 1]; got {getattr(self, name)}")
        if not 0 < self.zoom[0] <= self.zoom[1] < float("inf"):
            raise ConfigError(f"Augmentation.zoom needs 0 < least <= most; got {self.zoom}")
        if not self.scales or not all(0 < scale < float("inf") for scale in self.scales):
            raise ConfigError(f"Augmentation.scales needs numbers above 0; got {self.scales}")

    def image_sizes(self, image_size: int) -> tuple[int, ...]:
        """Return the shortest sides that batches draw from; a factor of 1 keeps the size as it is."""
        return tuple(
            image_size if scale == 1 else max(32, 32 * round(image_size * scale / 32))
            for scale in self.scales
        )

    def __call__(
        self, image: UInt8Array, truth: GroundTruth, random: np.random.Generator
    ) -> tuple[UInt8Array, GroundTruth]:
        """Return the augmented image, which may be a view, and its ground truth."""
        # Always the same number of draws, so that one setting does not move the others' choices.
        mirrored, position, place_x, place_y = random.random(4)
        upended, turned, jittered, *shades = random.random(7)
        if self.zoom != (1.0, 1.0):
            least, most = np.log(self.zoom)
            image, truth = zoom(
                image,
                truth,
                factor=float(np.exp(least + position * (most - least))),
                place=(place_x, place_y),
                min_visible=self.min_visible,
            )
        if jittered < self.photometric:
            image = jitter(image, *shades)
        if turned < self.quarter_turn:
            image, truth = quarter_turn(image, truth)
        if upended < self.flip_vertical:
            image, truth = flip_vertical(image, truth)
        return flip(image, truth) if mirrored < self.flip else (image, truth)


def flip(image: UInt8Array, truth: GroundTruth) -> tuple[UInt8Array, GroundTruth]:
    """Mirror an image, as a view, and its boxes left to right."""
    width = image.shape[1]
    x1, y1, x2, y2 = truth.boxes.T
    return image[:, ::-1], moved(truth, np.stack([width - x2, y1, width - x1, y2], axis=1))


def flip_vertical(image: UInt8Array, truth: GroundTruth) -> tuple[UInt8Array, GroundTruth]:
    """Turn an image, as a view, and its boxes upside down, left staying left."""
    height = image.shape[0]
    x1, y1, x2, y2 = truth.boxes.T
    return image[::-1], moved(truth, np.stack([x1, height - y2, x2, height - y1], axis=1))


def quarter_turn(image: UInt8Array, truth: GroundTruth) -> tuple[UInt8Array, GroundTruth]:
    """Turn an image, as a view, and its boxes to the left: what was its right edge is on top."""
    width = image.shape[1]
    x1, y1, x2, y2 = truth.boxes.T
    return np.rot90(image), moved(truth, np.stack([y1, width - x2, y2, width - x1], axis=1))


def zoom(
    image: UInt8Array,
    truth: GroundTruth,
    *,
    factor: float,
    place: tuple[float, float],
    min_visible: float,
) -> tuple[UInt8Array, GroundTruth]:
    """Cut out a window 1 / factor as large as the image; beyond the image it shows the image's mean colour.

    Args:
        place: where the window lies between its extreme positions, each in [0, 1].
    """
    height, width = image.shape[:2]
    window_width, window_height = max(1, round(width / factor)), max(1, round(height / factor))
    left = round((width - window_width) * place[0])
    top = round((height - window_height) * place[1])
    x1, y1 = max(left, 0), max(top, 0)
    x2, y2 = min(left + window_width, width), min(top + window_height, height)
    seen = image[y1:y2, x1:x2]
    if seen.shape[:2] != (window_height, window_width):
        canvas = np.empty((window_height, window_width, 3), np.uint8)
        canvas[:] = image.reshape(-1, 3).mean(axis=0).round()
        canvas[y1 - top : y2 - top, x1 - left : x2 - left] = seen
        seen = canvas
    boxes = truth.boxes - np.array([left, top, left, top], np.float32)
    return seen, cut(moved(truth, boxes), window_width, window_height, min_visible=min_visible)


def cut(truth: GroundTruth, width: int, height: int, *, min_visible: float) -> GroundTruth:
    """Clip boxes to a window at the origin. See `Augmentation.min_visible` for what becomes of the rest."""
    inside = np.clip(truth.boxes, 0, np.array([width, height, width, height], np.float32))
    whole = _areas(truth.boxes)
    share = _areas(inside) / whole
    left = (np.minimum(inside[:, 2] - inside[:, 0], inside[:, 3] - inside[:, 1]) > LEAST_SIDE) & (share > 0)
    kind = np.where((share < min_visible) & (truth.ignore == Ignore.NO), np.int8(Ignore.CUT), truth.ignore)
    return GroundTruth(
        boxes=inside[left],
        classes=truth.classes[left],
        areas=(truth.areas * share)[left],
        ignore=kind[left],
        ids=truth.ids[left],
    )


def _areas(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    areas: NDArray[np.float32] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return areas


def moved(truth: GroundTruth, boxes: NDArray[np.float32]) -> GroundTruth:
    """Return the ground truth with its boxes elsewhere; one that became thinner than `LEAST_SIDE` is gone."""
    solid = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) > LEAST_SIDE
    return GroundTruth(
        boxes[solid], truth.classes[solid], truth.areas[solid], truth.ignore[solid], truth.ids[solid]
    )
