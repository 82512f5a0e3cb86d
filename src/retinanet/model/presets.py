"""Specs with a name. Each is a plain function; whatever it does not say is `ModelSpec`'s default, the paper."""

from retinanet.model.spec import BackboneSpec, HeadSpec, ModelSpec
from retinanet.records import Classes


def paper(classes: Classes, *, backbone: str = "resnet50", weights: str | None = None) -> ModelSpec:
    """RetinaNet as the paper trains it: frozen BatchNorm in an ImageNet backbone, no norm in the heads."""
    return ModelSpec(classes, backbone=BackboneSpec(backbone, weights=weights, norm="frozen"))


def modern(classes: Classes, *, backbone: str = "resnet50", weights: str | None = None) -> ModelSpec:
    """As `paper`, with GroupNorm in the heads."""
    frozen = BackboneSpec(backbone, weights=weights, norm="frozen")
    return ModelSpec(classes, backbone=frozen, head=HeadSpec(norm="group"))


def from_scratch(classes: Classes, *, backbone: str = "resnet18") -> ModelSpec:
    """For a backbone without weights: GroupNorm in backbone and heads, which does not depend on the batch size."""
    return ModelSpec(classes, backbone=BackboneSpec(backbone, norm="group"), head=HeadSpec(norm="group"))
