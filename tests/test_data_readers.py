"""Readers of COCO and VOC: any input ends in a valid `Dataset` or a `DataError`; each message has a case."""

import copy
import itertools
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from retinanet.data import (
    Dataset,
    Fault,
    available_splits,
    finding,
    open_dataset,
    read_coco,
    read_voc,
    rules,
    voc_pages,
    write_coco,
)
from retinanet.data.dataset import Annotation
from retinanet.data.image_files import SUFFIXES
from retinanet.data.policies import judge_box
from retinanet.data.rules import clip_box
from retinanet.errors import DataError
from retinanet.records import Classes, GroundTruth, Ignore

Document = dict[str, Any]

REAL_DATA = os.environ.get("RETINANET_TEST_DATA")
needs_real_data = pytest.mark.skipif(not REAL_DATA, reason="RETINANET_TEST_DATA is not set")
fuzzing = settings(
    max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# ---------------------------------------------------------------------------------------------------------
# Small data sets


def picture(path: Path, width: int = 40, height: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)


def coco_document() -> Document:
    """Two images of 40 x 30 with three boxes, one without; category ids with a gap, not in order."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 5, "file_name": "empty.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 11, "image_id": 3, "category_id": 9, "bbox": [1, 2, 10, 20], "area": 55.5, "iscrowd": 0},
            {"id": 12, "image_id": 7, "category_id": 2, "bbox": [0.5, 0, 4, 5.25]},
            {"id": 10, "image_id": 3, "category_id": 2, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
    }


def coco_folder(folder: Path, document: Document | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "b", "empty"):
        picture(folder / f"{name}.png")
    path = folder / "instances_train.json"
    path.write_text(json.dumps(document or coco_document()))
    return path


def voc_object(name: str | None = "RBC", corners: str = "1 1 10 20", extra: str = "") -> str:
    bounds = "".join(
        f"<{key}>{value}</{key}>"
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners.split(), strict=False)
    )
    named = "" if name is None else f"<name>{name}</name>"
    return f"<object>{named}{extra}<bndbox>{bounds}</bndbox></object>"


def voc_page(*objects: str, size: str = "<width>40</width><height>30</height>", filename: str = "") -> str:
    name = f"<filename>{filename}</filename>" if filename else ""
    return f"<annotation>{name}<size>{size}</size>{''.join(objects)}</annotation>"


def voc_folder(folder: Path, pages: dict[str, str], **splits: str) -> Path:
    """A page an image; splits default to one, "train", with every image."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for stem, page in pages.items():
        (folder / "Annotations" / f"{stem}.xml").write_text(page)
        picture(folder / "JPEGImages" / f"{stem}.jpg")
    for split, names in (splits or {"train": "\n".join(pages)}).items():
        (folder / "ImageSets/Main" / f"{split}.txt").write_text(names + "\n")
    return folder


def faults(dataset: Dataset) -> list[str]:
    return [str(fault) for fault in dataset.faults]


def assert_valid(dataset: Dataset) -> None:
    """What every reader promises of what it returns."""
    for index in range(len(dataset)):
        truth, (width, height) = dataset.ground_truth(index), dataset.size(index)
        assert (truth.boxes >= 0).all()
        assert (truth.boxes <= [width, height, width, height]).all()
        assert (truth.classes < len(dataset.classes)).all()
        assert np.isfinite(truth.areas).all()
        assert dataset.path(index).is_relative_to(dataset.root)
        assert ".." not in dataset.path(index).parts


def test_one_judgement_for_a_box_in_every_format(tmp_path: Path) -> None:
    sides = list(itertools.permutations((-10, 3, 20, 50), 2))
    boxes = [(a, b, c, d) for (a, c), (b, d) in itertools.product(sides, sides)]
    judged = [judge_box(tuple(map(float, box)), 40, 30) for box in boxes]
    size = {"width": 40, "height": 30}
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", **size} for i in range(len(boxes))],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 2, "bbox": [a, b, c - a, d - b]}
            for i, (a, b, c, d) in enumerate(boxes)
        ],
        "categories": [{"id": 2, "name": "RBC"}],
    }
    coco = read_coco(coco_folder(tmp_path / "coco", document), split="train", images="absent")
    pages = {}
    for i, (a, b, c, d) in enumerate(boxes):  # the smaller one of two corners counts from 1
        corners = f"{a + (a < c)} {b + (b < d)} {c + (c < a)} {d + (d < b)}"
        pages[f"{i:03}"] = voc_page(voc_object(corners=corners))
    voc = read_voc(voc_folder(tmp_path / "voc", pages), split="train", images="absent")
    for dataset in (coco, voc):
        found = [(str(fault.kind), fault.action == "dropped") for fault in dataset.faults]
        assert found == [(str(one.kind), one.box is None) for one in judged if one.kind is not None]
        assert dataset.boxes.tolist() == [list(one.box) for one in judged if one.box is not None]


# ---------------------------------------------------------------------------------------------------------
# Dataset


def small_dataset(**changes: Any) -> Dataset:
    parts: dict[str, Any] = {
        "name": "blood",
        "split": "val",
        "root": Path("/data"),
        "classes": Classes(("cat", "dog")),
        "files": ["a.png", "sub/b.png", "c.png"],
        "image_ids": [7, 3, 5],
        "sizes": [(40, 30), (20, 10), (8, 8)],
        "annotations": [
            Annotation(2, (0, 0, 2, 2), 1, 4, Ignore.NO, 21),
            Annotation(0, (1, 1, 3, 4), 0, 5.5, Ignore.NO, 22),
            Annotation(2, (1, 1, 8, 8), 0, 9, Ignore.CROWD, 23),
        ],
    }
    return Dataset.build(**{**parts, **changes})


def test_dataset_gives_each_image_its_own_boxes_in_the_order_given() -> None:
    dataset = small_dataset()
    assert len(dataset) == 3
    assert dataset.path(1) == Path("/data/sub/b.png")
    assert dataset.size(1) == (20, 10)
    assert dataset.offsets.tolist() == [0, 1, 1, 3]
    assert dataset.ground_truth(2).boxes.tolist() == [[0, 0, 2, 2], [1, 1, 8, 8]]
    assert dataset.ground_truth(-1).ids.tolist() == [21, 23]
    assert dataset.ground_truth(2).ignore.tolist() == [Ignore.NO, Ignore.CROWD]
    assert dataset.ground_truth(0).areas.tolist() == [5.5]
    assert len(dataset.ground_truth(1)) == 0
    assert dataset.index_of_image_id() == {"7": 0, "3": 1, "5": 2}
    with pytest.raises(IndexError):
        dataset.ground_truth(3)


def test_dataset_arrays_are_flat_read_only_and_survive_pickling() -> None:
    dataset = pickle.loads(pickle.dumps(small_dataset()))
    assert dataset.ground_truth(2).ids.tolist() == [21, 23]
    for name in ("files", "widths", "image_ids", "boxes", "labels", "areas", "ignore", "annotation_ids"):
        assert getattr(dataset, name).dtype != object
    with pytest.raises(ValueError, match="read-only"):
        small_dataset().boxes[0, 0] = 1


