"""Mosaic: four pictures of a data set on one canvas (Bochkovskiy et al., 2020, https://arxiv.org/abs/2004.10934)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from retinanet.data.transforms import moved, zoom
from retinanet.images import UInt8Array
from retinanet.records import GroundTruth

# How much of the canvas is seen: all of it, its objects half as large as usual, to a quarter of it, where they have
# their usual size and there is a little of each picture, or only of one.
ZOOM = (1.0, 2.0)
# How much longer than its shortest side a picture may be before its longest decides its size, as usual for networks.
LONGEST = 1333 / 800


def partners(random: np.random.Generator, count: int, probability: float) -> tuple[int, ...]:
    """Return which three of `count` images stand beside an image, or none. The first numbers of the generator."""
    drawn, others = random.random(), random.integers(count, size=3)
    return tuple(others.tolist()) if drawn < probability else ()


def mosaic_window(
    pictures: Sequence[tuple[UInt8Array, GroundTruth]], random: np.random.Generator, *, min_visible: float
) -> tuple[UInt8Array, GroundTruth]:
    """Return a random part, see `ZOOM`, of the mosaic of four pictures. `min_visible`: see `Augmentation`."""
    position, place_x, place_y = random.random(3)
    least, most = np.log(ZOOM)
    factor = float(np.exp(least + position * (most - least)))
    return zoom(*mosaic(pictures), factor=factor, place=(place_x, place_y), min_visible=min_visible)


def mosaic(pictures: Sequence[tuple[UInt8Array, GroundTruth]]) -> tuple[UInt8Array, GroundTruth]:
    """Return four pictures around one point, with all of their boxes.

    They keep the sizes beside each other that they would have for the network, that of the first being as it is. What
    none covers has the mean colour of the first.
    """
    unit = _size(pictures[0][0])
    pictures = [_resized(image, truth, unit / _size(image)) for image, truth in pictures]
    heights, widths = np.array([image.shape[:2] for image, _ in pictures]).T
    middle_x, middle_y = int(widths[[0, 2]].max()), int(heights[[0, 1]].max())
    right, below = middle_x + int(widths[[1, 3]].max()), middle_y + int(heights[[2, 3]].max())
    canvas = np.empty((below, right, 3), np.uint8)
    canvas[:] = pictures[0][0].mean(axis=(0, 1)).round()
    shifted = []
    for number, (image, truth) in enumerate(pictures):
        height, width = image.shape[:2]
        x = middle_x if number % 2 else middle_x - width
        y = middle_y if number // 2 else middle_y - height
        canvas[y : y + height, x : x + width] = image
        shifted.append(truth.boxes + np.array([x, y, x, y], np.float32))
    truths = [truth for _, truth in pictures]
    return canvas, GroundTruth(
        boxes=np.concatenate(shifted),
        classes=np.concatenate([truth.classes for truth in truths]),
        areas=np.concatenate([truth.areas for truth in truths]),
        ignore=np.concatenate([truth.ignore for truth in truths]),
        ids=np.concatenate([truth.ids for truth in truths]),
    )


def _size(image: UInt8Array) -> float:
    height, width = image.shape[:2]
    return float(max(min(height, width), max(height, width) / LONGEST))


def _resized(image: UInt8Array, truth: GroundTruth, scale: float) -> tuple[UInt8Array, GroundTruth]:
    if scale == 1:
        return image, truth
    height, width = image.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    across, down = size[0] / width, size[1] / height
    pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    truth = replace(truth, areas=truth.areas * np.float32(across * down))
    return pixels, moved(truth, truth.boxes * np.array([across, down, across, down], np.float32))
