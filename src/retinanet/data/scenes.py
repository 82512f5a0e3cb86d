"""Synthetic detection images: disks, squares and triangles on clutter. NumPy and Pillow only.

What makes them worth training on: the classes differ by shape alone. Objects, clutter and background
take their colours from one distribution, and the size of a box does not depend on its class. Stripes and
noise occur in the background only; an object is plain or has a gradient.

An image is a function of (spec, seed, split, index): one image, or all of them in any order, give the same
pixels. A box is the exact extent of its whole shape, hidden parts included, in continuous coordinates: an
edge may lie inside a pixel. Shapes are never cut by the image's border. The annotated area is that of the
whole shape.
"""

import math
import zlib
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from retinanet.errors import ConfigError
from retinanet.records import Classes, Float32Array, GroundTruth

Float64Array: TypeAlias = NDArray[np.float64]

# The version of the drawing, which a data set carries: raise it when equal arguments begin to give other images.
GENERATOR = 2

CLASSES = Classes(names=("disk", "square", "triangle"), ids=(1, 2, 3))

# Beyond 20 degrees a square of ten pixels begins to look like a disk. Up to 20 it fills its box as a disk
# does (0.76 and 0.79 on average), so that how much background a box holds does not tell the two apart.
SQUARE_TILT = math.radians(20)
MAX_ASPECT = 1.3
MIN_VISIBLE = 0.5
MIN_CONTRAST = 100.0
PLACEMENTS = 30
# Objects are plain or a gradient, without the stripes and the noise of the background: small ones have no
# pixels to spare for a texture.
PLAIN_KINDS = 2
SUBROWS = 4


@dataclass(frozen=True)
class ShapesSpec:
    """What the images look like.

    The side of an object is the square root of width times height of its box; sides are log-uniform from
    `min_side` to `max_side`, by default over a range of 12 (11 to 134 pixels in an image of 160).

    Args:
        image_size: width and height in pixels, at least 32.
        min_side, max_side: smallest and largest side, as shares of `image_size`, at most 1; the smallest
            needs at least 6 pixels, below which the classes look alike.
        max_objects: an image that is not empty has 1 to `max_objects` objects, each number equally often
            (now and then fewer, where no free place is found).
        empty_share: share of images without an object, in [0, 1]; the first N images of a split hold
            N * `empty_share` of them, give or take two or three, whatever the seed.
    """

    image_size: int = 160
    min_side: float = 0.07
    max_side: float = 0.84
    max_objects: int = 6
    empty_share: float = 0.1

    def __post_init__(self) -> None:
        if self.image_size < 32:
            raise ConfigError(f"ShapesSpec.image_size needs at least 32 pixels; got {self.image_size}")
        if not 0 < self.min_side < self.max_side <= 1:
            raise ConfigError(
                "ShapesSpec needs 0 < min_side < max_side <= 1 (shares of image_size); "
                f"got min_side {self.min_side:g} and max_side {self.max_side:g}"
            )
        if self.min_side * self.image_size < 6:
            raise ConfigError(
                "ShapesSpec needs min_side * image_size of at least 6 pixels, or classes look alike; "
                f"got {self.min_side:g} * {self.image_size} = {self.min_side * self.image_size:g}"
            )
        if self.max_objects < 1:
            raise ConfigError(
                f"ShapesSpec.max_objects needs at least 1; got {self.max_objects} "
                "(empty_share=1 gives images without objects)"
            )
        if not 0 <= self.empty_share <= 1:
            raise ConfigError(f"ShapesSpec.empty_share needs [0, 1]; got {self.empty_share:g}")


