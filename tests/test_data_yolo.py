"""YOLO: layouts, lines and policies, each as a table of cases; any bytes end in a data set or a `DataError`."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_cases import (
    NAMES,
    SPLITS,
    assert_valid,
    boxes_by_image,
    damage,
    expected,
    faults,
    fuzzing,
    kinds,
    picture,
    refusal,
    write,
    yolo_line,
    yolo_set,
)
from retinanet.data import available_splits, open_dataset, read_yolo
from retinanet.errors import DataError
from retinanet.records import Classes

TRAIN = "train: images/train\nval: images/val\n"


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize(
    "names", ["[cat, dog]", "{0: cat, 1: dog}", "\n  1: dog\n  0: cat", "\n- cat\n- dog"]
)
def test_folders_of_splits_are_read(tmp_path: Path, outer: bool, names: str) -> None:
    yolo_set(tmp_path, outer=outer)
    places = "train: train/images\nval: val/images" if outer else TRAIN
    write(tmp_path / "data.yaml", f"{places}\nnc: 2\nnames: {names}\n")
    assert available_splits(tmp_path) == ("train", "val")
    for split, images in SPLITS.items():
        dataset = open_dataset(tmp_path, split)
        assert_valid(dataset)
        assert (dataset.format, dataset.split, dataset.faults) == ("YOLO", split, ())
        assert dataset.classes == Classes(NAMES)
        assert boxes_by_image(dataset) == expected(images)
        assert dataset.image_ids.tolist() == list(images)


@pytest.mark.parametrize(
    ("table", "kind"),
    [
        (TRAIN, None),
        ("path: .\n" + TRAIN, None),
        ("path: ''\n" + TRAIN, None),
        ("train: ./images/train/\nval: [images/val]\n", None),
        ("train: [images/train]\nval: images\\val\n", None),
        # "images" leads into the folder, so that its splits are relative to it
        ("path: images\ntrain: train\nval: val\n", "labels"),
        # as Roboflow and Ultralytics write them: one meaning, and said
        ("train: ../images/train\nval: ../images/val\n", "path elsewhere"),
        ("path: ../datasets/blood\n" + TRAIN, "path elsewhere"),
        ("path: /home/somebody/blood\n" + TRAIN, "path elsewhere"),
        ("path: blood  # beside the working directory\n" + TRAIN, "path elsewhere"),
        ("train: train.txt\nval: val.txt\n", None),
        # other keys are splits where they name a folder as our own writer does
        (
            TRAIN
            + "more: images/more\nlabels: labels\nimages_dir: images/train\ndownload: https://example.org/x.zip\n",
            None,
        ),
    ],
)
def test_where_splits_lie(tmp_path: Path, table: str, kind: str | None) -> None:
    yolo_set(tmp_path, table=f"{table}names: [cat, dog]\n")
    write(
        tmp_path / "train.txt",
        "\ufeff./images/train/a.png\r\n\r\nimages\\train\\b.png\r\nimages/train/empty.png",
    )
    write(tmp_path / "val.txt", "images/val/v.png\n")
    if kind == "labels":  # images beside their labels, as no folder below `path` is called images
        for path in sorted((tmp_path / "labels").rglob("*.txt")):
            shutil.copy(path, tmp_path / "images" / path.relative_to(tmp_path / "labels"))
    dataset = open_dataset(tmp_path, "train")
    assert boxes_by_image(dataset) == expected(SPLITS["train"])
    assert boxes_by_image(open_dataset(tmp_path / "data.yaml", "val")) == expected(SPLITS["val"])
    assert {fault.kind for fault in dataset.faults} == ({kind} if kind == "path elsewhere" else set())
    if "more" in table:
        picture(tmp_path / "images/more/m.png")
        assert available_splits(tmp_path) == ("train", "val", "more")


@pytest.mark.parametrize(
    ("line", "box"),
    [
        ("0 0.5 0.5 0.5 0.5", (10, 7.5, 30, 22.5)),
        ("0.0 5e-1 .5 0.5 0.5\t", (10, 7.5, 30, 22.5)),
        ("0 0.25 0.2 0.75 0.2 0.5 0.6", (10, 6, 30, 18)),  # a triangle
        ("0 0.25 0.2 0.75 0.2 0.75 0.6 0.25 0.6", (10, 6, 30, 18)),  # four corners
        ("0 0.9 0.5 0.4 0.5", (28, 7.5, 40, 22.5)),  # cut at the border
    ],
)
def test_lines_of_one_meaning(tmp_path: Path, line: str, box: tuple[float, ...]) -> None:
    yolo_set(tmp_path)
    write(tmp_path / "labels/train/a.txt", line)
    dataset = open_dataset(tmp_path, "train")
    assert boxes_by_image(dataset)["a"] == [("cat", box)]
    assert kinds(dataset) == ([("outside image", "repaired")] if box[2] == 40 else [])


@pytest.mark.parametrize(
    ("line", "kind", "reason"),
    [
        (
            "0 0.5 0.5 0.5",
            "wrong columns",
            "needs 5 numbers, or a polygon of 7 or more, an odd count; there are 4",
        ),
        ("0 0.5 0.5 0.5 0.5 0.9", "wrong columns", "there are 6 (a sixth is the score of a prediction)"),
        ("0,0.5,0.5,0.5,0.5", "wrong columns", "there are 1; got '0,0.5,0.5,0.5,0.5'"),
        ("0 0.5 0.5 0.5 0.5 0.5 0.5 0.5", "wrong columns", "there are 8"),
        ("0 a 0.5 0.5 0.5", "wrong columns", "needs numbers; got '0 a 0.5 0.5 0.5'"),
        ("0 1_0 0.5 0.5 0.5", "wrong columns", "needs numbers"),
        ("0 " + "9" * 70 + " 0.5 0.5 0.5", "wrong columns", "needs numbers"),
        ("2 0.5 0.5 0.5 0.5", "unknown class", "needs the number of a class of `names`, 0 to 1; got '2'"),
        ("-1 0.5 0.5 0.5 0.5", "unknown class", "got '-1'"),
        ("0.5 0.5 0.5 0.5 0.5", "unknown class", "got '0.5'"),
        ("cat 0.5 0.5 0.5 0.5", "unknown class", "got 'cat'"),
        ("nan 0.5 0.5 0.5 0.5", "unknown class", "got 'nan'"),
        ("0 nan 0.5 0.5 0.5", "not finite", "needs finite numbers"),
        ("0 inf 0.5 0.5 0.5", "not finite", "needs finite numbers"),
        ("0 0.5 1e999 0.5 0.5", "not finite", "needs finite numbers"),
        ("0 0.1 0.1 0.2 nan 0.3 0.3", "not finite", "needs finite numbers"),
        ("0 0.5 0.5 0 0", "equal corners", "has equal corners: a click, not a box"),
        ("0 0.5 0.5 0 0.5", "empty box", "has no area"),
        ("0 0.1 0.1 0.5 0.1 0.9 0.1", "empty box", "has no area"),  # a polygon on one line
        ("0 2.5 0.5 0.5 0.5", "outside image", "lies outside the image of 40 x 30 pixels"),
        ("0 12 10 8 9", "outside image", "lies outside the image"),  # in pixels, not in shares
    ],
)
def test_lines_that_are_dropped(tmp_path: Path, line: str, kind: str, reason: str) -> None:
    yolo_set(tmp_path)
    write(tmp_path / "labels/train/a.txt", yolo_line(0, (4, 6, 14, 26)) + "\n" + line)
    dataset = open_dataset(tmp_path, "train")
    assert boxes_by_image(dataset) == expected(SPLITS["train"])
    assert kinds(dataset) == [(kind, "dropped")]
    assert faults(dataset)[0].startswith("labels/train/a.txt: line 3: ")
    assert reason in dataset.faults[0].reason
    assert dataset.faults[0].fix
    with pytest.raises(
        DataError, match=r"strict reading refuses 1 fault of split 'train': labels/train/a.txt"
    ):
        open_dataset(tmp_path, "train", strict=True)


def test_key_points_are_not_polygons(tmp_path: Path) -> None:
    yolo_set(tmp_path, table=TRAIN + "names: [cat, dog]\nkpt_shape: [2, 2]\n")
    write(tmp_path / "labels/train/a.txt", "0 0.5 0.5 0.5 0.5 0.1 0.1 0.9 0.9\n")
    assert boxes_by_image(open_dataset(tmp_path, "train"))["a"] == [("cat", (10, 7.5, 30, 22.5))]


def test_files_that_are_not_as_they_should_be(tmp_path: Path) -> None:
    folder = yolo_set(tmp_path)
    write(folder / "images/train/broken.png", b"nothing")
    write(folder / "images/train/bits.png", b"")
    picture(folder / "images/train/odd.png")
    write(folder / "labels/train/odd.txt", b"\xff\xfe0 1 1 1 1")
    write(folder / "labels/train/gone.txt", "0 0.5 0.5 0.5 0.5\n")
    write(folder / "labels/train/classes.txt", "cat\ndog\n")
    write(folder / "labels/train/a.txt", "\ufeff" + yolo_line(0, (4, 6, 14, 26)).replace("\n", "\r\n") * 2)
    write(folder / "images/train/notes.txt", "no image")
    write(folder / "images/train/._a.png", b"left by another system")
    dataset = open_dataset(folder, "train")
    assert boxes_by_image(dataset) == expected(SPLITS["train"])
    assert [(fault.file, *kind) for fault, kind in zip(dataset.faults, kinds(dataset), strict=True)] == [
        ("labels/train/a.txt", "duplicate box", "dropped"),
        ("images/train/bits.png", "unreadable image", "dropped"),
        ("images/train/broken.png", "unreadable image", "dropped"),
        ("labels/train/odd.txt", "unreadable labels", "dropped"),
        ("labels/train/gone.txt", "missing image", "dropped"),
    ]


def test_lists_may_be_wrong(tmp_path: Path) -> None:
    folder = yolo_set(tmp_path, table="train: lists/train.txt\nval: images/val\nnames: [cat, dog]\n")
    picture(folder / "lists/images/my photo.png")
    write(
        folder / "lists/train.txt",
        "images/train/a.png\n./images/train/a.png\nimages/train/no.png\nimages/my photo.png",
    )
    dataset = open_dataset(folder, "train")
    assert dataset.files.tolist() == ["images/train/a.png", "lists/images/my photo.png"]
    assert [(str(fault.record), fault.kind, fault.action) for fault in dataset.faults] == [
        ("line 2", "duplicate listing", "repaired"),
        ("line 3", "missing image", "dropped"),
    ]


def test_numbers_of_classes_may_have_gaps_and_ids_of_their_own(tmp_path: Path) -> None:
    folder = yolo_set(tmp_path, table=TRAIN + "names: {0: cat, 1: no, 7: 1e3}\n")
    write(folder / "labels/train/b.txt", yolo_line(7, (0, 0, 20, 15)))
    dataset = open_dataset(folder, "train")
    assert dataset.classes == Classes(("cat", "no", "1e3"), (0, 1, 7))
    assert dataset.labels.tolist() == [0, 2]
    write(folder / "data.yaml", TRAIN + "names: {0: cat, 1: no, 7: x}\ncategory_ids: [18, 3, 90]\n")
    assert open_dataset(folder, "train").classes.ids == (18, 3, 90)


def test_ids_are_numbers_where_all_names_are(tmp_path: Path) -> None:
    yolo_set(tmp_path, {"train": {"000000000139": [("cat", (1, 1, 9, 9))], "7": []}})
    assert open_dataset(tmp_path, "train").image_ids.tolist() == [139, 7]


def test_sizes_are_those_a_person_sees(tmp_path: Path) -> None:
    folder = yolo_set(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 30)).save(folder / "images/train/a.png", exif=exif)
    dataset = open_dataset(folder, "train")
    assert dataset.size(0) == (30, 40)


@pytest.mark.parametrize("classes", ["classes.txt", "labels/classes.txt"])
@pytest.mark.parametrize("split", ["", "train"])
def test_without_a_table_classes_stand_in_a_list(tmp_path: Path, classes: str, split: str) -> None:
    yolo_set(tmp_path, {split: SPLITS["train"]} if split else SPLITS)
    (tmp_path / "data.yaml").unlink()
    if not split:
        for kind in ("images", "labels"):
            for path in (tmp_path / kind / "train").iterdir():
                path.rename(tmp_path / kind / path.name)
            shutil.rmtree(tmp_path / kind / "train")
            shutil.rmtree(tmp_path / kind / "val")
    with pytest.raises(
        DataError, match=r"has images and labels as YOLO, but nothing names its classes. Needed is data.yaml"
    ):
        open_dataset(tmp_path, "train")
    write(tmp_path / classes, "cat\ndog\n\n")
    assert available_splits(tmp_path) == ((split,) if split else ())
    dataset = open_dataset(tmp_path, "train")
    assert boxes_by_image(dataset) == expected(SPLITS["train"])
    assert dataset.faults == ()
    with pytest.raises(
        DataError,
        match=r"--image-root \(image_root in Python\) stands for the `path` of a data.yaml; there is none",
    ):
        open_dataset(tmp_path, "train", image_root=tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", r"data.yaml: needs `key: value` lines; got None"),
        ("- a", r"data.yaml: needs `key: value` lines; got \['a'\]"),
        (TRAIN, r"data.yaml: needs `names`, a list of class names or a table `0: name`; got None"),
        (TRAIN + "names: []", r"needs `names`"),
        (TRAIN + "names: cat", r"needs `names`, .* got 'cat'"),
        (TRAIN + "names: [a, [b]]", r"names: needs a whole number from 0 and a text.*got '1': \['b'\]"),
        (TRAIN + "names: {a: b}", r"names: needs a whole number from 0 .* got 'a': 'b'"),
        (TRAIN + "names: {-1: b}", r"got '-1': 'b'"),
        (TRAIN + "names: {1: a, 1.0: b}", r"each number once; got '1.0': 'b'"),
        (TRAIN + "names: [a, a]", r"data.yaml: names: Classes needs distinct names; given more than once: a"),
        (TRAIN + "names: [a, '']", r"names: Classes needs non-empty text"),
        (TRAIN + "nc: 3\nnames: [a, b]", r"nc is '3', but names holds 2 classes; correct one of them"),
        (
            TRAIN + "names: [a]\ncategory_ids: [x]",
            r"category_ids: needs a list of whole numbers from 0, one a class",
        ),
        (TRAIN + "names: [a]\ncategory_ids: 5", r"category_ids: needs a list of whole numbers"),
        (TRAIN + "names: {0: a, 0: b}", r"line 3: needs every key once; '0' is given twice"),
        (TRAIN + "train: x\nnames: [a]", r"line 3: needs every key once; 'train' is given twice"),
        (TRAIN + "? [a]\n: b\nnames: [a]", r"needs a word or a number as key; got a list or table"),
        ("a: &x [1]\nb: *x\n", r"line 2: needs YAML without aliases, which can expand without end; got \*x"),
        ("a: [", r"needs sound YAML; "),
        ("a: " + "[" * 30 + "]" * 30, r"needs lists and tables at most 20 deep; line 1"),
        ("a: 'x\0y'", r"needs sound YAML"),
        ("path: [a]\n" + TRAIN + "names: [cat, dog]", r"path: needs a folder; got \['a'\]"),
        ("train: {a: b}\nnames: [cat, dog]", r"train: needs a folder, a list of folders or a .txt file"),
        ("train: ../../x\nval: images/val\nnames: [cat, dog]", r"train: needs a path inside the data folder"),
        ("train: /etc\nnames: [cat, dog]", r"train: needs a path inside the data folder"),
        ("train: 'C:\\data'\nnames: [cat, dog]", r"train: needs a path inside the data folder"),
        (
            "train: images/trian\nnames: [cat, dog]",
            r"has no split 'train'; .*images/trian does not exist; there are: none",
        ),
        ("val: images/val\nnames: [cat, dog]", r"has no split 'train'; there are: val"),
        (
            "train: data.yaml\nnames: [cat, dog]",
            r"needs at least one usable image in split 'train'; got none",
        ),
        (
            "train: labels\nnames: [cat, dog]",
            r"needs at least one usable image in split 'train'; got none. It lists none",
        ),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, table: str, message: str) -> None:
    yolo_set(tmp_path, table=table)
    picture(tmp_path / "other/x.png")
    with pytest.raises(DataError, match=message):
        read_yolo(tmp_path / "data.yaml", split="train")


def test_traps_are_refused_at_once(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    start = time.perf_counter()
    for text, message in (
        (bomb, "without aliases"),
        ("[" * 900_000, "at most 20 deep"),
        ("{a: " * 200_000, "at most 20 deep"),
        ("- " * 400_000, "at most 20 deep"),
        ("a" * (2**20 + 1), "at most 1,048,576 bytes"),
        ("a" * 2**20, "needs"),
        ("!!python/object/apply:os.system ['touch x']", "needs `key: value` lines"),
    ):
        write(tmp_path / "data.yaml", text)
        with pytest.raises(DataError, match=message):
            read_yolo(tmp_path / "data.yaml", split="train")
    assert time.perf_counter() - start < 5
    assert os.listdir(tmp_path) == ["data.yaml"]


def test_nothing_leads_out_of_the_folder(tmp_path: Path) -> None:
    folder = yolo_set(tmp_path / "data")
    outside = picture(tmp_path / "secret.png")
    for link, target in (
        ("images/train/l.png", outside),
        ("labels/train/a.txt", write(tmp_path / "secret.txt", "0 0.5 0.5 0.5 0.5")),
        ("images/val", tmp_path),
    ):
        path = folder / link
        kept = path.with_name(path.name + ".kept")
        if path.exists():
            path.rename(kept)
        path.symlink_to(target)
        with pytest.raises(
            DataError, match=r"is a symbolic link, or in a linked folder, that leaves the data folder"
        ):
            open_dataset(folder, "val" if link == "images/val" else "train")
        path.unlink()
        if kept.exists():
            kept.rename(path)
    for line in ("../secret.png", "/etc/passwd", "images/../../secret.png", "C:\\x.png", "..\\secret.png"):
        write(folder / "data.yaml", "train: list.txt\nnames: [cat, dog]\n")
        write(folder / "list.txt", line)
        with pytest.raises(DataError, match=r"list.txt: line 1: needs a path inside the data folder"):
            open_dataset(folder, "train")
    for line, message in (
        ("a\0b", "printable"),
        ("x" * 600, "at most 512 characters"),
        (".", "name of a file"),
    ):
        write(folder / "list.txt", line)
        with pytest.raises(DataError, match=message):
            open_dataset(folder, "train")


def test_another_root_stands_for_path(tmp_path: Path) -> None:
    folder = yolo_set(tmp_path / "data", table=f"path: {tmp_path / 'elsewhere'}\n{TRAIN}names: [cat, dog]\n")
    for kind in ("images", "labels"):
        (folder / kind).rename((tmp_path / "elsewhere").mkdir(exist_ok=True) or tmp_path / "elsewhere" / kind)
    with pytest.raises(DataError, match=r"has no split 'train'"):
        open_dataset(folder, "train")
    dataset = open_dataset(folder, "train", image_root=tmp_path / "elsewhere")
    assert boxes_by_image(dataset) == expected(SPLITS["train"])
    absolute = f"train: {tmp_path / 'elsewhere/images/train'}\nnames: [cat, dog]\n"
    write(folder / "data.yaml", absolute)
    assert len(open_dataset(folder, "train", image_root=tmp_path / "elsewhere")) == 3


@fuzzing
@given(data=st.data(), which=st.sampled_from(["data.yaml", "labels/train/a.txt", "list.txt"]))
def test_any_bytes_give_a_data_set_or_a_data_error(tmp_path: Path, data: Any, which: str) -> None:
    if not (tmp_path / "data.yaml").exists():
        yolo_set(tmp_path)
    write(tmp_path / "data.yaml", "train: images/train\nval: list.txt\nnames: {0: cat, 1: dog}\n")
    write(tmp_path / "list.txt", "images/train/a.png\n./images/val/v.png\n")
    write(tmp_path / "labels/train/a.txt", "0 0.5 0.5 0.5 0.5\n1 0.1 0.1 0.4 0.1 0.2 0.7\n")
    path = tmp_path / which
    path.write_bytes(damage(path.read_bytes(), data.draw))
    for split in ("train", "val"):
        said = refusal(lambda split=split: open_dataset(tmp_path, split))
        assert not said or str(tmp_path) in said


def test_a_split_without_labels_is_one_without_boxes(tmp_path: Path) -> None:
    folder = yolo_set(tmp_path, table=f"{TRAIN}test: images/test\nnames: [cat, dog]\n")
    picture(folder / "images/test/t.png")
    picture(folder / "images/test/u.png")
    dataset = open_dataset(folder, "test")
    assert boxes_by_image(dataset) == {"t": [], "u": []}
    assert faults(dataset) == [
        "data.yaml: test: none of the 2 images of split 'test' has a label file; looked for labels/test/t.txt, for "
        "one: it is a split without boxes (repaired)"
    ]
    assert kinds(dataset) == [("missing annotation", "repaired")]
    assert open_dataset(folder, "train").faults == ()


def test_images_that_cannot_be_used_are_kept_by_name(tmp_path: Path) -> None:
    folder = yolo_set(tmp_path)
    write(folder / "images/train/broken.png", b"nothing")
    picture(folder / "images/train/odd.png")
    write(folder / "labels/train/odd.txt", b"\xff\xfe0 1 1 1 1")
    write(folder / "labels/train/a.txt", "0 0.1 0.2 0.3 0.2 0.2 0.4\n")
    dataset = open_dataset(folder, "train")
    assert dataset.left_out == ("images/train/broken.png", "images/train/odd.png")
    assert dataset.unread == ("polygons",)
    part = dataset.subset([0])
    assert (part.left_out, part.unread) == (dataset.left_out, dataset.unread)
