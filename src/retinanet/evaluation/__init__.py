"""How good are detections? COCO and VOC average precision, results files, score thresholds."""

from retinanet.evaluation.coco import evaluate_detections
from retinanet.evaluation.metrics import ClassMetrics, Metrics
from retinanet.evaluation.operating_points import choose_operating_points
from retinanet.evaluation.results import read_results, write_results
from retinanet.evaluation.voc import voc_average_precision

__all__ = [
    "ClassMetrics",
    "Metrics",
    "choose_operating_points",
    "evaluate_detections",
    "read_results",
    "voc_average_precision",
    "write_results",
]
