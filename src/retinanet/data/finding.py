"""Which of the image files that annotations name are there: every folder is listed once, not every file asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retinanet.data.rules import Fence, brief
from retinanet.errors import DataError

FEW = 64  # files of one folder that are rather asked for one by one: the folder may hold millions of others


def image_places(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Where images may lie, in order: (the folder they are in, the folder that they may not leave)."""
    names = ["", "images", split, f"images/{split}", f"{split}/images"]
    names += [place.format(split + year) for year in ("2017", "2014") for place in ("{}", "images/{}")]
    return [(base / name, base) for base in (folder, folder.parent) for name in names]


def find_place(files: Iterable[str], places: Sequence[tuple[Path, Path]], source: Path) -> tuple[Path, Path]:
    """Return the first place that holds the first image that is found at all; any place for no images.

    Raises:
        DataError: none is found anywhere.
    """
    folders = [(str(place), place, base) for place, base in places if os.path.isdir(place)]
    example, count = "", 0
    for file in files:
        example, count = example or file, count + 1
        for text, place, base in folders:
            if os.path.isfile(os.path.join(text, file)):
                return place, base
    if not count:
        return places[0]
    tried = ", ".join(str(place) for place, _ in places)
    raise DataError(
        f"{source}: none of its {count:,} image files was found, {brief(example)} for one. Tried: {tried}. Put them in "
        "one of these places, or name their folder: --image-root DIR (image_root in Python)"
    )


def files_there(folder: Path, fence: Fence, files: Sequence[str]) -> NDArray[np.bool_]:
    """Return which files, named relative to a folder, are regular files in it.

    Raises:
        DataError: one of them leaves the fence by a symbolic link.
    """
    there = np.zeros(len(files), bool)
    groups: dict[str, list[int]] = {}
    for index, file in enumerate(files):
        groups.setdefault(os.path.dirname(file), []).append(index)
    for parent, indices in groups.items():
        inner = os.path.join(folder, parent) if parent else str(folder)
        plain = _plain_files(inner, fence, {files[index] for index in indices}, parent)
        for index in indices:
            there[index] = files[index] in plain or fence.holds_file(os.path.join(folder, files[index]))
    return there


def _plain_files(folder: str, fence: Fence, wanted: set[str], parent: str) -> set[str]:
    """Return the wanted files that a listing shows as plain ones; links and odd spellings are asked for alone."""
    if len(wanted) < FEW:
        return set()
    try:
        with os.scandir(folder) as entries:
            fence.require_inside(folder)
            plain = (entry.name for entry in entries if entry.is_file(follow_symlinks=False))
            return {file for name in plain if (file := os.path.join(parent, name)) in wanted}
    except (OSError, ValueError):
        return set()
