"""Resize, normalise and pad in one pass over an image, to the bit what Pillow's resize and NumPy give one by one.

Pillow's resize of 8-bit images is exact arithmetic: weights are whole numbers of 22 bits, and what is resampled along
rows is rounded to uint8 before columns (https://github.com/python-pillow/Pillow/blob/main/src/libImaging/Resample.c).
So its pixels can be had again. torch's uint8 resize has weights of 16 bits, and differs by one in some pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from retinanet.kernels.cpu.compiled import compiled
from retinanet.kernels.cpu.threads import in_parallel

PRECISION = 22
HALF = 1 << (PRECISION - 1)

Taps: TypeAlias = tuple[NDArray[np.int32], NDArray[np.int32]]
Image: TypeAlias = NDArray[np.uint8]

# Pillow 13 resamples some images that become lower along columns first: such as are about twice as high as wide.
ROWS_FIRST = 1.8

i32, f32 = np.int32, np.float32


def fill(
    batch: NDArray[np.float32],
    images: list[Image],
    sizes: list[tuple[int, int]],
    factor: NDArray[np.float32],
    offset: NDArray[np.float32],
) -> None:
    """Write resized images, times `factor`, plus `offset`, into a batch, and zeros right of and below them.

    Args:
        batch: `[B, H, W, 3]`, C-contiguous.
        images: uint8 `[h, w, 3]`, of any strides; one that is mirrored left to right as a view costs nothing more.
        sizes: (width, height) of each after resizing.
        factor, offset: `[3]`, of each channel.
    """
    width = batch.shape[2]
    factors, offsets = np.tile(factor, width), np.tile(offset, width)

    def work(_: int, start: int, stop: int) -> None:
        for i in range(start, stop):
            image, (new_width, new_height) = images[i], sizes[i]
            if not rows_first(image.shape[:2], new_height):
                picture = PIL.Image.fromarray(image)
                image = np.asarray(picture.resize(sizes[i], PIL.Image.Resampling.BILINEAR))
            mirrored = image.strides[1] < 0
            image = np.ascontiguousarray(image[:, ::-1] if mirrored else image)
            height, width, _ = image.shape
            _resize(
                image.reshape(height, 3 * width),
                *taps(width, new_width, mirrored),
                *taps(height, new_height, False),
                factors,
                offsets,
                batch[i].reshape(len(batch[i]), -1),
            )

    in_parallel(work, len(images), least=1)


def rows_first(shape: tuple[int, int], new_height: int) -> bool:
    """Return whether every Pillow resamples along rows first, as the kernel does, where both sides change alike."""
    height, width = shape
    return new_height >= height or height <= ROWS_FIRST * width


@lru_cache(maxsize=256)
def taps(old: int, new: int, mirrored: bool) -> Taps:
    """Return of Pillow's bilinear filter the first source index `[new]` of each target pixel and its weights
    `[new, K]`, in units of 2^-22; K is the same for all.

    Args:
        mirrored: the source is read backwards, as if it had been mirrored.
    """
    scale = old / new
    support = max(1.0, scale)
    centre = (np.arange(new) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + support + 0.5).astype(np.int64), old)
    count = int((stop - first).max())
    source = first[:, None] + np.arange(count)
    distance = np.abs((source - centre[:, None] + 0.5) * (1.0 / support))
    weights = np.where((distance < 1) & (source < stop[:, None]), 1 - distance, 0.0)
    total = np.zeros(new)
    for column in weights.T:  # in Pillow's order: the last bit of a sum depends on it
        total += column
    whole = (weights / total[:, None] * (1 << PRECISION) + 0.5).astype(np.int32)
    # Windows that would end behind the last pixel begin earlier, with weights of zero.
    late = np.maximum(first + count - old, 0)
    first -= late
    for row in np.flatnonzero(late):
        whole[row] = np.roll(whole[row], late[row])
    if mirrored:
        first, whole = old - count - first, whole[:, ::-1]
    result = first.astype(np.int32), np.ascontiguousarray(whole)
    for array in result:
        array.setflags(write=False)
    return result


@compiled()
def _resize(image, columns, of_columns, rows, of_rows, factors, offsets, out):
    """Write an image `[h, 3w]` into `out` `[H, 3W]`: each row resampled once, and kept while rows below need it."""
    count, length = of_rows.shape[1], 3 * len(columns)
    kept = np.empty((count, length), np.uint8)
    done = rows[0]
    for y in range(len(rows)):
        while done < rows[y] + count:
            _across(image[done], columns, of_columns, kept[done % count])
            done += 1
        if count == 2:
            above, below = kept[rows[y] % 2], kept[(rows[y] + 1) % 2]
            _between(above, below, of_rows[y, 0], of_rows[y, 1], factors, offsets, out[y])
        else:
            _down(kept, rows[y], of_rows[y], factors, offsets, out[y])
        out[y, length:] = 0
    out[len(rows) :] = 0


@compiled()
def _across(row, columns, weights, out):
    """Resample one row `[3w]` into `[3W]`."""
    if weights.shape[1] == 2:  # every enlargement
        for x in range(len(columns)):
            at, left, right = 3 * columns[x], weights[x, 0], weights[x, 1]
            for c in range(3):
                total = i32(i32(row[at + c]) * left) + i32(i32(row[at + 3 + c]) * right)
                out[3 * x + c] = i32(total + HALF) >> PRECISION
        return
    for x in range(len(columns)):
        red = green = blue = i32(HALF)
        for k in range(weights.shape[1]):
            at, weight = 3 * (columns[x] + k), weights[x, k]
            red = i32(red + i32(row[at]) * weight)
            green = i32(green + i32(row[at + 1]) * weight)
            blue = i32(blue + i32(row[at + 2]) * weight)
        out[3 * x] = red >> PRECISION
        out[3 * x + 1] = green >> PRECISION
        out[3 * x + 2] = blue >> PRECISION


@compiled()
def _between(above, below, of_above, of_below, factors, offsets, out):
    for j in range(len(above)):
        total = i32(i32(above[j]) * of_above) + i32(i32(below[j]) * of_below)
        out[j] = f32(i32(i32(total + HALF) >> PRECISION)) * factors[j] + offsets[j]


@compiled()
def _down(kept, first, weights, factors, offsets, out):
    count, length = kept.shape
    totals = np.full(length, HALF, np.int32)
    for k in range(count):
        row, weight = kept[(first + k) % count], weights[k]
        for j in range(length):
            totals[j] = i32(totals[j] + i32(row[j]) * weight)
    for j in range(length):
        out[j] = f32(totals[j] >> PRECISION) * factors[j] + offsets[j]
