"""The bytes of a COCO file into records, fast where they are as they should be and in any case without a crash.

A section stays a list of undecoded records, views into the file. Records are decoded some thousand at a time, typed and
without the fields that nobody asks for (polygons are most of a file); what does not fit the types is decoded again,
alone, into plain values.
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import msgspec
from msgspec import Raw, Struct

from retinanet.data.rules import brief, read_bytes
from retinanet.errors import DataError

LARGEST_FILE = 8 * 2**30  # bytes; 5 million boxes with their polygons are some 2 GiB
LARGEST_WIDE = 64 * 2**20  # in UTF-16 and UTF-32, which are copied once more
START = 4096
CHUNK = 16_384  # records decoded at a time
SHOWN = 200  # characters of a value in a message

SECTIONS = ("images", "annotations", "categories")
_SURROGATES = re.compile(
    rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)
_NOT_NUMBERS = re.compile(rb"[^-]?(NaN|-?Infinity)")

# What annotations may hold that is no box, where it is not empty.
_BESIDE = {
    "masks": (b'"segmentation"', re.compile(rb'"segmentation"\s*:\s*(\[\s*[\[\d-]|\{)')),
    "key points": (b'"keypoints"', re.compile(rb'"keypoints"\s*:\s*\[\s*[\d-]')),
}

Scalar: TypeAlias = int | float | str | None
Fields: TypeAlias = dict[str, Any]


class ImageRecord(Struct, gc=False):
    """A record of `images` as it should be."""

    id: Scalar = None
    file_name: str | None = None
    width: int | float | None = None
    height: int | float | None = None


class AnnotationRecord(Struct, gc=False):
    """A record of `annotations` as it should be; the order of the fields is that of `boxes._Columns`."""

    id: Scalar = None
    image_id: Scalar = None
    category_id: Scalar = None
    bbox: tuple[float, float, float, float] | None = None
    area: float | None = None
    iscrowd: int | float | str | bool | None = None


RecordType = TypeVar("RecordType", ImageRecord, AnnotationRecord)


class Document:
    """The three lists of one file; `unread` names what annotations hold beside boxes.

    Raises:
        DataError: the file is not JSON or not COCO ground truth, with line and column where they are known.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        content = _content(source)
        self.unread = [  # `in` is several times as fast as a pattern
            name for name, (key, pattern) in _BESIDE.items() if key in content and pattern.search(content)
        ]
        found = self._top(content)
        self._sections = {key: self._section(found, key) for key in SECTIONS}

    def __getitem__(self, section: str) -> Sequence[Raw]:
        return self._sections[section]

    def chunks(
        self, section: str, record_type: type[RecordType]
    ) -> Iterator[tuple[int, list[RecordType | Fields]]]:
        """Yield (index of the first, records); what is not of the type comes as plain fields."""
        records = self._sections[section]
        many = msgspec.json.Decoder(list[record_type])  # type: ignore[valid-type]
        one, nothing = msgspec.json.Decoder(record_type), record_type()
        for start in range(0, len(records), CHUNK):
            chunk = records[start : start + CHUNK]
            try:
                yield start, many.decode(b"[" + b",".join(chunk) + b"]")
            except (msgspec.DecodeError, UnicodeDecodeError):
                yield start, [self._one(one, section, start + i, nothing) for i in range(len(chunk))]

    def plain(self, section: str, index: int) -> Any:
        """Return one record as plain values.

        Raises:
            DataError: its text is no UTF-8, or a number in it has thousands of digits.
        """
        try:
            return json.loads(bytes(self._sections[section][index]))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.source}: needs JSON; {section}[{index}]: {error}") from None

    def _one(
        self, decoder: msgspec.json.Decoder[RecordType], section: str, index: int, nothing: RecordType
    ) -> RecordType | Fields:
        record = self._sections[section][index]
        if memoryview(record)[:1] != b"{":  # no object: nothing to try, and a file may hold millions of these
            return nothing
        try:
            return decoder.decode(record)
        except (msgspec.DecodeError, UnicodeDecodeError):
            fields: Fields = self.plain(section, index)
            return fields

    def _top(self, content: bytes) -> dict[str, Raw]:
        try:
            try:
                return msgspec.json.decode(content, type=dict[str, Raw])
            except msgspec.ValidationError:
                raise
            except msgspec.DecodeError:
                mended = _SURROGATES.sub(lambda found: _whole_characters(found[0]), content)
                if mended == content:
                    raise
                content = mended
                return msgspec.json.decode(content, type=dict[str, Raw])
        except RecursionError:
            raise DataError(
                f"{self.source}: needs COCO JSON; its brackets are nested too deeply for that"
            ) from None
        except msgspec.ValidationError:
            if content.lstrip()[:1] == b"[":
                raise DataError(
                    f"{self.source}: needs COCO ground truth, an object with images, annotations and "
                    "categories; got a list, the form of detections"
                ) from None
            return {}
        except msgspec.DecodeError as error:
            raise DataError(f"{self.source}: needs JSON; {_reason(content, str(error))}") from None
        except ValueError as error:  # a key that is not UTF-8
            raise DataError(f"{self.source}: needs JSON; {error}") from None

    def _section(self, found: dict[str, Raw], key: str) -> list[Raw]:
        if key in found:
            try:
                return msgspec.json.decode(found[key], type=list[Raw])
            except msgspec.DecodeError:
                came = bytes(found[key])[:SHOWN].decode(errors="replace")
        else:
            came = f"keys {', '.join(map(brief, found)) or 'none'}"
        raise DataError(f"{self.source}: needs COCO JSON, an object with a list {key!r}; got {came[:SHOWN]}")


def _content(source: Path) -> bytes:
    """Return the bytes of the file in UTF-8; a large one that cannot be JSON is refused before it is read whole."""
    start = read_bytes(source, limit=LARGEST_FILE, first=START)
    encoding = json.detect_encoding(start[:4])
    if encoding in ("utf-8", "utf-8-sig"):
        text = start.removeprefix(BOM_UTF8).lstrip()
        if len(start) == START and text[:1] not in (b"{", b"["):
            raise DataError(f"{source}: needs COCO JSON, an object; it begins with {brief(start[:16])}")
        return read_bytes(source, limit=LARGEST_FILE).removeprefix(BOM_UTF8)
    try:
        return read_bytes(source, limit=LARGEST_WIDE).decode(encoding).encode()
    except ValueError as error:
        raise DataError(f"{source}: needs JSON; {error}") from None


def _whole_characters(escape: bytes) -> bytes:
    """Keep what stands for whole characters; half a pair, as a cut text leaves it, becomes U+FFFD."""
    return rb"\ufffd" if len(escape) == 6 else escape


def _reason(content: bytes, said: str) -> str:
    """Return "line 3, column 7: what is wrong" of what msgspec said."""
    text, _, place = said.removeprefix("JSON is malformed: ").partition(" (byte ")
    end = int(place[:-1]) if place else len(content)
    if literal := _NOT_NUMBERS.match(content, max(0, end - 1)):
        return f"{_position(content, literal.start(1))}: {literal[1].decode()} is not a number in JSON"
    return f"{_position(content, end)}: {text if place else 'the text ends too early'}"


def _position(content: bytes, offset: int) -> str:
    line = content.count(b"\n", 0, offset) + 1
    column = len(content[content.rfind(b"\n", 0, offset) + 1 : offset].decode(errors="replace")) + 1
    return f"line {line}, column {column}"
