"""torchvision's RetinaNet with our weights: the same network twice."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from retinanet.bench.inputs import TORCHVISION_ANCHORS
from retinanet.images import Preprocessing
from retinanet.model import (
    BackboneSpec,
    HeadSpec,
    ModelSpec,
    PostProcessing,
    PyramidSpec,
    RetinaNet,
    build_retinanet,
)
from retinanet.records import Classes


def spec_like_torchvision(backbone: str, classes: int, side: int) -> ModelSpec:
    """Return the spec of `retinanet_resnet50_fpn` (first version, BatchNorm frozen) on a ResNet and square images."""
    return ModelSpec(
        Classes(tuple(f"class {i}" for i in range(classes))),
        backbone=BackboneSpec(backbone, norm="frozen", norm_eps=1e-5),
        pyramid=PyramidSpec(p6_from="p5"),
        head=HeadSpec(norm="none"),
        anchors=TORCHVISION_ANCHORS,
        preprocessing=Preprocessing(side, side, size_rounding="floor", resize="linear"),
        post_processing=PostProcessing(max_detections=300, drop_empty=False),
    )


def twins(backbone: str, classes: int, side: int) -> tuple[RetinaNet, TorchvisionRetinaNet, ModelSpec]:
    """Return our network and torchvision's with the same random weights, stem and first stage frozen in both."""
    spec = spec_like_torchvision(backbone, classes, side)
    torch.manual_seed(0)
    body = resnet_fpn_backbone(
        backbone_name=backbone,
        weights=None,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=3,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    theirs = TorchvisionRetinaNet(
        body, classes, anchor_generator=_default_anchorgen(), min_size=side, max_size=side
    )
    for name, statistic in theirs.named_buffers():
        # Without statistics from data a deep ResNet's signal doubles with every block.
        if re.search(r"layer\d\.\d+\.bn[23]\.weight", name):
            statistic.fill_(0.3)
    ours = copied(theirs, spec)
    ours.backbone.freeze("stage1")
    return ours, theirs, spec


def our_name(name: str, layers: int = 2) -> str:
    """Translate the name of a tensor of torchvision's RetinaNet into ours.

    Args:
        layers: modules of a head's layer: convolution and ReLU, or 3 with a norm between them.
    """
    if name.startswith("backbone.body."):
        return "backbone.network." + name.removeprefix("backbone.body.")
    part, rest = name.removeprefix("backbone.").removeprefix("head.").split(".", 1)
    if part == "fpn":
        kind, index, *tail = rest.split(".")
        if kind == "extra_blocks":
            return f"pyramid.{index}.{tail[0]}"
        return f"pyramid.{'lateral' if kind == 'inner_blocks' else 'output'}.{index}.{tail[-1]}"
    head = {"classification_head": "class_head", "regression_head": "box_head"}[part]
    if not rest.startswith("conv."):
        return f"{head}.last.{rest.split('.')[1]}"
    _, layer, inner, what = rest.split(".")
    return f"{head}.tower.{int(layer) * layers + int(inner)}.{what}"


def copied(theirs: nn.Module, spec: ModelSpec) -> RetinaNet:
    """Return our network of a spec with the weights of torchvision's; every tensor must find its place."""
    layers = 3 if spec.head.norm == "group" else 2
    state: dict[str, Tensor] = {
        our_name(name, layers): tensor for name, tensor in theirs.state_dict().items()
    }
    ours = build_retinanet(spec)
    ours.load_state_dict(state)
    return ours.eval()
