"""The feature pyramid network: C3-C5 -> P3-P7 (Section 4, footnote 2 of the paper); and what is left without it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retinanet.model.convolution import Convolution3x3
from retinanet.model.spec import PyramidSpec


class FeaturePyramid(nn.Module):
    """P3-P5: lateral 1x1 on C3-C5, nearest upsampling from above, 3x3 output. P6: 3x3 stride 2 on C5 (or P5).
    P7: ReLU, then 3x3 stride 2 on P6.

    Initialised Xavier-uniform, bias 0, as Detectron does; the paper points to that of FPN, which names no distribution.
    """

    def __init__(self, *, in_channels: tuple[int, ...], spec: PyramidSpec) -> None:
        super().__init__()
        width = spec.channels
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in in_channels)
        self.output = nn.ModuleList(Convolution3x3(width, width, 3, padding=1) for _ in in_channels)
        self.p6_from_c5 = spec.p6_from == "c5"
        self.p6 = nn.Conv2d(in_channels[-1] if self.p6_from_c5 else width, width, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.before_p7 = nn.ReLU() if spec.relu_before_p7 else nn.Identity()
        initialise(self)

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return (P3, P4, P5, P6, P7)."""
        above: Tensor | None = None
        levels: list[Tensor] = []
        for i in reversed(range(len(features))):
            inner = self.lateral[i](features[i])
            above = (
                inner if above is None else inner + upsample_nearest(above, inner.shape[2], inner.shape[3])
            )
            levels.insert(0, self.output[i](above))
        top = features[-1] if self.p6_from_c5 else levels[-1]
        # In bf16 oneDNN leaves the gradient of weights that meet nothing but padding as it finds it in memory, NaN at
        # times: those of P7 where P6 is a single place, in images of 64 px. In fp32 it does not, and this is little.
        in_fp32 = top.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False):
            p6 = self.p6(top.float() if in_fp32 else top)
            return (*levels, p6, self.p7(self.before_p7(p6)))


class LastMap(nn.Module):
    """C5 alone, at stride 32: lateral 1x1 and 3x3 output, as P5 without a pyramid. The paper found its AP low."""

    def __init__(self, *, in_channels: tuple[int, ...], spec: PyramidSpec) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(in_channels[-1], spec.channels, 1)
        self.output = Convolution3x3(spec.channels, spec.channels, 3, padding=1)
        initialise(self)

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return one level."""
        return (self.output(self.lateral(features[-1])),)


def build_pyramid(in_channels: tuple[int, ...], spec: PyramidSpec) -> FeaturePyramid | LastMap:
    """Return the spec's way from C3-C5 to the levels that the heads see."""
    kind = FeaturePyramid if spec.levels == "p3-p7" else LastMap
    return kind(in_channels=in_channels, spec=spec)


def initialise(pyramid: nn.Module) -> None:
    """Draw every convolution Xavier-uniform, bias 0."""
    for module in pyramid.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # every one of them has a bias


def upsample_nearest(coarse: Tensor, height: int, width: int) -> Tensor:
    """Repeat every value 2x2 and cut to (height, width): `interpolate(mode="nearest")` for maps half as large.

    Written as a repeat because the gradient of `interpolate` is not deterministic on CUDA; channels run last
    in memory, as in the convolutions around it.
    """
    batch, channels, rows, columns = coarse.shape
    last = coarse.permute(0, 2, 3, 1)[:, :, None, :, None].expand(batch, rows, 2, columns, 2, channels)
    fine = last.reshape(batch, 2 * rows, 2 * columns, channels).permute(0, 3, 1, 2)
    return fine[:, :, :height, :width]
