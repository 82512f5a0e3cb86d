"""Devices and precision: what "auto" means, decided when asked and never at import."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch

from retinanet.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16"]


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device needs auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name} needs a CUDA device; torch sees none. Use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name} does not exist; torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def require_cpp_compiler() -> None:
    """Refuse where torch.compile would find no C++ compiler: it tries the one in CXX, or else one by platform."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", usual)
    if not any(map(shutil.which, (compiler, *compiler.split()[:1]))):  # the latter for "ccache g++"
        raise ConfigError(
            f"--compile needs a C++ compiler on a CPU; found no {compiler or usual}. "
            "Install it, name another in CXX, or leave out --compile"
        )


def resolve_precision(device: torch.device, precision: Precision) -> Literal["fp32", "bf16"]:
    """Return "bf16" for "auto" where the device computes bfloat16 natively, else "fp32"."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    # Without these instructions bf16 is emulated, several times slower than fp32.
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return "bf16" if native else "fp32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Return the context in which convolutions run in the given precision."""
    enabled = resolve_precision(device, precision) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def fix_cublas_memory() -> None:
    """Let cuBLAS compute the same whatever else the device does; torch refuses products of matrices on CUDA without it
    where results may not depend on timing. cuBLAS asks once, when it begins: to be called before CUDA is used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def fix_matrix_products() -> None:
    """Let MKL add in the same order in every call. Otherwise a product with a single column changes from call to call
    where there are two threads or more: the gradient of a convolution with one place, for one image, is such a product.
    MKL asks once, when it begins: to be called before anything is computed.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO")


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Make torch refuse operations whose result depends on timing, for as long as the block runs."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        fix_cublas_memory()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
