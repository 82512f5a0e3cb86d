"""Writing the CSV of keras-retinanet, which `csv_files.read_csv` reads back."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from retinanet.data.dataset import Dataset
from retinanet.data.policies import shortest
from retinanet.folders import write_text
from retinanet.records import Classes, Ignore


def write_csv(path: Path, dataset: Dataset, files: Sequence[str]) -> None:
    """Write `path,x1,y1,x2,y2,class`, a line a box, and `path,,,,,` for an image without; ignored boxes are left out.

    Corners are written with the fewest digits that give the same number in single precision.

    Args:
        files: the path of each image, relative to the CSV's folder.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for index, file in enumerate(files):
        truth = dataset.ground_truth(index)
        objects = [
            [file, *map(shortest, box), dataset.classes.names[label]]
            for box, label, ignore in zip(truth.boxes, truth.classes, truth.ignore, strict=True)
            if ignore == Ignore.NO
        ]
        writer.writerows(objects or [[file, "", "", "", "", ""]])
    write_text(path, text.getvalue())


def write_classes(path: Path, classes: Classes) -> None:
    """Write `class,id`, a line a class."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(zip(classes.names, classes.ids, strict=True))
    write_text(path, text.getvalue())
