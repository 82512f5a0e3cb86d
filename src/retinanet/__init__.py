"""RetinaNet and the focal loss: the facade. Names load their room when first used, so that this import is free."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from retinanet.version import __version__

if TYPE_CHECKING:
    from retinanet.records import Classes, Detections, GroundTruth

_ROOMS = {
    "Classes": "retinanet.records",
    "Detections": "retinanet.records",
    "GroundTruth": "retinanet.records",
}

__all__ = ["Classes", "Detections", "GroundTruth", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(_ROOMS[name]), name)
    raise AttributeError(f"module 'retinanet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
