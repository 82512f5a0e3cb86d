"""`bench convolution`: our 3x3 convolution beside torch's, on both sides of `model.convolution`'s limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from retinanet import kernels
from retinanet.anchors import CPU
from retinanet.bench.measuring import Contest

# Channels and side of the image: residual blocks, heads and pyramid at 512 pixels.
SHAPES = ((64, 128), (128, 64), (256, 64), (256, 32), (256, 8), (512, 16))
BATCH_SIZE = 2
# A result is as good as torch's, too, where it is so many roundings of float32 of the largest value from the exact one.
ROUNDINGS, EPSILON = 8, 2.0**-23


def contests(shapes: Sequence[tuple[int, int]] = SHAPES, *, device: torch.device = CPU) -> Iterator[Contest]:
    """Ours (Winograd) and torch's (oneDNN), channels_last, fp32, forward and backward.

    `equal` says that ours is at most twice as far from the result in float64 as torch's, or within `ROUNDINGS`. There
    is no contest on CUDA, where ours is torch's.
    """
    if device.type != "cpu" or not kernels.available("cpu"):
        return
    for channels, side in shapes:
        of = _drawn(channels, side)

        def ours(of: Sequence[Tensor] = of) -> list[Tensor]:
            # Not `Convolution3x3`, which leaves to torch what ours would lose.
            return _step(kernels.convolve3x3, *of)

        def theirs(of: Sequence[Tensor] = of) -> list[Tensor]:
            return _step(_torchs, *of)

        exact = _step(_torchs, *(tensor.double() for tensor in of))
        yield Contest(
            "convolution",
            f"{channels} to {channels} channels, {side} x {side}, batch {BATCH_SIZE}",
            ours,
            {"torch": theirs},
            {"torch": _agree(ours(), theirs(), exact)},
        )


def _drawn(channels: int, side: int) -> tuple[Tensor, ...]:
    """Return images, weight, bias and the gradient of the output."""
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(memory_format=torch.channels_last)

    images, gradient = (drawn(BATCH_SIZE, channels, side, side) for _ in range(2))
    weight = drawn(channels, channels, 3, 3)
    return images, weight, torch.randn(channels, generator=generator), gradient


def _torchs(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return conv2d(images, weight, bias, padding=1)


def _step(
    convolve: Callable[[Tensor, Tensor, Tensor], Tensor],
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    gradient: Tensor,
) -> list[Tensor]:
    """Return the output and the gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (images, weight, bias)]
    out = convolve(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def _agree(ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    """Return whether ours is at most twice as far from float64 as torch's, or as few roundings of the largest value as
    count for nothing: how torch adds up depends on the processor.
    """
    return all(
        (a - c).abs().max() <= max(2 * (b - c).abs().max(), ROUNDINGS * EPSILON * c.abs().max())
        for a, b, c in zip(ours, theirs, exact, strict=True)
    )