def test_subset_is_the_same_images_in_the_order_asked_for() -> None:
    dataset = small_dataset(faults=[Fault("f", "r", "why", "dropped")])
    for chosen in ([2, 0], np.array([2, 0])):
        part = dataset.subset(chosen)
        assert part.files.tolist() == ["c.png", "a.png"]
        assert part.ground_truth(0).ids.tolist() == [21, 23]
        assert part.ground_truth(1).ids.tolist() == [22]
        assert part.faults == dataset.faults
    assert dataset.subset(np.array([True, False, True])).image_ids.tolist() == [7, 5]
    assert dataset.subset(range(3)).boxes.tolist() == dataset.boxes.tolist()


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([3], r"Dataset.subset needs indices 0..2; got 3 to 3"),
        ([-1, 0], r"Dataset.subset needs indices 0..2; got -1 to 0"),
        ([0, 0], r"Dataset 'blood' needs distinct image ids; some are given twice"),
        ([], r"Dataset.subset needs at least one image; none was chosen"),
        ([0.5], r"Dataset.subset needs image indices or a mask of 3 booleans"),
        ([True], r"Dataset.subset needs image indices or a mask of 3 booleans"),
    ],
)
def test_subset_refuses(indices: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        small_dataset().subset(indices)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # no image
        ({"files": [], "image_ids": [], "sizes": [], "annotations": []}, r"'blood' needs at least one image"),
        # a size for two of three images
        ({"sizes": [(40, 30), (20, 10)]}, r"Dataset.widths needs shape \[3\]; got \[2\]"),
        ({"image_ids": ["x"]}, r"Dataset.image_ids needs shape \[3\]; got \[1\]"),
        ({"image_ids": ["x", "y", "x"]}, r"needs distinct image ids"),
        ({"sizes": [(40, 30), (0, 10), (8, 8)]}, r"sizes from 1 pixel; sub/b.png has \(0, 10\)"),
        # a class index beyond the classes
        ({"classes": Classes(("cat",))}, r"Dataset.labels needs class indices 0..0; got 0 to 1"),
        # an annotation of a fourth image
        (
            {"annotations": [Annotation(3, (0, 0, 1, 1), 0, 1, 0, 1)]},
            r"Dataset.offsets needs shape \[4\]; got \[5\]",
        ),
        (
            {"annotations": [Annotation(0, (2, 0, 1, 1), 0, 1, 0, 1)]},
            r"finite x2 > x1 and y2 > y1; box 0 is \[2.0, 0.0, 1.0, 1.0\]",
        ),
        (
            {"annotations": [Annotation(0, (0, 0, float("nan"), 1), 0, 1, 0, 1)]},
            r"Dataset.boxes needs finite",
        ),
    ],
)
def test_dataset_refuses_contradictions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        small_dataset(**changes)


def test_dataset_refuses_offsets_that_do_not_rise_to_the_number_of_boxes() -> None:
    dataset = small_dataset()
    columns = {name: getattr(dataset, name) for name in dataset.__dataclass_fields__}
    for offsets in ([0, 1, 1, 2], [0, 2, 1, 3], [1, 1, 1, 3]):
        with pytest.raises(DataError, match=r"Dataset.offsets needs to rise from 0 to 3"):
            Dataset(**{**columns, "offsets": offsets})


def test_summary_says_what_people_ask_first() -> None:
    fault = Fault("x.json", "annotations[3] (id 17)", "bbox is wrong", "dropped")
    assert str(fault) == "x.json: annotations[3] (id 17): bbox is wrong (dropped)"
    assert small_dataset(faults=[fault]).summary() == (
        "blood, val: 3 images, 1 without boxes; 1 fault (1 dropped, 0 repaired)\n"
        "2 boxes: cat 1, dog 1; 1 more to be ignored"
    )
    many = Classes(tuple(f"class{i}" for i in range(20)))
    assert "class11 0, and 8 more classes;" in small_dataset(classes=many).summary()


# ---------------------------------------------------------------------------------------------------------
# Rules


@pytest.mark.parametrize(
    ("box", "expected", "reason"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4), None),
        ((0, 0, 40, 30), (0, 0, 40, 30), None),  # the whole image
        ((0, 0, 40.01, 30), (0, 0, 40, 30), None),  # two decimals, rounded by the writer: not worth a word
        ((-5, 2, 3, 44), (0, 2, 3, 30), "reached beyond the image of 40 x 30 pixels; cut to [0, 2, 3, 30]"),
        ((40, 0, 50, 10), None, "lies outside the image of 40 x 30 pixels"),  # touches it only
        ((-9, -9, 0, 10), None, "lies outside"),
        ((1, 1, 1 + 1e-12, 9), None, "has no area in single precision"),
        ((-1e308, 1, 1e308, 2), (0, 1, 40, 2), "reached beyond"),
    ],
)
def test_clip_box(box: tuple[float, ...], expected: tuple[float, ...] | None, reason: str | None) -> None:
    cut, said = clip_box((box[0], box[1], box[2], box[3]), 40, 30)
    assert cut == expected
    assert said == reason or (reason is not None and said is not None and said.startswith(reason))


@given(st.tuples(*[st.floats(-1e9, 1e9)] * 4), st.integers(1, 2**20), st.integers(1, 2**20))
def test_a_clipped_box_lies_in_its_image_and_has_area_in_float32(
    values: tuple[float, float, float, float], width: int, height: int
) -> None:
    x1, x2 = sorted(values[:2])
    y1, y2 = sorted(values[2:])
    cut, _ = clip_box((x1, y1, x2, y2), width, height)
    if cut is not None and x2 > x1 and y2 > y1:
        box = np.array(cut, np.float32)
        assert (box[2:] > box[:2]).all()
        assert (box >= 0).all()
        assert (box[2:] <= [width, height]).all()


# ---------------------------------------------------------------------------------------------------------
# COCO


def test_coco_is_read_as_written(tmp_path: Path) -> None:
    dataset = read_coco(coco_folder(tmp_path), split="train")
    assert dataset.classes == Classes(names=("cat", "dog"), ids=(2, 9))  # sorted by id, the gap kept
    assert dataset.files.tolist() == ["a.png", "b.png", "empty.png"]  # as in the file, the empty one too
    assert dataset.image_ids.tolist() == [7, 3, 5]
    assert dataset.image_ids.dtype == np.int64
    assert dataset.ground_truth(0).boxes.tolist() == [[0.5, 0, 4.5, 5.25]]
    truth = dataset.ground_truth(1)
    assert truth.boxes.tolist() == [[1, 2, 11, 22], [0, 0, 40, 30]]
    assert truth.classes.tolist() == [1, 0]
    assert truth.areas.tolist() == [55.5, 1200]  # annotated; the box's where missing
    assert truth.ignore.tolist() == [Ignore.NO, Ignore.CROWD]
    assert truth.ids.tolist() == [11, 10]
    assert len(dataset.ground_truth(2)) == 0
    assert dataset.path(0).is_file()
    assert dataset.faults == ()
    assert (dataset.name, dataset.split) == ("instances_train.json", "train")


def edited(edit: Callable[[Document], None]) -> Document:
    document = coco_document()
    edit(document)
    return document


def changed(section: str, index: int, **fields: Any) -> Document:
    return edited(lambda d: d[section][index].update(fields))


BOX = "annotations[0] (id 11) of b.png: bbox"
FOUR = "needs four finite numbers [x, y, width, height]; got"


