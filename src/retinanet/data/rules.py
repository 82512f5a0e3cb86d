"""The rules that every reader keeps: which paths are refused, which boxes are repaired or dropped."""

from __future__ import annotations

import os
import re
import reprlib
import stat
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retinanet.errors import DataError

# Whether image files have to be there. "absent": nothing looks at them, sizes come from the annotations.
ImageFiles: TypeAlias = Literal["required", "absent"]
Box: TypeAlias = tuple[float, float, float, float]

LONGEST_SIDE = 2**20  # pixels; a larger side is a damaged number
LONGEST_NAME = 512  # characters; `Dataset.files` is as wide as its longest entry
ROUNDING = 0.02  # pixels; writers round x and width to two decimals each

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 100
_brief.maxlist = _brief.maxdict = 6
_brief.maxlevel = 3


def brief(value: Any) -> str:
    """Return a value for a message, cut to one short line."""
    return _brief.repr(value)


def read_bytes(path: Path, *, limit: int | None = None, first: int = -1) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes, or the `first` of them; `DataError` otherwise.

    A pipe or a device would block or never end.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: needs a file; it is a folder or a device")
        if limit is not None and found.st_size > limit:
            raise DataError(f"{path}: needs at most {limit:,} bytes; got {found.st_size:,}")
        with path.open("rb") as stream:
            return stream.read(first)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read: {reason}") from None


def read_text_lines(path: Path, limit: int) -> list[str]:
    """Return the lines of a text file in UTF-8, with a byte order mark or without; see `read_bytes`."""
    try:
        return read_bytes(path, limit=limit).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: needs text in UTF-8; {error}") from None


def number(value: Any) -> float | None:
    """Return a number as a float, None for everything else (bool, text, integers beyond float)."""
    if type(value) is float:
        return value
    try:
        return float(value) if type(value) is int else None
    except OverflowError:
        return None


def side(value: Any) -> int | None:
    """Return an image's width or height in pixels, None where it is not one."""
    length = number(value)
    if length is None or not (1 <= length <= LONGEST_SIDE) or not length.is_integer():
        return None
    return int(length)


def name_fault(name: Any) -> str | None:
    """Say why a value cannot be a file name, or None."""
    if not isinstance(name, str) or not name.strip():
        return f"needs a file name; got {brief(name)}"
    if len(name) > LONGEST_NAME:
        return f"needs a file name of at most {LONGEST_NAME} characters; got {len(name):,}"
    if not name.isprintable():  # also false for lone surrogates, which no file system takes
        return f"needs a file name of printable characters; got {brief(name)}"
    return None


def refuse_escape(name: str, where: str) -> None:
    """Raise `DataError` for an absolute path or one with "..", in the manner of any system."""
    if re.match(r"[\\/]|[A-Za-z]:", name) or ".." in re.split(r"[\\/]", name):
        raise DataError(
            f"{where}: needs a path inside the data folder, relative and without '..'; got {brief(name)}. "
            "Correct the file; the data set was not read"
        )


class Fence:
    """A folder that no file of a data set may lead out of, not even by a symbolic link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._real = Path(os.path.realpath(folder))
        self._inside: dict[str, bool] = {}  # by parent: one lstat a file instead of one a path component

    def holds_file(self, path: Path | str) -> bool:
        """Return whether a regular file is there; raise `DataError` if it lies outside."""
        try:
            mode = os.lstat(path).st_mode
            parent, linked = os.path.dirname(path), stat.S_ISLNK(mode)
            if parent not in self._inside:
                self._inside[parent] = self._covers(parent)
            if not self._inside[parent] or (linked and not self._covers(str(path))):
                raise DataError(_leaves(path, self.folder))
            return stat.S_ISREG(os.stat(path).st_mode if linked else mode)
        except (OSError, ValueError):
            return False

    def require_inside(self, folder: str) -> None:
        """Raise `DataError` if a folder lies outside."""
        if folder not in self._inside:
            self._inside[folder] = self._covers(folder)
        if not self._inside[folder]:
            raise DataError(_leaves(folder, self.folder))

    def holds_folder(self, path: Path) -> bool:
        """Return whether a folder is there; raise `DataError` if it lies outside."""
        if not os.path.isdir(path):
            return False
        if not self._covers(str(path)):
            raise DataError(_leaves(path, self.folder, "folder"))
        return True

    def _covers(self, path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._real)


def _leaves(path: Path | str, folder: Path, what: str = "file") -> str:
    return (
        f"{path}: is a symbolic link, or in a linked folder, that leaves the data folder {folder}; "
        f"put the {what} itself there"
    )


def clip_box(box: Box, width: int, height: int) -> tuple[Box | None, str | None]:
    """Cut a finite box with x2 > x1 and y2 > y1 to its image.

    Returns:
        (box, None) as it was or within `ROUNDING` of it; (box, reason) cut; (None, reason) nothing left.
    """
    x1, y1, x2, y2 = box
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        return None, f"lies outside the image of {width} x {height} pixels"
    over = max(-x1, -y1, x2 - width, y2 - height)
    if over > 0:
        x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    thin = min(x2 - x1, y2 - y1) < 0.125  # spacing of float32 numbers below LONGEST_SIDE is 1/16
    if thin and not (np.float32(x2) > np.float32(x1) and np.float32(y2) > np.float32(y1)):
        return None, "has no area in single precision"
    cut = (x1, y1, x2, y2)
    if over <= ROUNDING:
        return cut, None
    corners = ", ".join(f"{value:g}" for value in cut)
    return cut, f"reached beyond the image of {width} x {height} pixels; cut to [{corners}] (x1, y1, x2, y2)"


def smallest_size(boxes: list[Box]) -> tuple[int, int]:
    """Return the smallest (width, height) in whole pixels that holds the boxes."""
    return (
        max((int(np.ceil(box[2])) for box in boxes), default=1),
        max((int(np.ceil(box[3])) for box in boxes), default=1),
    )


def clip_boxes(
    boxes: NDArray[np.float64], sizes: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Cut boxes `[N, 4]` to their images `[N, 2]` (width, height) as `clip_box` does one.

    Returns:
        The boxes, cut; and which of them lie outside, have no area left in single precision, or lost more than
        `ROUNDING`: of the three at most one.
    """
    edges = np.concatenate([sizes, sizes], axis=1).astype(np.float64)
    outside = np.logical_or((boxes[:, :2] >= edges[:, :2]).any(axis=1), (boxes[:, 2:] <= 0).any(axis=1))
    over = np.maximum(-boxes[:, :2], boxes[:, 2:] - edges[:, 2:]).max(axis=1, initial=-np.inf)
    cut = np.clip(boxes, 0, edges)
    single = cut.astype(np.float32)
    flat = np.logical_and((single[:, 2:] <= single[:, :2]).any(axis=1), ~outside)
    reached = np.logical_and(over > ROUNDING, ~(outside | flat))
    return cut, outside, flat, reached
