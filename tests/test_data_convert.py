"""Conversion: every pair of formats comes back equal, what is lost is said, nothing is overwritten."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_cases import (
    NAMES,
    SETS,
    SPLITS,
    WIDTH,
    boxes_by_image,
    coco_set,
    csv_set,
    expected,
    fuzzing,
    parquet_set,
    splits_of_boxes,
    voc_set,
    yolo_set,
)
from retinanet.cli import main
from retinanet.data import Dataset, available_splits, convert_dataset, open_dataset
from retinanet.data.dataset import Annotation
from retinanet.data.image_files import digest
from retinanet.errors import ConfigError, DataError
from retinanet.records import Classes, Ignore

FORMATS = {"coco": "COCO", "voc": "Pascal VOC", "yolo": "YOLO", "csv": "CSV"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path_factory.mktemp("cache")))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["data", "convert", *map(str, arguments)])
    return int(stop.value.code or 0), capsys.readouterr().err


def read(folder: Path) -> dict[str, Dataset]:
    return {split: open_dataset(folder, split or "train") for split in available_splits(folder) or ("",)}


@pytest.mark.parametrize(("source", "form"), list(itertools.product(SETS, FORMATS)))
def test_all_pairs_come_back_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, form: str
) -> None:
    folder, out = SETS[source](tmp_path / "in"), tmp_path / "out"
    before = read(folder)
    code, said = run(capsys, folder, out, "--format", form)
    # VOC has no category ids; those of the COCO set are 3 and 8
    lost = source == "COCO" and form == "voc"
    assert (code, "lost: 2 category ids" in said) == ((1, True) if lost else (0, False)), said
    assert f"read as {source}: 2 splits, 2 classes" in said
    after = read(out)
    assert list(after) == ["train", "val"]
    for split, dataset in before.items():
        again = after[split]
        assert again.format == FORMATS[form]
        assert again.faults == ()
        assert boxes_by_image(again) == boxes_by_image(dataset)
        assert again.classes.names == NAMES
        if form != "voc":
            assert again.classes == dataset.classes
        if form == "coco":
            assert again.image_ids.tolist() == dataset.image_ids.tolist()
        names = {path.stem: path for path in map(again.path, range(len(again)))}
        for path in map(dataset.path, range(len(dataset))):
            assert digest(path) == digest(names[path.stem])
            assert path.samefile(names[path.stem])  # a hard link on the same disk
    assert "0 copies" in said


@settings(fuzzing, max_examples=25)
@given(data=st.data(), form=st.sampled_from(list(FORMATS)))
def test_round_trips_are_equal(tmp_path: Path, data: Any, form: Any) -> None:
    pictures = tmp_path / "pictures"
    splits = data.draw(splits_of_boxes(pictures))
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    made = convert_dataset(splits, out, form)
    kept = {split: writable(dataset, form) for split, dataset in splits.items()}
    if form == "voc" and not any(len(dataset.boxes) for dataset in kept.values()):
        with pytest.raises(DataError, match="needs an object with a name"):
            read(out)
        return
    again = read(out)
    assert set(again) == set(splits)
    for split, dataset in kept.items():
        found = again[split]
        assert found.faults == ()
        assert len(found) == len(dataset)
        assert sorted(digest(found.path(i)) for i in range(len(found))) == sorted(
            digest(dataset.path(i)) for i in range(len(dataset))
        )
        order = positions(found, out, split, form, dataset)
        for index in range(len(dataset)):
            before, after = dataset.ground_truth(index), found.ground_truth(order[index])
            assert found.size(order[index]) == dataset.size(index)
            names = [dataset.classes.names[label] for label in before.classes]
            assert [found.classes.names[label] for label in after.classes] == names
            np.testing.assert_allclose(after.boxes, before.boxes, rtol=0, atol=1e-8)
            if form in ("coco", "voc"):
                ignored = Ignore.CROWD if form == "coco" else Ignore.DIFFICULT
                assert after.ignore.tolist() == [ignored if kind else 0 for kind in before.ignore.tolist()]
        if form != "voc":
            assert found.classes.names == dataset.classes.names
            unsplit_yolo = form == "yolo" and not split
            assert found.classes.ids == ((0, 1, 2) if unsplit_yolo else dataset.classes.ids)
    # what is said to be lost is lost, and the other way round
    ignored = np.concatenate([dataset.ignore for dataset in splits.values()])
    gone = {"coco": Ignore.DIFFICULT in ignored, "voc": Ignore.CROWD in ignored}.get(
        form, bool(ignored.any())
    )
    assert any("ignore" in loss for loss in made.losses) == gone
    thin = sum(len(dataset.boxes) - len(kept[split].boxes) for split, dataset in splits.items())
    assert any(f"{thin} boxes of a pixel or thinner" in loss for loss in made.losses) == (
        form == "voc" and thin > 0
    )


def writable(dataset: Dataset, form: str) -> Dataset:
    """The boxes that a format can hold, which is said of it."""
    rows = []
    for index in range(len(dataset)):
        truth = dataset.ground_truth(index)
        for box, label, kind in zip(truth.boxes.tolist(), truth.classes, truth.ignore.tolist(), strict=True):
            width, height = box[2] - box[0], box[3] - box[1]
            thin = width < 1 or height < 1 or (width, height) == (1, 1)
            if not ((kind and form in ("yolo", "csv")) or (thin and form == "voc")):
                rows.append(Annotation(index, tuple(box), int(label), 1.0, kind, 0))
    return Dataset.build(
        name="d", split=dataset.split, root=dataset.root, classes=dataset.classes, files=dataset.files.tolist(),
        image_ids=dataset.image_ids.tolist(), sizes=[dataset.size(i) for i in range(len(dataset))], annotations=rows,
    )  # fmt: skip


def positions(found: Dataset, out: Path, split: str, form: str, dataset: Dataset) -> list[int]:
    """Where each image went: COCO, CSV and VOC keep the order, YOLO's folder is sorted by name."""
    if form != "yolo" and (form != "voc" or split):
        return list(range(len(dataset)))
    where = {path.stat().st_ino: i for i, path in enumerate(map(found.path, range(len(found))))}
    return [where[dataset.path(index).stat().st_ino] for index in range(len(dataset))]


