"""Pictures for people: boxes with captions, contact sheets, saving. NumPy and Pillow only.

The same input gives the same picture: nothing is random, and the font is the one inside Pillow.
"""

from __future__ import annotations

import colorsys
import math
import os
import secrets
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from retinanet.errors import ConfigError, DataError

Colour: TypeAlias = tuple[int, int, int]
Rectangle: TypeAlias = tuple[int, int, int, int]
"""Whole pixels: left, top, right, bottom; right and bottom are the first ones outside."""

PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (240, 228, 66),
    (0, 114, 178),
    (221, 221, 221),
    (136, 34, 85),
)
"""Colours of the first classes: Okabe and Ito's (2008), which colour-blind people tell apart, with pale
grey for their black, and one wine red."""

PAPER = (250, 250, 250)
INK = (32, 33, 36)
FRAME = (205, 207, 211)
LARGEST_CELL = 720
LARGEST_ENLARGED = 2048
IGNORED = (128, 128, 128)
MOST_COVERED = 0.2
"""The part of a picture that captions may cover."""


def class_colour(group: int) -> Colour:
    """Return the colour of a class index: from `PALETTE`, beyond it hues in steps of the golden angle."""
    if group < len(PALETTE):
        return PALETTE[group]
    step = group - len(PALETTE)
    saturation, value = ((0.75, 0.95), (0.5, 0.8), (0.95, 0.65))[step % 3]
    red, green, blue = colorsys.hsv_to_rgb(step * 0.381966 % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: NDArray[np.uint8],
    boxes: NDArray[Any],
    *,
    captions: Sequence[str] | None = None,
    groups: Sequence[int] | NDArray[np.int64] | None = None,
    colours: Sequence[Colour] | None = None,
    ignored: NDArray[np.bool_] | None = None,
    min_side: int = 480,
) -> Image.Image:
    """Return a picture of an image with outlined boxes and captions.

    A caption stands where it hides least: above its box, else below, inside or beside it, always within
    the picture and never on another one. In a crowd, where it would hide small boxes, or when the better
    captions already cover a fifth of the picture, it is left out; the outline remains.

    Args:
        image: `[H, W, 3]` uint8 RGB; it is not changed.
        boxes: `[N, 4]` xyxy in pixels of the image, best first; the best are drawn last, on top.
        captions: a line of text for each box; an empty one is not drawn.
        groups: a class index for each box, which decides its colour; all 0 when not given.
        colours: RGB of group 0, 1, ...; `class_colour` when not given.
        ignored: boxes that are grey and hatched, whatever their group; none when not given.
        min_side: an image whose shortest side is below this many pixels is enlarged by a whole factor
            (and its boxes with it), so that captions are legible and do not bury it. Its longest side
            stays within 2048.

    Raises:
        DataError: if the arrays do not fit each other.
    """
    boxes = np.asarray(boxes, np.float64)
    _check(image, boxes, captions, groups, colours)
    if ignored is not None and np.shape(ignored) != (len(boxes),):
        raise DataError(f"draw_boxes needs one ignored a box; got {np.shape(ignored)} for {len(boxes)} boxes")
    factor = _enlargement(image.shape[1], image.shape[0], min_side)
    picture = Image.fromarray(image)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    line = max(2, round(min(picture.size) / 280))
    indices = [0] * len(boxes) if groups is None else [int(group) for group in groups]
    paints = [class_colour(group) if colours is None else colours[group] for group in indices]
    outlines = [_outline(box, line, picture.size) for box in boxes * factor]
    for index in [] if ignored is None else np.flatnonzero(ignored).tolist():
        paints[index] = IGNORED
        _hatch(picture, outlines[index], line)
    draw = ImageDraw.Draw(picture, "RGBA")
    for outline, paint in zip(reversed(outlines), reversed(paints), strict=True):
        _draw_outline(draw, outline, line, paint)
    if captions is not None:
        _draw_captions(picture, outlines, paints, captions, line)
    return picture