@pytest.mark.parametrize(
    ("document", "messages", "boxes"),
    [
        # boxes
        (
            changed("annotations", 0, bbox=[-2, 2, 10, 40]),
            [
                f"{BOX} [-2, 2, 10, 40] reached beyond the image of 40 x 30 pixels; cut to [0, 2, 8, 30] "
                "(x1, y1, x2, y2) (repaired)"
            ],
            3,
        ),
        (
            changed("annotations", 0, bbox=[40, 2, 10, 4]),
            [f"{BOX} [40, 2, 10, 4] lies outside the image of 40 x 30 pixels (dropped)"],
            2,
        ),
        (
            changed("annotations", 0, bbox=[4, 2, 0, 4]),
            [f"{BOX} needs a width and height above 0; got [4, 2, 0, 4] (dropped)"],
            2,
        ),
        (
            changed("annotations", 0, bbox=[4, 2, -3, 4]),
            [
                f"{BOX} [4, 2, -3, 4] is reversed, its width or height below 0; taken as [1, 2, 3, 4] "
                "(repaired)"
            ],
            3,
        ),
        # one fault a box: dropped, else reversed, else cut
        (
            changed("annotations", 0, bbox=[4, 2, 0, 0]),
            [f"{BOX} [4, 2, 0, 0] has equal corners: a click, not a box (dropped)"],
            2,
        ),
        (
            changed("annotations", 0, bbox=[50, 2, -20, 4]),
            [
                f"{BOX} [50, 2, -20, 4] is reversed, its width or height below 0; taken as [30, 2, 10, 4] "
                "(repaired)"
            ],
            3,
        ),
        (
            changed("annotations", 0, bbox=[60, 2, -10, 4]),
            [f"{BOX} [60, 2, -10, 4] lies outside the image of 40 x 30 pixels (dropped)"],
            2,
        ),
        (changed("annotations", 0, bbox=[1, 2, 3]), [f"{BOX} {FOUR} [1, 2, 3] (dropped)"], 2),
        (changed("annotations", 0, bbox=[1, 2, 3, "4"]), [f"{BOX} {FOUR} [1, 2, 3, '4'] (dropped)"], 2),
        (changed("annotations", 0, bbox=[1, 2, 3, True]), [f"{BOX} {FOUR} [1, 2, 3, True] (dropped)"], 2),
        (changed("annotations", 0, bbox=None), [f"{BOX} {FOUR} None (dropped)"], 2),
        (changed("annotations", 0, bbox=[1, 2, 10**400, 3]), [f"{BOX} {FOUR} [1, 2, 1000"], 2),
        (
            changed("annotations", 0, bbox=[1, 2, 1e-12, 9]),
            [f"{BOX} [1, 2, 1e-12, 9] has no area in single precision (dropped)"],
            2,
        ),
        # areas
        (
            changed("annotations", 0, area=-1),
            ["annotations[0] (id 11) of b.png: area needs a number from 0; got -1; it became the box's (rep"],
            3,
        ),
        # references
        (
            changed("annotations", 0, image_id=99),
            ["annotations[0] (id 11): image_id needs the id of an image; got 99 (dropped)"],
            2,
        ),
        (
            changed("annotations", 0, category_id=1),
            ["annotations[0] (id 11) of b.png: category_id needs the id of a category; got 1 (dropped)"],
            2,
        ),
        (
            edited(lambda d: d["annotations"].__setitem__(0, "text")),
            ["annotations[0]: image_id needs the id of an image; got None (dropped)"],
            2,
        ),
        # annotation ids given twice or missing
        (
            changed("annotations", 0, id=12),
            ["annotations: ids need distinct whole numbers; they became the places in the list (repaired)"],
            3,
        ),
        # images: two boxes go with theirs
        (
            changed("images", 1, file_name="gone.png"),
            ["images[1] (id 3): there is no image file {folder}/gone.png (dropped)"],
            1,
        ),
        (
            changed("images", 1, file_name=5),
            ["images[1] (id 3): file_name needs a file name; got 5 (dropped)"],
            1,
        ),
        (
            changed("images", 1, file_name="\x1b[2J"),
            [r"images[1] (id 3): file_name needs a file name of printable characters; got '\x1b[2J' (drop"],
            1,
        ),
        (
            changed("images", 1, file_name="x" * 600),
            ["images[1] (id 3): file_name needs a file name of at most 512 characters; got 600 (dropped)"],
            1,
        ),
        (
            changed("images", 2, id=None),
            ["images[2]: id needs a whole number or text; got None (dropped)"],
            3,
        ),
        # numbers and text among the ids
        (
            changed("images", 2, id="five"),
            ["images: ids need to be all whole numbers or all text; they became text (repaired)"],
            3,
        ),
    ],
)
def test_coco_faults_are_named(tmp_path: Path, document: Document, messages: list[str], boxes: int) -> None:
    dataset = read_coco(coco_folder(tmp_path, document), split="train")
    said = faults(dataset)
    assert len(said) == len(messages)
    for text, expected in zip(said, messages, strict=True):
        assert text.startswith(f"instances_train.json: {expected.replace('{folder}', str(tmp_path))}")
    assert len(dataset.boxes) == boxes
    assert_valid(dataset)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            [{"image_id": 1, "score": 0.5}],
            "needs COCO ground truth, an object .*; got a list, the form of detections",
        ),
        (5, "needs COCO JSON, an object with a list 'images'; got keys none"),
        ({"imgs": []}, "needs COCO JSON, an object with a list 'images'; got keys 'imgs'"),
        (
            edited(lambda d: d.pop("annotations") and None),
            "with a list 'annotations'; got keys 'images', 'categories'",
        ),
        (edited(lambda d: d.update(categories={})), r"with a list 'categories'; got \{\}"),
        (
            edited(lambda d: d.update(images=[])),
            "needs at least one usable record in 'images'; got 0 records",
        ),
        (
            edited(lambda d: d.update(images=[{"file_name": "a.png"}])),
            r"got 1 records. instances_train.json: images\[0\]: id needs a whole number or text; got None",
        ),
        (
            changed("images", 1, id="7"),
            r"images\[1\] \(id 7\): needs an id of its own; images\[0\] \(id 7\) has the same",
        ),
        (changed("categories", 1, id=9), r"categories\[1\]: needs an id of its own; 9 is 'dog' too"),
        (
            changed("categories", 1, name="dog"),
            "categories: Classes needs distinct names; given more than once: dog",
        ),
        (
            changed("categories", 1, id="x"),
            r"categories\[1\]: needs a whole number 'id' and a text 'name'; got \{'id'",
        ),
        (changed("categories", 1, id=2**63), r"categories\[1\]: needs a whole number 'id'"),
        (changed("categories", 1, id="9" * 19), r"categories\[1\]: needs a whole number 'id'"),
        (changed("categories", 1, name=" "), r"categories\[1\]: needs a whole number 'id' and a text 'name'"),
        (edited(lambda d: d.update(categories=[])), "categories: Classes needs at least one class name"),
    ],
)
def test_coco_refuses(tmp_path: Path, document: Any, message: str) -> None:
    path = coco_folder(tmp_path)
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=message) as caught:
        read_coco(path, split="train")
    assert str(path) in str(caught.value)


RECORD = b'{"images": [{"id": %b}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n  "images": [1,\n  }', "needs JSON; line 3, column 3: invalid character"),
        (b"", "needs JSON; line 1, column 1: the text ends too early"),
        (b'{"images": [1, 2', "needs JSON; line 1, column 17: the text ends too early"),
        ('{"ä": x}'.encode(), "needs JSON; line 1, column 7: invalid character"),
        (b'{"images": NaN}', "needs JSON; line 1, column 12: NaN is not a number in JSON"),
        (b'{"images": [-Infinity]}', "needs JSON; line 1, column 13: -Infinity is not a number in JSON"),
        (b'{"a": ' + b"[" * 100_000, "its brackets are nested too deeply"),
        (b'{"a": ' + b'{"a": ' * 100_000, "its brackets are nested too deeply"),
        (b"[" * 100_000, "got a list, the form of detections"),
        (b'{"images": ' + b"9" * 5000 + b"}", "with a list 'images'; got 999"),
        (RECORD % (b"9" * 5000), r"needs JSON; images\[0\]: Exceeds the limit"),
        (RECORD % b'"\xff"', r"needs JSON; images\[0\]: 'utf-8' codec"),
        (b'{"\xff": 1}', "needs JSON; 'utf-8' codec"),
        (b"\xff\xfe{", "needs JSON; 'utf-16"),
        (b"\0" * 5000, "needs JSON; line 1, column 1: invalid character"),
        (b" " * 100 + b"x" * 5000, r"needs COCO JSON, an object; it begins with b'  "),
    ],
)
def test_coco_refuses_what_is_not_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_coco(path, split="train")


