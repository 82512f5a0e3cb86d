"""What data sets look like on disk: each layout is recognised by a folder or file, and says how it is opened.

Asked in the order of `LAYOUTS`; the first that knows the place is taken. Where no split is named a data set is one set
without splits, and answers to every split's name. `instances_train2017.json` is the split "train" unless another year
is there too; then only "train2017" names it. "valid" and "validation" are "val".
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np

from retinanet.data.arrow_files import hugging_face_splits
from retinanet.data.coco import read_coco
from retinanet.data.coco.document import SECTIONS
from retinanet.data.csv_files import is_table_of_boxes, read_csv, read_rows
from retinanet.data.dataset import Dataset, Fault
from retinanet.data.hugging_face import BoxFormat, read_hugging_face
from retinanet.data.image_files import SUFFIXES
from retinanet.data.kinds import Kind
from retinanet.data.open_images import is_open_images, read_open_images
from retinanet.data.rules import Fence, ImageFiles, read_bytes
from retinanet.data.voc import main_splits, read_voc, split_lists
from retinanet.data.yolo import read_yolo
from retinanet.data.yolo_table import NAMES, folder_splits, load_yolo
from retinanet.errors import DataError

T = TypeVar("T")

ROBOFLOW = "_annotations.coco.json"
USUAL = ("train", "val", "valid", "validation", "test")
WHOLE_COCO = ("annotations.json", "annotations/annotations.json", "instances.json", ROBOFLOW)
WHOLE_CSV = ("annotations.csv", "labels.csv", "_annotations.csv", "boxes.csv")
TABLES_TRIED = 50
BEGINNING = 2**20  # bytes of a file that tell what it is


@dataclass(frozen=True)
class Reading:
    """How a data set is to be read; see `opening.open_dataset`."""

    images: ImageFiles = "required"
    image_root: Path | None = None
    box_format: BoxFormat = "auto"


@dataclass(frozen=True)
class Opened:
    """A recognised data set.

    Args:
        splits: those that count every image once; none for one set without splits.
        names: every split's name that is understood.
        read: reads the split of a name, which is any where there are no splits.
    """

    format: str
    splits: tuple[str, ...]
    names: tuple[str, ...]
    read: Callable[[str, Reading], Dataset]


class Layout(NamedTuple):
    """A format, what is looked for, and the function that recognises it in a folder or file.

    It is given the folder of the images as well, where that is another: YOLO's splits are folders in it.
    """

    format: str
    looked_for: str
    recognise: Callable[[Path, Path | None], Opened | None]


def _voc(path: Path, image_root: Path | None) -> Opened | None:
    if not os.path.isdir(path / "Annotations"):
        return None
    lists = split_lists(path)
    if not lists and not any(name.endswith(".xml") for name in os.listdir(path / "Annotations")):
        return None

    def read(split: str, reading: Reading) -> Dataset:
        if reading.image_root is None:
            return read_voc(path, split=split, images=reading.images)
        dataset = read_voc(path, split=split, images="absent")
        return dataset if reading.images == "absent" else _moved(dataset, reading.image_root)

    return Opened("Pascal VOC", ordered(main_splits(lists)), tuple(lists), read)


def _moved(dataset: Dataset, root: Path) -> Dataset:
    """Return a VOC split with its images in another folder; those that are not there are dropped."""
    root = Path(os.path.abspath(root))
    fence = Fence(root)
    files, faults, kept = [], list(dataset.faults), []
    for index, file in enumerate(dataset.files.tolist()):
        found = _beside(fence, file, dataset.image_ids[index])
        if found is None:
            reason = f"there is no image {PurePosixPath(file).name} in {root}"
            page = f"Annotations/{dataset.image_ids[index]}.xml"
            faults.append(
                Fault(page, "filename", reason, "dropped", Kind.MISSING_IMAGE, Kind.MISSING_IMAGE.fix)
            )
            continue
        files.append(found)
        kept.append(index)
    if not kept:
        raise DataError(
            f"{root}: holds none of the {len(dataset)} images of {dataset.name}, {dataset.files[0]} for one"
        )
    counts = Counter(dataset.fault_counts)
    counts[str(Kind.MISSING_IMAGE), "dropped"] += len(dataset) - len(kept)
    return replace(
        dataset.subset(kept),
        root=root,
        files=np.array(files, np.str_),
        faults=tuple(faults),
        fault_counts=counts,
        left_out=tuple(
            found for file in dataset.left_out if (found := _beside(fence, file, PurePosixPath(file).stem))
        ),
    )


def _beside(fence: Fence, file: str, image_id: object) -> str | None:
    """Return what an image of a VOC data set is called in another folder: as its page says, else as the page itself."""
    choices = (PurePosixPath(file).name, *(f"{image_id}{suffix}" for suffix in SUFFIXES))
    return next((choice for choice in choices if fence.holds_file(fence.folder / choice)), None)


def _coco(path: Path, image_root: Path | None) -> Opened | None:
    if not path.is_dir():
        return _whole_coco(path) if path.suffix.lower() == ".json" else None
    for files in (
        _instances(path / "annotations"),
        _instances(path),
        {file.parent.name: file for file in sorted(path.glob(f"*/{ROBOFLOW}"))},
        {name: file for name in USUAL if _is_coco(file := path / f"annotations/{name}.json")},
        {name: file for name in USUAL if _is_coco(file := path / f"{name}.json")},
    ):
        if files:
            return _by_file(
                "COCO",
                files,
                lambda file, split, reading: read_coco(
                    file, split=split, images=reading.images, image_root=reading.image_root
                ),
            )
    whole = next((path / name for name in WHOLE_COCO if _is_coco(path / name)), None)
    return None if whole is None else _whole_coco(whole)


def _is_coco(file: Path) -> bool:
    """Return whether a JSON file begins as COCO's do: `train.json` may be anybody's."""
    if not file.is_file():
        return False
    start = read_bytes(file, first=BEGINNING).replace(b"\0", b"")  # UTF-16 has zeros between its letters
    return file.name == ROBOFLOW or any(f'"{key}"'.encode() in start for key in SECTIONS)


def _whole_coco(file: Path) -> Opened:
    def read(split: str, reading: Reading) -> Dataset:
        return read_coco(file, split=split, images=reading.images, image_root=reading.image_root)

    return Opened("COCO", (), (), read)


def _instances(folder: Path) -> dict[str, Path]:
    return {path.stem.removeprefix("instances_"): path for path in sorted(folder.glob("instances_*.json"))}


def _yolo(path: Path, image_root: Path | None) -> Opened | None:
    if path.is_dir():
        source = next((path / name for name in NAMES if _is_table(path / name)), None)
        others = [file for file in sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if _is_table(file)]
        if source is None and folder_splits(path):
            source = others[0] if len(others) == 1 else path
        if source is None:
            return None
    elif path.suffix.lower() in (".yaml", ".yml"):
        source = path
    else:
        return None
    known = source

    def read(name: str, split: str, reading: Reading) -> Dataset:
        return replace(read_yolo(known, split=name, image_root=reading.image_root), split=split)

    names = [name for name in load_yolo(known, image_root).splits if name]
    if not names:
        return Opened("YOLO", (), (), lambda split, reading: read(split, split, reading))
    return _by_file("YOLO", {name: name for name in names}, read)


def _is_table(file: Path) -> bool:
    """Return whether a file is YOLO's: called `data.yaml`, or a table of names; others have a `dataset.yaml` too."""
    if not file.is_file():
        return False
    said = re.search(
        rb"""(?:^|[{,])[ \t]*["']?names["']?[ \t]*:""", read_bytes(file, first=BEGINNING), re.MULTILINE
    )
    return file.stem == "data" or said is not None