def test_one_set_without_splits_stays_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = voc_set(tmp_path / "in", lists=False)
    for form in FORMATS:
        code, said = run(capsys, folder, tmp_path / form, "--format", form)
        assert code == 0
        assert "(one set without splits 4)" in said
        assert available_splits(tmp_path / form) == ()
        images = {**SPLITS["train"], **SPLITS["val"]}
        assert boxes_by_image(open_dataset(tmp_path / form, "any")) == expected(images)


@pytest.mark.parametrize("form", FORMATS)
def test_what_a_format_cannot_hold_is_said_with_its_count(tmp_path: Path, form: Any) -> None:
    folder = coco_set(tmp_path / "in")
    dataset = open_dataset(folder, "train")
    parts = {
        "train": Dataset.build(
            name="in", split="train", root=dataset.root, classes=Classes(("dog", "cat", "unused"), (4, 2, 9)),
            files=dataset.files.tolist(), image_ids=[1, 2, 3], sizes=[(WIDTH, 30)] * 3,
            annotations=[
                Annotation(0, (0, 0, 10, 10), 0, 55.5, Ignore.NO, 1),
                Annotation(0, (1, 0, 10, 10), 0, 90, Ignore.CROWD, 1),
                Annotation(1, (2, 0, 10, 10), 1, 80, Ignore.DIFFICULT, 1),
            ],
        )
    }  # fmt: skip
    made = convert_dataset(parts, tmp_path / "out", form)
    crowd = {
        "coco": "1 boxes marked difficult became crowd areas, which are ignored as they were",
        "voc": "1 crowd areas became objects marked difficult, which are ignored as they were",
    }.get(form, f"2 boxes to be ignored (crowd, difficult) are left out; {form} has no place")
    area = ["1 areas other than their box's (those of masks) became the box's"] * (form != "coco")
    voc = [
        "1 classes without an object are not there: unused",
        "3 category ids became the places of the names in the alphabet, from 0",
    ] * (form == "voc")
    assert list(made.losses) == [crowd, *area, *voc]


def test_images_of_another_size_than_annotated_are_left_out(tmp_path: Path) -> None:
    folder = coco_set(tmp_path / "in")
    Image.new("RGB", (2 * WIDTH, 60)).save(folder / "images/train/a.png")
    splits = {"train": open_dataset(folder, "train")}
    lost = "1 images of another size than annotated are left out with their boxes: a.png"
    for form in ("yolo", "csv"):
        made = convert_dataset(splits, tmp_path / form, form)
        assert (made.images, made.losses) == (2, (lost,))
        assert "a" not in boxes_by_image(open_dataset(tmp_path / form, "train"))
    assert convert_dataset(splits, tmp_path / "coco", "coco").images == 3  # it keeps the annotated size
    Image.new("RGB", (2 * WIDTH, 60)).save(folder / "images/val/v.png")
    with pytest.raises(DataError, match=r"every image of split 'val' has another size than annotated, v.png"):
        convert_dataset({"val": open_dataset(folder, "val")}, tmp_path / "none", "yolo")
    assert not (tmp_path / "none").exists()


