"""The network: spec, backbone, pyramid, heads, and the presets that put them together."""

from retinanet.model.backbone import Backbone, build_backbone, fitting_norm, load_backbone
from retinanet.model.fpn import FeaturePyramid
from retinanet.model.heads import Head
from retinanet.model.retinanet import RetinaNet, build_retinanet
from retinanet.model.spec import BackboneSpec, HeadSpec, ModelSpec, PostProcessing, PyramidSpec

__all__ = [
    "Backbone",
    "BackboneSpec",
    "FeaturePyramid",
    "Head",
    "HeadSpec",
    "ModelSpec",
    "PostProcessing",
    "PyramidSpec",
    "RetinaNet",
    "build_backbone",
    "build_retinanet",
    "fitting_norm",
    "load_backbone",
]