def _hugging_face(path: Path, image_root: Path | None) -> Opened | None:
    names = list(hugging_face_splits(path))
    if not names:
        return None

    def read(name: str, split: str, reading: Reading) -> Dataset:
        found = read_hugging_face(
            path,
            split=name,
            images=reading.images,
            image_root=reading.image_root,
            box_format=reading.box_format,
        )
        return replace(found, split=split)

    if names == [""]:
        return Opened("Hugging Face", (), (), lambda split, reading: read("", split, reading))
    return _by_file("Hugging Face", {name: name for name in names if name}, read)


def _open_images(path: Path, image_root: Path | None) -> Opened | None:
    def read(file: Path, split: str, reading: Reading, tables: Mapping[str, Path]) -> Dataset:
        others = [other for other in tables.values() if other != file]
        return read_open_images(
            file, split=split, image_root=reading.image_root, together=others, folder=_home(path, file)
        )

    return _tables("Open Images", path, is_open_images, read)


def _csv(path: Path, image_root: Path | None) -> Opened | None:
    def read(file: Path, split: str, reading: Reading, tables: Mapping[str, Path]) -> Dataset:
        others = [other for other in tables.values() if other != file]
        return read_csv(
            file,
            split=split,
            images=reading.images,
            image_root=reading.image_root,
            together=others,
            folder=_home(path, file),
        )

    return _tables("CSV", path, is_table_of_boxes, read)


