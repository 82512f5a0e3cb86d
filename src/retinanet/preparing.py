"""From decoded images to the network's input: resized, normalised, padded, one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from retinanet import kernels
from retinanet.errors import ConfigError
from retinanet.images import Geometry, Preprocessing, UInt8Array, stack


def prepare_batch(
    images: Sequence[UInt8Array], preprocessing: Preprocessing
) -> tuple[Float32[Tensor, "B 3 H W"], list[Geometry]]:
    """Return a batch `[B, 3, H, W]` float32 on the CPU, and for each image the map between its boxes and the batch's.

    The same numbers as of `Preprocessing.prepare` and `stack`, but each written once, to its place in the batch, and
    in the memory format that networks run in here, channels_last.

    Args:
        images: uint8 `[h, w, 3]` RGB, as `decode` returns them, or views of such.

    Raises:
        ImageError: one is of another kind.
        ConfigError: there is none.
    """
    if not images:
        raise ConfigError("prepare_batch needs at least one image; got none")
    if preprocessing.resize != "antialias" or not kernels.available("cpu"):
        return plain_prepare_batch(images, preprocessing)
    geometries = [preprocessing.geometry(image) for image in images]
    return kernels.prepare_images(images, [one.resized for one in geometries], preprocessing), geometries


def plain_prepare_batch(
    images: Sequence[UInt8Array], preprocessing: Preprocessing
) -> tuple[Float32[Tensor, "B 3 H W"], list[Geometry]]:
    """Do the same image by image, with Pillow and NumPy."""
    prepared = [preprocessing.prepare(image) for image in images]
    batch = torch.from_numpy(stack([pixels for pixels, _ in prepared], preprocessing.divisor))
    return batch.to(memory_format=torch.channels_last), [geometry for _, geometry in prepared]
