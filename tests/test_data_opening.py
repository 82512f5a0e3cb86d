"""Recognition: which layouts are known, what is said of those that are not, and what a split is called."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_cases import (
    SETS,
    SPLITS,
    assert_valid,
    boxes_by_image,
    coco_set,
    csv_set,
    expected,
    kinds,
    picture,
    voc_page,
    voc_set,
    write,
    yolo_set,
)
from retinanet.data import available_splits, open_dataset, read_as, read_coco
from retinanet.data.rules import read_bytes
from retinanet.errors import DataError
from retinanet.records import Classes


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("name", SETS)
def test_every_format_is_recognised_and_opened(tmp_path: Path, name: str) -> None:
    if name == "Hugging Face":
        pytest.importorskip("pyarrow")
    folder = SETS[name](tmp_path / "blood")
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    assert available_splits(folder) == ("train", "val")
    train, val = (open_dataset(folder, split, strict=True) for split in ("train", "val"))
    images = 3 if name == "Open Images" else 4  # which does not list images without objects
    assert read_as(train, val) == f"read as {name}: 2 splits, 2 classes, {images} images"
    for dataset in (train, val):
        assert_valid(dataset)
        assert (dataset.name, dataset.format) == ("blood", name)
        assert dataset.classes.names == ("cat", "dog")
        assert pickle.loads(pickle.dumps(dataset)).format == name
        assert dataset.subset([0]).format == name
    assert list(boxes_by_image(train).values())[:2] == [[("cat", (4, 6, 14, 26))], [("dog", (0, 0, 20, 15))]]
    assert list(boxes_by_image(val).values()) == [[("cat", (25, 10, 35, 20))]]
    assert {
        path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))
    } == before  # nothing is written


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser writes everywhere")
@pytest.mark.parametrize("name", SETS)
def test_a_folder_that_cannot_be_written_is_read(tmp_path: Path, name: str) -> None:
    folder = SETS[name](tmp_path / "blood")
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert open_dataset(folder, "train", strict=True)
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)


def test_one_of_each_is_said_in_the_singular(tmp_path: Path) -> None:
    folder = yolo_set(
        tmp_path, {"train": {"a": [("cat", (1, 2, 3, 4))]}}, table="train: images/train\nnames: [cat]\n"
    )
    assert read_as(open_dataset(folder, "train")) == "read as YOLO: 1 split, 1 class, 1 image"


@pytest.mark.parametrize(
    ("files", "splits", "asked", "opened"),
    [
        (["instances_train.json", "instances_val.json"], ("train", "val"), "val", "instances_val.json"),
        (
            ["annotations/instances_val2017.json", "annotations/instances_train2017.json"],
            ("train", "val"),
            "train",
            "annotations/instances_train2017.json",
        ),
        # the full name is understood as well
        (["annotations/instances_val2017.json"], ("val",), "val2017", "annotations/instances_val2017.json"),
        # two years: neither is "train"
        (
            ["instances_train2014.json", "instances_train2017.json"],
            ("train2014", "train2017"),
            "train2014",
            "instances_train2014.json",
        ),
        (
            ["train/_annotations.coco.json", "valid/_annotations.coco.json"],
            ("train", "val"),
            "val",
            "valid/_annotations.coco.json",
        ),
        (["valid/_annotations.coco.json"], ("val",), "valid", "valid/_annotations.coco.json"),
        (
            ["instances_minival.json", "instances_test.json"],
            ("test", "minival"),
            "minival",
            "instances_minival.json",
        ),
        (
            ["annotations/train.json", "annotations/valid.json"],
            ("train", "val"),
            "val",
            "annotations/valid.json",
        ),
        (["train.json", "test.json"], ("train", "test"), "test", "test.json"),
        (["annotations.json"], (), "train", "annotations.json"),
        (["_annotations.coco.json"], (), "any", "_annotations.coco.json"),
    ],
)
def test_coco_layouts(
    tmp_path: Path, files: list[str], splits: tuple[str, ...], asked: str, opened: str
) -> None:
    for index, name in enumerate(files):
        image = {"id": 7 if name == opened else 1000 + index, "file_name": "a.png", "width": 40, "height": 30}
        document = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
        write(tmp_path / name, json.dumps(document))
    assert available_splits(tmp_path) == splits
    dataset = open_dataset(tmp_path, asked, images="absent")
    assert dataset.image_ids[0] == 7
    assert (dataset.name, dataset.split, dataset.format) == (tmp_path.name, asked, "COCO")


def test_a_single_file_answers_to_every_split(tmp_path: Path) -> None:
    path = coco_set(tmp_path / "coco") / "annotations/instances_val.json"
    assert available_splits(path) == ()
    assert len(open_dataset(str(path), "val")) == 1
    dataset = open_dataset(str(path), "anything", images="absent")
    assert (dataset.split, dataset.name) == ("anything", "instances_val.json")
    path = csv_set(tmp_path / "csv") / "val.csv"
    assert available_splits(path) == ()
    assert len(open_dataset(path, "train")) == 1


def test_voc_without_lists_is_one_set(tmp_path: Path) -> None:
    folder = voc_set(tmp_path, lists=False)
    assert available_splits(folder) == ()
    dataset = open_dataset(folder, "whole")
    assert boxes_by_image(dataset) == expected({**SPLITS["train"], **SPLITS["val"]})
    assert (dataset.split, dataset.faults) == ("whole", ())
    write(folder / "Annotations/gone.xml", voc_page("gone.png", [("cat", (1, 2, 3, 4))]))
    dataset = open_dataset(folder, "whole")
    assert len(dataset) == 4
    assert str(dataset.faults[0]).startswith("Annotations: line 4 (gone): there is no image JPEGImages/gone")


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    folder = voc_set(tmp_path / "voc")
    (folder / "JPEGImages").rename(tmp_path / "elsewhere")
    (folder / "JPEGImages").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match=r"a symbolic link, or in a linked folder, that leaves the data folder"
    ):
        open_dataset(folder, "train")
    dataset = open_dataset(folder, "train", image_root=tmp_path / "elsewhere")
    assert boxes_by_image(dataset) == expected(SPLITS["train"])
    assert dataset.path(0) == tmp_path / "elsewhere/a.png"
    (tmp_path / "elsewhere/b.png").unlink()
    dataset = open_dataset(folder, "train", image_root=tmp_path / "elsewhere")
    assert (len(dataset), kinds(dataset)) == (2, [("missing image", "dropped")])
    assert dataset.left_out == ()
    (folder / "Annotations/empty.xml").rename(folder / "Annotations/other.xml")
    dataset = open_dataset(folder, "train", image_root=tmp_path / "elsewhere")
    assert dataset.left_out == ("empty.png",)  # without annotations: it is not unlisted, too
    (folder / "Annotations/other.xml").rename(folder / "Annotations/empty.xml")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: holds none of the 3 images of voc, JPEGImages/a.png for one"):
        open_dataset(folder, "train", image_root=tmp_path / "none")
    assert len(open_dataset(folder, "train", image_root=tmp_path / "none", images="absent")) == 3
    coco = coco_set(tmp_path / "coco")
    (coco / "images").rename(tmp_path / "pictures")
    dataset = open_dataset(coco, "train", image_root=tmp_path / "pictures/train")
    assert boxes_by_image(dataset) == expected(SPLITS["train"])


@pytest.mark.parametrize("content", [b"", "images/a.png,1,2,3,4,cat\n".encode("utf-16")])
def test_a_split_whose_csv_file_is_damaged_is_not_passed_by(tmp_path: Path, content: bytes) -> None:
    folder = csv_set(tmp_path)
    (folder / "train.csv").write_bytes(content)
    assert "train" in available_splits(folder)
    with pytest.raises(DataError, match=r"train\.csv: needs "):
        open_dataset(folder, "train")


def test_strict_reading_names_the_first_faults(tmp_path: Path) -> None:
    folder = csv_set(tmp_path, classes="cat,0\ndog,1\n")
    rows = "".join(f"images/a.png,{i},1,0,5,cat\n" for i in range(1, 6))
    write(folder / "train.csv", (folder / "train.csv").read_text() + rows)
    message = r"refuses 5 faults of split 'train': train.csv: line 4: .*line 5: .*line 6: .*; and 2 more"
    with pytest.raises(DataError, match=message):
        open_dataset(folder, "train", strict=True)
    assert len(open_dataset(folder, "val", strict=True)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.json", '{"epochs": 3}'),
        ("annotations/val.json", "[]"),
        ("annotations.json", "no JSON at all"),
        ("dataset.yaml", "license: none\ntrain: everything\n"),
    ],
)
@pytest.mark.parametrize("form", ["YOLO", "CSV"])
def test_files_of_others_are_passed_by(tmp_path: Path, name: str, text: str, form: str) -> None:
    folder = SETS[form](tmp_path)
    write(folder / name, text)
    assert open_dataset(folder, "train").format == form


def test_coco_is_known_by_its_keys_in_any_encoding(tmp_path: Path) -> None:
    coco = coco_set(tmp_path / "in") / "annotations/instances_train.json"
    write(tmp_path / "in/train.json", coco.read_text().encode("utf-16"))
    shutil.rmtree(tmp_path / "in/annotations")
    assert open_dataset(tmp_path / "in", "train").format == "COCO"


LOOKED_FOR = (
    r"no data set is recognised. Looked for: Annotations/\*.xml \(Pascal VOC\); annotations/instances_\{split\}.json, "
    r"instances_\{split\}.json, \{split\}/_annotations.coco.json \(COCO\); data.yaml \(YOLO\); \*.parquet, "
    r"dataset_dict.json \(Hugging Face\); \{split\}-annotations-bbox.csv \(Open Images\); \{split\}.csv, "
    r"annotations.csv \(CSV\). Found: "
)
READ = "Read are: Pascal VOC, COCO, YOLO, Hugging Face, Open Images, CSV"
NEEDED = (
    r"a COCO JSON, a YOLO data.yaml, a CSV file of boxes \(path,x1,y1,x2,y2,class\) or a parquet file can be"
)


@pytest.mark.parametrize(
    ("files", "data", "message"),
    [
        ([], "nothing", "nothing: does not exist; a folder or a file that describes a data set is required."),
        (["blood/x"], "blod", "blod: does not exist; .* Did you mean 'blood'"),
        ([], ".", f"is an empty folder; a data set is required. {READ}"),
        (["x.jpg", "sub/y.jpg"], ".", f"{LOOKED_FOR}sub/, x.jpg."),
        ([f"{i}.jpg" for i in range(10)], ".", r"7.jpg and 2 more."),
        (["Annotations/a.txt"], ".", r"Found: Annotations/."),
        (["inner/instances_val.json"], ".", r"Did you mean .*/inner\?"),
        (["truth.json"], ".", r"One JSON file can be named itself: .*/truth.json."),
        (["table.csv"], ".", r"One CSV file can be named itself: .*/table.csv."),
        (["data.yaml", "x/y"], ".", r"data.yaml: needs `key: value` lines"),
        (["data.yaml"], "data.yaml", r"data.yaml: needs `key: value` lines"),
        (["boxes.csv"], "boxes.csv", f"boxes.csv: is not a data set that can be read; {NEEDED}. {READ}"),
        (["x.zip"], "x.zip", f"x.zip: is not a data set that can be read; {NEEDED}"),
        (["x.json"], "x.json", r"x.json: needs JSON; line 1"),
        (["instances_val.json"], ".", "has no split 'train'; there are: val."),
        (["instances_trian.json"], ".", "has no split 'train'; there are: trian. Did you mean 'trian'"),
        ([], "a\0b", "cannot be read: embedded null byte|does not exist"),
    ],
)
def test_open_dataset_says_what_it_needs(tmp_path: Path, files: list[str], data: str, message: str) -> None:
    for name in files:
        write(tmp_path / name, "")
    start = time.perf_counter()
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / data, "train")
    assert time.perf_counter() - start < 1


def test_pipes_and_devices_are_refused_before_they_can_block(tmp_path: Path) -> None:
    for name in ("x.json", "x.yaml", "x.csv", "x.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=rf"{name}: is neither a folder nor a file; a folder or a file"):
            open_dataset(tmp_path / name, "train")
    with pytest.raises(DataError, match=r"x.json: needs a file; it is a folder or a device"):
        read_coco(tmp_path / "x.json", split="train")
    with pytest.raises(DataError, match=r"y.json: cannot be read: No such file"):
        read_coco(tmp_path / "y.json", split="train")
    (tmp_path / "z").write_bytes(b"1234")
    with pytest.raises(DataError, match=r"needs at most 3 bytes; got 4"):
        read_bytes(tmp_path / "z", limit=3)
    folder = tmp_path / "pipes"
    folder.mkdir()
    os.mkfifo(folder / "train.csv")  # no table, and nobody waits for it to become one
    with pytest.raises(DataError, match="no data set is recognised"):
        open_dataset(folder, "train")
    for name, place in (("COCO", "images/train"), ("YOLO", "images/train"), ("CSV", "images")):
        folder = SETS[name](tmp_path / name)
        (folder / place / "a.png").unlink()
        os.mkfifo(folder / place / "a.png")
        assert "there is no image file" in str(open_dataset(folder, "train").faults[0])


def test_splits_of_one_data_set_have_the_same_classes(tmp_path: Path) -> None:
    only_cats = {"train": {"a": [("cat", (1, 2, 3, 4))]}, "val": {"v": [("dog", (1, 2, 3, 4))]}}
    for name in ("Pascal VOC", "CSV", "Open Images"):
        folder = SETS[name](tmp_path / name)
        shutil.rmtree(folder)
        SETS[name](folder, only_cats)  # type: ignore[call-arg]
        assert {open_dataset(folder, split).classes for split in ("train", "val")} == {
            Classes(("cat", "dog"))
        }


def test_reading_needs_no_torch_and_no_pyarrow() -> None:
    code = "import sys, retinanet.data; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_set_with_a_picture_that_is_none_opens(tmp_path: Path) -> None:
    folder = coco_set(tmp_path)
    picture(folder / "images/train/unlisted.png")
    assert len(open_dataset(folder, "train")) == 3


def test_what_a_file_is_is_seen_at_once(tmp_path: Path) -> None:
    for name, text in (("dataset.yaml", "\n" * 2**20), ("dataset.yml", "{" * 2**20), ("x.yaml", " " * 2**20)):
        write(tmp_path / name, text)
    start = time.perf_counter()
    with pytest.raises(DataError, match="no data set is recognised"):
        open_dataset(tmp_path, "train")
    assert time.perf_counter() - start < 2
    write(tmp_path / "dataset.yml", "{train: images/train, 'names': [cat, dog]}")
    (yolo_set(tmp_path) / "data.yaml").unlink()
    assert available_splits(tmp_path) == ("train",)
