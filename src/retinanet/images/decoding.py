"""From files, bytes, PIL images and arrays to pixels as a person sees them; hostile files end in `ImageError`."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from retinanet.errors import ImageError

UInt8Array: TypeAlias = NDArray[np.uint8]
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


class Examined(NamedTuple):
    """An image file, really decoded: its pixels `[H, W, 3]` as a person sees them, and how it was stored.

    `orientation` is EXIF's, 1 to 8; from 5 on the stored picture is `H` wide and `W` high. `mode` is Pillow's name of
    the stored pixels, e.g. "L", "P", "CMYK", "I;16". `frames` counts the pictures of an animation or a
    multi-page file, of which the first is seen.
    """

    pixels: UInt8Array
    orientation: int
    mode: str
    frames: int


def examine(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Examined:
    """Decode an image file as `decode` does, and say how it was stored.

    Raises:
        ImageError: as `decode`.
    """
    with _opened(path) as (image, name):
        _require_pixels(image, name, max_pixels)
        mode, orientation = image.mode, _orientation(image)  # before Pillow turns a TIFF
        pixels = _from_pil(image, name, max_pixels)
        return Examined(pixels, orientation, mode, _frames(image))


def _frames(image: Image.Image) -> int:
    if image.format == "MPO":  # a JPEG with previews behind it, as telephones write it
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a damaged second frame does not concern the first
        return 1


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


def _require_pixels(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: an image needs at least one pixel; got {width} x {height}")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} pixels are more than max_pixels = {max_pixels}; "
            "scale it down, or raise max_pixels if you trust it"
        )


def _from_pil(image: Image.Image, name: str, max_pixels: int) -> UInt8Array:
    _require_pixels(image, name, max_pixels)
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
