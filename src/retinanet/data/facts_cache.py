"""What decoding found out about image files, kept outside the data set until a file changes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from retinanet.errors import ConfigError

# Rules of decoding that change what is found need another number.
FILE_NAME = "images-1.sqlite"
COMMIT_EVERY = 500
Row: TypeAlias = tuple[int, int, int, str, int, str, int]
"""width, height, orientation, mode, frames, digest, dhash: `retinanet.data.auditing.ImageFacts` without its index."""


def platform_cache() -> Path:
    """Return the folder where this platform's programs keep what can be made again."""
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local")
    elif sys.platform == "darwin":
        base = home / "Library/Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "retinanet"


class FactsCache:
    """A table by path; a row counts only as long as the file's size and time of change are the same.

    A cache that cannot be made, read or written is none: everything is then found out anew.

    Raises:
        ConfigError: the cache would lie in the data folder, where nothing is ever written.
    """

    def __init__(self, folder: Path | None, *, outside: Path) -> None:
        place = Path(os.path.realpath(platform_cache() if folder is None else folder))
        if place.is_relative_to(os.path.realpath(outside)):
            raise ConfigError(f"the cache needs a folder outside the data set {outside}; got {place}")
        self._table = _table(place / FILE_NAME)
        self._stamps: dict[str, tuple[int, int]] = {}
        self._written = 0

    def __enter__(self) -> FactsCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep what was found, even when stopped half-way."""
        if self._table is not None:
            with contextlib.suppress(sqlite3.Error):
                self._table.commit()
            self._table.close()

    def get(self, path: str) -> Row | None:
        """Return what is known of a file as it is now."""
        stamp = _stamp(path)
        if stamp is None or self._table is None:
            return None
        self._stamps[path] = stamp
        try:
            query = "SELECT width, height, orientation, mode, frames, digest, dhash FROM images "
            rows = self._table.execute(query + "WHERE path = ? AND size = ? AND changed = ?", (path, *stamp))
            found = rows.fetchone()
        except (sqlite3.Error, UnicodeError):
            return None
        return None if found is None else (*found[:6], int(found[6], 16))

    def put(self, path: str, row: Row) -> None:
        """Keep what was found, under the file's stamp from before it was decoded."""
        stamp = self._stamps.pop(path, None)
        if stamp is None or self._table is None:
            return
        values: tuple[Any, ...] = (path, *stamp, *row[:6], f"{row[6]:016x}")
        with contextlib.suppress(sqlite3.Error, UnicodeError):
            self._table.execute(f"INSERT OR REPLACE INTO images VALUES ({', '.join('?' * 10)})", values)
            self._written += 1
            if self._written % COMMIT_EVERY == 0:
                self._table.commit()


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def _table(file: Path) -> sqlite3.Connection | None:
    for attempt in range(2):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            table = sqlite3.connect(file, timeout=5)
            table.execute(
                "CREATE TABLE IF NOT EXISTS images (path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, "
                "width INTEGER, height INTEGER, orientation INTEGER, mode TEXT, frames INTEGER, "
                "digest TEXT, dhash TEXT)"
            )
            return table
        except sqlite3.DatabaseError as error:
            if attempt or isinstance(
                error, sqlite3.OperationalError
            ):  # locked, full or read-only: go without
                return None
            with contextlib.suppress(OSError):
                file.unlink()  # not a database: our own cache, damaged
        except OSError:
            return None
    return None
