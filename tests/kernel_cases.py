"""Cases that the tests of several kernels share, and circumstances to try them in: threads, another process."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
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


def run_python(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if run.returncode != 0:
        pytest.fail(f"{run.stdout}{run.stderr}", pytrace=False)
    return run


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_boxes(*shape: int, seed: int, extent: float = 240.0) -> Tensor:
    corner, size = torch.rand(2, *shape, 2, generator=seeded(seed))
    return torch.cat((corner * extent, corner * extent + 8 + size * 80), dim=-1)


def random_mask(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed)) < 0.3
