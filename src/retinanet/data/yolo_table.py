"""What a YOLO data set says of itself: `data.yaml`, or the folders and the class list where there is none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from retinanet.data.collecting import Where, clean_name
from retinanet.data.dataset import Fault
from retinanet.data.kinds import Kind
from retinanet.data.policies import whole
from retinanet.data.rules import Fence, brief, read_text_lines
from retinanet.data.yaml_files import Plain, read_yaml
from retinanet.errors import DataError
from retinanet.records import Classes

NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
SPLITS = ("train", "val", "valid", "validation", "test")
OTHER_KEYS = ("path", "names", "nc", "category_ids", "download", "kpt_shape", "flip_idx", "roboflow")
CLASSES = ("classes.txt", "labels/classes.txt", "obj.names")
LARGEST_LIST = 64 * 2**20  # bytes
EXAMPLE = "data.yaml with the lines `train: images/train`, `val: images/val` and `names: [first class, second class]`"


@dataclass(frozen=True)
class YoloSet:
    """What stands in `data.yaml`.

    Args:
        source: the file it was read from.
        root: the folder that the splits are relative to, and that nothing may leave.
        splits: folders of images or lists of them, relative to `root`, by name; one named "" is a whole set.
        labels: the class index of each class number in the label files.
        absent: splits that are named but not there, with the path that was looked for.
        keypoints: lines hold a box and then key points, which are not read.
    """

    source: Path
    root: Path
    classes: Classes
    labels: dict[int, int]
    splits: dict[str, tuple[str, ...]]
    absent: dict[str, Path]
    keypoints: bool
    faults: tuple[Fault, ...] = ()


def load_yolo(source: Path, image_root: Path | str | None = None) -> YoloSet:
    """Return what a `data.yaml`, or a folder without one, says about its splits and classes.

    Raises:
        DataError: as `read_yolo`.
    """
    if source.is_dir():
        if image_root is not None:
            raise DataError(
                f"{source}: --image-root (image_root in Python) stands for the `path` of a data.yaml; there is none"
            )
        return _load_folder(source)
    source = Path(os.path.abspath(source))
    document = read_yaml(source)
    classes, labels = _classes(document, source)
    faults: list[Fault] = []
    if image_root is None:
        root = _root(document.get("path"), source, faults)
    else:
        root = Path(os.path.abspath(image_root))
    splits: dict[str, tuple[str, ...]] = {}
    absent: dict[str, Path] = {}
    for name, given in document.items():
        items = [item for item in (given if isinstance(given, list) else [given]) if item != ""]
        if name in SPLITS and items:
            entries = [_entry(item, root, Where(source.name, name), faults) for item in items]
            lacking = [root / entry for entry in entries if not os.path.exists(root / entry)]
            if lacking:
                absent[name] = lacking[0]
            else:
                splits[name] = tuple(entries)
        elif name not in OTHER_KEYS and given == f"images/{name}" and _is_inside(given, root):
            splits[name] = (given,)  # as `yolo_writing` names a split that is called otherwise
    return YoloSet(source, root, classes, labels, splits, absent, "kpt_shape" in document, tuple(faults))


def _is_inside(given: str, root: Path) -> bool:
    """Return whether a value of any other key is a folder of the data set, and its key so a split."""
    try:
        return os.path.isdir(root / clean_name(given, root, ""))
    except DataError:
        return False


def _load_folder(folder: Path) -> YoloSet:
    folder = Path(os.path.abspath(folder))
    splits = folder_splits(folder)
    listed = next((folder / name for name in CLASSES if (folder / name).is_file()), None)
    if listed is None:
        raise DataError(
            f"{folder}: has images and labels as YOLO, but nothing names its classes. Needed is {EXAMPLE}, or "
            f"{CLASSES[0]} with a name a line"
        )
    if not Fence(folder).holds_file(listed):
        raise DataError(f"{listed}: needs a file with a class name a line")
    names = [line.strip() for line in read_text_lines(listed, LARGEST_LIST)]
    while names and not names[-1]:
        names.pop()
    classes, labels = _named(dict(enumerate(names)), None, listed)
    return YoloSet(listed, folder, classes, labels, splits, {}, keypoints=False)


def folder_splits(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the splits of a folder by where its images and labels lie, none where it is not laid out so.

    `images/train` with `labels/train`, `train/images` with `train/labels`, or `images` with `labels`: one set, "".
    """
    inner = {name: (f"images/{name}", f"labels/{name}") for name in SPLITS}
    outer = {name: (f"{name}/images", f"{name}/labels") for name in SPLITS}
    for choices in (inner, outer, {"": ("images", "labels")}):
        found: dict[str, tuple[str, ...]] = {
            name: (images,)
            for name, (images, labels) in choices.items()
            if os.path.isdir(folder / images) and _holds_labels(folder / labels)
        }
        if found:
            return found
    return {}


