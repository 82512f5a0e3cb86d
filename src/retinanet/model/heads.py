"""The two heads: four 3x3 convolutions and a last one, the same weights on every pyramid level."""

from __future__ import annotations

import math

from torch import Tensor, nn

from retinanet.model.convolution import Convolution3x3
from retinanet.model.spec import HeadSpec


class Head(nn.Module):
    """One subnet (Section 4): `depth` 3x3 convolutions with ReLU, then a 3x3 convolution with A * values outputs.

    The class head has K values an anchor, the box head 4; they share no weights. Convolutions start Gaussian
    with bias 0; without norm, as in the paper, with deviation 0.01. `prior` (pi) is for the class head alone:
    the last bias becomes -log((1 - pi) / pi), so that every anchor starts with p = pi for every class and the many
    negatives do not drown the first steps.

    With GroupNorm, which the paper does not have, the tower starts as He et al. (2015). The norm takes its scale
    away, but an optimiser whose steps have a size of their own turns small weights around at once (measured in
    docs/decisions/0006).
    """

    def __init__(
        self, *, channels: int, anchors: int, values: int, spec: HeadSpec, prior: float | None = None
    ) -> None:
        super().__init__()
        self.values = values
        layers: list[nn.Module] = []
        for _ in range(spec.depth):
            layers.append(Convolution3x3(channels, channels, 3, padding=1, bias=spec.norm == "none"))
            if spec.norm == "group":
                layers.append(nn.GroupNorm(32, channels))
            layers.append(nn.ReLU())
        self.tower = nn.Sequential(*layers)
        self.last = Convolution3x3(channels, anchors * values, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if spec.norm == "group" and module is not self.last:
                    start_before_norm(module)
                else:
                    nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if prior is not None:
            nn.init.constant_(self.last.bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]

    def forward(self, level: Tensor) -> Tensor:
        """Map a pyramid level `[B, C, h, w]` to `[B, h*w*A, values]`; a view where memory is channels_last."""
        out: Tensor = self.last(self.tower(level))
        return out.permute(0, 2, 3, 1).reshape(out.shape[0], -1, self.values)


def start_before_norm(convolution: nn.Conv2d) -> None:
    """Draw the weights of a convolution of the tower that GroupNorm follows."""
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
