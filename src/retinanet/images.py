"""Images: the one decoder, the one preprocessing, and the way back. NumPy and Pillow only.

An image is what a person sees: RGB, upright (EXIF orientation applied exactly once), opaque. Every
box of this library lives in that frame; `Geometry` carries boxes to the network's frame and back.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from retinanet.errors import ConfigError, ImageError

UInt8Array: TypeAlias = NDArray[np.uint8]
Float32Array: TypeAlias = NDArray[np.float32]
ImageSource: TypeAlias = str | Path | bytes | Image.Image | UInt8Array
"""A path, an encoded file's bytes, a PIL image or an array: whatever `decode` takes."""

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""What is opened, whatever a file is called. Pillow knows forty formats; one of them, EPS, runs a program."""

MAX_PIXELS = 89_478_485
"""Largest image that is decoded unless told otherwise: 256 MiB of RGB, where Pillow begins to warn."""

BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels: white, the page on which people see such pictures, and against
which the dark drawings of logos, diagrams and cut-outs remain visible. Opaque pixels do not change."""

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(source: ImageSource, *, bgr: bool = False, max_pixels: int = MAX_PIXELS) -> UInt8Array:
    """Return an image as a person sees it: `[H, W, 3]`, RGB, 0..255.

    - Files (paths or bytes) in one of `FORMATS`; of animations and multi-page files the first frame.
    - EXIF orientation is applied once, to PIL images as well. EXIF that cannot be read is none.
    - Transparency in any form is composited on `BACKGROUND`.
    - 16-bit grey keeps its high byte, so that 0..65535 becomes 0..255. Pillow's mode `I` is taken as
      16 bits in a wider cell. 32-bit floats have no range to scale by and are refused.
    - Arrays are uint8: `[H, W]` or `[H, W, 1]` grey, `[H, W, 3]` RGB, `[H, W, 4]` RGBA.

    Args:
        source: what to decode; a `str` is a path.
        bgr: the array's colours are in OpenCV's order (BGR or BGRA). Only arrays can be.
        max_pixels: files and PIL images of more pixels are refused on reading their header. Beyond
            179 million Pillow's own `PIL.Image.MAX_IMAGE_PIXELS` has to be raised as well.

    Returns:
        A new, writable array; only a contiguous RGB array is handed back as it came.

    Raises:
        ImageError: for everything that is not a sound image, naming the file.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, bgr)
    if bgr:
        raise ImageError(
            f"decode needs an array for bgr=True; got {type(source).__name__}, which knows its order"
        )
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "")) or "PIL image"
        with _failures_named(name):
            return _from_pil(source, name, max_pixels)
    with _opened(source) as (image, name):
        return _from_pil(image, name, max_pixels)


def read_size(path: str | Path) -> tuple[int, int]:
    """Return (width, height) in pixels as a person sees the image, EXIF considered, without decoding it.

    Raises:
        ImageError: if the file is missing or its header is not that of an image.
    """
    with _opened(path) as (image, _):
        width, height = image.size
        # Pillow already turns a TIFF by itself, its size included.
        turned = image.format != "TIFF" and _orientation(image) >= 5
        return (height, width) if turned else (width, height)


@contextmanager
def _opened(source: str | Path | bytes) -> Iterator[tuple[Image.Image, str]]:
    if not isinstance(source, str | Path | bytes):
        raise ImageError(
            f"an image is a path, bytes, a PIL image or a uint8 array; got {type(source).__name__}"
        )
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    with (
        _failures_named(name),
        _stream(source) as stream,
        Image.open(stream, formats=FORMATS) as image,
    ):
        yield image, name


def _stream(source: str | Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    path = Path(source)
    if not path.exists():
        raise ImageError(f"{path}: there is no such file; an image is required")
    if not path.is_file():  # a pipe or a device could be read for ever
        raise ImageError(f"{path}: this is a folder or a device; an image file is required")
    return path.open("rb")


@contextmanager
def _failures_named(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image in any of the formats {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: Pillow refuses it as too large ({error}); "
            "scale it down, or raise max_pixels and PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    # On hostile bytes Pillow raises nearly anything: OSError, SyntaxError, struct.error, MemoryError ...
    except Exception as error:
        raise ImageError(
            f"{name}: damaged, truncated or unreadable ({error or type(error).__name__})"
        ) from error


def _from_pil(image: Image.Image, name: str, max_pixels: int) -> UInt8Array:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: an image needs at least one pixel; got {width} x {height}")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} pixels are more than max_pixels = {max_pixels}; "
            "scale it down, or raise max_pixels if you trust it"
        )
    image.load()
    # Not ImageOps.exif_transpose: it copies upright images, and writes EXIF back, which fails on odd tags.
    turn = _TRANSPOSE.get(_orientation(image))
    return _to_rgb(image if turn is None else image.transpose(turn), name)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF (or XMP) orientation, 1 to 8; 1 if there is none that can be read."""
    try:
        if image.format == "PNG" and not _behind_pixels(image):
            exif = Image.Image.getexif(image)  # PngImageFile's own would decode the pixels first
        else:
            exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in _TRANSPOSE else 1
    except Exception:
        return 1


