"""Cases that the tests of several kernels share, and the numbers of threads to try them with."""

from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def torch_threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_boxes(*shape: int, seed: int, extent: float = 240.0) -> Tensor:
    corner, size = torch.rand(2, *shape, 2, generator=seeded(seed))
    return torch.cat((corner * extent, corner * extent + 8 + size * 80), dim=-1)


def random_mask(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed)) < 0.3
