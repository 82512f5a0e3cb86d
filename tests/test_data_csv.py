"""CSV of keras-retinanet and of Open Images: rows, columns and policies, each as a table of cases."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_cases import (
    OPEN_IMAGES,
    SPLITS,
    assert_valid,
    boxes_by_image,
    csv_set,
    damage,
    expected,
    faults,
    fuzzing,
    kinds,
    open_images_row,
    open_images_set,
    picture,
    refusal,
    write,
)
from retinanet.data import available_splits, open_dataset, read_csv, read_open_images
from retinanet.errors import DataError
from retinanet.records import Classes, Ignore

CAT = "images/a.png,4,6,14,26,cat"


@pytest.mark.parametrize(
    "header", ["", "path,x1,y1,x2,y2,class", "\ufeffImage Name,X_min,ymin,XMAX,y-max,Label"]
)
@pytest.mark.parametrize("classes", [None, "dog,5\ncat,9\n", "class,id\ndog,5\ncat,9"])
@pytest.mark.parametrize("change", [("", ""), ("\n", "\r\n"), (",", ";"), (",", "\t"), ("/", "\\")])
def test_files_of_splits_are_read(
    tmp_path: Path, header: str, classes: str | None, change: tuple[str, str]
) -> None:
    csv_set(tmp_path, header=header, classes=classes)
    for split in SPLITS:
        path = tmp_path / f"{split}.csv"
        write(path, path.read_bytes().replace(*(text.encode() for text in change)))
    assert available_splits(tmp_path) == ("train", "val")
    for split, images in SPLITS.items():
        dataset = open_dataset(tmp_path, split)
        assert_valid(dataset)
        assert (dataset.format, dataset.split, dataset.faults) == ("CSV", split, ())
        # without a class file the names of all splits together, so that val knows of dogs
        assert dataset.classes == (Classes(("dog", "cat"), (5, 9)) if classes else Classes(("cat", "dog")))
        assert boxes_by_image(dataset) == expected(images)
    assert boxes_by_image(open_dataset(tmp_path / "train.csv", "any")) == expected(SPLITS["train"])


def test_a_table_may_have_empty_columns_at_its_end(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.png")
    write(tmp_path / "train.csv", f"path,x1,y1,x2,y2,class,,\n{CAT},,\n{CAT.replace('cat', 'dog')}\n")
    dataset = open_dataset(tmp_path, "train")
    assert (len(dataset.boxes), dataset.faults) == (2, ())


def test_columns_are_found_by_name_among_others(tmp_path: Path) -> None:
    picture(tmp_path / "train/a.png")
    rows = "filename,width,height,class,xmin,ymin,xmax,ymax,note\na.png,20,30,cat,4,6,14,26,x\n"
    write(tmp_path / "train/_annotations.csv", rows)
    write(tmp_path / "valid/_annotations.csv", rows)
    picture(tmp_path / "valid/a.png")
    assert available_splits(tmp_path) == ("train", "val")
    dataset = open_dataset(tmp_path, "val")
    assert boxes_by_image(dataset) == {"a": [("cat", (4, 6, 14, 26))]}
    assert dataset.size(0) == (20, 30)  # as annotated
    assert dataset.annotation_ids.tolist() == [2]  # its line


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["annotations.csv"], ()),
        (["anything.csv"], ()),
        (["labels.csv", "more.csv"], ()),
        (["train.csv", "validation.csv", "annotations.csv"], ("train", "val")),
        (["train_labels.csv", "test_labels.csv"], ("train", "test")),
        (["annotations/train.csv"], ("train",)),
        (["one.csv", "two.csv"], ("one", "two")),
        (["train-a.csv", "train-b.csv"], ("train-a", "train-b")),
    ],
)
def test_splits_are_told_from_names(tmp_path: Path, files: list[str], splits: tuple[str, ...]) -> None:
    picture(tmp_path / "images/a.png")
    for name in files:
        write(tmp_path / name, CAT)
    write(tmp_path / "classes.csv", "cat,0\n")
    assert available_splits(tmp_path) == splits
    assert len(open_dataset(tmp_path, splits[0] if splits else "train")) == 1


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ("images/b.png,1,2,3,4", "wrong columns", "needs 6 columns; got 5"),
        ("images/b.png,1,2,3,4,cat,x", "wrong columns", "needs 6 columns; got 7"),
        ("a, b.png,1,2,3,4,cat", "wrong columns", "needs 6 columns; got 7"),
        (",1,2,3,4,cat", "bad file name", "needs a file name; got ''"),
        ("a\x01.png,1,2,3,4,cat", "bad file name", "needs a file name of printable characters"),
        ("images/b.png,1,2,,4,cat", "incomplete row", "needs path,x1,y1,x2,y2,class; got '1,2,,4,cat'"),
        ("images/b.png,1,2,3,4,", "incomplete row", "got '1,2,3,4,'"),
        ("images/b.png,1,2,3,x,cat", "not a number", "needs four numbers; got ['1', '2', '3', 'x']"),
        ("images/b.png,1,2,3,1_0,cat", "not a number", "needs four numbers"),
        (
            "images/b.png,1,2,nan,4,cat",
            "not finite",
            "box [1, 2, nan, 4] (x1, y1, x2, y2) needs finite numbers",
        ),
        ("images/b.png,1,2,inf,4,cat", "not finite", "needs finite numbers"),
        ("images/b.png,1,2,1e999,4,cat", "not finite", "needs finite numbers"),
        ("images/b.png,3,4,3,4,cat", "equal corners", "has equal corners: a click, not a box"),
        ("images/b.png,3,4,3,8,cat", "empty box", "has no area"),
        ("images/b.png,0,4,2e-46,8,cat", "empty box", "has no area in single precision"),
        ("images/b.png,1000,4,1000.00000001,8,cat", "outside image", "lies outside the image of 40 x 30"),
        ("images/b.png,30,4,30.0000001,8,cat", "empty box", "has no area in single precision"),
        ("images/b.png,1,2,3,4,cow", "unknown class", "needs a class of the class file; got 'cow'"),
        ("images/gone.png,1,2,3,4,cat", "missing image", "there is no image file"),
        ("images/broken.png,1,2,3,4,cat", "unreadable image", "its size cannot be read"),
        (CAT, "duplicate box", "the image has the same box of the same class already"),
        (CAT.replace("a.png", "./a.png"), "duplicate box", "the same box of the same class"),
    ],
)
def test_rows_that_are_dropped(tmp_path: Path, row: str, kind: str, reason: str) -> None:
    csv_set(tmp_path, classes="cat,0\ndog,1\n")
    write(tmp_path / "images/broken.png", "nothing")
    lines = (tmp_path / "train.csv").read_text()
    write(tmp_path / "train.csv", f"{lines}\n{row}\n")
    dataset = open_dataset(tmp_path, "train")
    assert boxes_by_image(dataset) == expected(SPLITS["train"])
    assert kinds(dataset) == [(kind, "dropped")]
    assert reason in dataset.faults[0].reason
    assert faults(dataset)[0].startswith("train.csv: line 5: ")
    assert dataset.faults[0].fix
    if kind == "unknown class":
        assert dataset.faults[0].fix == "add 'cow' to classes.csv, or correct the name"


def test_rows_of_one_meaning(tmp_path: Path) -> None:
    picture(tmp_path / "my photo, 1.png")
    rows = (
        '"my photo, 1.png", 4 ,6,14,26.5, cat ,,\n"my photo, 1.png",,,,,\n"my photo, 1.png",-5,20,50,33,dog\n'
    )
    write(tmp_path / "train.csv", rows)
    dataset = open_dataset(tmp_path, "train")
    assert boxes_by_image(dataset) == {"my photo, 1": [("cat", (4, 6, 14, 26.5)), ("dog", (0, 20, 40, 30))]}
    assert kinds(dataset) == [("outside image", "repaired")]


@pytest.mark.parametrize("row", ["9,4,3,8", "3,8,9,4", "9,8,3,4"])
def test_reversed_corners_are_one_rectangle(tmp_path: Path, row: str) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path / "train.csv", f"a.png,{row},cat\n")
    dataset = open_dataset(tmp_path, "train")
    assert boxes_by_image(dataset) == {"a": [("cat", (3, 4, 9, 8))]}
    assert kinds(dataset) == [("reversed box", "repaired")]
    assert "(x1, y1, x2, y2) is reversed; taken as [3, 4, 9, 8]" in dataset.faults[0].reason


def test_sizes_may_be_unknown_without_images(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "a.png,4,6,14,26.5,cat\n")
    with pytest.raises(
        DataError, match=r"train.csv: none of its 1 image files was found, 'a.png' for one. Tried"
    ):
        open_dataset(tmp_path, "train")
    dataset = open_dataset(tmp_path, "train", images="absent")
    assert dataset.size(0) == (14, 27)
    assert kinds(dataset) == [("missing size", "repaired")]
    picture(tmp_path / "images/a.png")  # asked where it is there, though none has to be
    dataset = open_dataset(tmp_path, "train", images="absent")
    assert (dataset.size(0), dataset.faults) == ((40, 30), ())


@pytest.mark.parametrize("place", ["", "images", "train", "images/train", "train/images", "../images", ".."])
def test_where_images_lie(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "data"
    write(folder / "train.csv", "a.png,4,6,14,26,cat\n")
    picture(folder / place / "a.png")
    assert open_dataset(folder, "train").path(0).resolve() == (folder / place / "a.png").resolve()


def test_another_root_holds_the_images(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere/a.png")
    write(tmp_path / "data/train.csv", f"a.png,4,6,14,26,cat\n{tmp_path / 'elsewhere/a.png'},5,6,14,26,cat\n")
    dataset = open_dataset(tmp_path / "data", "train", image_root=tmp_path / "elsewhere")
    assert dataset.files.tolist() == ["a.png"]
    assert len(dataset.boxes) == 2
    with pytest.raises(
        DataError,
        match=r"--image-root \(image_root in Python\) needs a folder of images; there is none at .*nowhere",
    ):
        open_dataset(tmp_path / "data", "train", image_root=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"train.csv: needs lines of path,x1,y1,x2,y2,class; the file is empty"),
        ("\n\n", r"the file is empty"),
        (
            "a,b,c,d,e,f\n",
            r"line 1: needs path,x1,y1,x2,y2,class, as values or as names of columns; got 'a,b,c,d,e,f'",
        ),
        ("\xff\xfe", r"train.csv: needs text in UTF-8"),
        ('images/a.png,1,2,3,4,"cat\n', r"line 1: needs sound CSV; unexpected end of data"),
        ("images/a.png,1,2,3,4,cat\n" + "x" * 70_000, r"line 2: needs at most 65,536 characters"),
        ("x" * 70_000, r"line 1: needs at most 65,536 characters"),
        ('"' + "x\n" * 70_000, r"needs sound CSV; field larger than field limit"),
        ("images/a.png,1,2,3,4,5,6,7\nimages/a.png,1,2", r"classes: Classes needs at least one class name"),
        ("images/a.png,,,,,\n", r"classes: Classes needs at least one class name; none was given"),
        ("../a.png,1,2,3,4,cat", r"train.csv: line 1: needs a path inside the data folder"),
        ("/etc/passwd,1,2,3,4,cat", r"line 1: needs a path inside the data folder"),
        ("C:\\a.png,1,2,3,4,cat", r"line 1: needs a path inside the data folder"),
        ("images/link.png,1,2,3,4,cat", r"link.png: is a symbolic link, or in a linked folder, that leaves"),
        (
            "images/broken.png,1,2,3,4,cat",
            r"needs at least one usable image in split 'train'; got none. train.csv: line 1",
        ),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    csv_set(tmp_path / "data")
    (tmp_path / "data/images/link.png").symlink_to(picture(tmp_path / "secret.png"))
    write(tmp_path / "data/images/broken.png", b"")
    write(tmp_path / "data/train.csv", text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_csv(tmp_path / "data/train.csv", split="train")


def test_a_file_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    csv_set(tmp_path, classes="cat,0\n")
    write(tmp_path / "train.csv", ",1,2,3,4,cat\nimages/a.png,1,2\n")
    with pytest.raises(
        DataError, match=r"at least one usable image in split 'train'; got none. train.csv: line 1: needs a"
    ):
        read_csv(tmp_path / "train.csv", split="train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cat,0\ndog,0\n",
            r"classes.csv: line 2: needs `class,id`, the id a whole number from 0 and its own",
        ),
        ("cat,0\ncat,1\n", r"classes.csv: classes: Classes needs distinct names"),
        ("cat,0\ndog\n", r"line 2: needs `class,id`"),
        ("cat,0\ndog,x\n", r"line 2: needs `class,id`"),
        (",0\n", r"line 1: needs `class,id`"),
        ("cat,O\ndog,1\n", r"line 1: needs `class,id`.* got 'cat,O'"),
        ("cat,-1\ndog,1\n", r"line 1: needs `class,id`.* got 'cat,-1'"),
        ("", r"classes.csv: classes: Classes needs at least one class name"),
    ],
)
def test_class_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    csv_set(tmp_path, classes=text)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path, "train")


def test_classes_are_those_of_the_data_folder(tmp_path: Path) -> None:
    folder = csv_set(tmp_path / "data")
    write(tmp_path / "classes.csv", "somebody,0\n")  # beside the data folder: another's
    assert open_dataset(folder, "train").classes == Classes(("cat", "dog"))
    for split in SPLITS:
        (folder / f"annotations/{split}.csv").parent.mkdir(exist_ok=True)
        (folder / f"{split}.csv").rename(folder / f"annotations/{split}.csv")
    write(folder / "classes.csv", "dog,5\ncat,9\n")
    assert open_dataset(folder, "train").classes == Classes(("dog", "cat"), (5, 9))


def test_descriptions_are_those_of_the_data_folder(tmp_path: Path) -> None:
    folder = open_images_set(tmp_path / "data")
    (folder / "class-descriptions-boxable.csv").rename(tmp_path / "class-descriptions-boxable.csv")
    assert open_dataset(folder, "train").classes.names == ("/m/01yrx", "/m/0bt9lr")
    assert open_dataset(tmp_path / "data/train-annotations-bbox.csv", "train").classes.names[0] == "/m/01yrx"


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").mkdir()
    for read in (read_csv, read_open_images):
        with pytest.raises(DataError, match=r"train.csv: needs a file; it is a folder or a device"):
            read(tmp_path / "train.csv", split="train")
        with pytest.raises(DataError, match=r"no.csv: cannot be read: No such file"):
            read(tmp_path / "no.csv", split="train")


def test_a_long_file_is_read_soon(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    rows = "".join(f"a.png,{i % 37},{i % 23},{i % 37 + 1 + i / 1e5},29,cat\n" for i in range(50_000))
    write(tmp_path / "train.csv", rows)
    start = time.perf_counter()
    assert len(open_dataset(tmp_path, "train").boxes) > 40_000
    assert time.perf_counter() - start < 5


@fuzzing
@given(
    data=st.data(),
    which=st.sampled_from(["train.csv", "classes.csv"]),
    images=st.sampled_from(["required", "absent"]),
)
def test_any_bytes_give_a_data_set_or_a_data_error(
    tmp_path: Path, data: Any, which: str, images: Any
) -> None:
    csv_set(tmp_path, classes="cat,0\ndog,1\n")
    path = tmp_path / which
    path.write_bytes(damage(path.read_bytes(), data.draw))
    said = refusal(lambda: read_csv(tmp_path / "train.csv", split="train", images=images))
    assert not said or str(tmp_path) in said
    refusal(lambda: open_dataset(tmp_path, "train"))


# ---------------------------------------------------------------------------------------------------------
# Open Images


def test_open_images_are_read(tmp_path: Path) -> None:
    open_images_set(tmp_path)
    assert available_splits(tmp_path) == ("train", "val")
    for split, images in SPLITS.items():
        dataset = open_dataset(tmp_path, split)
        assert_valid(dataset)
        assert (dataset.format, dataset.faults, dataset.classes.names) == ("Open Images", (), ("cat", "dog"))
        assert boxes_by_image(dataset) == expected({name: boxes for name, boxes in images.items() if boxes})
    assert open_dataset(tmp_path, "train").image_ids.tolist() == ["a", "b"]


@pytest.mark.parametrize(
    "place", ["train", "images", "images/train", "train/images", "train/data", ".", "../images"]
)
def test_open_images_lie_in_usual_places(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "data"
    write(
        folder / "oidv6-train-annotations-bbox.csv",
        f"{OPEN_IMAGES}\n{open_images_row('a', 'cat', (4, 6, 14, 26))}\n",
    )
    picture(folder / place / "a.jpg")
    dataset = open_dataset(folder, "train")
    assert dataset.path(0).resolve() == (folder / place / "a.jpg").resolve()
    assert dataset.classes.names == ("/m/01yrx",)  # nothing describes it


def test_groups_are_areas_to_be_ignored(tmp_path: Path) -> None:
    folder = open_images_set(tmp_path)
    path = folder / "train-annotations-bbox.csv"
    write(path, path.read_text() + open_images_row("a", "dog", (0, 0, 40, 30), group=1) + "\n")
    dataset = open_dataset(folder, "train")
    assert dataset.ground_truth(0).ignore.tolist() == [Ignore.NO, Ignore.CROWD]
    assert dataset.annotation_ids.tolist() == [2, 4, 3]


def test_two_labels_of_one_name_stay_apart(tmp_path: Path) -> None:
    folder = open_images_set(tmp_path)
    write(folder / "class-descriptions.csv", "/m/01yrx,other\n")  # the one for boxes goes before it
    write(folder / "class-descriptions-boxable.csv", "LabelName,DisplayName\n/m/01yrx,pet\n/m/0bt9lr,pet\n")
    assert open_dataset(folder, "train").classes.names == ("pet (/m/01yrx)", "pet (/m/0bt9lr)")


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        (open_images_row("a", "cat", (4, 6, 14, 26)), "duplicate box", "the same box"),
        (open_images_row("a", "", (4, 6, 14, 26)), "unknown class", "needs a LabelName"),
        (
            "a,x,/m/01yrx,1,0.1,x,0.1,0.2",
            "not a number",
            "need four numbers from 0 to 1; got ['0.1', '0.1', 'x', '0.2']",
        ),
        ("a,x,/m/01yrx", "not a number", "need four numbers"),
        ("a,x,/m/01yrx,1,0.1,nan,0.1,0.2", "not finite", "needs finite numbers"),
        ("a,x,/m/01yrx,1,1.5,1.9,0.1,0.2", "outside image", "lies outside"),
        (",x,/m/01yrx,1,0.5,0.6,0.1,0.2", "bad file name", "ImageID needs a file name"),
        ("c,x,/m/01yrx,1,0.5,0.6,0.1,0.2", "missing image", "1 listed images are not there: c"),
        ("broken,x,/m/01yrx,1,0.5,0.6,0.1,0.2", "unreadable image", "its size cannot be read"),
    ],
)
def test_open_images_rows_that_are_dropped(tmp_path: Path, row: str, kind: str, reason: str) -> None:
    folder = open_images_set(tmp_path)
    write(folder / "train/broken.jpg", b"nothing")
    path = folder / "train-annotations-bbox.csv"
    write(path, path.read_text() + row + "\n")
    dataset = open_dataset(folder, "train")
    assert boxes_by_image(dataset) == expected({name: SPLITS["train"][name] for name in ("a", "b")})
    assert kinds(dataset) == [(kind, "dropped")]
    assert reason in dataset.faults[0].reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ImageID,LabelName\na,b\n", r"needs the columns ImageID, .*; XMin is missing"),
        (OPEN_IMAGES, r"needs a box with a LabelName; there is none"),
        (
            f"{OPEN_IMAGES}\nq,x,c,1,0,1,0,1\nr,x,c,1,0,1,0,1\n",
            r"none of its images was found, q, r. Tried ID.jpg in: ",
        ),
        (f"{OPEN_IMAGES}\n../a,x,c,1,0,1,0,1\n", r"line 2: ImageID: needs a path inside the data folder"),
        (f"{OPEN_IMAGES}\nlink,x,c,1,0,1,0,1\n", r"is a symbolic link, or in a linked folder, that leaves"),
        (f'{OPEN_IMAGES}\n"a', r"needs sound CSV"),
    ],
)
def test_open_images_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = open_images_set(tmp_path / "data")
    (folder / "train/link.jpg").symlink_to(picture(tmp_path / "secret.jpg"))
    write(folder / "train.csv", text)
    with pytest.raises(DataError, match=message):
        read_open_images(folder / "train.csv", split="train")


@fuzzing
@given(
    data=st.data(), which=st.sampled_from(["train-annotations-bbox.csv", "class-descriptions-boxable.csv"])
)
def test_any_bytes_of_open_images_give_a_data_set_or_a_data_error(
    tmp_path: Path, data: Any, which: str
) -> None:
    open_images_set(tmp_path)
    path = tmp_path / which
    path.write_bytes(damage(path.read_bytes(), data.draw))
    said = refusal(lambda: read_open_images(tmp_path / "train-annotations-bbox.csv", split="train"))
    assert not said or str(tmp_path) in said
