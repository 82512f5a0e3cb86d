"""3x3 convolution with stride 1 by Winograd's minimal filtering F(2x2, 3x3).

Four outputs of a 2x2 tile cost 16 products a pair of channels in place of 36: the 4x4 input tile d and the filter g
are transformed by additions, multiplied element by element, summed over input channels (16 matrix products over all
tiles), and transformed back:

    Y = A^T [ (G g G^T) * (B^T d B) ] A

Memory beyond input and output is a few megabytes: tiles are worked on some rows at a time.

Reference: Lavin, Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, Section 4.1.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinanet.kernels.cpu.compiled import compiled
from retinanet.kernels.cpu.memory import recycled
from retinanet.kernels.cpu.threads import in_parallel

# Tiles whose transforms are in memory at once: enough for fast matrix products, few enough for the last cache.
TILES = 512
_G = torch.tensor(
    [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float32, device="cpu"
)
# g -> G g G^T as a matrix on the nine places of a filter, and the order of the sixteen after rotating it by 180
# degrees, which exchanges the first and the last row of G g, and the first and the last column.
FILTER_TRANSFORM = torch.kron(_G, _G)
ROTATED = [4 * i + j for i in (3, 1, 2, 0) for j in (3, 1, 2, 0)]


def convolve(images: Tensor, weight: Tensor) -> Tensor:
    """Return the convolution `[B, Co, H, W]`, channels_last, of images `[B, Ci, H, W]` and weight `[Co, Ci, 3, 3]`."""
    return _convolve(images, _filters(weight))


def image_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the images: the convolution of the output's with the filters rotated by 180 degrees."""
    return _convolve(gradient, _filters(weight)[ROTATED].transpose(1, 2))


