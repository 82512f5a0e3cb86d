"""A zoo of broken data sets: each gives its own named message, none a traceback, none takes over five seconds.

A case is a folder and what must be said of it. With a `kind` of fault the data set is read all the same, without one it
is refused. To add a format: a table of cases like those below, named in `ZOO`.
"""

import io
import json
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retinanet.cli.main import main
from retinanet.data import open_dataset
from retinanet.data.auditing import audit_images, unlisted_images
from retinanet.data.kinds import Kind
from retinanet.errors import DataError

LONGEST = 5.0  # seconds a case
Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Case:
    """A broken data set: its files, the words that tell it from every other, and the kind of fault, if it is read."""

    name: str
    files: Files
    says: str
    kind: str = ""
    action: str = "dropped"
    audited: bool = False  # found by decoding, not by reading


def pixels(form: str = "PNG", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize(size).save(stream, form, **options)
    return stream.getvalue()


def twelve_bits() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.linspace(0, 4095, 1200).astype(np.uint16).reshape(30, 40)).save(stream, "PNG")
    return stream.getvalue()


def turned(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


SOUND = pixels()
JPEG = pixels("JPEG")

# ---------------------------------------------------------------------------------------------------------
# COCO


def coco(
    change: Callable[[dict[str, Any]], Any] | None = None, *, raw: bytes | None = None, **images: bytes | None
) -> Files:
    """Two images with a box each; `change` edits the document, `raw` takes its place, `images` replaces files."""
    document: dict[str, Any] = {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 2, "file_name": "b.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 20]},
            {"id": 2, "image_id": 2, "category_id": 8, "bbox": [5, 5, 10, 10]},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
    }
    if change is not None:
        change(document)
    files: dict[str, bytes | None] = {"a.png": SOUND, "b.png": SOUND}
    files |= {name.replace("_", "."): content for name, content in images.items()}
    files["instances_train.json"] = json.dumps(document).encode() if raw is None else raw
    return {name: content for name, content in files.items() if content is not None}


def box(**fields: Any) -> Files:
    return coco(lambda d: d["annotations"][0].update(fields))


def image(**fields: Any) -> Files:
    return coco(lambda d: d["images"][0].update(fields))


COCO = (
    Case("box outside", box(bbox=[40, 0, 5, 5]), "lies outside the image of 40 x 30", Kind.OUTSIDE_IMAGE),
    Case(
        "box over the edge", box(bbox=[35, 0, 9, 5]), "cut to [35, 0, 40, 5]", Kind.OUTSIDE_IMAGE, "repaired"
    ),
    Case(
        "box reversed", box(bbox=[11, 2, -10, 20]), "taken as [1, 2, 10, 20]", Kind.REVERSED_BOX, "repaired"
    ),
    Case(
        "box without area",
        box(bbox=[1, 2, 0, 20]),
        "width and height above 0; got [1, 2, 0, 20]",
        Kind.EMPTY_BOX,
    ),
    Case("box too thin", box(bbox=[1, 2, 1e-30, 9]), "has no area in single precision", Kind.EMPTY_BOX),
    Case("box of text", box(bbox=["1", 2, 3, 4]), "got ['1', 2, 3, 4]", Kind.NOT_A_NUMBER),
    Case("box NaN as text", box(bbox=["NaN", 2, 3, 4]), "got ['NaN', 2, 3, 4]", Kind.NOT_A_NUMBER),
    Case("box of three", box(bbox=[1, 2, 3]), "got [1, 2, 3]", Kind.NOT_A_NUMBER),
    Case(
        "no box",
        box(bbox=None),
        "needs four finite numbers [x, y, width, height]; got None",
        Kind.NOT_A_NUMBER,
    ),
    Case(
        "box infinite",
        coco(raw=coco()["instances_train.json"].replace(b"[1, 2,", b"[1e999, 2,")),
        "got [inf",
        Kind.NOT_FINITE,
    ),
    Case("box huge", box(bbox=[0, 0, 10**300, 1]), "reached beyond", Kind.OUTSIDE_IMAGE, "repaired"),
    Case(
        "box twice",
        coco(lambda d: d["annotations"].append({**d["annotations"][0], "id": 9})),
        "annotations[2] (id 9) of a.png: is the box of annotations[0] again",
        Kind.DUPLICATE_BOX,
    ),
    Case("area negative", box(area=-5), "area needs a number from 0; got -5", Kind.INVALID_AREA, "repaired"),
    Case("area of text", box(area="x"), "area needs a number from 0; got 'x'", Kind.INVALID_AREA, "repaired"),
    Case("orphan", box(image_id=77), "image_id needs the id of an image; got 77", Kind.ORPHAN_ANNOTATION),
    Case(
        "unknown class",
        box(category_id=5),
        "category_id needs the id of a category; got 5",
        Kind.UNKNOWN_CLASS,
    ),
    Case("class out of range", box(category_id=2**70), f"got {2**70}", Kind.UNKNOWN_CLASS),
    Case("annotation id twice", box(id=2), "ids need distinct whole numbers", Kind.DUPLICATE_ID, "repaired"),
    Case("annotation id text", box(id="x"), "ids need distinct whole numbers", Kind.DUPLICATE_ID, "repaired"),
    Case(
        "record is no object", coco(lambda d: d["annotations"].append(5)), "got None", Kind.ORPHAN_ANNOTATION
    ),
    Case(
        "image without id",
        coco(lambda d: d["images"].append({})),
        "id needs a whole number or text",
        Kind.MISSING_ID,
    ),
    Case(
        "ids mixed",
        coco(lambda d: d["images"].append({**d["images"][0], "id": "x", "file_name": "c.png"}), c_png=SOUND),
        "became text",
        Kind.MIXED_IDS,
        "repaired",
    ),
    Case("image absent", coco(a_png=None), "there is no image file", Kind.MISSING_IMAGE),
    Case(
        "name of control characters",
        image(file_name="a\x07.png"),
        "of printable characters",
        Kind.BAD_FILE_NAME,
    ),
    Case("name missing", image(file_name=None), "needs a file name; got None", Kind.BAD_FILE_NAME),
    Case(
        "size missing, image broken",
        coco(lambda d: d["images"][0].pop("width"), a_png=b"x"),
        "cannot be read",
        Kind.UNREADABLE_IMAGE,
    ),
    Case("image id twice", image(id=2), "images[1] (id 2): needs an id of its own"),
    Case(
        "image id twice, once as text",
        image(id="2"),
        "images[1] (id 2): needs an id of its own; images[0] (id 2)",
    ),
    Case("class id twice", coco(lambda d: d["categories"][0].update(id=8)), "8 is 'cat' too"),
    Case("class name twice", coco(lambda d: d["categories"][0].update(name="dog")), "distinct names"),
    Case(
        "class without name",
        coco(lambda d: d["categories"][0].pop("name")),
        "categories[0]: needs a whole number 'id'",
    ),
    Case("no classes", coco(lambda d: d.update(categories=[])), "needs at least one class name"),
    Case("no images", coco(lambda d: d.update(images=[])), "needs at least one usable record in 'images'"),
    Case("no image files", coco(a_png=None, b_png=None), "none of its 2 image files was found"),
    Case("no annotations", coco(lambda d: d.pop("annotations")), "with a list 'annotations'; got keys"),
    Case("detections", coco(raw=b'[{"image_id": 1, "score": 0.5}]'), "the form of detections"),
    Case("empty file", coco(raw=b""), "line 1, column 1: the text ends too early"),
    Case("cut file", coco(raw=coco()["instances_train.json"][:-9]), "the text ends too early"),
    Case(
        "NaN",
        coco(raw=coco()["instances_train.json"].replace(b"20]", b"NaN]")),
        "NaN is not a number in JSON",
    ),
    Case(
        "comma missing",
        coco(raw=b'{"images": []\n "annotations": []}'),
        "line 2, column 2: expected ',' or '}'",
    ),
    Case("not text", coco(raw=b"\x00\xff" * 50), "needs JSON"),
    Case("deep", coco(raw=b'{"images": ' + b"[" * 100_000), "nested too deeply"),
    Case("path upwards", image(file_name="../a.png"), "needs a path inside the data folder"),
    Case("path absolute", image(file_name="/etc/passwd"), "got '/etc/passwd'"),
    Case("path of Windows", image(file_name="C:\\a.png"), "needs a path inside the data folder"),
    # found by decoding
    Case(
        "truncated",
        coco(lambda d: d["images"][0].update(file_name="a.jpg"), a_png=None, a_jpg=JPEG[:-200]),
        "truncated",
        Kind.TRUNCATED_IMAGE,
        audited=True,
    ),
    Case(
        "no image at all",
        coco(a_png=b"<html>not found</html>"),
        "not an image in any",
        Kind.UNREADABLE_IMAGE,
        audited=True,
    ),
    Case("empty image file", coco(a_png=b""), "not an image in any", Kind.UNREADABLE_IMAGE, audited=True),
    Case("other size", coco(a_png=pixels(size=(80, 60))), "scaled by 2", Kind.OTHER_SIZE, audited=True),
    Case(
        "turned",
        coco(a_png=pixels(exif=turned(6))),
        "(EXIF orientation 6)",
        Kind.ROTATED_LABELS,
        audited=True,
    ),
    Case(
        "animated",
        coco(a_png=pixels("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))])),
        "holds 2 pictures",
        Kind.ANIMATED_IMAGE,
        "repaired",
        audited=True,
    ),
    Case(
        "12 bits in 16",
        coco(a_png=twelve_bits()),
        "nearly black",
        Kind.DARK_IMAGE,
        "repaired",
        audited=True,
    ),
    Case("bomb", coco(a_png=claiming(65_536, 65_536)), "too large", Kind.HUGE_IMAGE, audited=True),
    Case("unlisted", coco(c_png=SOUND), "no split lists", Kind.UNLISTED_IMAGE, audited=True),
)


# ---------------------------------------------------------------------------------------------------------
# Pascal VOC


def thing(corners: str = "2 3 11 22", name: str = "<name>cat</name>", more: str = "") -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    bounds = "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, corners.split(), strict=False))
    return f"<object>{name}{more}<bndbox>{bounds}</bndbox></object>"


def page(*objects: str, size: str = "<width>40</width><height>30</height>") -> bytes:
    return f"<annotation><size>{size}</size>{''.join(objects)}</annotation>".encode()


def voc(a: bytes | None = None, listing: bytes = b"a\nb\n", **changes: bytes | None) -> Files:
    """Two images with an object each; `a` is the first one's annotation file."""
    files: dict[str, bytes | None] = {
        "JPEGImages/a.png": SOUND,
        "JPEGImages/b.png": SOUND,
        "Annotations/a.xml": page(thing()) if a is None else a,
        "Annotations/b.xml": page(thing()),
        "ImageSets/Main/train.txt": listing,
    }
    places = {"png": "JPEGImages", "jpg": "JPEGImages", "xml": "Annotations", "txt": "ImageSets/Main"}
    for name, content in changes.items():
        stem, _, ending = name.rpartition("_")
        files[f"{places[ending]}/{stem}.{ending}"] = content
    return {name: content for name, content in files.items() if content is not None}


def two(corners: str) -> Files:
    return voc(page(thing(), thing(corners)))


VOC = (
    Case("click", two("5 6 5 6"), "corners [5, 6, 5, 6] are equal: a click", Kind.EQUAL_CORNERS),
    Case("reversed", two("9 6 5 8"), "taken as [5, 6, 9, 8]", Kind.REVERSED_BOX, "repaired"),
    Case("from zero", two("0 0 5 8"), "cut to [0, 0, 5, 8]", Kind.OUTSIDE_IMAGE, "repaired"),
    Case("outside", two("41 1 45 9"), "lies outside the image", Kind.OUTSIDE_IMAGE),
    Case("NaN", two("nan 1 5 9"), "got [nan, 1, 5, 9]", Kind.NOT_FINITE),
    Case("infinite", two("1 1 inf 9"), "got [1, 1, inf, 9]", Kind.NOT_FINITE),
    Case("text", two("1 x 5 9"), "got [1, x, 5, 9]", Kind.NOT_A_NUMBER),
    Case("three corners", two("1 2 5"), "got [1, 2, 5]", Kind.NOT_A_NUMBER),
    Case(
        "no corners",
        voc(page(thing(), "<object><name>cat</name></object>")),
        "got no corners",
        Kind.NOT_A_NUMBER,
    ),
    Case("last line", two("40.9999999999 1 41 9"), "has no area in single precision", Kind.EMPTY_BOX),
    Case(
        "no class", voc(page(thing(), thing(name=""))), "name needs the name of a class", Kind.MISSING_CLASS
    ),
    Case("twice", voc(page(thing(), thing())), "is the box of object 1 again", Kind.DUPLICATE_BOX),
    Case(
        "listed twice",
        voc(listing=b"a\nb\na\n"),
        "line 3 (a): the image is listed twice",
        Kind.DUPLICATE_LISTING,
        "repaired",
    ),
    Case(
        "no page", voc(a_xml=None), "there is no annotation file Annotations/a.xml", Kind.MISSING_ANNOTATION
    ),
    Case("no image", voc(a_png=None), "there is no image JPEGImages/a", Kind.MISSING_IMAGE),
    Case(
        "no size, no image",
        voc(page(thing(), size=""), a_png=b"x"),
        "the size is missing and cannot be read",
        Kind.UNREADABLE_IMAGE,
    ),
    Case("cut XML", voc(page(thing())[:-9]), "Annotations/a.xml: needs sound XML", Kind.UNREADABLE_LABELS),
    Case("empty XML", voc(b""), "the file is empty", Kind.UNREADABLE_LABELS),
    Case(
        "another XML",
        voc(b"<html/>"),
        "needs the XML of Pascal VOC, <annotation>; got <'html'>",
        Kind.UNREADABLE_LABELS,
    ),
    Case(
        "entities",
        voc(b"<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>&b;</annotation>"),
        "without DOCTYPE and ENTITY",
    ),
    Case("UTF-16", voc(page(thing()).decode().encode("utf-16")), "got zero bytes", Kind.UNREADABLE_LABELS),
    Case(
        "unknown encoding",
        voc(b"<?xml version='1.0' encoding='klingon'?><annotation/>"),
        "unknown encoding",
        Kind.UNREADABLE_LABELS,
    ),
    Case("large XML", voc(b"<annotation>" + b" " * 9_000_000), "needs at most 8,388,608 bytes"),
    Case("no objects", voc(page(), b_xml=page()), "needs an object with a name in Annotations/*.xml"),
    Case("list of paths", voc(listing=b"../../a\n"), "line 1: needs a path inside the data folder"),
    Case("list is binary", voc(listing=b"\xff\xfe\x00"), "needs text in UTF-8"),
    Case("list is empty", voc(listing=b"\n"), "The list is empty"),
    Case("list of strangers", voc(listing=b"x\ny\n"), "needs at least one usable image; got none"),
    Case("cut image", voc(a_png=None, a_jpg=JPEG[:-200]), "truncated", Kind.TRUNCATED_IMAGE, audited=True),
    Case(
        "size of another",
        voc(page(thing(), size="<width>41</width><height>30</height>")),
        "is annotated as 41 x 30",
        Kind.OTHER_SIZE,
        audited=True,
    ),
    Case("not in a list", voc(c_png=SOUND), "no split lists", Kind.UNLISTED_IMAGE, audited=True),
)

# ---------------------------------------------------------------------------------------------------------
# YOLO and CSV


def yolo(
    labels: bytes = b"0 0.5 0.5 0.2 0.2\n", *, yaml: bytes | None = None, **changes: bytes | None
) -> Files:
    """Two images; `labels` are the first one's, the other has none."""
    files: dict[str, bytes | None] = {
        "data.yaml": b"train: images/train\nnames: [cat, dog]\n" if yaml is None else yaml,
        "images/train/a.png": SOUND,
        "images/train/b.png": SOUND,
        "labels/train/a.txt": labels,
    }
    files |= {f"images/train/{name.replace('_', '.')}": content for name, content in changes.items()}
    return {name: content for name, content in files.items() if content is not None}


def more(line: bytes) -> Files:
    return yolo(b"0 0.5 0.5 0.2 0.2\n" + line)


YOLO = (
    Case("class out of range", more(b"2 0.5 0.5 0.1 0.1"), "labels/train/a.txt: line 2", Kind.UNKNOWN_CLASS),
    Case("class negative", more(b"-1 0.5 0.5 0.1 0.1"), "line 2", Kind.UNKNOWN_CLASS),
    Case("three numbers", more(b"0 0.5 0.5"), "got '0 0.5 0.5'", Kind.WRONG_COLUMNS),
    Case("text", more(b"0 x 0.5 0.1 0.1"), "line 2", Kind.WRONG_COLUMNS),
    Case("outside", more(b"0 1.5 0.5 0.1 0.1"), "lies outside", Kind.OUTSIDE_IMAGE),
    Case("over the edge", more(b"0 0.95 0.5 0.2 0.2"), "reached beyond", Kind.OUTSIDE_IMAGE, "repaired"),
    Case("twice", more(b"0 0.5 0.5 0.2 0.2"), "has the same box", Kind.DUPLICATE_BOX),
    Case("labels are binary", yolo(b"\xff\xfe\x00"), "labels/train/a.txt", Kind.UNREADABLE_LABELS),
    Case("size unreadable", yolo(a_png=b"x"), "cannot be read", Kind.UNREADABLE_IMAGE),
    Case("no names", yolo(yaml=b"train: images/train\n"), "names"),
    Case(
        "path of another machine",
        yolo(yaml=b"path: /home/a/x\ntrain: images/train\nnames: [cat, dog]\n"),
        "its own folder is taken",
        Kind.PATH_ELSEWHERE,
        "repaired",
    ),
    Case("alias bomb", yolo(yaml=b"a: &a [1]\nb: [*a, *a]\n"), "data.yaml"),
    Case("path upwards", yolo(yaml=b"train: ../../etc\nnames: [cat]\n"), "data.yaml"),
    Case("no YAML", yolo(yaml=b"{"), "data.yaml"),
)


def table(*lines: bytes, classes: bytes | None = b"cat,0\ndog,1\n") -> Files:
    files = {"train.csv": b"\n".join((b"a.png,1,2,11,22,cat", *lines)), "a.png": SOUND, "b.png": SOUND}
    return files if classes is None else {**files, "classes.csv": classes}


CSV = (
    Case("unknown class", table(b"b.png,1,2,11,22,cow"), "got 'cow'", Kind.UNKNOWN_CLASS),
    Case("text", table(b"b.png,1,x,11,22,cat"), "needs four numbers", Kind.NOT_A_NUMBER),
    Case("NaN", table(b"b.png,1,nan,11,22,cat"), "needs finite numbers", Kind.NOT_FINITE),
    Case("infinite", table(b"b.png,1,2,inf,22,cat"), "needs finite numbers", Kind.NOT_FINITE),
    Case("click", table(b"b.png,5,6,5,6,cat"), "equal corners: a click", Kind.EQUAL_CORNERS),
    Case("without width", table(b"b.png,5,6,5,9,cat"), "has no area", Kind.EMPTY_BOX),
    Case("outside", table(b"b.png,50,6,55,9,cat"), "lies outside", Kind.OUTSIDE_IMAGE),
    Case("twice", table(b"a.png,1,2,11,22,cat"), "has the same box", Kind.DUPLICATE_BOX),
    Case("half a row", table(b"b.png,1,2,,,cat"), "got ", Kind.INCOMPLETE_ROW),
    Case("five columns", table(b"b.png,1,2,11,22"), "line 2", Kind.WRONG_COLUMNS),
    Case("no image", table(b"c.png,1,2,11,22,cat"), "there is no image file", Kind.MISSING_IMAGE),
    Case("path upwards", table(b"../c.png,1,2,11,22,cat"), "needs a path inside the data folder"),
)

# ---------------------------------------------------------------------------------------------------------
# Another format: its table, and its line here

ZOO = {"COCO": COCO, "VOC": VOC, "YOLO": YOLO, "CSV": CSV}
CASES = [pytest.param(case, id=f"{form}: {case.name}") for form, cases in ZOO.items() for case in cases]


def written(case: Case, folder: Path) -> Path:
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def quick() -> Iterator[None]:
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < LONGEST


@pytest.mark.parametrize("case", CASES)
def test_a_broken_data_set_is_named(case: Case, tmp_path: Path, quick: None) -> None:
    data = written(case, tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    if not case.kind:
        with pytest.raises(DataError, match=re.escape(case.says)) as caught:
            open_dataset(data, "train")
        assert str(data) in str(caught.value)
    else:
        dataset = open_dataset(data, "train")
        faults = list(dataset.faults)
        if case.audited:
            assert faults == []
            faults = audit_images(dataset, cache=tmp_path / "cache")[1] + unlisted_images([dataset])
        (fault,) = faults
        assert (fault.kind, fault.action) == (case.kind, case.action)
        assert case.says in str(fault)
        assert len(str(fault)) < 1000
        assert fault.fix
        assert fault.kind in set(Kind)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_the_zoo_is_large_and_every_kind_is_in_it() -> None:
    cases = [case for table in ZOO.values() for case in table]
    assert len(cases) >= 40
    assert all(len({case.name for case in table}) == len(table) for table in ZOO.values())
    seen = {case.kind for case in cases if case.kind}
    assert seen == set(Kind) - {Kind.MISSING_SIZE}  # the header of the image tells it; see below


def test_a_missing_size_is_named_where_no_image_tells_it(tmp_path: Path) -> None:
    data = written(Case("", image(width=None), ""), tmp_path)
    assert open_dataset(data, "train").faults == ()
    (fault,) = open_dataset(data, "train", images="absent").faults
    assert (fault.kind, fault.action) == (Kind.MISSING_SIZE, "repaired")


def test_what_is_advised_for_a_missing_annotation_is_an_image_without_objects(tmp_path: Path) -> None:
    assert Kind.MISSING_ANNOTATION.fix.endswith("an XML file whose <annotation> holds no <object>")
    dataset = open_dataset(written(Case("", voc(b"<annotation></annotation>"), ""), tmp_path), "train")
    assert (dataset.faults, dataset.files.tolist(), len(dataset.boxes)) == (
        (),
        ["JPEGImages/a.png", "JPEGImages/b.png"],
        1,
    )


# ---------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("COCO: box outside", 1),
        ("COCO: image absent", 1),
        ("VOC: click", 1),
        ("COCO: box reversed", 0),
        ("COCO: NaN", 2),
        ("COCO: deep", 2),
        ("COCO: path upwards", 2),
        ("VOC: entities", 2),
        ("VOC: list of strangers", 2),
        ("YOLO: alias bomb", 2),
    ],
)
def test_a_command_says_the_same_and_its_exit_code_tells(
    name: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form, _, short = name.partition(": ")
    case = next(case for case in ZOO[form] if case.name == short)
    data = written(case, tmp_path / "data")
    with pytest.raises(SystemExit) as stopped:
        main(["data", "convert", str(data), str(tmp_path / "out"), "--format", "coco"])
    assert stopped.value.code == code
    said = capsys.readouterr().err
    assert case.says in said
    assert "Traceback" not in said
