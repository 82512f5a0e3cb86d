"""RetinaNet and the focal loss: the facade. Names load their room when first used, so this import is free."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from retinanet.version import __version__

if TYPE_CHECKING:
    from retinanet.anchors import AnchorSpec
    from retinanet.errors import RetinaNetError
    from retinanet.inference import Detector, evaluate, load
    from retinanet.losses import sigmoid_focal_loss
    from retinanet.model import ModelSpec, RetinaNet, build_retinanet
    from retinanet.records import Classes, Detections, GroundTruth
    from retinanet.training.run import train

_ROOMS = {
    "AnchorSpec": "retinanet.anchors",
    "Classes": "retinanet.records",
    "Detections": "retinanet.records",
    "Detector": "retinanet.inference",
    "GroundTruth": "retinanet.records",
    "ModelSpec": "retinanet.model",
    "RetinaNet": "retinanet.model",
    "RetinaNetError": "retinanet.errors",
    "build_retinanet": "retinanet.model",
    "evaluate": "retinanet.inference",
    "load": "retinanet.inference",
    "sigmoid_focal_loss": "retinanet.losses",
    "train": "retinanet.training.run",
}

__all__ = [
    "AnchorSpec",
    "Classes",
    "Detections",
    "Detector",
    "GroundTruth",
    "ModelSpec",
    "RetinaNet",
    "RetinaNetError",
    "__version__",
    "build_retinanet",
    "evaluate",
    "load",
    "sigmoid_focal_loss",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'retinanet' has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return __all__
