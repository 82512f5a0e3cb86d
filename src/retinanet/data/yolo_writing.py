"""Writing YOLO: `data.yaml` and a label file an image, which `yolo.read_yolo` reads back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml

from retinanet.data.dataset import Dataset
from retinanet.folders import write_text
from retinanet.records import Classes, Ignore


def write_yolo_labels(folder: Path, dataset: Dataset, names: Sequence[str]) -> None:
    """Write a label file for each image, empty where it has no objects; ignored boxes have no place in it.

    Twelve significant digits: read back with an image of the same size, corners are equal to 1e-11 of its sides.

    Args:
        folder: where the label files go.
        names: the file name of each image there.
    """
    for index, name in enumerate(names):
        truth, (width, height) = dataset.ground_truth(index), dataset.size(index)
        lines = []
        for (x1, y1, x2, y2), label, ignore in zip(
            truth.boxes.tolist(), truth.classes, truth.ignore, strict=True
        ):
            if ignore == Ignore.NO:
                shares = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
                lines.append(f"{label} {' '.join(f'{share:.12g}' for share in shares)}\n")
        write_text(folder / f"{PurePosixPath(name).stem}.txt", "".join(lines))


def write_yolo_table(folder: Path, splits: Sequence[str], classes: Classes) -> None:
    """Write `data.yaml`; or, for one set without splits, `classes.txt`.

    Label files count classes from 0; other ids are kept under `category_ids`, a key that only this library reads.
    """
    if list(splits) == [""]:
        write_text(folder / "classes.txt", "".join(f"{name}\n" for name in classes.names))
        return
    table: dict[str, object] = {split: f"images/{split}" for split in splits}
    table["names"] = dict(enumerate(classes.names))
    if classes.ids != tuple(range(len(classes))):
        table["category_ids"] = list(classes.ids)
    write_text(folder / "data.yaml", yaml.safe_dump(table, sort_keys=False, allow_unicode=True))