def contact_sheet(
    tiles: Sequence[Image.Image],
    *,
    columns: int,
    captions: Sequence[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """Return pictures in a grid on a light page, row by row, each with its caption below.

    Columns are equally wide, a row is as high as its highest picture. Pictures of more than 720 pixels
    are scaled down, smaller ones keep their size.

    Raises:
        ConfigError: without tiles, without columns, or with another number of captions than tiles.
    """
    if not tiles or columns < 1:
        raise ConfigError(
            f"contact_sheet needs tiles and columns, one of each at least; got {len(tiles)} and {columns}"
        )
    if captions is not None and len(captions) != len(tiles):
        raise ConfigError(
            f"contact_sheet needs one caption a tile; got {len(captions)} for {len(tiles)} tiles"
        )
    tiles = [_shrunk(tile) for tile in tiles]
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    width = max(tile.width for tile in tiles)
    heights = [max(tile.height for tile in tiles[row * columns :][:columns]) for row in range(rows)]
    text = max(13, round(max(width, *heights) / 32))
    gap = text
    label = 0 if captions is None else round(1.7 * text)
    head = 0 if title is None else round(2.6 * text)
    size = (columns * (width + gap) + gap, head + sum(heights) + rows * (label + gap) + gap)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    if title is not None:
        _write(draw, (gap, gap), title, round(1.5 * text), sheet.width - 2 * gap)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        left = gap + column * (width + gap)
        bottom = head + sum(heights[: row + 1]) + row * (label + gap) + gap
        x, y = left + (width - tile.width) // 2, bottom - tile.height
        draw.rectangle((x - 1, y - 1, x + tile.width, bottom), outline=FRAME)
        sheet.paste(tile, (x, y))
        if captions is not None:
            _write(draw, (x, bottom + round(0.35 * text)), captions[index], text, left + width - x)
    return sheet


def side_by_side(left: Image.Image, right: Image.Image, left_caption: str, right_caption: str) -> Image.Image:
    """Return two pictures beside each other with their captions."""
    return contact_sheet([left, right], columns=2, captions=[left_caption, right_caption])


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a picture as its suffix says: JPEG (`.jpg`, `.jpeg`; quality 92, full colour) or PNG (`.png`).

    The file appears complete or not at all: it is written beside its place and then moved there.

    Raises:
        ConfigError: for another suffix.
        DataError: if it cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".jpg", ".jpeg", ".png"):
        raise ConfigError(f"{path}: a picture is saved as .jpg, .jpeg or .png; got suffix {path.suffix!r}")
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        if suffix == ".png":
            image.save(unfinished, "PNG")
        else:
            # Full colour resolution: thin coloured lines would otherwise blur.
            image.convert("RGB").save(unfinished, "JPEG", quality=92, subsampling=0)
        os.replace(unfinished, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _check(
    image: NDArray[np.uint8],
    boxes: NDArray[Any],
    captions: Sequence[str] | None,
    groups: Sequence[int] | NDArray[np.int64] | None,
    colours: Sequence[Colour] | None,
) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise DataError(f"draw_boxes needs a uint8 image [H, W, 3]; got {image.dtype} {list(image.shape)}")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise DataError(f"draw_boxes needs finite boxes [N, 4]; got {list(boxes.shape)} or a NaN")
    for what, values in (("caption", captions), ("group", groups)):
        if values is not None and len(values) != len(boxes):
            raise DataError(f"draw_boxes needs one {what} a box; got {len(values)} for {len(boxes)} boxes")
    if groups is not None and len(groups):
        low, high = int(min(groups)), int(max(groups))
        if low < 0 or (colours is not None and high >= len(colours)):
            allowed = "from 0" if colours is None else f"0..{len(colours) - 1}, one for each colour"
            raise DataError(f"draw_boxes needs groups {allowed}; got {low}..{high}")


def _enlargement(width: int, height: int, min_side: int) -> int:
    wanted = math.ceil(min_side / min(width, height))
    return max(1, min(wanted, LARGEST_ENLARGED // max(width, height)))


def _outline(box: NDArray[np.float64], line: int, size: tuple[int, int]) -> Rectangle:
    """Return the outer rectangle of a line centred on the box's edge, kept within the picture."""
    width, height = size
    left = min(max(round(box[0] - line / 2), 0), width - line)
    top = min(max(round(box[1] - line / 2), 0), height - line)
    right = max(min(round(box[2] + line / 2), width), left + line)
    bottom = max(min(round(box[3] + line / 2), height), top + line)
    return left, top, right, bottom


def _draw_outline(draw: ImageDraw.ImageDraw, outline: Rectangle, line: int, paint: Colour) -> None:
    left, top, right, bottom = outline
    draw.rectangle((left, top, right - 1, bottom - 1), outline=paint, width=line)
    # A dark hair line on both sides keeps any colour visible on any ground.
    shade = (0, 0, 0, 110)
    draw.rectangle((left - 1, top - 1, right, bottom), outline=shade)
    if right - left > 2 * line + 2 and bottom - top > 2 * line + 2:
        draw.rectangle((left + line, top + line, right - line - 1, bottom - line - 1), outline=shade)


def _hatch(picture: Image.Image, outline: Rectangle, line: int) -> None:
    """Cover a rectangle with a grey veil and diagonal stripes, through which the image can be seen."""
    left, top, right, bottom = outline
    # Stripes of neighbours lie on the same diagonals.
    diagonal = np.add.outer(np.arange(top, bottom), np.arange(left, right)) % (6 * line)
    veil = np.where(diagonal < 2 * line, np.uint8(170), np.uint8(70))
    picture.paste(IGNORED, outline, Image.fromarray(veil))


def _draw_captions(
    picture: Image.Image,
    outlines: Sequence[Rectangle],
    paints: Sequence[Colour],
    captions: Sequence[str],
    line: int,
) -> None:
    size = _caption_size(picture, captions)
    font = _font(size)
    side, rise = max(3, round(size * 0.35)), max(2, round(size * 0.18))
    ascent, descent = font.getmetrics()
    height = ascent + descent + 2 * rise
    rectangles = np.reshape(np.array(outlines, np.int64), (-1, 4))
    areas = (rectangles[:, 2] - rectangles[:, 0]) * (rectangles[:, 3] - rectangles[:, 1])
    budget = MOST_COVERED * picture.width * picture.height
    placed = np.zeros((0, 4), np.int64)
    for index, (outline, paint, caption) in enumerate(zip(outlines, paints, captions, strict=True)):
        text = _shortened(caption, font, picture.width - 2 * side)
        width = math.ceil(font.getlength(text)) + 2 * side
        # A large box is no worse for a caption on it; a small one disappears.
        small = (areas < 6 * width * height) & (np.arange(len(areas)) != index)
        chip = _place(outline, (width, height), line, picture.size, placed, rectangles[small])
        if not text or chip is None or (len(placed) and budget < width * height):
            continue
        placed = np.vstack([placed, chip])
        budget -= width * height
        picture.paste(paint, chip[:2], _chip_mask(width, height, max(2, size // 5)))
        ImageDraw.Draw(picture).text(
            (chip[0] + side, chip[1] + rise + ascent), text, font=font, fill=_contrast(paint), anchor="ls"
        )


def _caption_size(picture: Image.Image, captions: Sequence[str]) -> int:
    """Return the font size in pixels: a fortieth of the picture, smaller where captions would crowd it."""
    size = max(12, round(min(picture.size) / 40))
    letters = sum(len(caption) for caption in captions)
    covered = letters * 0.8 * size * size / (picture.width * picture.height)
    return max(min(size, 11), round(size * min(1.0, math.sqrt(0.12 / covered)))) if covered else size


def _place(
    outline: Rectangle,
    chip: tuple[int, int],
    line: int,
    size: tuple[int, int],
    placed: NDArray[np.int64],
    others: NDArray[np.int64],
) -> Rectangle | None:
    """Return the free place within the picture that hides least of other boxes, or None."""
    left, top, right, bottom = outline
    width, height = chip
    roomy = right - left > 1.2 * width and bottom - top > 3 * height
    above, below, inside = (left, top - height), (left, bottom), (left + line, top + line)
    beside = [(right, top), (left - width, top), (right - width, top - height), (right - width, bottom)]
    best, least = None, 0.3 * width * height
    for x, y in [above, *([inside, below] if roomy else [below]), *beside]:
        x = min(max(x, 0), size[0] - width)
        place = (x, y, x + width, y + height)
        if x < 0 or y < 0 or y + height > size[1] or _shared(place, placed):
            continue
        hidden = _shared(place, others)
        if hidden < least:
            best, least = place, hidden
    return best


def _shared(place: Rectangle, others: NDArray[np.int64]) -> int:
    """Return how many pixels a rectangle shares with others `[N, 4]`, added up."""
    width = np.minimum(place[2], others[:, 2]) - np.maximum(place[0], others[:, 0])
    height = np.minimum(place[3], others[:, 3]) - np.maximum(place[1], others[:, 1])
    return int((width.clip(0) * height.clip(0)).sum())


def _chip_mask(width: int, height: int, radius: int) -> Image.Image:
    """Return a rounded rectangle with smooth corners, drawn large and scaled down."""
    large = Image.new("L", (4 * width, 4 * height), 0)
    ImageDraw.Draw(large).rounded_rectangle((0, 0, 4 * width - 1, 4 * height - 1), 4 * radius, fill=255)
    return large.resize((width, height), Image.Resampling.BOX)


def _contrast(paint: Colour) -> Colour:
    """Return black or white, whichever stands out more by WCAG's relative luminance."""
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (channel / 255 for channel in paint)
    )
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def _shrunk(tile: Image.Image) -> Image.Image:
    scale = LARGEST_CELL / max(tile.size)
    if scale >= 1:
        return tile
    size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
    return tile.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, width: int) -> None:
    font = _font(size)
    draw.text(place, _shortened(text, font, width), font=font, fill=INK)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return the text on one line, its end replaced by dots if it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..." if text else ""


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ConfigError(
            "drawing needs Pillow with FreeType, as its wheels have; reinstall pillow from PyPI"
        )
    return font
