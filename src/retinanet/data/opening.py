"""The one function that opens a data set of any format that `layouts` recognises."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from retinanet.data.dataset import Dataset
from retinanet.data.hugging_face import BoxFormat
from retinanet.data.layouts import LAYOUTS, Opened, Reading, recognised
from retinanet.data.rules import ImageFiles
from retinanet.errors import DataError, did_you_mean

FORMATS = ", ".join(layout.format for layout in LAYOUTS)
READ = f"Read are: {FORMATS}"
ENTRIES_SHOWN = 8
FOLDERS_TRIED = 50
FAULTS_SHOWN = 3


def open_dataset(
    data: str | Path,
    split: str,
    *,
    images: ImageFiles = "required",
    image_root: str | Path | None = None,
    box_format: BoxFormat = "auto",
    strict: bool = False,
) -> Dataset:
    """Read one split of a data set, whatever its format; `Dataset.format` says what it was read as.

    A data set without splits, such as a single COCO JSON file, answers to every split's name; `available_splits` is
    empty for it.

    Args:
        data: a folder in one of the layouts of `layouts`, or the file that describes the data set: COCO JSON, YOLO's
            `data.yaml`, a CSV or parquet file.
        images: "absent" needs no image file. YOLO and Open Images, whose boxes are shares of their images, need
            them all the same; CSV takes the sizes that it lacks from those that are there.
        image_root: the folder that the images are in, where it is another than the format says; see each reader. It
            stands for VOC's `JPEGImages` and for the `path` of a `data.yaml`.
        box_format: how the boxes of a Hugging Face data set are to be read; "auto" takes what they prove.
        strict: refuse a data set of which anything had to be repaired or dropped.

    Raises:
        DataError: nothing is there, the format is not recognised, the split is absent, or its reader refuses.
    """
    path, root = _existing(data), _folder(image_root)
    opened = _opened(path, root)
    if opened.splits and split not in opened.names:
        raise DataError(
            f"{data}: has no split {split!r}; there are: {', '.join(opened.splits)}."
            + did_you_mean(split, opened.names)
        )
    if box_format != "auto" and opened.format != "Hugging Face":
        raise DataError(
            f"{data}: box_format is for Hugging Face data sets; {opened.format} says itself what boxes are"
        )
    dataset = opened.read(split, Reading(images, root, box_format))
    name = os.path.basename(os.path.abspath(path)) if path.is_dir() else dataset.name
    dataset = replace(dataset, name=name or str(path), format=opened.format)
    if strict and dataset.faults:
        count = dataset.fault_total
        first = "; ".join(map(str, dataset.faults[:FAULTS_SHOWN]))
        more = f"; and {count - FAULTS_SHOWN:,} more" if count > FAULTS_SHOWN else ""
        raise DataError(
            f"{data}: strict reading refuses {_count(count, 'fault')} of split {split!r}: {first}{more}"
        )
    return dataset


def available_splits(data: str | Path, *, image_root: str | Path | None = None) -> tuple[str, ...]:
    """Return the splits that together count every image once, train, val and test first.

    Empty for a data set without splits. VOC's `trainval` is not among them where `train` or `val` is; it can be
    opened by name.

    Args:
        image_root: as in `open_dataset`.

    Raises:
        DataError: nothing is there or the format is not recognised.
    """
    return _opened(_existing(data), _folder(image_root)).splits


def read_as(*splits: Dataset) -> str:
    """Say what a data set was read as: "read as YOLO: 2 splits, 5 classes, 1,204 images"."""
    images, classes = sum(len(split) for split in splits), len(splits[0].classes)
    counts = [_count(len(splits), "split"), _count(classes, "class"), _count(images, "image")]
    return f"read as {splits[0].format}: {', '.join(counts)}"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def _existing(data: str | Path) -> Path:
    path = Path(data)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
        empty = is_folder and not any(path.iterdir())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read: {reason}") from None
    if empty:
        raise DataError(f"{path}: is an empty folder; a data set is required. {READ}")
    if not is_folder and not is_file:
        there = "is neither a folder nor a file" if path.exists() else "does not exist"
        hint = "" if path.exists() else did_you_mean(path.name, _siblings(path))
        raise DataError(f"{path}: {there}; a folder or a file that describes a data set is required.{hint}")
    return path


def _folder(image_root: str | Path | None) -> Path | None:
    if image_root is not None and not os.path.isdir(image_root):
        raise DataError(
            f"--image-root (image_root in Python) needs a folder of images; there is none at {image_root}"
        )
    return None if image_root is None else Path(os.path.abspath(image_root))


def _siblings(path: Path) -> list[str]:
    try:
        return os.listdir(path.parent)
    except OSError:
        return []


def _opened(path: Path, image_root: Path | None) -> Opened:
    try:
        found = recognised(path, image_root)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    if found is not None:
        return found
    if path.is_file():
        raise DataError(
            f"{path}: is not a data set that can be read; a COCO JSON, a YOLO data.yaml, a CSV file of boxes "
            f"(path,x1,y1,x2,y2,class) or a parquet file can be. {READ}"
        )
    entries = sorted(path.iterdir())
    shown = [entry.name + "/" * os.path.isdir(entry) for entry in entries[:ENTRIES_SHOWN]]
    more = f" and {len(entries) - ENTRIES_SHOWN} more" if len(entries) > ENTRIES_SHOWN else ""
    looked_for = "; ".join(f"{layout.looked_for} ({layout.format})" for layout in LAYOUTS)
    hints = "".join(f" {hint}" for hint in _hints(entries))
    raise DataError(
        f"{path}: no data set is recognised. Looked for: {looked_for}. Found: {', '.join(shown)}{more}.{hints}"
    )


def _hints(entries: list[Path]) -> list[str]:
    """Return what may have been meant: a folder inside, or a file that can be named itself."""
    inner = [entry for entry in entries if os.path.isdir(entry)][:FOLDERS_TRIED]
    hints = [f"Did you mean {entry}?" for entry in inner if _is_data_set(entry)][:1]
    files = [entry for entry in entries if entry.suffix.lower() in (".json", ".csv")]
    return hints + [f"One {file.suffix[1:].upper()} file can be named itself: {file}." for file in files][:1]


def _is_data_set(folder: Path) -> bool:
    try:
        return recognised(folder) is not None
    except (DataError, OSError):
        return False
