"""Pictures of a validation: ground truth beside detections."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from retinanet.data import Dataset
from retinanet.drawing import contact_sheet, draw_boxes
from retinanet.folders import write_bytes
from retinanet.images import decode
from retinanet.inference import Validation
from retinanet.inference.detector import DEFAULT_THRESHOLD
from retinanet.records import Detections, Ignore

# Rows of the sheet, and how many picture pairs stand in one.
ROWS, PAIRS = 3, 2


def draw_validation(dataset: Dataset, found: Validation, path: Path) -> None:
    """Draw some validation images, ground truth left and detections (at the best-F1 thresholds) right, as PNG.

    The images stand at equal distances in the data set: neither the best nor the worst are picked.
    """
    classes = found.detections[0].classes
    tiles, captions = [], []
    readable = [i for i in range(len(dataset)) if str(dataset.files[i]) not in found.failed]
    for place in np.linspace(0, len(readable) - 1, min(ROWS * PAIRS, len(readable))):
        index = readable[int(place)]
        image, truth = decode(dataset.path(index)), dataset.ground_truth(index)
        truth = truth.select(truth.ignore == Ignore.NO)
        names = [dataset.classes.names[label] for label in truth.classes]
        # Colours are those of the model's classes on both sides.
        groups = [classes.names.index(name) if name in classes.names else len(classes) for name in names]
        tiles.append(draw_boxes(image, truth.boxes, captions=names, groups=groups))
        tiles.append(sure_detections(found, index).draw(image))
        captions += [f"ground truth: {Path(str(dataset.files[index])).name}", "detections"]
    sheet = io.BytesIO()
    contact_sheet(tiles, columns=2 * PAIRS, captions=captions).save(sheet, "PNG")
    write_bytes(path, sheet.getvalue())


def sure_detections(found: Validation, index: int) -> Detections:
    """Return the detections of an image from the best-F1 thresholds on."""
    detections = found.detections[index]
    limits = found.operating_points.threshold_per_class(detections.classes, DEFAULT_THRESHOLD)
    return detections.select(detections.scores >= limits[detections.labels])
