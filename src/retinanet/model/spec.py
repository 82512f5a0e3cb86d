"""`ModelSpec`: everything that changes a number between an image and its boxes, saved with the weights.

Two models with equal specs and equal weights give equal boxes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from retinanet.anchors import AnchorSpec
from retinanet.boxes import BoxCoding
from retinanet.errors import ConfigError
from retinanet.images import Preprocessing
from retinanet.plain import from_plain
from retinanet.records import Classes

FORMAT_VERSION = 1


@dataclass(frozen=True)
class BackboneSpec:
    """The timm network that gives C3, C4 and C5.

    Args:
        name: a timm model with features at strides 8, 16 and 32.
        weights: what it started from (a timm tag or a file's name), for the record; None is from scratch.
        norm: "native" is timm's own; "frozen" turns BatchNorm into a fixed affine map; "group" builds the
            network with GroupNorm (32 groups).
        norm_eps: epsilon of its normalisation layers; None keeps timm's. Published torchvision COCO weights
            were made with 0.
        stride_in_1x1: Caffe's ResNets (Detectron, detectron2) put a bottleneck's stride into its first 1x1
            convolution, torchvision's and timm's into the 3x3.
    """

    name: str = "resnet50"
    weights: str | None = None
    norm: Literal["native", "frozen", "group"] = "native"
    norm_eps: float | None = None
    stride_in_1x1: bool = False


@dataclass(frozen=True)
class PyramidSpec:
    """The feature pyramid: width, where P6 comes from, and whether ReLU stands before P7's convolution.

    Args:
        levels: "p3-p7" is the paper's pyramid; "c5" is none: the backbone's last map alone, at stride 32, which the
            paper compares it with.
    """

    channels: int = 256
    p6_from: Literal["c5", "p5"] = "c5"
    relu_before_p7: bool = True
    levels: Literal["p3-p7", "c5"] = "p3-p7"

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ConfigError(f"PyramidSpec.channels needs at least 1; got {self.channels}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between the locations of each level."""
        return (8, 16, 32, 64, 128) if self.levels == "p3-p7" else (32,)


@dataclass(frozen=True)
class HeadSpec:
    """Both heads: how many 3x3 convolutions before the last one, and GroupNorm (32 groups) in them or not.

    With GroupNorm the convolutions carry no bias.
    """

    depth: int = 4
    norm: Literal["none", "group"] = "none"

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ConfigError(f"HeadSpec.depth needs 0 or more; got {self.depth}")


@dataclass(frozen=True)
class PostProcessing:
    """From raw predictions to detections (Section 4, Inference).

    Args:
        score_threshold: keep scores above it; one number, or one a level.
        top_k: at most this many candidates a level are decoded.
        nms_threshold: IoU above which the lower of two boxes of a class goes.
        clip: corners are moved into the image "before-nms" or "after-nms" (detectron2).
        drop_empty: leave out boxes without width or height after clipping.
        max_detections: an image.
    """

    score_threshold: float | tuple[float, ...] = 0.05
    top_k: int = 1000
    nms_threshold: float = 0.5
    clip: Literal["before-nms", "after-nms"] = "before-nms"
    drop_empty: bool = True
    max_detections: int = 100

    def __post_init__(self) -> None:
        thresholds = (
            self.score_threshold if isinstance(self.score_threshold, tuple) else (self.score_threshold,)
        )
        if not thresholds or not all(0 <= threshold < 1 for threshold in thresholds):
            raise ConfigError(f"PostProcessing.score_threshold needs [0, 1); got {self.score_threshold}")
        if not 0 <= self.nms_threshold <= 1:
            raise ConfigError(f"PostProcessing.nms_threshold needs [0, 1]; got {self.nms_threshold}")
        for name in ("top_k", "max_detections"):
            if getattr(self, name) < 1:
                raise ConfigError(f"PostProcessing.{name} needs at least 1; got {getattr(self, name)}")

    def thresholds(self, levels: int) -> tuple[float, ...]:
        """Return one score threshold a level."""
        if not isinstance(self.score_threshold, tuple):
            return (self.score_threshold,) * levels
        if len(self.score_threshold) != levels:
            raise ConfigError(
                f"PostProcessing.score_threshold needs one number or {levels}, one a pyramid level; "
                f"got {len(self.score_threshold)}"
            )
        return self.score_threshold

    def lowered(self, score_threshold: float) -> PostProcessing:
        """Return the same rules with score thresholds of at most this."""
        given = self.score_threshold
        if isinstance(given, tuple):
            return dataclasses.replace(self, score_threshold=tuple(min(t, score_threshold) for t in given))
        return dataclasses.replace(self, score_threshold=min(given, score_threshold))

    def capped(self, max_detections: int) -> PostProcessing:
        """Return the same rules with another number of detections an image."""
        return dataclasses.replace(self, max_detections=max_detections)


@dataclass(frozen=True)
class ModelSpec:
    """The whole model but its weights."""

    classes: Classes
    backbone: BackboneSpec = field(default_factory=BackboneSpec)
    pyramid: PyramidSpec = field(default_factory=PyramidSpec)
    head: HeadSpec = field(default_factory=HeadSpec)
    anchors: AnchorSpec = field(default_factory=AnchorSpec)
    coding: BoxCoding = field(default_factory=BoxCoding)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    post_processing: PostProcessing = field(default_factory=PostProcessing)

    def __post_init__(self) -> None:
        if self.anchors.strides != self.pyramid.strides:
            raise ConfigError(
                f"ModelSpec needs anchors on {self.pyramid.levels.upper()}, strides {self.pyramid.strides}; "
                f"got {self.anchors.strides}"
            )
        self.post_processing.thresholds(len(self.anchors.strides))
        # With one channel a group, a single location of P7 would be normalised to nothing; torch refuses it.
        if self.head.norm == "group" and (self.pyramid.channels % 32 or self.pyramid.channels < 64):
            raise ConfigError(
                "ModelSpec.head.norm 'group' (32 groups) needs ModelSpec.pyramid.channels 64, 96, 128 ...; "
                f"got {self.pyramid.channels}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, the format version first."""
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ModelSpec:
        """Read what `to_json` wrote, in this or an earlier version; anything unknown is an error."""
        values = dict(values)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"ModelSpec needs format_version {FORMAT_VERSION}; got {version}. "
                "A newer version of retinanet may have written it: upgrade with pip install -U retinanet"
            )
        return from_plain(cls, values, "ModelSpec")