def weight_gradient(images: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of the weight `[Co, Ci, 3, 3]`, channels_last."""
    batch, channels, height, width = images.shape
    outputs = gradient.shape[1]
    x, g = _pixels(images), _pixels(gradient)
    total = torch.zeros((16, outputs, channels), dtype=torch.float32, device="cpu")
    rows = -(-height // 2)
    chunks = _chunks(batch, height, width)
    of_images, of_gradient = _room(chunks, channels), _room(chunks, outputs)
    for first, last, tiles in chunks:
        into, out = _matrices(of_images, tiles, channels), _matrices(of_gradient, tiles, outputs)
        _spread(x, into, first, last)
        o = out.numpy()
        in_parallel(
            lambda _, start, stop, first=first, o=o: _gradient_tiles(  # type: ignore[misc]
                g, o, first, first + start, first + stop, rows
            ),
            last - first,
            least=1,
        )
        total.baddbmm_(out.transpose(1, 2), into)
    places = torch.matmul(FILTER_TRANSFORM.t(), total.view(16, -1))
    return places.view(3, 3, outputs, channels).permute(2, 0, 1, 3).contiguous().permute(0, 3, 1, 2)


def _filters(weight: Tensor) -> Tensor:
    """Return G g G^T of every filter, `[16, Ci, Co]`."""
    places = weight.detach().permute(0, 2, 3, 1).reshape(len(weight), 9, -1)
    return torch.matmul(FILTER_TRANSFORM, places).permute(1, 2, 0)


def _convolve(images: Tensor, filters: Tensor) -> Tensor:
    batch, channels, height, width = images.shape
    outputs = filters.shape[2]
    out = torch.empty((batch, height, width, outputs), dtype=torch.float32, device="cpu")
    x, y = _pixels(images), out.numpy()
    chunks = _chunks(batch, height, width)
    of_images, of_output = _room(chunks, channels), _room(chunks, outputs)
    for first, last, tiles in chunks:
        into, product = _matrices(of_images, tiles, channels), _matrices(of_output, tiles, outputs)
        _spread(x, into, first, last)
        torch.bmm(into, filters, out=product)
        _gather(product, y, first, last)
    return out.permute(0, 3, 1, 2)


def _spread(x: NDArray[np.float32], into: Tensor, first: int, last: int) -> None:
    v, rows = into.numpy(), -(-x.shape[1] // 2)
    in_parallel(
        lambda _, start, stop: _input_tiles(x, v, first, first + start, first + stop, rows),
        last - first,
        least=1,
    )


def _gather(product: Tensor, y: NDArray[np.float32], first: int, last: int) -> None:
    m, rows = product.numpy(), -(-y.shape[1] // 2)
    in_parallel(
        lambda _, start, stop: _output_tiles(m, y, first, first + start, first + stop, rows),
        last - first,
        least=1,
    )


def _chunks(batch: int, height: int, width: int) -> list[tuple[int, int, int]]:
    """Cut the rows of tiles of all images: first row, row behind the last, and how many tiles that is."""
    rows, columns = batch * -(-height // 2), -(-width // 2)
    step = max(1, TILES // max(1, columns))
    return [
        (first, min(first + step, rows), (min(first + step, rows) - first) * columns)
        for first in range(0, rows, step)
    ]


def _room(chunks: list[tuple[int, int, int]], channels: int) -> Tensor:
    """Return memory for the matrices of the largest chunk."""
    most = max((tiles for _, _, tiles in chunks), default=0)
    return recycled(torch.Size((16 * most * channels,)), torch.float32, scratch=True)


def _matrices(room: Tensor, tiles: int, channels: int) -> Tensor:
    return room[: 16 * tiles * channels].view(16, tiles, channels)


def _pixels(images: Tensor) -> NDArray[np.float32]:
    """Return the view `[B, H, W, C]`."""
    return images.detach().permute(0, 2, 3, 1).contiguous().numpy()


@compiled()
def _input_tiles(x, v, first, start, stop, rows):
    """Write B^T d B of the 4x4 tiles of some rows of tiles: first along the columns of whole rows of pixels."""
    height, width, channels = x.shape[1], x.shape[2], x.shape[3]
    columns = (width + 1) // 2
    wide = (2 * columns + 2) * channels
    line = np.zeros((4, wide), np.float32)
    t = np.empty((4, wide), np.float32)
    for row in range(start, stop):
        image, top = row // rows, 2 * (row % rows) - 1
        for i in range(4):
            if 0 <= top + i < height:
                _copy(x[image, top + i].reshape(width * channels), line[i, channels : (width + 1) * channels])
            else:
                line[i, :] = 0
        _minus(line[0], line[2], t[0])
        _plus(line[1], line[2], t[1])
        _minus(line[2], line[1], t[2])
        _minus(line[1], line[3], t[3])
        at = (row - first) * columns
        for i in range(4):
            for s in range(columns):
                a = t[i, 2 * s * channels : (2 * s + 1) * channels]
                b = t[i, (2 * s + 1) * channels : (2 * s + 2) * channels]
                c = t[i, (2 * s + 2) * channels : (2 * s + 3) * channels]
                d = t[i, (2 * s + 3) * channels : (2 * s + 4) * channels]
                _minus(a, c, v[4 * i, at + s])
                _plus(b, c, v[4 * i + 1, at + s])
                _minus(c, b, v[4 * i + 2, at + s])
                _minus(b, d, v[4 * i + 3, at + s])


@compiled()
def _output_tiles(m, y, first, start, stop, rows):
    """Write A^T m A to the pixels of some rows of tiles."""
    height, width, channels = y.shape[1], y.shape[2], y.shape[3]
    columns = (width + 1) // 2
    u = np.empty((2, 4, columns * channels), np.float32)
    for row in range(start, stop):
        image, top = row // rows, 2 * (row % rows)
        at = (row - first) * columns
        for j in range(4):
            m0, m1 = m[j, at : at + columns].reshape(-1), m[4 + j, at : at + columns].reshape(-1)
            m2, m3 = m[8 + j, at : at + columns].reshape(-1), m[12 + j, at : at + columns].reshape(-1)
            _plus_plus(m0, m1, m2, u[0, j])
            _minus_minus(m1, m2, m3, u[1, j])
        for i in range(min(2, height - top)):
            for s in range(columns):
                lo, hi = s * channels, (s + 1) * channels
                left = y[image, top + i, 2 * s]
                _plus_plus(u[i, 0, lo:hi], u[i, 1, lo:hi], u[i, 2, lo:hi], left)
                if 2 * s + 1 < width:
                    right = y[image, top + i, 2 * s + 1]
                    _minus_minus(u[i, 1, lo:hi], u[i, 2, lo:hi], u[i, 3, lo:hi], right)


@compiled()
def _gradient_tiles(g, out, first, start, stop, rows):
    """Write A g A^T of the 2x2 tiles of some rows of tiles."""
    height, width, channels = g.shape[1], g.shape[2], g.shape[3]
    columns = (width + 1) // 2
    line = np.zeros((2, 2 * columns * channels), np.float32)
    t = np.empty((4, 2 * columns * channels), np.float32)
    for row in range(start, stop):
        image, top = row // rows, 2 * (row % rows)
        for i in range(2):
            if top + i < height:
                _copy(g[image, top + i].reshape(width * channels), line[i, : width * channels])
            else:
                line[i, :] = 0
        _copy(line[0], t[0])
        _plus(line[0], line[1], t[1])
        _minus(line[0], line[1], t[2])
        _negative(line[1], t[3])
        at = (row - first) * columns
        for i in range(4):
            for s in range(columns):
                a = t[i, 2 * s * channels : (2 * s + 1) * channels]
                b = t[i, (2 * s + 1) * channels : (2 * s + 2) * channels]
                _copy(a, out[4 * i, at + s])
                _plus(a, b, out[4 * i + 1, at + s])
                _minus(a, b, out[4 * i + 2, at + s])
                _negative(b, out[4 * i + 3, at + s])


@compiled(inline=True)
def _copy(a, out):
    for k in range(len(out)):
        out[k] = a[k]


@compiled(inline=True)
def _negative(a, out):
    for k in range(len(out)):
        out[k] = -a[k]


@compiled(inline=True)
def _plus(a, b, out):
    for k in range(len(out)):
        out[k] = a[k] + b[k]


@compiled(inline=True)
def _minus(a, b, out):
    for k in range(len(out)):
        out[k] = a[k] - b[k]


@compiled(inline=True)
def _plus_plus(a, b, c, out):
    for k in range(len(out)):
        out[k] = a[k] + b[k] + c[k]


@compiled(inline=True)
def _minus_minus(a, b, c, out):
    for k in range(len(out)):
        out[k] = a[k] - b[k] - c[k]
