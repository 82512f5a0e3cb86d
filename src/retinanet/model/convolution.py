"""The 3x3 convolution that most of the arithmetic is in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retinanet import kernels

# Products of input and output channels below which transforming costs what multiplying less saves:
# `retinanet bench convolution` times both sides of this limit and of the next.
LEAST_CHANNELS = 96 * 96
# Tiles of 2x2 outputs in a batch below which the matrix products are too thin.
LEAST_TILES = 64


class Convolution3x3(nn.Conv2d):
    """`nn.Conv2d`, computed on a CPU by Winograd's algorithm where that is faster: less than half the products.

    The result differs in rounding alone, and not for the worse. What the fast path does not take (another size,
    stride or grouping, bfloat16, CUDA, export) is torch's own convolution.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Map `[B, Ci, H, W]` to `[B, Co, H', W']`."""
        if self._has_fast_path(images):
            return kernels.convolve3x3(images, self.weight, self.bias)
        return super().forward(images)

    def _has_fast_path(self, images: Tensor) -> bool:
        return (
            self.kernel_size == (3, 3)
            and self.stride == self.dilation == (1, 1)
            and self.padding == (1, 1)
            and self.padding_mode == "zeros"
            and self.groups == 1
            and self.in_channels * self.out_channels >= LEAST_CHANNELS
            and images.ndim == 4
            and len(images) * ((images.shape[2] + 1) // 2) * ((images.shape[3] + 1) // 2) >= LEAST_TILES
            and images.dtype == self.weight.dtype == torch.float32
            and images.device.type
            == "cpu"  # asked first: the next question has no answer for a "meta" device
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_exporting()
            and images.is_contiguous(memory_format=torch.channels_last)
            and kernels.usable(images, self.weight, cuda=False)
        )


def with_fast_convolutions(network: nn.Module) -> nn.Module:
    """Put `Convolution3x3` in the place of every plain 3x3 convolution; parameters and their names stay."""
    for module in network.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (3, 3):
            # The same object in another class: whoever else holds it, or its parameters, goes on holding it.
            module.__class__ = Convolution3x3
    return network