def _holds_labels(folder: Path) -> bool:
    return os.path.isdir(folder) and any(name.endswith(".txt") for name in os.listdir(folder))


def _classes(document: dict[str, Plain], source: Path) -> tuple[Classes, dict[int, int]]:
    """Return the classes, and the index of each number that label files may have."""
    given = document.get("names")
    if isinstance(given, list):
        given = {str(number): name for number, name in enumerate(given)}
    if not isinstance(given, dict) or not given:
        raise DataError(
            f"{source}: needs `names`, a list of class names or a table `0: name`; got {brief(given)}"
        )
    names: dict[int, str] = {}
    for key, name in given.items():
        number = whole(key)
        if number is None or number in names or not isinstance(name, str):
            raise DataError(
                f"{source}: names: needs a whole number from 0 and a text, each number once; "
                f"got {brief(key)}: {brief(name)}"
            )
        names[number] = name.strip()
    count = document.get("nc", str(len(names)))
    if not isinstance(count, str) or whole(count) != len(names):
        raise DataError(
            f"{source}: nc is {brief(count)}, but names holds {len(names)} classes; correct one of them"
        )
    return _named(names, document.get("category_ids"), source)


def _named(names: dict[int, str], ids: Plain | None, source: Path) -> tuple[Classes, dict[int, int]]:
    numbers = sorted(names)
    given = numbers if ids is None else [whole(i) if isinstance(i, str) else None for i in ids]
    own = [number for number in given if number is not None]
    if isinstance(ids, str | dict) or len(own) != len(numbers):
        raise DataError(
            f"{source}: category_ids: needs a list of whole numbers from 0, one a class; got {brief(ids)}"
        )
    try:
        classes = Classes(tuple(names[number] for number in numbers), tuple(own))
        return classes, {number: label for label, number in enumerate(numbers)}
    except DataError as error:
        raise DataError(f"{source}: names: {error}") from None


def _root(given: Plain | None, source: Path, faults: list[Fault]) -> Path:
    """Return the folder that `path` means: one in the file's folder, or that folder itself."""
    base = source.parent
    if given is None or given in ("", "."):
        return base
    if not isinstance(given, str):
        raise DataError(f"{source}: path: needs a folder; got {brief(given)}")
    try:
        wanted = os.path.realpath(base / given)
        inside = Path(wanted).is_relative_to(os.path.realpath(base))
        if inside and os.path.isdir(wanted):
            return Path(os.path.normpath(base / os.path.relpath(wanted, os.path.realpath(base))))
    except ValueError:
        pass
    reason = f"{brief(given)} is no folder inside that of {source.name} and is not followed; its own folder is taken"
    faults.append(
        Fault(
            source.name,
            "path",
            reason,
            "repaired",
            Kind.PATH_ELSEWHERE,
            "remove the line, or name the folder: --image-root DIR",
        )
    )
    return base


def _entry(given: Plain, root: Path, where: Where, faults: list[Fault]) -> str:
    """Return a split's folder or list, relative to the root."""
    label = f"{root / where.file}: {where.record}"
    if not isinstance(given, str):
        raise DataError(f"{label}: needs a folder, a list of folders or a .txt file; got {brief(given)}")
    name = given.strip().replace("\\", "/")
    if name in (".", "./"):
        return "."
    inner = name
    while inner.startswith("../"):
        inner = inner[3:]
    # As Roboflow writes it, for a file one folder further down than it lies.
    if inner != name and os.path.exists(root / clean_name(inner, root, label)):
        reason = f"{brief(given)} leads out of the data folder; {inner} in it is taken"
        faults.append(Fault(*where, reason, "repaired", Kind.PATH_ELSEWHERE, f"write {inner}"))
        name = inner
    return clean_name(name, root, label)
