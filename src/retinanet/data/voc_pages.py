"""One annotation file of Pascal VOC: XML into what it says about its image."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from retinanet.data.policies import decimal
from retinanet.data.rules import brief, read_bytes, side
from retinanet.errors import DataError

LARGEST_XML = 8 * 2**20  # bytes; some 20,000 objects
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocObject(NamedTuple):
    """One `<object>`: its class, four corners as text (None: it has none), and whether it is hard to tell."""

    name: str
    corners: tuple[str, ...] | None
    difficult: bool


class VocPage(NamedTuple):
    """What one annotation file says."""

    filename: str
    size: tuple[int, int] | None
    objects: list[VocObject]


class UnsoundPage(DataError):
    """An annotation file that is damaged, as a copy that was broken off leaves it; its image cannot be used."""


def read_page(path: Path) -> VocPage:
    """Read an annotation file.

    Raises:
        UnsoundPage: no sound XML in UTF-8 or another known encoding, or not that of VOC.
        DataError: it is too large, or declares entities.
    """
    root = _parse(path)
    width, height = (side(decimal(root.findtext(f"size/{key}", ""))) for key in ("width", "height"))
    objects = []
    for item in root.findall("object"):
        bounds = item.find("bndbox")
        corners = [] if bounds is None else [bounds.findtext(key) for key in CORNERS]
        objects.append(
            VocObject(
                name=(item.findtext("name") or "").strip(),
                corners=tuple(text.strip() for text in corners if text is not None) or None,
                difficult=(item.findtext("difficult") or "").strip() == "1",
            )
        )
    size = (width, height) if width and height else None
    return VocPage((root.findtext("filename") or "").strip(), size, objects)


class _HasDoctype(Exception):
    """XML that begins to declare things."""


class _PlainTree(ElementTree.TreeBuilder):
    """Refuses a DOCTYPE before anything in it is read, in whatever encoding it is written."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise _HasDoctype


def _parse(path: Path) -> ElementTree.Element:
    content = read_bytes(path, limit=LARGEST_XML)
    if b"\0" in content:  # UTF-16
        raise UnsoundPage(f"{path}: needs XML in UTF-8; got zero bytes")
    if not content.strip():
        raise UnsoundPage(f"{path}: needs the XML of Pascal VOC, <annotation>; the file is empty")
    try:
        root = ElementTree.fromstring(content, ElementTree.XMLParser(target=_PlainTree()))
    except _HasDoctype:
        raise DataError(
            f"{path}: needs plain XML without DOCTYPE and ENTITY, which can expand without end"
        ) from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: odd encodings
        raise UnsoundPage(f"{path}: needs sound XML; {error}") from None
    if root.tag != "annotation":
        raise UnsoundPage(f"{path}: needs the XML of Pascal VOC, <annotation>; got <{brief(root.tag)}>")
    return root