@pytest.mark.parametrize(
    "name",
    [
        "../a.png",
        "images/../../a.png",
        "/etc/passwd",
        "..\\a.png",
        "C:\\a.png",
        "C:a.png",
        "\\\\host\\a.png",
        "..",
    ],
)
@pytest.mark.parametrize("images", ["required", "absent"])
def test_coco_refuses_paths_out_of_the_folder(tmp_path: Path, name: str, images: Any) -> None:
    path = coco_folder(tmp_path / "data", changed("images", 1, file_name=name))
    picture(tmp_path / "a.png")
    with pytest.raises(
        DataError, match=r"images\[1\] \(id 3\): file_name: needs a path inside the data folder"
    ):
        read_coco(path, split="train", images=images)


def test_coco_follows_links_inside_the_folder_and_refuses_those_that_leave(tmp_path: Path) -> None:
    path = coco_folder(tmp_path / "data")
    picture(tmp_path / "data/pool/b.png")
    picture(tmp_path / "outside/b.png")
    link = tmp_path / "data/b.png"
    link.unlink()
    link.symlink_to("pool/b.png")
    assert len(read_coco(path, split="train")) == 3
    link.unlink()
    link.symlink_to("../outside/b.png")
    with pytest.raises(
        DataError, match=r"b.png: is a symbolic link, or in a linked folder, that leaves the data folder"
    ):
        read_coco(path, split="train")
    (tmp_path / "data/linked").symlink_to(tmp_path / "outside")
    path.write_text(json.dumps(changed("images", 1, file_name="linked/b.png")))
    with pytest.raises(DataError, match="leaves the data folder"):
        read_coco(path, split="train")
    link.unlink()
    link.symlink_to("nowhere.png")  # dangling
    path.write_text(json.dumps(coco_document()))
    assert "there is no image file" in faults(read_coco(path, split="train"))[0]


@pytest.mark.parametrize(
    ("json_file", "place"),
    [
        ("instances_train.json", "."),
        ("instances_train.json", "images"),
        ("instances_train.json", "train"),
        ("instances_train.json", "train/images"),
        ("annotations/instances_train.json", "."),
        ("annotations/instances_train.json", "images"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2014.json", "images/train2014"),
        ("train/_annotations.coco.json", "train"),
    ],
)
def test_coco_finds_the_images_in_the_usual_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, json_file: str, place: str
) -> None:
    for name in ("a", "b", "empty"):
        picture(tmp_path / place / f"{name}.png")
    path = tmp_path / json_file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco_document()))
    dataset = read_coco(path, split="train")
    assert dataset.root == tmp_path / place
    assert all(dataset.path(i).is_file() for i in range(3))
    monkeypatch.chdir(tmp_path)
    assert read_coco(json_file, split="train").root == dataset.root
    assert read_coco(json_file, split="train", image_root=place).path(0).is_file()


def test_many_images_are_found_by_listing_their_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 3 * finding.FEW
    names = [f"sub/{i}.png" for i in range(count)]
    document = coco_document()
    document["images"] = [
        {"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names)
    ]
    path = coco_folder(tmp_path, document)
    (tmp_path / "sub").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / names[3]).unlink()
    (tmp_path / names[3]).mkdir()  # a folder in the place of a file
    (tmp_path / names[4]).unlink()
    (tmp_path / names[4]).symlink_to(tmp_path / names[5])
    (tmp_path / names[6]).unlink()
    asked: list[str] = []
    holds_file = rules.Fence.holds_file
    monkeypatch.setattr(
        rules.Fence, "holds_file", lambda self, path: asked.append(str(path)) or holds_file(self, path)
    )
    dataset = read_coco(path, split="train")
    assert len(dataset) == count - 2
    assert [fault.record for fault in dataset.faults] == ["images[3] (id 3)", "images[6] (id 6)"]
    assert {fault.kind for fault in dataset.faults} == {"missing image"}
    assert asked == [
        str(tmp_path / names[index]) for index in (3, 4, 6)
    ]  # only what a listing does not settle
    (tmp_path / names[4]).unlink()
    (tmp_path / names[4]).symlink_to("/etc/passwd")
    with pytest.raises(DataError, match="leaves the data folder"):
        read_coco(path, split="train")
    (tmp_path / "sub").rename(tmp_path.parent / f"{tmp_path.name} elsewhere")
    (tmp_path / "sub").symlink_to(tmp_path.parent / f"{tmp_path.name} elsewhere")
    with pytest.raises(DataError, match="leaves the data folder"):
        read_coco(path, split="train")


def test_coco_says_where_it_looked_when_no_image_is_there(tmp_path: Path) -> None:
    path = tmp_path / "instances_train.json"
    path.write_text(json.dumps(coco_document()))
    with pytest.raises(
        DataError, match=r"none of its 3 image files was found, 'a.png' for one. Tried: "
    ) as caught:
        read_coco(path, split="train")
    for place in ("images", "train", "images/train", "train/images", "train2017", "images/train2014"):
        assert f"{tmp_path / place}," in str(caught.value)
    assert "or name their folder: --image-root DIR (image_root in Python)" in str(caught.value)
    with pytest.raises(DataError, match=f"Tried: {tmp_path / 'else'}. Put them"):
        read_coco(path, split="train", image_root=tmp_path / "else")


def test_coco_without_images_needs_no_image_and_no_size(tmp_path: Path) -> None:
    document = coco_document()
    for image in document["images"]:
        del image["width"], image["file_name"]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(document))
    dataset = read_coco(path, split="val", images="absent")
    assert dataset.files.tolist() == ["7", "3", "5"]
    assert [dataset.size(i) for i in range(3)] == [(5, 6), (40, 30), (1, 1)]
    assert faults(dataset)[0] == (
        "truth.json: images[0] (id 7): width and height are missing; "
        "they became 5 x 6, the least that holds the boxes (repaired)"
    )


@pytest.mark.parametrize(
    "size", [{"width": None}, {"height": 0}, {"width": 1e9}, {"width": "40"}, {"height": 1.5}]
)
def test_coco_takes_a_missing_size_from_the_image(tmp_path: Path, size: Document) -> None:
    path = coco_folder(tmp_path, changed("images", 1, **size))
    dataset = read_coco(path, split="train")
    assert dataset.size(1) == (40, 30)
    assert dataset.faults == ()
    (tmp_path / "b.png").write_bytes(b"no image")
    said = faults(read_coco(path, split="train"))
    assert len(said) == 1
    assert "images[1] (id 3): width and height are missing and cannot be read: " in said[0]
    path.write_text(json.dumps({**coco_document(), "images": [{"id": 3, "file_name": "b.png"}]}))
    with pytest.raises(DataError, match=r"none of its 1 images is usable. instances_train.json: images"):
        read_coco(path, split="train")