def draw_scene(spec: ShapesSpec, seed: int, split: str, index: int) -> tuple[NDArray[np.uint8], GroundTruth]:
    """Draw one image: `[image_size, image_size, 3]` RGB, and its objects, the hindmost first.

    Args:
        seed: >= 0.
        split: any name; splits share no image.
        index: number of the image in its split, >= 0.

    Raises:
        ConfigError: a negative seed or index.
    """
    check_seed("draw_scene", seed)
    if index < 0:
        raise ConfigError(f"draw_scene needs index >= 0; got {index}")
    entropy = np.random.SeedSequence([seed, zlib.crc32(split.encode()), index])
    rng = np.random.Generator(np.random.PCG64(entropy))
    objects = [] if _is_empty(spec, index) else _place_objects(rng, spec)
    canvas = _background(rng, spec.image_size)
    for shape in objects:
        _paint(rng, canvas, shape)
    return _photograph(rng, canvas), _ground_truth(objects)


def check_seed(who: str, seed: int) -> None:
    if seed < 0:
        raise ConfigError(f"{who} needs seed >= 0; got {seed}")


def _is_empty(spec: ShapesSpec, index: int) -> bool:
    # Multiples of the golden ratio are spread evenly but not periodically: every run of images has its
    # share of empty ones, and so has every n-th image.
    return (0.5 + index * (math.sqrt(5) - 1) / 2) % 1 < spec.empty_share


# --- geometry ---


@dataclass(frozen=True, eq=False)
class _Shape:
    kind: str
    outline: Float64Array  # [V, 2] corners in pixels from (left, top)
    coverage: Float32Array  # [h, w] share of each pixel inside the outline, from (left, top)
    solid: NDArray[np.bool_]  # [h, w] the pixels at least half inside
    left: int = 0
    top: int = 0

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.coverage.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    @property
    def box(self) -> Float64Array:
        place = np.array([self.left, self.top], np.float64)
        return np.concatenate([place + self.outline.min(axis=0), place + self.outline.max(axis=0)])

    @property
    def area(self) -> float:
        (x1, y1), (x2, y2) = self.outline.T, _next_corners(self.outline).T
        return float(abs((x1 * y2 - y1 * x2).sum()) / 2)


def _ground_truth(objects: list[_Shape]) -> GroundTruth:
    if not objects:
        return GroundTruth.empty()
    return GroundTruth(
        boxes=np.array([shape.box for shape in objects], np.float32),
        classes=np.array([CLASSES.names.index(shape.kind) for shape in objects]),
        areas=np.array([shape.area for shape in objects], np.float32),
    )


def _place_objects(rng: np.random.Generator, spec: ShapesSpec) -> list[_Shape]:
    """Choose the objects of an image, the hindmost first, each visible by half or more."""
    count = int(rng.integers(1, spec.max_objects + 1))
    sides = np.exp(rng.uniform(math.log(spec.min_side), math.log(spec.max_side), count)) * spec.image_size
    # Large objects tend to lie behind: the other way round they would hide the small ones, be refused, and
    # the sides would no longer be log-uniform. Near sizes lie in either order.
    depth = sides * np.exp(rng.uniform(-0.4, 0.4, count))
    # The foremost object of each pixel, from 1; 0 where there is none.
    owner = np.zeros((spec.image_size, spec.image_size), np.int32)
    objects: list[_Shape] = []
    whole, visible = np.zeros(count + 1), np.zeros(count + 1)
    for side in sides[np.argsort(-depth, kind="stable")]:
        kind = CLASSES.names[rng.integers(len(CLASSES))]
        shape = _new_shape(rng, kind, float(side), spec.image_size)
        for _ in range(PLACEMENTS):
            shape = _moved(rng, shape, spec.image_size)
            hides = np.bincount(owner[shape.window][shape.solid], minlength=count + 1)
            if (visible - hides >= MIN_VISIBLE * whole)[1:].all():
                objects.append(shape)
                owner[shape.window][shape.solid] = len(objects)
                visible -= hides
                visible[len(objects)] = whole[len(objects)] = shape.solid.sum()
                break
    return objects