def test_ids_of_annotations_are_kept_where_they_are_distinct(tmp_path: Path) -> None:
    dataset = open_dataset(coco_set(tmp_path / "in"), "train")
    for name, ids, after in (("kept", [21, 9], [21, 9]), ("new", [4, 4], [1, 2])):
        parts = {"train": replace(dataset, annotation_ids=np.array(ids))}
        convert_dataset(parts, tmp_path / name, "coco")
        assert open_dataset(tmp_path / name, "train").annotation_ids.tolist() == after


@pytest.mark.parametrize("form", ["yolo", "csv"])
@pytest.mark.parametrize("ids", [(-1, 4), (0, 2**31)])
def test_ids_that_cannot_be_read_back_become_others(tmp_path: Path, form: Any, ids: tuple[int, int]) -> None:
    dataset = open_dataset(coco_set(tmp_path / "in"), "train")
    parts = {"train": replace(dataset, classes=Classes(NAMES, ids))}
    made = convert_dataset(parts, tmp_path / "out", form)
    assert made.losses == (f"2 category ids became 0 to 1; {form} has whole numbers from 0 to 2^31 - 1",)
    found = open_dataset(tmp_path / "out", "train")
    assert (found.classes, boxes_by_image(found)) == (Classes(NAMES), boxes_by_image(dataset))


def test_what_was_not_read_is_said(tmp_path: Path) -> None:
    dataset = replace(open_dataset(coco_set(tmp_path / "in"), "train"), unread=("masks",))
    made = convert_dataset({"train": dataset}, tmp_path / "out", "coco")
    assert made.losses == ("masks of the source are not read: boxes alone are converted",)


def test_names_that_are_equal_are_made_distinct(tmp_path: Path) -> None:
    files = ["a/x.png", "b/x.png", "c/X.PNG", "x.jpg", "odd/name", " .png", "y\\z.png"]
    for number, name in enumerate(files):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(coco_set(tmp_path / "c") / "images/train/a.png", tmp_path / "in" / name)
        with (tmp_path / "in" / name).open("ab") as stream:
            stream.write(b"%d" % number)
    dataset = Dataset.build(
        name="in", split="train", root=tmp_path / "in", classes=Classes(("cat",)), files=files,
        image_ids=list(range(len(files))), sizes=[(40, 30)] * len(files),
        annotations=[Annotation(i, (i, 1, i + 2, 3), 0, 4, 0, i) for i in range(len(files))],
    )  # fmt: skip
    made = convert_dataset({"train": dataset}, tmp_path / "out", "yolo")
    names = sorted(path.name for path in (made.path / "images/train").iterdir())
    assert names == ["b_x.png", "c_X.PNG", "image.png", "name.png", "x-2.jpg", "x.png", "y_z.png"]
    again = open_dataset(made.path, "train")
    assert {digest(again.path(i)): again.ground_truth(i).boxes.tolist() for i in range(len(files))} == {
        digest(dataset.path(i)): dataset.ground_truth(i).boxes.tolist() for i in range(len(files))
    }


def test_images_are_copied_where_no_link_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    folder = voc_set(tmp_path / "in")
    monkeypatch.setattr(os, "link", refuse)
    code, said = run(capsys, folder, tmp_path / "out", "--format", "yolo")
    assert (code, "0 are hard links, 4 copies" in said) == (0, True)
    assert boxes_by_image(open_dataset(tmp_path / "out", "train")) == expected(SPLITS["train"])


def test_a_link_within_the_data_becomes_a_file(tmp_path: Path) -> None:
    folder = yolo_set(tmp_path / "in")
    (folder / "images/train/l.png").symlink_to(folder / "images/train/a.png")
    convert_dataset(read(folder), tmp_path / "out", "coco", source=folder)
    path = tmp_path / "out/images/train/l.png"
    assert path.is_file()
    assert not path.is_symlink()


