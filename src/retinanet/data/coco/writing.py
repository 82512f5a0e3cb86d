"""Writing COCO JSON, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retinanet.data.rules import LONGEST_SIDE, name_fault, refuse_escape, side
from retinanet.errors import DataError
from retinanet.records import Classes, GroundTruth, Ignore


def write_coco(
    path: Path | str,
    *,
    classes: Classes,
    files: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    ground_truths: Sequence[GroundTruth],
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write a COCO JSON file, whole or not at all; `read_coco` gives back equal boxes, areas and classes.

    Images and annotations are numbered from 1, categories keep `classes.ids`. Every ignored box is written
    as `iscrowd: 1`, the only way that COCO has to say it.

    Args:
        files: one path an image, relative to the JSON's folder or another place where `read_coco` looks.
        sizes: (width, height) in pixels.
        info: plain values about the data set, which COCO keeps under `info`; left out when None.

    Raises:
        DataError: lengths differ, a file name, size or label is impossible, or the disk refuses.
    """
    if not len(files) == len(sizes) == len(ground_truths):
        raise DataError(
            "write_coco needs one size and one ground truth a file; "
            f"got {len(files)} files, {len(sizes)} sizes, {len(ground_truths)} ground truths"
        )
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for file, (width, height), truth in zip(files, sizes, ground_truths, strict=True):
        where = f"write_coco, files[{len(images)}]"
        if fault := name_fault(file):
            raise DataError(f"{where}: {fault}")
        refuse_escape(file, where)
        if not (side(width) and side(height)):
            raise DataError(f"{where}: needs sides of 1 to {LONGEST_SIDE} pixels; got {width} x {height}")
        if len(truth) and truth.classes.max() >= len(classes):
            raise DataError(
                f"{where}: needs class indices 0..{len(classes) - 1}; got {int(truth.classes.max())}"
            )
        images.append({"id": len(images) + 1, "file_name": file, "width": int(width), "height": int(height)})
        rows = zip(truth.boxes.tolist(), truth.classes, truth.areas.tolist(), truth.ignore, strict=True)
        for (x1, y1, x2, y2), label, area, ignore in rows:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": classes.ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": int(ignore != Ignore.NO),
                }
            )
    categories = [{"id": i, "name": name} for i, name in zip(classes.ids, classes.names, strict=True)]
    document: dict[str, Any] = {"images": images, "annotations": annotations, "categories": categories}
    if info is not None:
        document = {"info": dict(info), **document}
    _write_whole(Path(path), json.dumps(document, separators=(",", ":"), allow_nan=False))


def _write_whole(target: Path, text: str) -> None:
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        try:
            with draft.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror}") from None