def _new_shape(rng: np.random.Generator, kind: str, side: float, image_size: int) -> _Shape:
    """Draw a shape, not placed yet; the geometric mean of its width and height is `side`."""
    limit = math.log(min(MAX_ASPECT, (image_size / side) ** 2))
    stretch = math.exp(rng.uniform(-limit, limit) / 2)
    size = np.minimum([side * stretch, side / stretch], image_size)
    # The part of the place that is less than a pixel is chosen once: coverage is costly, moving it is not.
    corner = rng.uniform(0, np.minimum(1, image_size - size))
    outline = np.minimum(corner + _unit_outline(rng, kind) * size, image_size)
    width, height = (math.ceil(edge) for edge in outline.max(axis=0))
    coverage = _coverage(outline, height, width)
    return _Shape(kind, outline, coverage, coverage >= 0.5)


def _moved(rng: np.random.Generator, shape: _Shape, image_size: int) -> _Shape:
    height, width = shape.coverage.shape
    left, top = rng.random(2) * (image_size - width + 1, image_size - height + 1)
    return replace(shape, left=int(left), top=int(top))


def _unit_outline(rng: np.random.Generator, kind: str) -> Float64Array:
    """Return `[V, 2]` corners of a shape, turned by chance, with extent 0..1 in x and in y."""
    turn = rng.uniform(-SQUARE_TILT, SQUARE_TILT) if kind == "square" else rng.uniform(0, 2 * math.pi)
    corners = {"disk": 48, "square": 4, "triangle": 3}[kind]
    points = _ring(corners, turn + math.pi / 4)
    low, high = points.min(axis=0), points.max(axis=0)
    unit: Float64Array = (points - low) / (high - low)
    return unit


def _ring(corners: int, turn: float) -> Float64Array:
    angles = turn + np.arange(corners) * (2 * math.pi / corners)
    ring: Float64Array = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return ring


def _coverage(outline: Float64Array, height: int, width: int) -> Float32Array:
    """Return `[height, width]` shares of pixels inside a polygon (even-odd rule).

    Every pixel row is sampled at 4 heights; along a sample line the covered length is exact. This is
    our own so that no drawing library's rounding moves an edge away from its box.
    """
    x1, y1 = outline.astype(np.float32).T
    x2, y2 = _next_corners(outline).astype(np.float32).T
    lines = (np.arange(height * SUBROWS, dtype=np.float32)[:, None] + np.float32(0.5)) / SUBROWS
    crossed = (y1 <= lines) != (y2 <= lines)
    slope = (x2 - x1) / np.where(y1 == y2, np.float32(1), y2 - y1)
    crossings = np.where(crossed, x1 + (lines - y1) * slope, np.float32(width))
    crossings.sort(axis=1)
    pixels = np.arange(width, dtype=np.float32)
    total = np.zeros((height, width), np.float32)
    for first in range(0, int(crossed.sum(axis=1).max()), 2):
        enter, leave = crossings[:, first : first + 1], crossings[:, first + 1 : first + 2]
        # Covered length of [pixel, pixel + 1] is the difference of two ramps.
        span = _ramp(leave - pixels) - _ramp(enter - pixels)
        total += span.reshape(height, SUBROWS, width).mean(axis=1)
    return total


def _next_corners(outline: Float64Array) -> Float64Array:
    return np.concatenate([outline[1:], outline[:1]])


def _ramp(values: Float32Array) -> Float32Array:
    return np.minimum(np.maximum(values, 0, out=values), 1, out=values)


# --- paint ---


def _background(rng: np.random.Generator, size: int) -> Float32Array:
    """Return `[3, size, size]`: a texture with strokes, arcs and scribbles, none of them a filled shape."""
    texture, (first, second) = _texture(rng, size, size), _two_colours(rng)
    canvas = first + texture * (second - first)
    image = Image.fromarray(_interleaved(canvas))
    for _ in range(int(rng.integers(0, 4))):
        mask = Image.new("L", (2 * size, 2 * size))
        for _ in range(int(rng.integers(1, 6))):
            _stroke(rng, ImageDraw.Draw(mask), 2 * size)
        image.paste(_ink(rng), mask=mask.reduce(2))
    return np.moveaxis(np.asarray(image), 2, 0).astype(np.float32, order="C")


