"""COCO results files: detections of any detector, in and out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import numpy as np

from retinanet.errors import DataError
from retinanet.records import Classes, Detections

FIELDS = ("image_id", "category_id", "bbox", "score")
# Far beyond any image, and safely inside float32.
LARGEST_COORDINATE = 1e9


def read_results(
    path: str | os.PathLike[str],
    *,
    image_ids: Sequence[int | str],
    sizes: Sequence[tuple[int, int]],
    classes: Classes,
) -> list[Detections]:
    """Read a COCO results file: a list of {"image_id", "category_id", "bbox": [x, y, w, h], "score"}.

    Image ids are compared as text, so 7 and "7" name the same image. A width or height of 0 is allowed:
    such a box overlaps nothing, COCO counts it as a wrong detection. Other fields are not looked at.

    Args:
        path: the file.
        image_ids: the data set's ids of the images to report on.
        sizes: (width, height) of each, in pixels.
        classes: the data set's classes; `category_id` is one of `classes.ids`.

    Returns:
        One `Detections` an image, in the order of `image_ids`; equal scores keep the file's order.

    Raises:
        DataError: the file cannot be read or a record is not as described; names record (from 0) and field.
    """
    if len(image_ids) != len(sizes):
        raise DataError(f"read_results needs one size an image; got {len(image_ids)} ids, {len(sizes)} sizes")
    index_of_image = {str(image_id): number for number, image_id in enumerate(image_ids)}
    if len(index_of_image) != len(image_ids):
        raise DataError("read_results needs image ids that differ as text; some are given more than once")
    index_of_category = classes.index_of_id()
    rows: list[list[list[float]]] = [[] for _ in image_ids]
    for number, record in enumerate(_records(path)):
        where = f"{path}: record {number}"
        image, row = _row(record, where, index_of_image, index_of_category)
        rows[image].append(row)

    results = []
    for (width, height), of_image in zip(sizes, rows, strict=True):
        table = np.array(of_image, np.float64).reshape(-1, 6)
        table = table[np.argsort(-table[:, 5], kind="stable")]
        boxes = np.concatenate([table[:, 1:3], table[:, 1:3] + table[:, 3:5]], axis=1)
        scores, labels = table[:, 5].astype(np.float32), table[:, 0].astype(np.int64)
        results.append(Detections(boxes.astype(np.float32), scores, labels, classes, width, height))
    return results


def write_results(
    path: str | os.PathLike[str], detections: Sequence[Detections], image_ids: Sequence[int | str]
) -> None:
    """Write a COCO results file with the classes' original ids; the file appears whole or not at all.

    A box with x2 < x1 or y2 < y1 is written with width or height 0, as `evaluate_detections` takes it.

    Raises:
        DataError: not one id an image.
        OSError: the file cannot be written; an existing one stays as it was.
    """
    if len(detections) != len(image_ids):
        raise DataError(
            f"write_results needs one image id a Detections; got {len(detections)} and {len(image_ids)}"
        )
    records = []
    for found, image_id in zip(detections, image_ids, strict=True):
        boxes = found.boxes.astype(np.float64)
        boxes[:, 2:] = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
        rows = zip(found.category_ids.tolist(), boxes.tolist(), found.scores.tolist(), strict=True)
        records += [dict(zip(FIELDS, (image_id, *row), strict=True)) for row in rows]
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(records))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _records(path: str | os.PathLike[str]) -> list[Any]:
    try:
        records = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except RecursionError:
        raise DataError(f"{path}: nested too deeply for a COCO results file; write a flat list") from None
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}; write a list of detections") from error
    if not isinstance(records, list):
        raise DataError(
            f"{path}: a COCO results file is a list of detections; got {_kind(records)}. "
            "An annotation file is not a results file"
        )
    return records


def _row(
    record: Any, where: str, index_of_image: Mapping[str, int], index_of_category: Mapping[int, int]
) -> tuple[int, list[float]]:
    """Return the image's index and [label, x, y, width, height, score]."""
    if not isinstance(record, dict):
        raise DataError(f"{where} needs an object with {', '.join(FIELDS)}; got {_kind(record)}")
    for name in FIELDS:
        if name not in record:
            raise DataError(f"{where} lacks {name!r}; add it: each needs {', '.join(FIELDS)}")
    image_id, category, box, score = (record[name] for name in FIELDS)
    if isinstance(image_id, bool) or not isinstance(image_id, int | str):
        raise DataError(f"{where}: image_id needs a whole number or text; got {short_repr(image_id)}")
    if str(image_id) not in index_of_image:
        raise DataError(
            f"{where}: image_id {short_repr(image_id)} is not an image of the data set; "
            "judge the results on the split they were made from"
        )
    if isinstance(category, bool) or not isinstance(category, int):
        raise DataError(f"{where}: category_id needs a whole number; got {short_repr(category)}")
    if category not in index_of_category:
        known = short_repr(sorted(index_of_category))
        raise DataError(f"{where}: category_id {short_repr(category)} is none of the data set's ids {known}")
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)):
        raise DataError(
            f"{where}: bbox needs four finite numbers [x, y, width, height] within +-{LARGEST_COORDINATE:g}; "
            f"got {short_repr(box)}"
        )
    if box[2] < 0 or box[3] < 0:
        raise DataError(
            f"{where}: bbox needs width and height >= 0; got {short_repr(box)}. "
            "Write [x, y, width, height], not two corners"
        )
    if not (_is_number(score) and 0 <= score <= 1):
        raise DataError(f"{where}: score needs a number in [0, 1]; got {short_repr(score)}")
    return index_of_image[str(image_id)], [index_of_category[category], *box, score]


def _is_number(value: Any) -> bool:
    # False for NaN too; true and false are not numbers here.
    return type(value) in (int, float) and -LARGEST_COORDINATE <= value <= LARGEST_COORDINATE


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
