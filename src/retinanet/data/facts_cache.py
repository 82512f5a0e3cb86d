"""What decoding found out about image files, kept outside the data set until a file changes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from retinanet.errors import ConfigError
from retinanet.folders import cache_folder

# Rules of decoding that change what is found need another number.
FILE_NAME = "images-2.sqlite"
WRITE_EVERY = 0.5  # seconds
PATIENCE = 5.0  # seconds that another check may take to write
Row: TypeAlias = tuple[int, int, int, str, int, int, str, int]
"""width, height, orientation, mode, frames, brightest, digest, dhash: `auditing.ImageFacts` without its index."""


class FactsCache:
    """A table by path; a row counts only as long as the file's size and time of change are the same.

    A cache that cannot be made, read or written is none: everything is then found out anew. What is found is written
    twice a second at most, in one go, so that several checks at a time keep each other waiting for milliseconds.

    Args:
        folder: `folders.cache_folder("facts")` when not given.
        outside: folders that it may not lie in.

    Raises:
        ConfigError: the cache would lie in a data folder, where nothing is ever written.
    """

    def __init__(self, folder: Path | None, *, outside: Sequence[Path]) -> None:
        place = Path(os.path.realpath(cache_folder("facts") if folder is None else folder))
        for data in outside:
            if place.is_relative_to(os.path.realpath(data)):
                raise ConfigError(
                    f"the cache needs a folder outside the data set {data}; got {place}. RETINANET_CACHE names another"
                )
        self._table = _table(place / FILE_NAME)
        self._stamps: dict[str, tuple[int, int]] = {}
        self._waiting: list[tuple[Any, ...]] = []
        self._written = time.monotonic()

    def __enter__(self) -> FactsCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep what was found, even when stopped half-way."""
        self._write()
        self._give_up()

    def get(self, path: str) -> Row | None:
        """Return what is known of a file as it is now."""
        stamp = _stamp(path)
        if stamp is None or self._table is None:
            return None
        self._stamps[path] = stamp
        try:
            query = "SELECT width, height, orientation, mode, frames, brightest, digest, dhash FROM images "
            rows = self._table.execute(query + "WHERE path = ? AND size = ? AND changed = ?", (path, *stamp))
            found = rows.fetchone()
            return None if found is None else (*found[:7], int(found[7], 16))
        except sqlite3.OperationalError:  # locked: nobody waits for it once more for every image
            self._give_up()
        except (sqlite3.Error, UnicodeError, ValueError, TypeError):
            pass
        return None

    def put(self, path: str, row: Row) -> None:
        """Keep what was found, under the file's stamp from before it was decoded."""
        stamp = self._stamps.pop(path, None)
        if stamp is None or self._table is None:
            return
        self._waiting.append((path, *stamp, *row[:7], f"{row[7]:016x}"))
        if time.monotonic() - self._written >= WRITE_EVERY:
            self._write()

    def _write(self) -> None:
        if self._table is None or not self._waiting:
            return
        rows, self._waiting = self._waiting, []
        try:
            with self._table:
                self._table.executemany(f"INSERT OR REPLACE INTO images VALUES ({', '.join('?' * 11)})", rows)
        except sqlite3.OperationalError:  # locked or full
            self._give_up()
        except (sqlite3.Error, UnicodeError):
            pass
        self._written = time.monotonic()

    def _give_up(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None


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
            table = sqlite3.connect(file, timeout=PATIENCE)
            table.execute(
                "CREATE TABLE IF NOT EXISTS images (path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, "
                "width INTEGER, height INTEGER, orientation INTEGER, mode TEXT, frames INTEGER, "
                "brightest INTEGER, digest TEXT, dhash TEXT)"
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
