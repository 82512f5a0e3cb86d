"""Image files as a folder holds them: which names are images, and in which order they are listed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from retinanet.errors import DataError

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".pbm", ".jfif", ".jpe",
)  # fmt: skip
DEEPEST = 12  # folders inside folders
_BEGINNINGS = (
    (b"\xff\xd8", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"BM", ".bmp"),
    (b"GIF8", ".gif"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"P4", ".pbm"),
    (b"P5", ".pgm"),
    (b"P6", ".ppm"),
)


def is_image_name(name: str) -> bool:
    """Return whether a file's name ends like an image's."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def suffix_of(content: bytes) -> str:
    """Return the usual ending for the first bytes of an image file, ".img" where they are no image's."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for start, suffix in _BEGINNINGS if content.startswith(start)), ".img")


def list_files(folder: Path) -> Iterator[str]:
    """Yield the files of a folder and the folders in it, sorted, as paths relative to it, with "/".

    Linked folders are not entered: what they hold lies elsewhere.

    Raises:
        DataError: the folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None

    for place, folders, names in os.walk(folder, onerror=refuse):
        inside = os.path.relpath(place, folder)
        prefix = "" if inside == "." else inside.replace(os.sep, "/") + "/"
        folders[:] = sorted(folders) if prefix.count("/") < DEEPEST else []
        yield from (prefix + name for name in sorted(names))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