def test_splits_are_made_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = {f"i{n}": [(NAMES[n % 2], (n, 0, n + 5, 9))] for n in range(20)}
    folder = csv_set(tmp_path / "in", {"annotations": images})
    assert available_splits(folder) == ()
    asked = ("--format", "coco", "--split-shares", "0.5,0.25,0.25", "--seed", 7)
    code, said = run(capsys, folder, tmp_path / "out", *asked)
    assert (code, "(train 10, val 5, test 5)" in said) == (0, True)
    parts = read(tmp_path / "out")
    assert list(parts) == ["train", "val", "test"]
    run(capsys, folder, tmp_path / "again", *asked)
    for split, part in read(tmp_path / "again").items():
        assert part.files.tolist() == parts[split].files.tolist()
    # train is divided, test stays
    three = yolo_set(tmp_path / "three", {"train": images, "test": {"v": [("cat", (1, 1, 5, 5))]}})
    code, said = run(capsys, three, tmp_path / "divided", "--format", "voc", "--split-shares", "0.8,0.2")
    assert (code, "(train 16, val 4, test 1)" in said) == (0, True)


def test_a_fault_of_the_data_gives_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = csv_set(tmp_path / "in", classes="cat,0\ndog,1\n")
    with (folder / "train.csv").open("a") as stream:
        stream.write("".join(f"images/a.png,9,{n},9,9,cat\n" for n in range(7)))
    code, said = run(capsys, folder, tmp_path / "out", "--format", "coco")
    assert code == 1
    assert "train.csv: line 4: box [9, 0, 9, 9] (x1, y1, x2, y2) has no area" in said
    assert "and 2 more faults" in said
    assert len(read(tmp_path / "out")) == 2
    code, said = run(capsys, folder, tmp_path / "strict", "--format", "coco", "--strict")
    assert code == 2
    assert "strict reading refuses 7 faults of split 'train'" in said
    assert not (tmp_path / "strict").exists()


def test_images_elsewhere_are_admitted_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = voc_set(tmp_path / "in")
    (folder / "JPEGImages").rename(tmp_path / "pictures")
    (folder / "JPEGImages").symlink_to(tmp_path / "pictures")
    code, said = run(capsys, folder, tmp_path / "out", "--format", "coco")
    assert (code, "leaves the data folder" in said) == (2, True)
    code, _ = run(capsys, folder, tmp_path / "out", "--format", "coco", "--image-root", tmp_path / "pictures")
    assert code == 0
    assert boxes_by_image(open_dataset(tmp_path / "out", "train")) == expected(SPLITS["train"])


def test_a_form_of_boxes_can_be_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = parquet_set(tmp_path / "in", {"train": {"a": [("cat", (4, 6, 14, 26))]}})
    code, said = run(capsys, folder, tmp_path / "out", "--format", "csv")
    assert (code, "--box-format xywh" in said) == (2, True)
    code, _ = run(capsys, folder, tmp_path / "out", "--format", "csv", "--box-format", "xywh")
    assert code == 0
    assert open_dataset(tmp_path / "out", "train").boxes.tolist() == [[4, 6, 14, 26]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data convert needs DATA; none was given"),
        (["in"], "data convert needs OUT; none was given"),
        (["in", "out"], "data convert needs --format; none was given"),
        (["in", "out", "--format", "yol"], "got 'yol'. Did you mean 'yolo'?"),
        (["nowhere", "out", "--format", "voc"], "nowhere: does not exist"),
        (["in", "in/out", "--format", "voc"], "a folder outside the data set is required; "),
        (["in", "in", "--format", "voc"], "a new folder is required; "),
        (["in", "file", "--format", "voc"], "nothing is ever overwritten"),
        (["in", "file/out", "--format", "voc"], "no folder can be made in "),
        (
            ["in", "out", "--format", "voc", "--split-shares", "0.5"],
            "two or three numbers above 0 that add up to 1",
        ),
        (
            ["in", "out", "--format", "voc", "--split-shares", "a,b"],
            "needs numbers with commas, such as 0.8,0.1,0.1",
        ),
        (
            ["in", "out", "--format", "voc", "--split-shares", "0.8,0.2"],
            "val is there already: the data set has train, val",
        ),
        (
            ["in", "out", "--format", "voc", "--seed", "-1", "--split-shares", "0.8,0.2"],
            "--seed needs 0 or more",
        ),
        (
            ["in", "out", "--format", "voc", "--seed", "3"],
            "--seed belongs to --split-shares, which is not given",
        ),
        (
            ["in", "out", "--format", "voc", "--box-format", "xywh"],
            "box_format is for Hugging Face data sets; CSV says",
        ),
        (
            ["in", "out", "--format", "voc", "--image-root", "none"],
            "image_root in Python) needs a folder of images",
        ),
    ],
)
def test_wrong_requests_exit_with_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    csv_set(tmp_path / "in")
    (tmp_path / "file").write_text("x")
    code, said = run(capsys, *arguments)
    assert code == 2
    assert message in said
    assert sorted(os.listdir(tmp_path)) == ["file", "in"]  # nothing half-made is left


