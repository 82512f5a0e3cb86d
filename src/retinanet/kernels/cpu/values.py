"""float32 and bfloat16 tensors as arrays for kernels."""

from __future__ import annotations

import numpy as np
import torch
from numba import types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor


def flat_array(tensor: Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
    """Return a flat view of float32 values, or of the bits of bfloat16 ones, which NumPy does not have.

    They are the upper half of a float32's.
    """
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()


def as_float32(values, room):
    """Return, inside a kernel, the values themselves, or bfloat16 ones widened into `room`."""


def room_for(out, room):
    """Return, inside a kernel, where to compute what goes to `out`: there if it is float32, else in `room`.

    An empty `out` wants no result, and gets room all the same.
    """


def store(computed, out):
    """Bring, inside a kernel, what was computed in the room to `out`, rounded to nearest even."""


@overload(as_float32)
def _as_float32(values, room):
    if values.dtype == types.float32:
        return lambda values, room: values

    def widen(values, room):
        bits = room.view(np.uint32)
        for i in range(len(values)):
            bits[i] = np.uint32(values[i]) << np.uint32(16)
        return room[: len(values)]

    return widen


@overload(room_for)
def _room_for(out, room):
    if out.dtype == types.float32:
        return lambda out, room: out if len(out) else room
    return lambda out, room: room


@overload(store)
def _store(computed, out):
    if out.dtype == types.float32:
        return lambda computed, out: None

    def narrow(computed, out):
        bits = computed.view(np.uint32)
        for i in range(len(out)):
            b = bits[i]
            rounded = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            out[i] = np.uint16(rounded) if computed[i] == computed[i] else np.uint16(0x7FC0)

    return narrow