def _behind_pixels(image: Image.Image) -> bool:
    """Whether a PNG that is not yet decoded has metadata behind its pixels, where only decoding finds it."""
    stream = getattr(image, "fp", None)
    if stream is None:
        return False
    position = stream.tell()
    stream.seek(8)
    seen = False
    found = False
    while not found and len(header := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        seen = seen or kind == b"IDAT"
        found = seen and kind in {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}
        stream.seek(length + 4, io.SEEK_CUR)
    stream.seek(position)
    return found


def _to_rgb(image: Image.Image, name: str) -> UInt8Array:
    if image.mode.startswith("I"):
        return _from_16_bit(image, name)
    if image.mode == "F":
        raise ImageError(f"{name}: 32-bit float pixels have no known range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        seen = image.convert("RGBA")
        image = Image.new("RGB", image.size, BACKGROUND)
        image.paste(seen, mask=seen)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return np.asarray(image).copy()  # Pillow's array is read-only, which torch.from_numpy warns about


def _from_16_bit(image: Image.Image, name: str) -> UInt8Array:
    values = np.asarray(image)
    if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise ImageError(
            f"{name}: 32-bit integer pixels need the range 0..65535; got {values.min()}..{values.max()}"
        )
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = BACKGROUND[0]
    return np.repeat(grey[:, :, None], 3, axis=2)


def _from_array(array: NDArray[Any], bgr: bool) -> UInt8Array:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        raise ImageError(
            "an image array needs uint8 and shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], not empty; "
            f"got {array.dtype} {list(array.shape)}"
        )
    if channels == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    if bgr:
        array = array[:, :, [2, 1, 0, 3][:channels]]
    if channels == 4:
        return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), "array")
    return np.ascontiguousarray(array)


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
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ImageError(
                f"prepare needs a decoded image, uint8 [H, W, 3]; got {image.dtype} {list(image.shape)}"
            )
        original = (image.shape[1], image.shape[0])
        resized = self.resized_size(*original)
        pixels: NDArray[Any] = image
        if resized != original and self.resize == "antialias":
            pixels = np.asarray(Image.fromarray(image).resize(resized, Image.Resampling.BILINEAR))
        elif resized != original:
            pixels = _resize_linear(image, *resized)
        return self._normalise(pixels), Geometry(original, resized)

    def _normalise(self, pixels: NDArray[Any]) -> Float32Array:
        planes = np.empty((3, *pixels.shape[:2]), np.float32)
        order = (0, 1, 2) if self.channel_order == "rgb" else (2, 1, 0)
        for plane, channel in zip(planes, order, strict=True):
            plane[:] = pixels[:, :, channel]
            plane *= np.float32(1 / self.std[channel])
            plane += np.float32(-self.mean[channel] / self.std[channel])
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