def test_two_records_of_one_file_are_one_image(tmp_path: Path) -> None:
    document = coco_document()
    document["images"][1]["file_name"] = "./a.png"
    path = coco_folder(tmp_path, document)
    dataset = read_coco(path, split="train")
    assert faults(dataset) == [
        "instances_train.json: images[1] (id 3): is the file of images[0] (id 7) again; it counts once, with the boxes "
        "of both (repaired)"
    ]
    assert dataset.fault_counts == {("duplicate listing", "repaired"): 1}
    assert dataset.files.tolist() == ["a.png", "empty.png"]
    assert (np.diff(dataset.offsets).tolist(), dataset.left_out) == ([3, 0], ())
    assert len(read_coco(path, split="train", images="absent")) == 3  # results have the ids of both


@pytest.mark.parametrize(("given", "crowd"), [(1, True), ("1", True), ("0", False), (True, True), (2, False)])
def test_crowds_may_be_marked_in_text(tmp_path: Path, given: Any, crowd: bool) -> None:
    document = changed("annotations", 0, iscrowd=given)
    dataset = read_coco(coco_folder(tmp_path, document), split="train")
    assert (dataset.ignore[dataset.annotation_ids == 11] == Ignore.CROWD).tolist() == [crowd]


@pytest.mark.parametrize(
    ("fields", "unread"),
    [
        ({"segmentation": [[1, 2, 3, 4, 5, 6]]}, ("masks",)),
        ({"segmentation": {"counts": "x", "size": [1, 2]}}, ("masks",)),
        ({"segmentation": [], "keypoints": []}, ()),
        ({"keypoints": [1, 2, 2]}, ("key points",)),
    ],
)
def test_coco_knows_what_it_does_not_read(tmp_path: Path, fields: Document, unread: tuple[str, ...]) -> None:
    document = changed("annotations", 0, **fields)
    document["categories"][0]["keypoints"] = ["nose"]
    document["images"][2]["file_name"] = "gone.png"
    dataset = read_coco(coco_folder(tmp_path, document), split="train")
    assert (dataset.unread, dataset.left_out) == (unread, ("gone.png",))


def test_coco_ids_are_compared_as_text_and_come_back_as_given(tmp_path: Path) -> None:
    document = changed("images", 0, id="7")
    for image, text in zip(document["images"], ("7", "x/3", "5"), strict=True):
        image["id"] = text
    document["annotations"][0]["image_id"] = "x/3"
    document["annotations"][2]["image_id"] = "x/3"
    document["categories"][1]["id"] = "2"
    document["annotations"][1]["category_id"] = 2.0  # as table programs write it
    dataset = read_coco(coco_folder(tmp_path, document), split="train")
    assert dataset.faults == ()
    assert dataset.image_ids.tolist() == ["7", "x/3", "5"]
    assert len(dataset.boxes) == 3
    assert dataset.index_of_image_id()["x/3"] == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_coco_is_read_in_any_encoding_of_json(tmp_path: Path, encoding: str) -> None:
    path = coco_folder(tmp_path)
    text = json.dumps(changed("categories", 0, name="hünd"), ensure_ascii=False)
    path.write_bytes((text + " " * 5000).encode(encoding))
    assert read_coco(path, split="train").classes.names == ("cat", "hünd")


def test_coco_takes_paths_as_windows_writes_them(tmp_path: Path) -> None:
    picture(tmp_path / "sub/b.png")
    dataset = read_coco(coco_folder(tmp_path, changed("images", 1, file_name="sub\\b.png")), split="train")
    assert dataset.path(1) == tmp_path / "sub/b.png"


# ---------------------------------------------------------------------------------------------------------
# Writing COCO


@st.composite
def float32_truths(draw: st.DrawFn) -> GroundTruth:
    def edges(high: int) -> list[float]:
        return sorted(draw(st.lists(st.floats(0, high, width=32), min_size=2, max_size=2, unique=True)))

    drawn = [(edges(40), edges(30)) for _ in range(draw(st.integers(0, 4)))]
    pairs = [pair for place, pair in enumerate(drawn) if pair not in drawn[:place]]  # equal boxes count once
    boxes = np.array([[x[0], y[0], x[1], y[1]] for x, y in pairs], np.float32).reshape(-1, 4)
    count = len(boxes)
    return GroundTruth(
        boxes=boxes,
        classes=np.array(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)), np.int64),
        areas=np.array(
            draw(st.lists(st.floats(0, 1e6, width=32), min_size=count, max_size=count)), np.float32
        ),
        ignore=np.array(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)), np.int8),
    )


@fuzzing
@given(truths=st.lists(float32_truths(), min_size=1, max_size=3))
def test_reading_gives_back_what_was_written(tmp_path: Path, truths: list[GroundTruth]) -> None:
    classes = Classes(("cat", "dog"), (3, 8))
    files = [f"images/{i}.png" for i in range(len(truths))]
    path = tmp_path / "instances_train.json"
    write_coco(path, classes=classes, files=files, sizes=[(40, 30)] * len(files), ground_truths=truths)
    dataset = read_coco(path, split="train", images="absent")
    assert dataset.faults == ()
    assert dataset.classes == classes
    assert dataset.files.tolist() == files
    assert dataset.image_ids.tolist() == list(range(1, len(files) + 1))
    assert dataset.annotation_ids.tolist() == list(range(1, len(dataset.boxes) + 1))
    for index, truth in enumerate(truths):
        again = dataset.ground_truth(index)
        # x + (x2 - x) is exact in double precision unless the edges are some 2^29 apart in magnitude
        np.testing.assert_allclose(again.boxes, truth.boxes, rtol=1e-7, atol=0)
        assert again.classes.tolist() == truth.classes.tolist()
        assert again.areas.tolist() == truth.areas.tolist()
        assert again.ignore.tolist() == truth.ignore.tolist()
    assert os.listdir(tmp_path) == ["instances_train.json"]  # no draft is left


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": []}, "one size and one ground truth a file; got 1 files, 0 sizes, 1 ground truths"),
        ({"files": ["../a.png"]}, r"write_coco, files\[0\]: needs a path inside the data folder"),
        ({"files": [""]}, r"write_coco, files\[0\]: needs a file name; got ''"),
        ({"sizes": [(0, 5)]}, r"write_coco, files\[0\]: needs sides of 1 to 1048576 pixels; got 0 x 5"),
        ({"classes": Classes(("cat",))}, r"write_coco, files\[0\]: needs class indices 0..0; got 1"),
        ({"path": "missing/folder/x.json"}, "missing/folder/x.json: cannot be written: No such file"),
    ],
)
def test_write_coco_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    parts: dict[str, Any] = {
        "path": "x.json",
        "classes": Classes(("cat", "dog")),
        "files": ["a.png"],
        "sizes": [(40, 30)],
        "ground_truths": [GroundTruth(np.array([[0, 0, 1, 1]], np.float32), np.array([1]))],
    }
    Path("x.json").write_text("old")
    with pytest.raises(DataError, match=message):
        write_coco(**{**parts, **changes})
    assert Path("x.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]


def test_write_coco_leaves_the_old_file_when_the_disk_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"x.json: cannot be written: No space left on device"):
        write_coco(
            path,
            classes=Classes(("a",)),
            files=["a.png"],
            sizes=[(9, 9)],
            ground_truths=[GroundTruth.empty()],
        )
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]


# ---------------------------------------------------------------------------------------------------------
# VOC


