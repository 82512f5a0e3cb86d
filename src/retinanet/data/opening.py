"""Which format a folder or file has, which splits, and the one function that opens them all.

Looked for in this order; the first layout with at least one split is taken:

- Pascal VOC: `Annotations` and `ImageSets/Main/{split}.txt`
- COCO: `annotations/instances_{split}.json`; the same with a year, `instances_{split}2017.json`
- COCO: `instances_{split}.json` in the folder itself, with a year or without
- COCO as Roboflow writes it: `{split}/_annotations.coco.json`

`instances_train2017.json` is the split "train" unless another year is there too; then only "train2017"
names it. "valid" and "validation" are "val".
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from retinanet.data.coco import read_coco
from retinanet.data.dataset import Dataset
from retinanet.data.rules import ImageFiles
from retinanet.data.voc import LISTS, main_splits, read_voc, split_lists
from retinanet.errors import DataError, did_you_mean

ROBOFLOW = "_annotations.coco.json"
READ = "COCO JSON and Pascal VOC are read"
ENTRIES_SHOWN = 8
FOLDERS_TRIED = 50

Opener: TypeAlias = Callable[[ImageFiles], Dataset]


@dataclass(frozen=True)
class _Layout:
    """The splits of a folder: those that count every image once, and every name that is understood."""

    splits: tuple[str, ...]
    names: dict[str, Path]
    is_voc: bool


def open_dataset(data: str | Path, split: str, *, images: ImageFiles = "required") -> Dataset:
    """Read one split of a data set, whatever its format.

    A single COCO JSON file answers to every split's name; `available_splits` is empty for it.

    Args:
        data: a folder in one of the layouts above, or a COCO JSON file.
        images: "absent" reads annotations only and looks at no image file.

    Raises:
        DataError: nothing is there, the format is not recognised, the split is absent, or its reader refuses.
    """
    path = _existing(data)
    if path.is_file():
        return read_coco(path, split=split, images=images)
    layout = _layout(path)
    if split not in layout.names:
        raise DataError(
            f"{data}: has no split {split!r}; there are: {', '.join(layout.splits)}."
            + did_you_mean(split, layout.names)
        )
    if layout.is_voc:
        return read_voc(path, split=split, images=images)
    return replace(
        read_coco(layout.names[split], split=split, images=images), name=path.resolve().name or str(path)
    )


def available_splits(data: str | Path) -> tuple[str, ...]:
    """Return the splits that together count every image once, train, val and test first.

    Empty for a single JSON file. VOC's `trainval` is not among them where `train` or `val` is; it can be
    opened by name.

    Raises:
        DataError: nothing is there or the format is not recognised.
    """
    path = _existing(data)
    return () if path.is_file() else _layout(path).splits


def _existing(data: str | Path) -> Path:
    path = Path(data)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
        empty = is_folder and not any(path.iterdir())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read: {reason}") from None
    if is_folder and not empty:
        return path
    if empty:
        raise DataError(f"{path}: is an empty folder; a data set is required. {READ}")
    if not is_file:
        there = "is neither a folder nor a file" if path.exists() else "does not exist"
        hint = "" if path.exists() else did_you_mean(path.name, _siblings(path))
        raise DataError(f"{path}: {there}; a folder or a COCO JSON file is required.{hint}")
    if path.suffix.lower() == ".json":
        return path
    raise DataError(f"{path}: {_unread(path.name) or 'is not a data set that can be read'}; {READ}")


def _siblings(path: Path) -> list[str]:
    try:
        return os.listdir(path.parent)
    except OSError:
        return []


def _unread(name: str) -> str | None:
    suffix = Path(name).suffix.lower()
    if suffix in (".yaml", ".yml"):
        return f"{name} (YOLO) is not read yet"
    if suffix == ".csv":
        return f"{name} (CSV) is not read yet"
    return None


def _layout(folder: Path) -> _Layout:
    found = _recognised(folder)
    if found is not None:
        return found
    entries = sorted(folder.iterdir())
    shown = [entry.name + "/" * os.path.isdir(entry) for entry in entries[:ENTRIES_SHOWN]]
    more = f" and {len(entries) - ENTRIES_SHOWN} more" if len(entries) > ENTRIES_SHOWN else ""
    hints = [text for entry in entries if (text := _unread(entry.name))][:1]
    if os.path.isdir(folder / "Annotations"):
        hints.append(f"{LISTS}/*.txt, the lists of splits of Pascal VOC, are missing")
    inner = [entry for entry in entries if os.path.isdir(entry)][:FOLDERS_TRIED]
    hints += [f"Did you mean {entry}?" for entry in inner if _recognised(entry)][:1]
    hints += [f"One JSON file can be named itself: {entry}" for entry in entries if entry.suffix == ".json"][
        :1
    ]
    raise DataError(
        f"{folder}: no data set is recognised. Looked for: Annotations with {LISTS}/{{split}}.txt "
        f"(Pascal VOC), annotations/instances_{{split}}.json, instances_{{split}}.json, "
        f"{{split}}/{ROBOFLOW} (COCO). Found: {', '.join(shown)}{more}. "
        + "".join(f"{hint}{'' if hint.endswith('?') else '.'} " for hint in hints)
        + READ
    )


def _recognised(folder: Path) -> _Layout | None:
    if os.path.isdir(folder / "Annotations") and (lists := split_lists(folder)):
        return _Layout(_ordered(main_splits(lists)), lists, is_voc=True)
    for files in (
        _instances(folder / "annotations"),
        _instances(folder),
        {path.parent.name: path for path in sorted(folder.glob(f"*/{ROBOFLOW}"))},
    ):
        if files:
            return _with_aliases(files)
    return None


def _instances(folder: Path) -> dict[str, Path]:
    return {path.stem.removeprefix("instances_"): path for path in sorted(folder.glob("instances_*.json"))}


def _with_aliases(files: dict[str, Path]) -> _Layout:
    """Name each file without its year, and "val" whatever it is called, where no other file is meant."""
    plain = {name: re.sub(r"(?<=[a-z])(19|20)\d\d$", "", name) for name in files}
    plain = {name: "val" if short in ("valid", "validation") else short for name, short in plain.items()}
    uses = Counter(plain.values())
    names = {plain[name] if uses[plain[name]] == 1 else name: path for name, path in files.items()}
    return _Layout(_ordered(list(names)), {**files, **names}, is_voc=False)


def _ordered(splits: list[str]) -> tuple[str, ...]:
    usual = ("train", "val", "test")
    return tuple(sorted(splits, key=lambda name: (usual.index(name) if name in usual else len(usual), name)))