@pytest.mark.parametrize(
    ("classes", "split", "form", "message"),
    [
        (
            ("a ",),
            "train",
            "csv",
            "csv needs class names of printable characters without outer spaces; got 'a '",
        ),
        (("a\nb",), "train", "yolo", "yolo needs class names of printable characters"),
        (("a\x01",), "train", "voc", "voc needs class names of printable characters"),
        (("a",), "../x", "coco", "coco needs a plain word as name of a split; got '../x'"),
        (("a",), "names", "yolo", "yolo needs a plain word as name of a split; got 'names'"),
    ],
)
def test_names_that_cannot_be_written(
    tmp_path: Path, classes: tuple[str, ...], split: str, form: Any, message: str
) -> None:
    dataset = open_dataset(csv_set(tmp_path / "in"), "train")
    dataset = Dataset.build(
        name="in", split=split, root=dataset.root, classes=Classes(classes), files=["images/a.png"], image_ids=[1],
        sizes=[(40, 30)], annotations=[],
    )  # fmt: skip
    with pytest.raises(DataError, match=message):
        convert_dataset({split: dataset}, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_splits_must_agree(tmp_path: Path) -> None:
    train = open_dataset(csv_set(tmp_path / "in"), "train")
    other = open_dataset(csv_set(tmp_path / "other", {"val": {"v": [("cow", (1, 2, 3, 4))]}}), "val")
    with pytest.raises(
        DataError, match="needs the same classes in every split; train has cat, dog, val has cow"
    ):
        convert_dataset({"train": train, "val": other}, tmp_path / "out", "coco")
    with pytest.raises(DataError, match="needs splits with names, or one set without; got none or both"):
        convert_dataset({"train": train, "": train}, tmp_path / "out", "coco")
    train.path(0).unlink()
    with pytest.raises(DataError, match=r"a.png: cannot be copied to .*No such file"):
        convert_dataset({"train": train}, tmp_path / "out", "coco")
    with pytest.raises(ConfigError, match="a folder outside the data set is required"):
        convert_dataset({"train": train}, tmp_path / "in" / "out", "coco")


def test_training_says_how_to_make_a_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = voc_set(tmp_path / "in", lists=False)
    with pytest.raises(SystemExit) as stop:
        main(["train", str(folder), "--output", str(tmp_path / "run"), "--pretrained", "none"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"training needs the splits train and val; {folder} is one set without splits" in said
    line = said[said.index("retinanet data convert") :].split()
    line[line.index("OUT")] = str(tmp_path / "out")
    with pytest.raises(SystemExit) as stop:  # the advice works as it stands
        main(line[1:])
    assert stop.value.code == 0
    assert available_splits(tmp_path / "out") == ("train", "val")


def test_training_and_evaluation_say_what_was_read_and_may_be_strict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = csv_set(tmp_path / "in", classes="cat,0\ndog,1\n")
    results = tmp_path / "results.json"
    results.write_text('[{"image_id": "v", "category_id": 0, "bbox": [25, 10, 10, 10], "score": 0.9}]')
    judge = ["evaluate", "--detections", str(results), str(folder), "--output"]
    train = ["train", str(folder), "--pretrained", "none", "--output", str(tmp_path / "run"), "--strict"]
    with pytest.raises(SystemExit) as stop:
        main([*judge, str(tmp_path / "a"), "--strict"])
    assert stop.value.code == 0
    assert "read as CSV: 1 split, 2 classes, 1 image\n" in capsys.readouterr().err
    with (folder / "val.csv").open("a") as stream:
        stream.write("images/v.png,9,9,3,3,cat\n")
    for command in ([*judge, str(tmp_path / "b"), "--strict"], train):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        assert (
            "strict reading refuses 1 fault of split 'val': val.csv: line 2: box" in capsys.readouterr().err
        )
    with pytest.raises(SystemExit) as stop:
        main([*judge, str(tmp_path / "c")])
    assert stop.value.code == 0
