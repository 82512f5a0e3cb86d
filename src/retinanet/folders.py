"""Folders and files that commands leave behind: never overwritten, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from retinanet.errors import ConfigError, DiskError

RUNS = Path("runs")
# A full disk, a used-up share of it, and a limit on the size of files.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def new_folder(output: str | None, stem: str, *, outside: Sequence[str | Path] = ()) -> Path:
    """Make the folder a command writes to: `output`, or the first free runs/STEM-N.

    Args:
        outside: data sets, folders or files, that it may not lie in; see `require_outside`.

    Raises:
        ConfigError: the folder holds something already, or cannot be made.
    """
    path = Path(output) if output else _first_free(stem)
    require_new(path)
    require_outside(path, *outside, by_default=not output)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be made: {error.strerror}") from None
    return path


def cache_folder(name: str) -> Path:
    """Return the folder for what can be made again: $RETINANET_CACHE/NAME, else ~/.cache/retinanet/NAME.

    It is not made. $XDG_CACHE_HOME stands for ~/.cache where it is set.
    """
    given = os.environ.get("RETINANET_CACHE")
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retinanet"
    return Path(os.path.abspath(given or usual)) / name


def require_new(path: Path) -> None:
    """Refuse a folder that holds something, or a file."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"--output needs a new folder; {path} exists and is not empty. Choose another name")


def require_new_file(path: Path) -> None:
    """Refuse a file that exists, and one in a folder that does not."""
    if path.exists():
        raise ConfigError(f"--output needs a new file; {path} exists. Choose another name")
    if not path.parent.is_dir():
        raise ConfigError(f"--output needs a file in an existing folder; there is no {path.parent}")


def require_outside(path: Path, *data: str | Path, by_default: bool = False) -> None:
    """Refuse a place inside a data set, whose files are left as they were.

    Args:
        data: folders that it may not lie in; a file stands for the folder that holds it.
        by_default: nobody asked for `path`: --output is then what helps.
    """
    real = Path(os.path.realpath(path))
    for given in data:
        there = Path(os.path.realpath(given))
        folder = there if there.is_dir() else there.parent
        if there.exists() and real.is_relative_to(folder):
            way_out = (
                "the working directory lies in the data: say --output FOLDER"
                if by_default
                else "Choose another"
            )
            raise ConfigError(
                f"--output needs a place outside the data folder {given if Path(given).is_dir() else folder}; "
                f"got {path}. {way_out[0].upper()}{way_out[1:]}"
            )


def folders_among(*data: str) -> list[str]:
    """Return those of some data sets that are folders: beside a file there may lie more than what belongs to it."""
    return [one for one in data if os.path.isdir(one)]


def _first_free(stem: str) -> Path:
    number = 1
    while (RUNS / f"{stem}-{number}").exists():
        number += 1
    return RUNS / f"{stem}-{number}"


def write_text(path: Path, text: str) -> None:
    """Write a file of text in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, *, parents: bool = False) -> None:
    """Write a file beside its place and move it there, so that it is never seen half-written.

    Args:
        parents: make the folders of its path that are not there.

    Raises:
        DiskError: the disk has no room or refuses; a file that was there stays as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or a power cut leaves the new name with nothing in it
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise not_written(path.name, path.parent, len(content), error) from None


def not_written(what: str, folder: Path, needed: int, error: OSError) -> DiskError:
    """Return the error of something that cannot be written; of a full disk it says which bytes are needed and free.

    Call it when what was written in part is gone: that takes room, too.
    """
    if error.errno not in FULL:
        return DiskError(f"{what} cannot be written to {folder}: {error.strerror or error}")
    free = ""
    with suppress(OSError):
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = f", {shutil.disk_usage(there).free:,} are free"
    why = "" if error.errno == errno.ENOSPC else f" ({os.strerror(error.errno)})"
    return DiskError(f"no room for {what} in {folder}{why}: {needed:,} bytes are needed{free}")


def write_json(path: Path, values: Any, *, parents: bool = False) -> None:
    """Write indented JSON; see `write_bytes`."""
    write_bytes(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode(), parents=parents)


def read_json(path: Path) -> dict[str, Any]:
    """Read an object that `write_json` wrote."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} needs a JSON object; got {type(values).__name__}")
    return values