def _home(path: Path, file: Path) -> Path:
    """Return the data set's own folder: what was opened, or the folder of the file that was."""
    return path if path.is_dir() else file.parent


def _tables(
    form: str,
    path: Path,
    is_table: Callable[[Path], bool],
    read: Callable[[Path, str, Reading, Mapping[str, Path]], Dataset],
) -> Opened | None:
    """Recognise CSV files: one for each split by its name or folder, or one for all."""
    if not path.is_dir():
        if path.suffix.lower() != ".csv" or not is_table(path):
            return None
        return Opened(form, (), (), lambda split, reading: read(path, split, reading, {}))
    files = [*path.glob("*.csv"), *path.glob("annotations/*.csv"), *path.glob("*/_annotations.csv")]
    found = [file for file in sorted(files)[:TABLES_TRIED] if is_table(file)]
    whole = [file for file in found if file.name in WHOLE_CSV and not _split_in(file)]
    if found:  # a split of it is not passed by where its file is damaged: who reads that is told
        found += [file for file in sorted(files)[:TABLES_TRIED] if file.stem in USUAL and not _has_text(file)]
    if not any(_split_in(file) for file in found) and (whole or len(found) == 1):
        table = (whole or found)[0]
        return Opened(form, (), (), lambda split, reading: read(table, split, reading, {}))
    parts = [file for file in found if file not in whole]
    uses = Counter(_split_in(file) for file in parts)
    names = (_split_in(file) if uses[_split_in(file)] == 1 else "" for file in parts)
    tables = {name or file.stem: file for name, file in zip(names, parts, strict=True)}
    if not tables:
        return None
    return _by_file(form, tables, lambda file, split, reading: read(file, split, reading, tables))


def _has_text(file: Path) -> bool:
    """Return whether a CSV file has a first line that can be read."""
    try:
        return next(read_rows(file), None) is not None
    except DataError:
        return False


def _split_in(file: Path) -> str:
    """Return the usual split that a file's name holds as a word of its own, or that its folder is called."""
    words = [*re.split(r"[^a-z]+", file.stem.lower()), file.parent.name]
    return next((word for word in words if word in USUAL), "")


LAYOUTS = (
    Layout("Pascal VOC", "Annotations/*.xml", _voc),
    Layout(
        "COCO", f"annotations/instances_{{split}}.json, instances_{{split}}.json, {{split}}/{ROBOFLOW}", _coco
    ),
    Layout("YOLO", "data.yaml", _yolo),
    Layout("Hugging Face", "*.parquet, dataset_dict.json", _hugging_face),
    Layout("Open Images", "{split}-annotations-bbox.csv", _open_images),
    Layout("CSV", "{split}.csv, annotations.csv", _csv),
)


def recognised(path: Path, image_root: Path | None = None) -> Opened | None:
    """Return the first layout that a folder or file has."""
    return next(
        (found for layout in LAYOUTS if (found := layout.recognise(path, image_root)) is not None), None
    )


def _by_file(form: str, files: Mapping[str, T], read: Callable[[T, str, Reading], Dataset]) -> Opened:
    """Name each split without its year, and "val" whatever it is called, where no other is meant."""
    plain = {name: re.sub(r"(?<=[a-z])(19|20)\d\d$", "", name) for name in files}
    plain = {name: "val" if short in ("valid", "validation") else short for name, short in plain.items()}
    uses = Counter(plain.values())
    names = {plain[name] if uses[plain[name]] == 1 else name: file for name, file in files.items()}
    known = {**files, **names}
    return Opened(
        form, ordered(list(names)), tuple(known), lambda split, reading: read(known[split], split, reading)
    )


def ordered(splits: Sequence[str]) -> tuple[str, ...]:
    """Return names of splits with train, val and test first."""
    usual = ("train", "val", "test")
    return tuple(sorted(splits, key=lambda name: (usual.index(name) if name in usual else len(usual), name)))
