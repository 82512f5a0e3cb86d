"""Images of a data set with their boxes, coloured by whether an anchor fits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from retinanet.data import Dataset
from retinanet.data.coverage import best_overlaps, objects_in_network
from retinanet.drawing import Colour, contact_sheet, draw_boxes
from retinanet.errors import ImageError
from retinanet.images import decode
from retinanet.records import Ignore
from retinanet.training.checking import Frame

FITS, MISSES, IGNORED = 0, 1, 2
# Bluish green and vermillion of Okabe and Ito, which colour-blind people tell apart.
COLOURS: tuple[Colour, ...] = ((0, 158, 115), (225, 55, 0), (150, 150, 150))
# Images at equal distances, images with most objects that no anchor fits, and images in a row.
EVEN, MISSED, COLUMNS = 6, 6, 3


def draw_objects(dataset: Dataset, frame: Frame) -> bytes | None:
    """Return a contact sheet as a JPEG file, None where no image can be decoded."""
    groups = np.full(len(dataset.boxes), IGNORED)
    objects = objects_in_network(dataset, frame.preprocessing)
    groups[objects.rows] = np.where(best_overlaps(frame.anchors, objects) >= 0.5, FITS, MISSES)
    before = np.concatenate([[0], np.cumsum(groups == MISSES)])
    missed = np.diff(before[dataset.offsets])
    even = np.unique(np.linspace(0, len(dataset) - 1, min(EVEN, len(dataset))).astype(int)).tolist()
    worst = [i for i in np.argsort(-missed, kind="stable").tolist() if missed[i] and i not in even][:MISSED]
    tiles, captions = [], []
    for index in [*even, *worst]:
        try:
            image = decode(dataset.path(index))
        except ImageError:  # named among the faults
            continue
        own = slice(int(dataset.offsets[index]), int(dataset.offsets[index + 1]))
        # What comes first is drawn last, on top.
        order = np.argsort(groups[own] != MISSES, kind="stable")
        tiles.append(draw_boxes(image, dataset.boxes[own][order], groups=groups[own][order], colours=COLOURS))
        objects_here = int((dataset.ignore[own] == Ignore.NO).sum())
        captions.append(f"{missed[index]} of {objects_here} red: {Path(str(dataset.files[index])).name}")
    if not tiles:
        return None
    buffer = io.BytesIO()
    contact_sheet(tiles, columns=COLUMNS, captions=captions).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
