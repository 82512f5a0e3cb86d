"""From a data set in memory to one on disk in any format that can be written, and what was lost on the way."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias

import numpy as np

from retinanet.data.coco import write_coco
from retinanet.data.csv_writing import write_classes, write_csv
from retinanet.data.dataset import Dataset
from retinanet.data.image_files import is_image_name, suffix_of
from retinanet.data.policies import whole
from retinanet.data.rules import name_fault
from retinanet.data.voc_writing import holds_corners, write_voc_list, write_voc_pages
from retinanet.data.yolo_table import OTHER_KEYS
from retinanet.data.yolo_writing import write_yolo_labels, write_yolo_table
from retinanet.errors import ConfigError, DataError, ImageError
from retinanet.images import read_size
from retinanet.records import Classes, Ignore

Format: TypeAlias = Literal["coco", "voc", "yolo", "csv"]

NAMES_SHOWN = 5
LONGEST_STEM = 120  # characters, of at most 4 bytes, of the 255 bytes that a file's name may have


@dataclass(frozen=True)
class Conversion:
    """What `convert_dataset` made.

    Args:
        path: the new folder.
        images: how many it holds.
        linked: how many of them share their bytes with the original file; the others are copies.
        losses: what the format cannot hold, a sentence each.
    """

    path: Path
    images: int
    linked: int
    losses: tuple[str, ...]


@dataclass(frozen=True)
class _Part:
    """A split on its way to disk: its images' names in the folder `images`, which is relative to the new one."""

    split: str
    dataset: Dataset
    images: str
    names: list[str]

    @property
    def files(self) -> list[str]:
        return [f"{self.images}/{name}" for name in self.names]


