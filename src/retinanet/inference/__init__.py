"""From a model to detections, and from detections over a data set to metrics."""

from retinanet.inference.detector import Detector, load
from retinanet.inference.post_processing import Found, post_process
from retinanet.inference.validation import Validation, check_classes, evaluate, validate

__all__ = ["Detector", "Found", "Validation", "check_classes", "evaluate", "load", "post_process", "validate"]
