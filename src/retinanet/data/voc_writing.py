"""Writing Pascal VOC: an XML file an image and lists of splits, which `voc.read_voc` reads back."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from retinanet.data.dataset import Dataset
from retinanet.data.policies import shortest
from retinanet.data.voc import LISTS
from retinanet.data.voc_pages import CORNERS
from retinanet.folders import write_bytes, write_text
from retinanet.records import Float32Array, Ignore


def holds_corners(boxes: Float32Array) -> NDArray[np.bool_]:
    """Return `[M]` which boxes can be written: one thinner than a pixel would come back reversed, one of exactly a
    pixel as a click, because both corners are inside the box.
    """
    corners = boxes.astype(np.float64)
    width, height = corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1]
    kept: NDArray[np.bool_] = (width >= 1) & (height >= 1) & ((width > 1) | (height > 1))
    return kept


def write_voc_pages(folder: Path, dataset: Dataset, names: Sequence[str]) -> None:
    """Write an annotation file for each image into `folder/Annotations`; ignored boxes become difficult ones.

    Corners count pixels from 1 and include the last: xmin = x1 + 1, xmax = x2. Whole numbers stay whole; others are
    written with their decimals, which VOC's own sets do not have but its readers take, so that a box read back is the
    same to 1e-12 pixels.

    Args:
        names: the file name of each image in `JPEGImages`.
    """
    for index, name in enumerate(names):
        truth, (width, height) = dataset.ground_truth(index), dataset.size(index)
        page = ElementTree.Element("annotation")
        ElementTree.SubElement(page, "folder").text = "JPEGImages"
        ElementTree.SubElement(page, "filename").text = name
        size = ElementTree.SubElement(page, "size")
        for key, value in (("width", width), ("height", height), ("depth", 3)):
            ElementTree.SubElement(size, key).text = str(value)
        truth = truth.select(holds_corners(truth.boxes))
        for box, label, ignore in zip(truth.boxes, truth.classes, truth.ignore, strict=True):
            item = ElementTree.SubElement(page, "object")
            ElementTree.SubElement(item, "name").text = dataset.classes.names[label]
            ElementTree.SubElement(item, "difficult").text = str(int(ignore != Ignore.NO))
            bounds = ElementTree.SubElement(item, "bndbox")
            for key, value, first in zip(CORNERS, box, (1, 1, 0, 0), strict=True):
                ElementTree.SubElement(bounds, key).text = f"{Decimal(shortest(value)) + first:f}"
        ElementTree.indent(page)
        path = folder / "Annotations" / f"{PurePosixPath(name).stem}.xml"
        write_bytes(path, ElementTree.tostring(page, encoding="utf-8"))


def write_voc_list(folder: Path, split: str, names: Sequence[str]) -> None:
    """Write the list of a split's images, a name a line."""
    path = folder / LISTS / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{PurePosixPath(name).stem}\n" for name in names))