def test_voc_corners_are_inclusive_and_count_from_one(tmp_path: Path) -> None:
    whole = voc_object("WBC", "1 1 40 30")
    objects = (voc_object(corners="5 6 5 9"), voc_object(corners="1.5 2.5 3.5 4.5"))
    dataset = read_voc(voc_folder(tmp_path, {"a": voc_page(whole, *objects), "b": voc_page()}), split="train")
    truth = dataset.ground_truth(0)
    # the whole image; one pixel wide; corners with decimals
    assert truth.boxes.tolist() == [[0, 0, 40, 30], [4, 5, 5, 9], [0.5, 1.5, 3.5, 4.5]]
    assert truth.areas.tolist() == [1200, 4, 9]
    assert dataset.classes == Classes(("RBC", "WBC"), (0, 1))
    assert truth.classes.tolist() == [1, 0, 0]
    assert truth.ids.tolist() == [1, 2, 3]
    assert len(dataset.ground_truth(1)) == 0
    assert dataset.image_ids.tolist() == ["a", "b"]
    assert dataset.files.tolist() == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    assert dataset.path(0).is_file()
    assert dataset.name == tmp_path.name
    assert dataset.faults == ()


def test_voc_difficult_is_kept_to_be_ignored(tmp_path: Path) -> None:
    easy, hard = (voc_object(extra=f"<difficult>{flag}</difficult>") for flag in (0, 1))
    dataset = read_voc(
        voc_folder(tmp_path, {"a": voc_page(easy, hard, voc_object(corners="1 1 9 9"))}), split="train"
    )
    assert dataset.ground_truth(0).ignore.tolist() == [Ignore.NO, Ignore.DIFFICULT, Ignore.NO]


def test_voc_parts_of_objects_are_not_objects(tmp_path: Path) -> None:
    part = f"<part><name>head</name>{voc_object(None, '2 2 3 3')}</part>"
    dataset = read_voc(voc_folder(tmp_path, {"a": voc_page(voc_object(extra=part))}), split="train")
    assert dataset.classes.names == ("RBC",)
    assert dataset.boxes.tolist() == [[0, 0, 10, 20]]


def test_voc_splits_agree_on_the_classes_and_count_nothing_twice(tmp_path: Path) -> None:
    pages = {
        "a": voc_page(voc_object("zebra")),
        "b": voc_page(voc_object("ant")),
        "c": voc_page(voc_object("bee")),
    }
    folder = voc_folder(
        tmp_path, pages, train="a", val="b", test="c\n\n", trainval="a\nb", zebra_train="a  1", ant_val="b -1"
    )
    assert available_splits(folder) == ("train", "val", "test")
    for split, ids in (("train", ["a"]), ("val", ["b"]), ("trainval", ["a", "b"]), ("ant_val", ["b"])):
        dataset = open_dataset(folder, split)
        assert dataset.classes == Classes(("ant", "bee", "zebra"), (0, 1, 2))
        assert dataset.image_ids.tolist() == ids
        assert dataset.split == split
        assert dataset.faults == ()


def test_voc_trainval_is_a_split_where_it_is_all_there_is(tmp_path: Path) -> None:
    folder = voc_folder(tmp_path, {"a": voc_page(voc_object())}, trainval="a", test="a")
    assert available_splits(folder) == ("test", "trainval")


OBJECT = "Annotations/a.xml: object 2 (RBC):"


@pytest.mark.parametrize(
    ("item", "message", "boxes"),
    [
        (
            voc_object(corners="5 6 5 6"),
            f"{OBJECT} corners [5, 6, 5, 6] are equal: a click, not a box (dropped)",
            1,
        ),
        (
            voc_object(corners="9 6 5 8"),
            f"{OBJECT} corners [9, 6, 5, 8] are reversed; xmax >= xmin and ymax >= ymin are required: "
            "taken as [5, 6, 9, 8] (repaired)",
            2,
        ),
        (
            voc_object(corners="0 1 5 8"),
            f"{OBJECT} corners [0, 1, 5, 8]: reached beyond the image of 40 x 30 pixels; "
            "cut to [0, 0, 5, 8] (x1, y1, x2, y2) (repaired)",
            2,
        ),
        # one fault an object: dropped, else reversed, else cut
        (
            voc_object(corners="45 1 41 8"),
            f"{OBJECT} corners [45, 1, 41, 8]: lies outside the image of 40 x 30 pixels (dropped)",
            1,
        ),
        (
            voc_object(corners="45 1 31 8"),
            f"{OBJECT} corners [45, 1, 31, 8] are reversed; xmax >= xmin and ymax >= ymin are required: taken as "
            "[31, 1, 40, 8] (repaired)",
            2,
        ),
        (
            voc_object(corners="1_0 1 31 8"),
            f"{OBJECT} bndbox needs four finite numbers xmin, ymin, xmax, ymax; got [1_0, 1, 31, 8] (dropped)",
            1,
        ),
        (
            voc_object(corners="41 1 45 8"),
            f"{OBJECT} corners [41, 1, 45, 8]: lies outside the image of 40 x 30 pixels (dropped)",
            1,
        ),
        (
            voc_object(corners="1 nan 5 8"),
            f"{OBJECT} bndbox needs four finite numbers xmin, ymin, xmax, ymax; got [1, nan, 5, 8] (dropped)",
            1,
        ),
        (
            voc_object(corners="1 2 x 8"),
            f"{OBJECT} bndbox needs four finite numbers xmin, ymin, xmax, ymax; got [1",
            1,
        ),
        (
            voc_object(corners="1 2 5"),
            f"{OBJECT} bndbox needs four finite numbers xmin, ymin, xmax, ymax; got [1",
            1,
        ),
        (
            "<object><name>RBC</name></object>",
            f"{OBJECT} bndbox needs four finite numbers xmin, ymin, xmax, ymax; got no corners (dropped)",
            1,
        ),
        (
            voc_object(None),
            "Annotations/a.xml: object 2 (no name): name needs the name of a class; it is missing (dropped)",
            1,
        ),
    ],
)
def test_voc_faults_are_named(tmp_path: Path, item: str, message: str, boxes: int) -> None:
    dataset = read_voc(voc_folder(tmp_path, {"a": voc_page(voc_object(), item)}), split="train")
    assert [text[: len(message)] for text in faults(dataset)] == [message]
    assert len(dataset.boxes) == boxes
    assert_valid(dataset)


def test_voc_missing_and_repeated_files_are_named(tmp_path: Path) -> None:
    folder = voc_folder(
        tmp_path, {stem: voc_page(voc_object()) for stem in "abc"}, train="a\nb\nc\na\nno xml", val="b"
    )
    (folder / "JPEGImages/b.jpg").unlink()
    (folder / "Annotations/c.xml").unlink()
    dataset = read_voc(folder, split="train")
    listing = "ImageSets/Main/train.txt"
    assert faults(dataset) == [
        f"{listing}: line 2 (b): there is no image JPEGImages/b ({', '.join(SUFFIXES)}) (dropped)",
        f"{listing}: line 3 (c): there is no annotation file Annotations/c.xml (dropped)",
        f"{listing}: line 4 (a): the image is listed twice; it counts once (repaired)",
        f"{listing}: line 5 (no xml): there is no annotation file Annotations/no xml.xml (dropped)",
    ]
    assert dataset.image_ids.tolist() == ["a"]
    with pytest.raises(
        DataError, match=r"val.txt: needs at least one usable image; got none. .*no image JPEGImages/b"
    ):
        read_voc(folder, split="val")


