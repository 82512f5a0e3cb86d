"""RetinaNet: backbone, pyramid, two heads. Nothing else: no loss, no decoding, no NMS, no resizing."""

from __future__ import annotations

from torch import Tensor, nn

from retinanet.batches import RawPredictions
from retinanet.errors import ConfigError
from retinanet.model.backbone import Backbone, build_backbone
from retinanet.model.fpn import FeaturePyramid, LastMap, build_pyramid
from retinanet.model.heads import Head
from retinanet.model.spec import ModelSpec


class RetinaNet(nn.Module):
    """The network of the paper from ready parts. It returns the same thing in training and in evaluation."""

    def __init__(
        self, *, backbone: Backbone, pyramid: FeaturePyramid | LastMap, class_head: Head, box_head: Head
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = pyramid
        self.class_head = class_head
        self.box_head = box_head

    @property
    def outputs(self) -> tuple[nn.Module, ...]:
        """The last layer of each head."""
        return self.class_head.last, self.box_head.last

    def forward(self, images: Tensor) -> RawPredictions:
        """Map normalised images `[B, 3, H, W]` (H and W multiples of 32) to raw predictions."""
        levels = self.pyramid(self.backbone(images))
        return RawPredictions(
            logits=tuple(self.class_head(level) for level in levels),
            deltas=tuple(self.box_head(level) for level in levels),
            grids=tuple((level.shape[2], level.shape[3]) for level in levels),
        )


def build_retinanet(spec: ModelSpec, *, prior: float = 0.01) -> RetinaNet:
    """Build the network of a spec with fresh weights, drawn from torch's global generator.

    Args:
        prior: pi in (0, 1), what every class probability starts at; the paper's 0.01.
    """
    if not 0 < prior < 1:
        raise ConfigError(f"--prior needs a probability in (0, 1); got {prior}")
    backbone = build_backbone(spec.backbone)
    width, anchors = spec.pyramid.channels, spec.anchors.per_location
    return RetinaNet(
        backbone=backbone,
        pyramid=build_pyramid(backbone.channels, spec.pyramid),
        class_head=Head(
            channels=width, anchors=anchors, values=len(spec.classes), spec=spec.head, prior=prior
        ),
        box_head=Head(channels=width, anchors=anchors, values=4, spec=spec.head),
    )
