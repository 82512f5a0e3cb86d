"""From decoded pixels to the network's input, and boxes there and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retinanet.errors import ConfigError, ImageError
from retinanet.images.decoding import UInt8Array

Float32Array: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Preprocessing:
    """Everything between a decoded image and the network that changes a number.

    The image is resized by `min(image_size / shortest, max_size / longest)`, then each channel becomes
    `(x - mean) / std`, then a batch is padded with zeros, the mean colour. Some projects normalise
    before they resize; that is no option here, because normalising is affine and the weights of a resize
    sum to one, so that the order does not matter.

    Args:
        image_size: length of the shortest side after resizing, pixels.
        max_size: what the longest side may not exceed, pixels; wins over `image_size`.
        size_rounding: a side of x pixels becomes `int(x + 0.5)` (Detectron2, MMDetection: 500 x 375 at
            800 gives 1067 x 800) or `int(x)` (torchvision: 1066 x 800).
        resize: "antialias" is Pillow's bilinear filter, whose support grows with the reduction, rounded to
            uint8; "linear" is two taps at half-pixel centres in float32, which is
            `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.
        mean, std: of red, green, blue, in units of 0..255, whatever `channel_order` is. The defaults
            are ImageNet's.
        channel_order: the order in which the network gets its channels.
        divisor: sides of a padded batch are multiples of it (see `stack`); P7 has stride 128, yet 32 is
            enough, since P6 and P7 round up.

    Raises:
        ConfigError: naming the field, what it needs and what came.
    """

    image_size: int = 800
    max_size: int = 1333
    size_rounding: Literal["nearest", "floor"] = "nearest"
    resize: Literal["antialias", "linear"] = "antialias"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    channel_order: Literal["rgb", "bgr"] = "rgb"
    divisor: int = 32

    def __post_init__(self) -> None:
        for field in ("image_size", "max_size", "divisor"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"Preprocessing.{field} needs a whole number from 1; got {value!r}")
        if self.image_size > self.max_size:
            raise ConfigError(
                "Preprocessing.image_size (the shortest side) needs to be at most max_size (the longest); "
                f"got image_size {self.image_size} and max_size {self.max_size}"
            )
        for field, choices in (
            ("size_rounding", ("nearest", "floor")),
            ("resize", ("antialias", "linear")),
            ("channel_order", ("rgb", "bgr")),
        ):
            value = getattr(self, field)
            if value not in choices:
                raise ConfigError(f"Preprocessing.{field} needs {' or '.join(choices)}; got {value!r}")
        for field in ("mean", "std"):
            value = getattr(self, field)
            try:
                numbers = tuple(float(number) for number in value)
            except (TypeError, ValueError):
                numbers = ()
            if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
                raise ConfigError(
                    f"Preprocessing.{field} needs three finite numbers (R, G, B); got {value!r}"
                )
            object.__setattr__(self, field, numbers)
        if min(self.std) <= 0:
            raise ConfigError(f"Preprocessing.std needs numbers above 0; got {self.std}")

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) after resizing, each at least 1.

        >>> Preprocessing().resized_size(500, 375)
        (1067, 800)
        """
        # In doubles, as the projects named above compute it: the same boxes ask for the same rounding errors.
        scale = min(self.image_size / min(width, height), self.max_size / max(width, height))
        half = 0.5 if self.size_rounding == "nearest" else 0.0
        return max(1, int(width * scale + half)), max(1, int(height * scale + half))

    def prepare(self, image: UInt8Array) -> tuple[Float32Array, Geometry]:
        """Resize and normalise one decoded image.

        Args:
            image: `[H, W, 3]` uint8 RGB, as `decode` returns it. An image that has the right size already
                is not resampled.

        Returns:
            `[3, h, w]` float32, contiguous, not padded; and the geometry that leads back.
        """
        geometry = self.geometry(image)
        pixels: NDArray[Any] = image
        if geometry.resized != geometry.original and self.resize == "antialias":
            pixels = np.asarray(Image.fromarray(image).resize(geometry.resized, Image.Resampling.BILINEAR))
        elif geometry.resized != geometry.original:
            pixels = _resize_linear(image, *geometry.resized)
        return self._normalise(pixels), geometry

    def geometry(self, image: UInt8Array) -> Geometry:
        """Return the size of a decoded image before and after.

        Raises:
            ImageError: it is not `[H, W, 3]` uint8.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ImageError(
                f"prepare needs a decoded image, uint8 [H, W, 3]; got {image.dtype} {list(image.shape)}"
            )
        original = (image.shape[1], image.shape[0])
        return Geometry(original, self.resized_size(*original))

    def normalisation(self) -> tuple[Float32Array, Float32Array]:
        """Return factor and offset `[3]` of each channel of the network's input: (x - mean) / std."""
        order = [0, 1, 2] if self.channel_order == "rgb" else [2, 1, 0]
        factor = [1 / self.std[channel] for channel in order]
        offset = [-self.mean[channel] / self.std[channel] for channel in order]
        return np.array(factor, np.float32), np.array(offset, np.float32)

    def restore(self, pixels: Float32Array) -> UInt8Array:
        """Return the picture `[H, W, 3]` uint8 RGB that a network's input `[3, H, W]` shows: x std + mean, rounded."""
        planes = pixels if self.channel_order == "rgb" else pixels[::-1]
        picture = np.moveaxis(planes, 0, 2) * np.array(self.std) + np.array(self.mean)
        rounded: UInt8Array = picture.round().clip(0, 255).astype(np.uint8)
        return rounded

    def _normalise(self, pixels: NDArray[Any]) -> Float32Array:
        planes = np.empty((3, *pixels.shape[:2]), np.float32)
        channels = np.moveaxis(pixels if self.channel_order == "rgb" else pixels[:, :, ::-1], 2, 0)
        for plane, channel, factor, offset in zip(planes, channels, *self.normalisation(), strict=True):
            plane[:] = channel
            plane *= factor
            plane += offset
        return planes


@dataclass(frozen=True)
class Geometry:
    """The size of an image before and after `Preprocessing`, and the map of boxes between the two.

    Padding lies right and below, so that it moves no coordinate.

    Args:
        original: (width, height) in pixels as decoded.
        resized: (width, height) in pixels before padding.
    """

    original: tuple[int, int]
    resized: tuple[int, int]

    def to_network(self, boxes: NDArray[Any]) -> Float32Array:
        """Map `[N, 4]` xyxy boxes of the original image to the resized one: x * resized / original."""
        return (boxes * self._scale()).astype(np.float32)

    def to_original(self, boxes: NDArray[Any]) -> Float32Array:
        """Map `[N, 4]` xyxy boxes of the resized image back, and clip them to the original image."""
        return np.clip(boxes / self._scale(), 0, np.tile(self.original, 2)).astype(np.float32)

    def _scale(self) -> NDArray[np.float64]:
        # float64: in float32 a round trip at 30,000 pixels would be off by hundredths of a pixel.
        return np.tile(np.divide(self.resized, self.original), 2)


def stack(images: Sequence[Float32Array], divisor: int) -> Float32Array:
    """Pad prepared images to their common size, rounded up to a multiple of `divisor`: `[B, 3, H, W]`."""
    if not images:
        raise ConfigError("stack needs at least one image; got none")
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    return pad_to((-height % divisor + height, -width % divisor + width), images)


def pad_to(size: tuple[int, int], images: Sequence[Float32Array]) -> Float32Array:
    """Pad prepared images `[3, h, w]` right and below with zeros, the mean colour.

    Args:
        size: (height, width), at least that of every image. A fixed one keeps shapes static.

    Returns:
        `[B, 3, height, width]` float32.
    """
    batch = np.zeros((len(images), 3, *size), np.float32)
    for index, (padded, image) in enumerate(zip(batch, images, strict=True)):
        _, height, width = image.shape
        if height > size[0] or width > size[1]:
            raise ConfigError(
                f"pad_to needs images of at most {size[0]} x {size[1]} (height x width); "
                f"image {index} has {height} x {width}"
            )
        padded[:, :height, :width] = image
    return batch


def _resize_linear(image: UInt8Array, width: int, height: int) -> Float32Array:
    left, right, across = _taps(image.shape[1], width)
    above, below, down = _taps(image.shape[0], height)
    pixels = image.astype(np.float32)
    rows = pixels.take(left, axis=1)
    rows += (pixels.take(right, axis=1) - rows) * across[:, None]
    result = rows.take(above, axis=0)
    result += (rows.take(below, axis=0) - result) * down[:, None, None]
    return result


def _taps(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Float32Array]:
    """Return the two source indices of each target pixel and the weight of the second."""
    # As torch's fused multiply-add: scale and result in float32, the product exact.
    scale = np.float64(np.float32(old) / np.float32(new))
    position = np.maximum(((np.arange(new) + 0.5) * scale - 0.5).astype(np.float32), np.float32(0))
    first = np.minimum(position.astype(np.intp), old - 1)
    return first, np.minimum(first + 1, old - 1), (position - first).astype(np.float32)