def convert_dataset(
    splits: Mapping[str, Dataset],
    output: Path | str,
    form: Format,
    *,
    source: Path | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Conversion:
    """Write a data set as a new folder, which appears under its name only when it is complete.

    - coco: `annotations/instances_{split}.json`, `images/{split}/`
    - voc: `Annotations/`, `JPEGImages/`, `ImageSets/Main/{split}.txt`
    - yolo: `data.yaml`, `images/{split}/`, `labels/{split}/`
    - csv: `{split}.csv`, `classes.csv`, `images/{split}/`

    One set without splits becomes `annotations.json`, no lists, `classes.txt`, `annotations.csv`. Images are hard links
    where the file system makes them, else copies: of the bytes themselves, never encoded again. A link is the same file
    under two names: who paints in one paints in both. Files keep their names, made distinct where two are equal.
    `opening.open_dataset` reads the result back with equal boxes, classes and splits; COCO keeps the ids of images and,
    where they are distinct, of annotations; in the other formats an image is known by its file's name.

    Args:
        splits: by name; a single one named "" is a set without splits.
        output: the folder to make; must not exist.
        source: the data set's own folder, inside which nothing is written.
        progress: called with the number of images done so far.

    Raises:
        ConfigError: `output` exists, lies in the data set or cannot be made.
        DataError: splits of different classes, a class name that the format cannot hold, an image that is not there,
            a split of which no image has the annotated size.
    """
    output = Path(os.path.abspath(output))
    classes = _classes(splits, form)
    splits, lost = _of_annotated_size(splits, form)
    lost += losses(splits, form)
    _require_outside(
        output, [*([] if source is None else [Path(source)]), *(d.root for d in splits.values())]
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-")
    except OSError as error:
        raise ConfigError(
            f"no folder can be made in {output.parent}: {error.strerror}; choose another place"
        ) from None
    with staging as temporary:
        folder = Path(temporary) / "data"
        folder.mkdir()
        parts, linked, done = _parts(splits, form), 0, 0
        for part in parts:
            (folder / part.images).mkdir(parents=True, exist_ok=True)
            for index, name in enumerate(part.names):
                linked += _place(part.dataset.path(index), folder / part.images / name)
                done += 1
                if progress:
                    progress(done)
        WRITERS[form](folder, parts, classes if _holds_ids(classes, form) else Classes(classes.names))
        folder.rename(output)
    return Conversion(output, done, linked, tuple(lost))


def _require_outside(output: Path, folders: Sequence[Path]) -> None:
    if os.path.lexists(output):
        raise ConfigError(f"a new folder is required; {output} exists, and nothing is ever overwritten")
    real = Path(os.path.realpath(output))
    for folder in folders:
        home = folder if os.path.isdir(folder) else folder.parent
        if real.is_relative_to(os.path.realpath(home)):
            raise ConfigError(f"a folder outside the data set is required; {output} lies in {home}")


def _classes(splits: Mapping[str, Dataset], form: Format) -> Classes:
    """Return the classes that all splits have; refuse names that would not come back."""
    if not splits or ("" in splits and len(splits) > 1):
        raise DataError("a conversion needs splits with names, or one set without; got none or both")
    first, *others = splits.values()
    for other in others:
        if other.classes != first.classes:
            raise DataError(
                f"{first.name}: a conversion needs the same classes in every split; {first.split} has "
                f"{', '.join(first.classes.names[:8])}, {other.split} has {', '.join(other.classes.names[:8])}"
            )
    for split in splits:
        if split and (name_fault(split) or re.search(r"[\\/]|^\.", split) or split in OTHER_KEYS):
            raise DataError(f"{form} needs a plain word as name of a split; got {split!r}")
    for name in first.classes.names:
        if form != "coco" and (name != name.strip() or not name.isprintable()):
            raise DataError(
                f"{form} needs class names of printable characters without outer spaces; got {name!r}"
            )
    return first.classes


def _of_annotated_size(splits: Mapping[str, Dataset], form: Format) -> tuple[dict[str, Dataset], list[str]]:
    """Leave out images of another size than annotated, where the format takes the size of the file; and say so."""
    if form not in ("yolo", "csv"):
        return dict(splits), []
    kept, others = {}, []
    for split, dataset in splits.items():
        same = np.array([_is_of_size(dataset, index) for index in range(len(dataset))], np.bool_)
        others += dataset.files[~same].tolist()
        if not same.any():
            raise DataError(
                f"{dataset.name}: every image of split {split!r} has another size than annotated, {others[0]} for one; "
                f"{form} takes the size of the file. `retinanet data check` says more"
            )
        kept[split] = dataset if same.all() else dataset.subset(same)
    shown = ", ".join(others[:NAMES_SHOWN]) + (" ..." if len(others) > NAMES_SHOWN else "")
    lost = f"{len(others):,} images of another size than annotated are left out with their boxes: {shown}"
    return kept, [lost] if others else []


def _is_of_size(dataset: Dataset, index: int) -> bool:
    try:
        return read_size(dataset.path(index)) == dataset.size(index)
    except ImageError:  # it comes as it is, to be named when it is read
        return True


def _holds_ids(classes: Classes, form: Format) -> bool:
    """Return whether category ids can be read back; where one cannot, all are numbered anew."""
    return form not in ("yolo", "csv") or all(whole(str(number)) == number for number in classes.ids)


def _parts(splits: Mapping[str, Dataset], form: Format) -> list[_Part]:
    parts, taken = [], set[str]()
    for split, dataset in splits.items():
        images = "JPEGImages" if form == "voc" else "images" + (f"/{split}" if split else "")
        taken = taken if form == "voc" else set()  # VOC has all splits in one folder
        parts.append(
            _Part(split, dataset, images, [_new_name(dataset, i, taken) for i in range(len(dataset))])
        )
    return parts


def _new_name(dataset: Dataset, index: int, taken: set[str]) -> str:
    """Return a file name whose part before the ending is nobody else's: labels are named by it."""
    path = PurePosixPath(str(dataset.files[index]).replace("\\", "_"))
    suffix = path.suffix
    if not is_image_name(path.name):
        try:
            with dataset.path(index).open("rb") as stream:
                suffix = suffix_of(stream.read(16))
        except OSError as error:
            raise DataError(f"{dataset.path(index)}: cannot be read: {error.strerror}") from None
    stem = path.stem.strip(" .")[-LONGEST_STEM:].strip(" .") or "image"
    longer = "_".join([*path.parent.parts, stem])[-LONGEST_STEM:].strip(" .")
    number, choice = 1, stem
    while choice.casefold() in taken:  # file systems may not tell A from a
        number, choice = number + 1, longer if number == 1 else f"{longer}-{number}"
    taken.add(choice.casefold())
    return choice + suffix


def _place(source: Path, target: Path) -> bool:
    """Link or copy an image; return whether it is a link."""
    real = os.path.realpath(source)
    try:
        os.link(real, target)
        return True
    except OSError:  # another disk, a file system without links, a file of somebody else
        pass
    try:
        shutil.copyfile(real, target)
    except OSError as error:
        raise DataError(f"{source}: cannot be copied to {target}: {error.strerror}") from None
    return False


def _write_coco(folder: Path, parts: Sequence[_Part], classes: Classes) -> None:
    for part in parts:
        path = folder / (f"annotations/instances_{part.split}.json" if part.split else "annotations.json")
        path.parent.mkdir(exist_ok=True)
        dataset = part.dataset
        write_coco(
            path,
            classes=classes,
            files=part.files,
            sizes=[dataset.size(index) for index in range(len(dataset))],
            ground_truths=[dataset.ground_truth(index) for index in range(len(dataset))],
            image_ids=dataset.image_ids.tolist(),
            keep_ids=len(np.unique(dataset.annotation_ids)) == len(dataset.annotation_ids),
        )


def _write_voc(folder: Path, parts: Sequence[_Part], classes: Classes) -> None:
    (folder / "Annotations").mkdir()
    for part in parts:
        write_voc_pages(folder, part.dataset, part.names)
        if part.split:
            write_voc_list(folder, part.split, part.names)


def _write_yolo(folder: Path, parts: Sequence[_Part], classes: Classes) -> None:
    for part in parts:
        labels = folder / part.images.replace("images", "labels", 1)
        labels.mkdir(parents=True)
        write_yolo_labels(labels, part.dataset, part.names)
    write_yolo_table(folder, [part.split for part in parts], classes)


def _write_csv(folder: Path, parts: Sequence[_Part], classes: Classes) -> None:
    for part in parts:
        write_csv(folder / f"{part.split or 'annotations'}.csv", part.dataset, part.files)
    write_classes(folder / "classes.csv", classes)


WRITERS: dict[Format, Callable[[Path, Sequence[_Part], Classes], None]] = {
    "coco": _write_coco,
    "voc": _write_voc,
    "yolo": _write_yolo,
    "csv": _write_csv,
}


def losses(splits: Mapping[str, Dataset], form: Format) -> list[str]:
    """Return what a format cannot hold of a data set, a sentence with a count each."""
    parts = list(splits.values())
    classes = parts[0].classes
    ignore = np.concatenate([part.ignore for part in parts])
    crowd, difficult = (int((ignore == kind).sum()) for kind in (Ignore.CROWD, Ignore.DIFFICULT))
    found = []
    if form == "coco" and difficult:
        found.append(
            f"{difficult:,} boxes marked difficult became crowd areas, which are ignored as they were"
        )
    if form == "voc" and crowd:
        found.append(f"{crowd:,} crowd areas became objects marked difficult, which are ignored as they were")
    if form in ("yolo", "csv") and crowd + difficult:
        found.append(
            f"{crowd + difficult:,} boxes to be ignored (crowd, difficult) are left out; {form} has no place"
        )
    if form != "coco":
        boxes, areas = np.concatenate([p.boxes for p in parts]), np.concatenate([p.areas for p in parts])
        kept = (ignore == Ignore.NO) | (form == "voc")
        own = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        if other := int((~np.isclose(areas, own, rtol=1e-3, atol=1e-3) & kept).sum()):
            found.append(f"{other:,} areas other than their box's (those of masks) became the box's")
    if unread := sorted({kind for part in parts for kind in part.unread}):
        found.append(f"{' and '.join(unread)} of the source are not read: boxes alone are converted")
    plain = tuple(range(len(classes)))
    if form == "voc":
        if thin := sum(int((~holds_corners(part.boxes)).sum()) for part in parts):
            found.append(
                f"{thin:,} boxes of a pixel or thinner are left out; the corners of voc are whole pixels"
            )
        empty = set(classes.names) - {
            classes.names[label] for part in parts for label in np.unique(part.labels)
        }
        if empty:
            found.append(
                f"{len(empty):,} classes without an object are not there: {', '.join(sorted(empty)[:8])}"
            )
        if classes.ids != plain or classes.names != tuple(sorted(classes.names)):
            found.append(
                f"{len(classes):,} category ids became the places of the names in the alphabet, from 0"
            )
    elif not _holds_ids(classes, form):
        found.append(
            f"{len(classes):,} category ids became 0 to {len(classes) - 1}; {form} has whole numbers from 0 to 2^31 - 1"
        )
    elif form == "yolo" and "" in splits and classes.ids != plain:
        found.append(
            f"{len(classes):,} category ids became 0 to {len(classes) - 1}; without splits yolo has no place"
        )
    return found
