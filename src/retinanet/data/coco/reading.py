"""One COCO file into a `Dataset`: the document, its classes, images and boxes, each in a file of its own."""

from __future__ import annotations

import os
from pathlib import Path

from retinanet.data.coco.boxes import BoxReader
from retinanet.data.coco.document import Document
from retinanet.data.coco.listing import find_files, image_ids, image_sizes, read_classes, read_entries
from retinanet.data.dataset import Dataset
from retinanet.data.faults import FaultLog
from retinanet.data.finding import image_places
from retinanet.data.rules import ImageFiles
from retinanet.errors import DataError


def read_coco(
    json_path: Path | str,
    *,
    split: str,
    image_root: Path | str | None = None,
    images: ImageFiles = "required",
) -> Dataset:
    """Read one COCO JSON file.

    Classes are ordered by category id, gaps in the ids are kept. Images keep the order of the file; those
    without boxes count. Ids may be whole numbers or text and are compared as text. A missing `area` is the
    box's. `iscrowd: 1` becomes `Ignore.CROWD`. A negative width or height says that the corners are swapped, which is
    one rectangle all the same; a box that stands twice counts once; one that reaches beyond its image is cut.
    Two records of one file are one image with the boxes of both.

    File names are relative to `image_root` or, when not given, to the first of these places that holds the
    first image that is found at all: for the JSON's folder and then its parent, the folder itself,
    `images`, `{split}`, `images/{split}`, `{split}/images`, and the same with `{split}2017`, `{split}2014`.

    Args:
        split: recorded in the result, and a part of the places above.
        images: "absent" looks at no image file; a missing size is then the smallest that holds the boxes.

    Raises:
        DataError: the file is not COCO JSON, an id is given twice, no image file is found, or a path is
            absolute, has ".." or leaves the folder by a symbolic link.
    """
    source = Path(json_path)
    try:
        return _read(source, split, image_root, images)
    except MemoryError:
        raise DataError(f"{source}: needs more memory than there is; split the file") from None


def _read(source: Path, split: str, image_root: Path | str | None, images: ImageFiles) -> Dataset:
    log = FaultLog()
    document = Document(source)
    classes = read_classes(document)
    entries = read_entries(document, log, needs_file=images == "required")
    root = Path(os.path.abspath(source.parent if image_root is None else image_root))
    if images == "required":
        places = image_places(root, split) if image_root is None else [(root, root)]
        root = find_files(source, entries, places, log)
    boxes = BoxReader(document, entries, classes, log).read()
    kept = [entry for entry in entries if entry.kept]
    return Dataset.from_columns(
        name=source.name,
        split=split,
        root=root,
        classes=classes,
        files=[entry.file for entry in kept],
        image_ids=image_ids(source, kept, log),
        sizes=image_sizes(source, kept, boxes.owners, boxes.boxes, log),
        owners=boxes.owners,
        boxes=boxes.boxes,
        labels=boxes.labels,
        areas=boxes.areas,
        ignore=boxes.ignore,
        annotation_ids=boxes.ids,
        faults=log.kept,
        fault_counts=log.counts,
        left_out=[entry.file for entry in entries if entry.file and not (entry.kept or entry.same)],
        unread=document.unread,
    )