@pytest.mark.parametrize(
    ("filename", "files", "chosen"),
    [
        ("a.png", ["a.jpg", "a.png"], "a.png"),  # the extension that the annotation names
        ("a", ["a.PNG", "a.txt"], "a.PNG"),  # a known one, upper case as well
        ("other.jpg", ["a.png", "other.jpg"], "a.png"),  # the name of the annotation decides
        ("other.jpg", ["other.jpg"], "other.jpg"),  # unless only the other exists
        ("../../a.jpg", ["a.jpg"], "a.jpg"),  # a path in <filename> is never followed
        ("/etc/passwd", ["a.jpg"], "a.jpg"),
    ],
)
def test_voc_finds_the_image(tmp_path: Path, filename: str, files: list[str], chosen: str) -> None:
    folder = voc_folder(tmp_path, {"a": voc_page(voc_object(), filename=filename)})
    (folder / "JPEGImages/a.jpg").unlink()
    for name in files:
        (folder / "JPEGImages" / name).write_bytes(b"")
    assert read_voc(folder, split="train").files.tolist() == [f"JPEGImages/{chosen}"]


@pytest.mark.parametrize(
    "size", ["", "<width>0</width><height>30</height>", "<width>x</width><height>30</height>"]
)
def test_voc_takes_a_missing_size_from_the_image(tmp_path: Path, size: str) -> None:
    folder = voc_folder(tmp_path, {stem: voc_page(voc_object(), size=size) for stem in "ab"})
    (folder / "JPEGImages/b.jpg").write_bytes(b"no image")
    dataset = read_voc(folder, split="train")
    assert dataset.size(0) == (40, 30)
    assert len(dataset) == 1
    assert faults(dataset)[0].startswith("Annotations/b.xml: size: the size is missing and cannot be read: ")


def test_voc_without_images_looks_at_none(tmp_path: Path) -> None:
    pages = {"a": voc_page(voc_object(), filename="a.png"), "b": voc_page(voc_object(), size="")}
    folder = voc_folder(tmp_path, pages)
    for path in (folder / "JPEGImages").iterdir():
        path.unlink()
    (folder / "JPEGImages").rmdir()
    dataset = open_dataset(folder, "train", images="absent")
    assert [dataset.size(i) for i in range(2)] == [(40, 30), (10, 20)]
    assert dataset.files.tolist() == ["JPEGImages/a.png", "JPEGImages/b"]
    assert faults(dataset) == [
        "Annotations/b.xml: size: width and height are missing; "
        "they became 10 x 20, the least that holds the boxes (repaired)"
    ]
    with pytest.raises(DataError, match="needs a folder JPEGImages with the images; there is none"):
        read_voc(folder, split="train")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<annotation><object>", "Annotations/a.xml: needs sound XML; no element found"),
        ("", "Annotations/a.xml: needs the XML of Pascal VOC, <annotation>; the file is empty"),
        ("<html/>", "Annotations/a.xml: needs the XML of Pascal VOC, <annotation>; got <'html'>"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>", "needs plain XML without DOCTYPE and ENTITY"),
        ("<?xml version='1.0' encoding='no-such'?><annotation/>", "Annotations/a.xml: needs sound XML; "),
        ("<?xml version='1.0' encoding='shift_jis'?><annotation/>", "Annotations/a.xml: needs sound XML; "),
        ("\0", "Annotations/a.xml: needs XML in UTF-8; got zero bytes"),
        (voc_page(), "needs an object with a name in Annotations/\\*.xml; there is none"),
        ("<annotation>" + " " * 9_000_000, "Annotations/a.xml: needs at most 8,388,608 bytes; got 9,000,012"),
    ],
)
def test_voc_refuses_pages(tmp_path: Path, page: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_voc(voc_folder(tmp_path, {"a": page}), split="train")


@pytest.mark.parametrize("page", ["<annotation><object>", "", "\0\0", "<html/>"])
def test_a_damaged_page_costs_its_image(tmp_path: Path, page: str) -> None:
    pages = {"a": voc_page(voc_object()), "b": page, "c": voc_page(voc_object("WBC"))}
    folder = voc_folder(tmp_path, pages, train="a\nb", val="c", test="b")
    train, val = read_voc(folder, split="train"), read_voc(folder, split="val")
    assert (train.files.tolist(), train.left_out) == (["JPEGImages/a.jpg"], ("JPEGImages/b.jpg",))
    assert [(fault.file, fault.record, fault.kind, fault.action) for fault in train.faults] == [
        ("Annotations/b.xml", "file", "unreadable labels", "dropped")
    ]
    assert (val.classes.names, val.faults, val.left_out) == (("RBC", "WBC"), (), ())
    with pytest.raises(
        DataError, match=r"test.txt: needs at least one usable image; .*b.xml: file: .* needs "
    ):
        read_voc(folder, split="test")


def test_voc_refuses_entities_in_any_encoding(tmp_path: Path) -> None:
    folder = voc_folder(tmp_path, {"a": ""})
    bomb = "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>&b;</annotation>"
    (folder / "Annotations/a.xml").write_bytes(bomb.encode("utf-16"))
    with pytest.raises(DataError, match="needs XML in UTF-8; got zero bytes"):
        read_voc(folder, split="train")
    hidden = b"<?xml version='1.0' encoding='cp037'?>" + bomb.encode("cp037")
    (folder / "Annotations/a.xml").write_bytes(hidden)
    with pytest.raises(DataError, match="needs sound XML; unknown encoding"):
        read_voc(folder, split="train")


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        (
            b"../../etc/passwd",
            r"train.txt: line 1: needs a path inside the data folder, relative and without '..'",
        ),
        (b"a\n/etc/passwd", r"train.txt: line 2: needs a path inside"),
        (b"\x1b[2J", r"train.txt: line 1: needs a file name of printable characters"),
        (b"\xff", r"train.txt: needs text in UTF-8"),
        (b"\n", r"train.txt: needs at least one usable image; got none. The list is empty"),
    ],
)
def test_voc_refuses_lists(tmp_path: Path, listing: bytes, message: str) -> None:
    folder = voc_folder(tmp_path, {"a": voc_page(voc_object())}, train="a", val="a")
    (folder / "ImageSets/Main/train.txt").write_bytes(listing)
    with pytest.raises(DataError, match=message):
        read_voc(folder, split="train")


def test_voc_refuses_links_that_leave_the_folder(tmp_path: Path) -> None:
    picture(tmp_path / "outside.jpg")
    (tmp_path / "outside.xml").write_text(voc_page(voc_object()))
    for linked in ("JPEGImages/a.jpg", "Annotations/a.xml"):
        folder = voc_folder(tmp_path / linked, {"a": voc_page(voc_object())})
        (folder / linked).unlink()
        (folder / linked).symlink_to(tmp_path / f"outside{Path(linked).suffix}")
        with pytest.raises(DataError, match="leaves the data folder"):
            read_voc(folder, split="train")


def test_voc_refuses_folders_without_their_parts(tmp_path: Path) -> None:
    folder = voc_folder(tmp_path, {"a": voc_page(voc_object())}, train="a", val="a")
    with pytest.raises(
        DataError, match=r"needs the list ImageSets/Main/vl.txt; there are: train, val. Did you mean 'val'"
    ):
        read_voc(folder, split="vl")
    with pytest.raises(DataError, match=r"needs the list ImageSets/Main/../../x.txt; there are"):
        read_voc(folder, split="../../x")
    (folder / "ImageSets/Main/odd.txt").mkdir()
    with pytest.raises(DataError, match=r"odd.txt: needs a file with one image name a line"):
        read_voc(folder, split="train")
    (folder / "ImageSets/Main/odd.txt").rmdir()
    (folder / "Annotations").rename(folder / "annotations_elsewhere")
    with pytest.raises(DataError, match="Annotations: cannot be read: No such file"):
        read_voc(folder, split="train")


def test_voc_names_may_hold_spaces_and_flags(tmp_path: Path) -> None:
    pages = {name: voc_page(voc_object()) for name in ("my photo", "shot 1", "b")}
    dataset = read_voc(voc_folder(tmp_path, pages, train="my photo\nshot 1\nb  -1"), split="train")
    assert dataset.image_ids.tolist() == ["my photo", "shot 1", "b"]


