"""How much of a device's arithmetic a training step uses."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from retinanet.bench.measuring import seconds_of

REPEATS = 3
# Sides of the two square matrices: enough to fill the device, and no more than about a second of it.
SIDES = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Utilisation:
    """A step beside a matrix product.

    The share can pass 100 %: Winograd's algorithm computes less than what is counted, on some processors oneDNN's
    convolutions outrun matrix products, and in fp32 torch lets cuDNN's convolutions, but no matrix product, round
    their inputs to TF32.

    Args:
        flops: of a step, as `flops_of` counts them.
        seconds: of a step.
        matrix_rate: floating-point operations a second in a matrix product on the same device.
    """

    flops: int
    seconds: float
    matrix_rate: float

    def __str__(self) -> str:
        """Say it in a line.

        >>> print(Utilisation(61_000_000_000, 0.43, 192e9))
        61 GFLOP a step in 0.43 s: 142 GFLOP/s, 74 % of the 192 GFLOP/s that a matrix product reaches
        """
        rate = self.flops / self.seconds
        return (
            f"{_shown(self.flops)} a step in {self.seconds:.2g} s: {_shown(rate)}/s, "
            f"{100 * rate / self.matrix_rate:.0f} % of the {_shown(self.matrix_rate)}/s that a matrix product reaches"
        )


def utilisation(step: Callable[[], object], device: torch.device, dtype: torch.dtype) -> Utilisation:
    """Measure a step, and a matrix product in the type that the step's convolutions compute in."""
    flops = flops_of(step)  # the first call, which also compiles
    taken = [seconds_of(step, device) for _ in range(REPEATS)]
    return Utilisation(flops, statistics.median(taken), matrix_rate(device, dtype))


def flops_of(step: Callable[[], object]) -> int:
    """Count the floating-point operations of a call's convolutions and matrix products, a multiply-add as two.

    Those of the direct convolution, whatever computes it: work that a better algorithm saves is work done. Losses,
    norms and optimiser are left out, being thousandths.
    """
    # torch knows its own operators alone.
    operators = torch.ops.retinanet
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            operators.convolve3x3: _of_convolution,
            operators.convolve3x3_gradients: _of_gradients,
        },
    )
    with counter:
        step()
    return int(counter.get_total_flops())


def _of_convolution(images: Sequence[int], weight: Sequence[int], *, out_shape: Sequence[int]) -> int:
    return conv_flop_count(list(images), list(weight), list(out_shape))


def _of_gradients(
    gradient: Sequence[int],
    images: Sequence[int],
    weight: Sequence[int],
    of_images: bool,
    of_weight: bool,
    *,
    out_shape: object,
) -> int:
    # Each gradient pairs every output with every weight just as the convolution does.
    return (of_images + of_weight) * conv_flop_count(list(images), list(weight), list(gradient))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second that the product of two large matrices reaches at best."""
    side = SIDES[device.type]
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    a @ b
    return 2 * side**3 / min(seconds_of(lambda: a @ b, device) for _ in range(REPEATS))


def _shown(flops: float) -> str:
    if flops >= 1e12:
        return f"{float(f'{flops / 1e12:.3g}'):g} TFLOP"
    return f"{float(f'{flops / 1e9:.3g}'):g} GFLOP"