def _stroke(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int) -> None:
    centre, reach = rng.uniform(0, size, 2), rng.uniform(0.05, 0.5) * size
    # Thin for its length: a short thick stroke is a filled shape.
    width = max(2, round(min(rng.uniform(0.005, 0.03) * size, 0.15 * reach)))
    if rng.random() < 0.4:
        start, extent = rng.uniform(0, 360), rng.uniform(60, 270)
        corners = [*(centre - reach / 2), *(centre + reach / 2)]
        draw.arc([float(c) for c in corners], start, start + extent, fill=255, width=width)
    else:
        points = centre + rng.uniform(-reach, reach, (int(rng.integers(2, 7)), 2))
        draw.line([(float(x), float(y)) for x, y in points], fill=255, width=width, joint="curve")


def _paint(rng: np.random.Generator, canvas: Float32Array, shape: _Shape) -> None:
    beneath = canvas[:, *shape.window]
    weight = float(shape.coverage.sum())
    behind = (beneath * shape.coverage).sum(axis=(1, 2)) / weight
    texture = _texture(rng, *shape.coverage.shape, kinds=PLAIN_KINDS)
    share = float((texture * shape.coverage).sum()) / weight
    first, second = _two_colours(rng)
    while np.linalg.norm((first + share * (second - first)).ravel() - behind) < MIN_CONTRAST:
        first, second = _two_colours(rng)
    beneath += shape.coverage * (first + texture * (second - first) - beneath)


def _two_colours(rng: np.random.Generator) -> tuple[Float32Array, Float32Array]:
    """Draw the ends of a texture, each `[3, 1, 1]`: any colour, and one on the way from it to any other."""
    first, other = rng.uniform(0, 255, (2, 3, 1, 1)).astype(np.float32)
    return first, first + np.float32(rng.uniform(0.1, 0.6)) * (other - first)


def _ink(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3)
    return int(red), int(green), int(blue)


def _texture(rng: np.random.Generator, height: int, width: int, *, kinds: int = 4) -> Float32Array:
    """Return `[height, width]` in [0, 1]: plain, a gradient, stripes, or smooth noise (the first `kinds` of
    them), equally often."""
    kind = rng.integers(kinds)
    texture: Float32Array
    if kind == 0:
        texture = np.zeros((height, width), np.float32)
    elif kind == 3:
        cell = math.exp(rng.uniform(math.log(2), math.log(48)))
        grid = rng.random((math.ceil(height / cell) + 1, math.ceil(width / cell) + 1), dtype=np.float32)
        smooth = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        texture = np.clip(np.asarray(smooth), 0, 1)
    else:
        angle = rng.uniform(0, 2 * math.pi)
        x = np.arange(width, dtype=np.float32) * np.float32(math.cos(angle))
        y = np.arange(height, dtype=np.float32)[:, None] * np.float32(math.sin(angle))
        along = x - x.min() + y - y.min()
        if kind == 1:
            texture = along / along.max()
        else:
            period = math.exp(rng.uniform(math.log(4), math.log(32)))
            texture = 0.5 + 0.5 * np.sin(along * np.float32(2 * math.pi / period))
    return texture


def _photograph(rng: np.random.Generator, canvas: Float32Array) -> NDArray[np.uint8]:
    """Add grain to every other image, and round."""
    if rng.random() < 0.5:
        grain = rng.standard_normal(canvas.shape[1:], dtype=np.float32)
        canvas = canvas + grain * np.float32(rng.uniform(2, 8))
    return _interleaved(canvas)


def _interleaved(canvas: Float32Array) -> NDArray[np.uint8]:
    rounded = np.clip(canvas + np.float32(0.5), 0, 255).astype(np.uint8)
    return np.stack(list(rounded), axis=2)
