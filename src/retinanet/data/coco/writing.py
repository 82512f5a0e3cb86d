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
    image_ids: Sequence[int] | Sequence[str] | None = None,
    keep_ids: bool = False,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write a COCO JSON file, whole or not at all; `read_coco` gives back equal boxes, areas and classes.

    Annotations, without `keep_ids`, and images, without `image_ids`, are numbered from 1; categories keep
    `classes.ids`. Every ignored box is written as `iscrowd: 1`, the only way that COCO has to say it.

    Args:
        files: one path an image, relative to the JSON's folder or another place where `read_coco` looks.
        sizes: (width, height) in pixels.
        image_ids: one an image, distinct.
        keep_ids: annotations keep the ids of their ground truths, which need to be distinct.
        info: plain values about the data set, which COCO keeps under `info`; left out when None.

    Raises:
        DataError: lengths differ, a file name, size or label is impossible, or the disk refuses.
    """
    ids = range(1, len(files) + 1) if image_ids is None else image_ids
    if not len(files) == len(sizes) == len(ground_truths) == len(ids):
        raise DataError(
            "write_coco needs one size and one ground truth a file; "
            f"got {len(files)} files, {len(sizes)} sizes, {len(ground_truths)} ground truths, {len(ids)} ids"
        )
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for own_id, file, (width, height), truth in zip(ids, files, sizes, ground_truths, strict=True):
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
        images.append({"id": own_id, "file_name": file, "width": int(width), "height": int(height)})
        rows = zip(
            truth.boxes.tolist(),
            truth.classes,
            truth.areas.tolist(),
            truth.ignore,
            truth.ids.tolist(),
            strict=True,
        )
        for (x1, y1, x2, y2), label, area, ignore, given in rows:
            annotations.append(
                {
                    "id": given if keep_ids else len(annotations) + 1,
                    "image_id": own_id,
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