# ---------------------------------------------------------------------------------------------------------
# Hostile input: a data set or a DataError, nothing else

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([3, 7, 9, 2, "7", "a.png", "../a.png", "/a", "\ud800", "\0", 1e999, 10**400, 0, -1]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def refusal(read: Callable[[], Dataset]) -> str:
    """Return the message of a `DataError`, or "" for a valid data set; nothing else may come."""
    try:
        assert_valid(read())
    except DataError as error:
        return str(error)
    return ""


def mutate(document: Any, choose: Callable[[Any], Any]) -> Any:
    """Replace one node, anywhere."""
    node, path = document, []
    while isinstance(node, dict | list) and node and choose(st.integers(0, 4)):
        key = choose(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
        path.append((node, key))
        node = node[key]
    if not path:
        return choose(anything)
    holder, key = path[-1]
    holder[key] = choose(anything)
    return document


def damage(content: bytes, choose: Callable[[Any], Any]) -> bytes:
    """Overwrite, insert, cut or repeat some bytes."""
    for _ in range(choose(st.integers(1, 3))):
        start = choose(st.integers(0, len(content)))
        end = min(len(content), start + choose(st.integers(0, 12)))
        new = choose(
            st.binary(max_size=6)
            | st.sampled_from([b"NaN", b"1e999", b"[" * 50, b"<a>", b"&lt;", b"&x;", b"-"])
        )
        content = content[:start] + new * choose(st.integers(0, 3)) + content[end:]
    return content


@fuzzing
@given(data=st.data(), images=st.sampled_from(["required", "absent"]))
def test_any_coco_document_gives_a_data_set_or_a_data_error(tmp_path: Path, data: Any, images: Any) -> None:
    path = coco_folder(tmp_path) if not (tmp_path / "a.png").exists() else tmp_path / "instances_train.json"
    document = copy.deepcopy(coco_document())
    for _ in range(data.draw(st.integers(1, 3))):
        document = mutate(document, data.draw)
    path.write_text(json.dumps(document).replace("NaN", "1e999").replace("Infinity", "1e999"))
    said = refusal(lambda: read_coco(path, split="train", images=images))
    assert not said or len(said) < 3000


@fuzzing
@given(data=st.data())
def test_any_coco_bytes_give_a_data_set_or_a_data_error(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "instances_train.json"
    path.write_bytes(damage(json.dumps(coco_document()).encode(), data.draw))
    said = refusal(lambda: read_coco(path, split="train", images="absent"))
    assert not said or str(path) in said


@fuzzing
@given(data=st.data(), images=st.sampled_from(["required", "absent"]))
def test_any_xml_bytes_give_a_data_set_or_a_data_error(tmp_path: Path, data: Any, images: Any) -> None:
    page = voc_page(
        voc_object(), voc_object("WBC", "3 4 12 30", "<difficult>1</difficult>"), filename="a.jpg"
    )
    folder = tmp_path if (tmp_path / "Annotations").exists() else voc_folder(tmp_path, {"a": page})
    content = b"<?xml version='1.0' encoding='utf-8'?>" + page.encode()
    (folder / "Annotations/a.xml").write_bytes(damage(content, data.draw))
    said = refusal(lambda: read_voc(folder, split="train", images=images))
    assert not said or str(folder) in said


@fuzzing
@given(
    listing=st.binary(max_size=40)
    | st.lists(st.sampled_from(["a", "b 1", "..", "/", "a/b", " "])).map(
        lambda lines: "\n".join(lines).encode()
    )
)
def test_any_list_gives_a_data_set_or_a_data_error(tmp_path: Path, listing: bytes) -> None:
    if not (tmp_path / "Annotations").exists():
        voc_folder(tmp_path, {"a": voc_page(voc_object()), "b": voc_page()})
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(listing)
    said = refusal(lambda: open_dataset(tmp_path, "train"))
    assert not said or str(tmp_path) in said


def test_many_levels_of_xml_end_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = "<annotation>" + "<a>" * 100_000 + "</a>" * 100_000 + "</annotation>"
    folder = voc_folder(tmp_path, {"a": deep, "b": voc_page(voc_object())})
    start = time.perf_counter()
    assert len(read_voc(folder, split="train")) == 2
    assert time.perf_counter() - start < 5
    monkeypatch.setattr(voc_pages, "LARGEST_XML", 1000)
    with pytest.raises(DataError, match=r"a.xml: needs at most 1,000 bytes"):
        read_voc(folder, split="train")


# ---------------------------------------------------------------------------------------------------------
# Real data


@needs_real_data
def test_bccd_is_read_whole_and_its_two_clicks_are_the_only_faults() -> None:
    folder = Path(REAL_DATA or "") / "bccd/BCCD"
    assert available_splits(folder) == ("train", "val", "test")
    splits = [open_dataset(folder, split) for split in available_splits(folder)]
    assert [len(part) for part in splits] == [205, 87, 72]
    assert sum(len(part.boxes) for part in splits) == 4888 - 2
    assert {part.classes for part in splits} == {Classes(("Platelets", "RBC", "WBC"))}
    assert len({image for part in splits for image in part.image_ids.tolist()}) == 364
    click = "are equal: a click, not a box (dropped)"
    assert [faults(part) for part in splits] == [
        [f"Annotations/BloodImage_00343.xml: object 4 (RBC): corners [181, 329, 181, 329] {click}"],
        [f"Annotations/BloodImage_00338.xml: object 13 (RBC): corners [504, 337, 504, 337] {click}"],
        [],
    ]
    for part in splits:
        assert_valid(part)
        assert set(part.widths.tolist()) == {640}


@needs_real_data
def test_nuclei_are_read_whole() -> None:
    folder = Path(REAL_DATA or "") / "nuclei"
    splits = [open_dataset(folder, split) for split in available_splits(folder)]
    assert [(part.split, len(part), part.faults) for part in splits] == [("train", 502, ()), ("val", 126, ())]
    assert sum(len(part.boxes) for part in splits) == 25_844
    assert max(int(np.diff(part.offsets).max()) for part in splits) == 369
    assert splits[1].path(0).is_file()


@needs_real_data
@pytest.mark.parametrize(
    ("file", "images", "boxes", "crowds", "repaired"),
    [
        ("faster_coco_eval/tests/dataset/gt_dataset.json", 3, 9, 0, 0),
        # image ids are text, those of its annotations numbers
        ("faster_coco_eval/tests/dataset/gt_ignore_test.json", 1, 14, 1, 0),
        ("faster_coco_eval/tests/dataset/cocoapi/instances_val2014_100.json", 100, 839, 9, 0),
        ("podm/tests/test_coco_eval/gts/sampled_gts_bbox_area.json", 100, 830, 0, 0),
        # two boxes reach 4 and 9 pixels beyond their images
        ("podm/toyexample/dets_coco_format/coco_dets.json", 10, 12, 0, 2),
    ],
)
def test_ground_truth_is_read_without_its_images(
    file: str, images: int, boxes: int, crowds: int, repaired: int
) -> None:
    path = Path(REAL_DATA or "") / "eval_fixtures" / file
    dataset = open_dataset(path, "val", images="absent")
    assert (len(dataset), len(dataset.boxes)) == (images, boxes)
    assert int((dataset.ignore == Ignore.CROWD).sum()) == crowds
    assert [fault.action for fault in dataset.faults] == ["repaired"] * repaired
    with pytest.raises(DataError, match="image files was found"):
        open_dataset(path, "val")
