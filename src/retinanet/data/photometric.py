"""Random brightness, contrast, saturation and hue: one affine map of the colours. NumPy and Pillow only."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageStat

from retinanet.images import UInt8Array

# The ranges of torchvision's RandomPhotometricDistort, after those of SSD (Liu et al., 2016): factors, and of the hue a
# share of the colour circle.
BRIGHTNESS = (0.875, 1.125)
CONTRAST = SATURATION = (0.5, 1.5)
HUE = (-0.05, 0.05)

# ITU-R BT.601: grey, and the two axes of colour of the YIQ space.
LUMA = np.array([0.299, 0.587, 0.114])
YIQ = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def jitter(
    image: UInt8Array, brightness: float, contrast: float, saturation: float, hue: float
) -> UInt8Array:
    """Return the image with other colours.

    Args:
        image: `[H, W, 3]` uint8 RGB.
        brightness, contrast, saturation, hue: in [0, 1], where in its range each lies.
    """
    return adjusted(
        image,
        brightness=_within(BRIGHTNESS, brightness),
        contrast=_within(CONTRAST, contrast),
        saturation=_within(SATURATION, saturation),
        hue=_within(HUE, hue),
    )


def adjusted(
    image: UInt8Array,
    *,
    brightness: float = 1.0,
    contrast: float = 1.0,
    saturation: float = 1.0,
    hue: float = 0.0,
) -> UInt8Array:
    """Return the image after one affine map of its colours, rounded and clipped once.

    Brightness b, contrast c and saturation s are torchvision's: b x; c x + (1 - c) m with the image's mean grey m;
    s x + (1 - s) grey(x). The hue turns in the plane of I and Q instead of HSV's hexagon, so that it is linear, too,
    and leaves grey(x) as it is.

    Args:
        hue: share of the colour circle, in [-0.5, 0.5]; above 0 from red towards yellow.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    angle = 2 * math.pi * hue
    turn = np.eye(3)
    turn[1:, 1:] = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    colours = np.linalg.inv(YIQ) @ turn @ YIQ
    colours = saturation * colours + (1 - saturation) * LUMA  # each row of greys(x) is the luma
    matrix = brightness * contrast * colours
    mean_grey = float(LUMA @ ImageStat.Stat(picture).mean)
    offset = brightness * (1 - contrast) * mean_grey
    rows: NDArray[np.float64] = np.column_stack([matrix, np.full(3, offset)])
    return np.asarray(picture.convert("RGB", tuple(rows.ravel().tolist())))


def _within(limits: tuple[float, float], place: float) -> float:
    return limits[0] + place * (limits[1] - limits[0])
