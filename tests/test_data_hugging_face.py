"""Hugging Face data sets on disk: where they lie, what their boxes prove, and images kept in a cache."""

from __future__ import annotations

import hashlib
import importlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_cases import (
    NAMES,
    SPLITS,
    arrow_table,
    assert_valid,
    boxes_by_image,
    damage,
    expected,
    fuzzing,
    hugging_face_rows,
    kinds,
    parquet_set,
    picture,
    refusal,
    saved_set,
    write,
)
from retinanet.data import Dataset, available_splits, open_dataset, read_hugging_face
from retinanet.data.hugging_face import Evidence
from retinanet.errors import DataError, MissingExtraError
from retinanet.records import Classes, Ignore

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RETINANET_CACHE", str(place))
    return place


def by_id(dataset: Dataset, images: Any) -> None:
    """Files in the cache are called by their content: boxes are compared by the place of the image."""
    found = list(boxes_by_image(dataset).values())
    assert found == list(expected(images).values())


def one_file(folder: Path, *rows: dict[str, Any], names: Any = NAMES) -> Path:
    path = folder / "train.parquet"
    parquet.write_table(arrow_table(rows, names=names), path)
    return path


def row(folder: Path, boxes: list[Any], labels: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    base = hugging_face_rows(folder, {"a": []})[0]
    return {**base, "objects": {"bbox": boxes, "category": labels or ["cat"] * len(boxes)}, **changes}


@pytest.mark.parametrize("make", [parquet_set, saved_set])
def test_splits_on_disk_are_read(tmp_path: Path, cache: Path, make: Any) -> None:
    folder = make(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    assert available_splits(folder) == ("train", "val")
    for split, images in SPLITS.items():
        dataset = open_dataset(folder, split)
        assert_valid(dataset)
        assert (dataset.format, dataset.split, dataset.faults) == ("Hugging Face", split, ())
        assert dataset.classes == Classes(NAMES)
        by_id(dataset, images)
        assert dataset.image_ids.tolist() == list(range(len(images)))
        for index in range(len(dataset)):  # in the cache, once, by what they hold
            path = dataset.path(index)
            assert path.is_relative_to(cache)
            assert path.stem == hashlib.sha256(path.read_bytes()).hexdigest()
            assert path.suffix == ".png"
    assert sorted(tmp_path.rglob("*")) == before
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.png")}
    assert len(kept) == 4
    open_dataset(folder, "train")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.png")} == kept


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train.parquet"], ("train",)),
        (["train-00000-of-00002.parquet", "train-00001-of-00002-ab12.parquet"], ("train",)),
        (["data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], ("val", "test")),
        (["default/train/0000.parquet", "default/test/0000.parquet"], ("train", "test")),
        (["extra-00000-of-00001.parquet"], ("extra",)),
        (["boxes.parquet"], ()),
        (["train.parquet", "boxes.parquet"], ("train", "boxes")),
    ],
)
def test_splits_are_told_from_names(tmp_path: Path, files: list[str], splits: tuple[str, ...]) -> None:
    table = arrow_table([row(tmp_path, [[4, 6, 30, 20]])], names=NAMES)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, tmp_path / name)
    assert available_splits(tmp_path) == splits
    dataset = open_dataset(tmp_path, splits[0] if splits else "train", box_format="xywh")
    assert len(dataset) == (2 if "00002" in files[0] else 1)


@pytest.mark.parametrize(
    ("boxes", "form"),
    [
        ([[4, 6, 10, 20], [30, 20, 5, 5]], "xywh"),  # the second is reversed as xyxy
        ([[4, 6, 14, 26], [30, 20, 35, 25]], "xyxy"),  # the second leaves its image as xywh
        ([[4, 6, 10, 20]], None),  # either
        ([[30, 20, 5, 5], [30, 20, 35, 25]], None),  # neither
        ([[0, 0, 40.9, 30.9]], None),  # a pixel over the border proves nothing
        ([], "xyxy"),  # nothing to be read
    ],
)
@pytest.mark.parametrize("sized", [True, False])
def test_the_form_of_boxes_is_proven_or_told(
    tmp_path: Path, boxes: list[Any], form: Any, sized: bool
) -> None:
    rows = [row(tmp_path, boxes)]
    if not sized:  # the images themselves give the sizes
        rows = [
            {key: value for key, value in item.items() if key not in ("width", "height")} for item in rows
        ]
    path = one_file(tmp_path, *rows)
    if form is None:
        with pytest.raises(
            DataError, match=r"nothing says whether boxes are xyxy or xywh: of \d, .* box_format='xywh'"
        ):
            open_dataset(path, "train")
        form = "xywh"
        told = open_dataset(path, "train", box_format="xywh")
    else:
        told = open_dataset(path, "train", box_format=form)
        assert open_dataset(path, "train").boxes.tolist() == told.boxes.tolist()
    if boxes == [[4, 6, 10, 20], [30, 20, 5, 5]]:
        assert told.boxes.tolist() == [[4, 6, 14, 26], [30, 20, 35, 25]]
    if boxes == [[4, 6, 14, 26], [30, 20, 35, 25]]:
        assert told.boxes.tolist() == boxes


def test_another_split_may_prove_the_form(tmp_path: Path) -> None:
    folder = parquet_set(
        tmp_path, {"train": {"a": [("cat", (30, 20, 35, 25))]}, "val": {"v": [("cat", (1, 2, 9, 8))]}}
    )
    assert open_dataset(folder, "val").boxes.tolist() == [[1, 2, 9, 8]]


@given(
    boxes=st.lists(
        st.tuples(st.floats(0, 39), st.floats(0, 29), st.floats(0.5, 1), st.floats(0.5, 1)), min_size=1
    ),
    form=st.sampled_from(["xyxy", "xywh"]),
)
def test_sound_boxes_never_prove_the_other_form(boxes: Any, form: str) -> None:
    evidence = Evidence()
    for x, y, w, h in boxes:
        box = (x, y, min(x + 40 * w, 40), min(y + 30 * h, 30))
        values = box if form == "xyxy" else (x, y, box[2] - x, box[3] - y)
        evidence.take(values, (40, 30))
    assert evidence.proven() in (form, None)


def test_a_rare_fault_proves_nothing() -> None:
    evidence = Evidence()
    for _ in range(199):
        evidence.take((0, 0, 5, 5), (40, 30))
    evidence.take((9, 9, 5, 5), (40, 30))  # one reversed box in 200, of xyxy or xywh
    assert evidence.proven() is None
    evidence.take((9, 9, 5, 5), (40, 30))
    evidence.take((9, 9, 5, 5), (40, 30))
    assert evidence.proven() == "xywh"


def test_shares_are_not_pixels(tmp_path: Path) -> None:
    path = one_file(tmp_path, row(tmp_path, [[0.1, 0.1, 0.5, 1.0]]))
    with pytest.raises(DataError, match=r"needs boxes in pixels; all 1 lie between 0 and 1, as shares"):
        open_dataset(path, "train", box_format="xyxy")


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["dog", "cat"], Classes(("cat", "dog"))),
        ([7, 3], Classes(("3", "7"), (3, 7))),
    ],
)
def test_classes_without_features_are_the_values(tmp_path: Path, values: list[Any], classes: Classes) -> None:
    image = row(tmp_path, [])["image"]
    rows = [{"image": image, "objects": [{"boxes": [30, 20, 5, 5], "label": value} for value in values]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    dataset = open_dataset(tmp_path, "train")
    assert dataset.classes == classes
    assert dataset.labels.tolist() == [1, 0]


@pytest.mark.parametrize("crowd", [[0, 1, 0], ["0", "1", ""], [False, True, None], [2, 1.0, 0]])
def test_more_that_objects_may_say(tmp_path: Path, crowd: list[Any]) -> None:
    image = row(tmp_path, [])["image"]
    boxes = [[30, 20, 5, 5], [0, 0, 9, 9], [1, 1, 5, 5]]
    objects = {"bbox": boxes, "category": ["a"] * 3, "area": [12.5, -1.0, None], "iscrowd": crowd}
    parquet.write_table(
        pyarrow.Table.from_pylist([{"img": image, "objects": objects}]), tmp_path / "t.parquet"
    )
    dataset = open_dataset(tmp_path, "train")
    assert dataset.areas.tolist() == [12.5, 81, 25]
    assert dataset.ignore.tolist() == [Ignore.NO, Ignore.CROWD, Ignore.NO]


def test_images_by_path(tmp_path: Path, cache: Path) -> None:
    rows = [
        row(tmp_path, [[30, 20, 5, 5]], image={"bytes": None, "path": "sub\\a.png"}),
        row(tmp_path, [], image={"bytes": None, "path": "gone.png"}),
        row(tmp_path, [], image={"bytes": None, "path": None}),
        row(tmp_path, []),
    ]
    picture(tmp_path / "sub/a.png")
    one_file(tmp_path, *rows)
    dataset = open_dataset(tmp_path, "train")
    assert dataset.files.tolist() == ["sub/a.png"]
    assert [fault.reason[:24] for fault in dataset.faults] == [
        f"there is no image file {tmp_path / 'gone.png'}"[:24],
        "needs an image; got {'by"[:24],
        "needs its image in the f",
    ]
    assert set(kinds(dataset)) == {("missing image", "dropped")}
    picture(tmp_path / "elsewhere/sub/a.png", 50, 60)
    moved = open_dataset(tmp_path, "train", image_root=tmp_path / "elsewhere")
    assert moved.path(0) == tmp_path / "elsewhere/sub/a.png"


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "link.png"])
def test_nothing_leads_out_of_the_folder(tmp_path: Path, cache: Path, path: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(picture(tmp_path / "secret.png"))
    one_file(folder, row(folder, [], image={"bytes": None, "path": path}), names=["cat"])
    with pytest.raises(DataError, match=r"needs a path inside the data folder|leaves the data folder"):
        open_dataset(folder, "train")
    one_file(folder, row(folder, [], image={"bytes": None, "path": f"{cache}/images/../../x"}), names=["cat"])
    with pytest.raises(DataError, match=r"needs a path inside the data folder"):
        open_dataset(folder, "train")


@pytest.mark.parametrize(
    ("changes", "kind", "reason"),
    [
        (
            {"objects": {"bbox": [[30, 20, 5]], "category": ["cat"]}},
            "not a number",
            "needs four numbers; got",
        ),
        ({"objects": {"bbox": [None], "category": ["cat"]}}, "not a number", "needs four numbers; got None"),
        ({"objects": {"bbox": [[1, 2, float("nan"), 4]], "category": ["cat"]}}, "not finite", "needs finite"),
        ({"objects": {"bbox": [[1, 2, 0, 0]], "category": ["cat"]}}, "equal corners", "a click"),
        ({"objects": {"bbox": [[90, 2, 3, 4]], "category": ["cat"]}}, "outside image", "lies outside"),
        ({"objects": {"bbox": [[1, 2, 3, 4]] * 2, "category": ["cat"] * 2}}, "duplicate box", "the same box"),
        (
            {"objects": {"bbox": [[1, 2, 3, 4]], "category": ["cat", "dog"]}},
            "unknown class",
            "one class a box; got 1",
        ),
        ({"image": {"bytes": b"nothing", "path": "x"}}, "unreadable image", "its size cannot be read"),
        ({"image": {"bytes": b"", "path": "x"}}, "missing image", "needs an image of 1 to"),
    ],
)
def test_rows_that_are_dropped(tmp_path: Path, changes: dict[str, Any], kind: str, reason: str) -> None:
    bad = {**row(tmp_path, []), "width": None, "height": None, **changes}
    path = one_file(tmp_path, row(tmp_path, [[30, 20, 5, 5]]), bad)
    dataset = open_dataset(path, "train", box_format="xywh")
    assert kinds(dataset) == [(kind, "dropped")]
    assert reason in dataset.faults[0].reason
    assert dataset.faults[0].record.startswith("row 1")
    assert len(dataset.boxes) == (2 if kind == "duplicate box" else 1)


def test_a_class_beyond_the_names_is_unknown(tmp_path: Path) -> None:
    table = arrow_table([row(tmp_path, [[30, 20, 5, 5], [0, 0, 9, 9]])], names=["cat"])
    struct = table.column("objects").to_pylist()
    struct[0]["category"] = [0, 5]
    table = table.set_column(4, table.schema.field("objects"), [struct])
    parquet.write_table(table, tmp_path / "train.parquet")
    dataset = open_dataset(tmp_path, "train")
    assert kinds(dataset) == [("unknown class", "dropped")]
    assert "needs one of 1 classes; got 5" in dataset.faults[0].reason


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"image": ["a.png"]}, r"needs a column 'objects'; there are: 'image'"),
        ({"objects": [1]}, r"the classes of objects need to be all text or all whole numbers; got none"),
        ({"objects": [[{"bbox": [1, 2, 3, 4]}]]}, r"all text or all whole numbers; got none"),
        (
            {"objects": [{"bbox": [[9, 9, 2, 2]], "category": ["a"]}]},
            r"needs at least one usable image.*no column 'image'",
        ),
    ],
)
def test_files_that_are_refused(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    parquet.write_table(pyarrow.table(table), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=message):
        read_hugging_face(tmp_path, split="train")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.parquet", "nothing", r"x.parquet: needs a sound parquet or Arrow file; "),
        ("x.parquet", "", r"needs a sound parquet or Arrow file; "),
        ("state.json", "{", r"state.json: needs JSON; "),
        ("state.json", "[]", r"state.json: needs a JSON object; got \[\]"),
        ("state.json", "[" * 100_000, r"state.json: needs JSON; "),
        (
            "state.json",
            '{"_data_files": [{"filename": "../x.arrow"}]}',
            r"needs a path inside the data folder",
        ),
        (
            "state.json",
            '{"_data_files": [{"filename": "x.arrow"}]}',
            r"x.arrow: needs a file of the data set",
        ),
        (
            "state.json",
            '{"_data_files": [7]}',
            r"needs at least one usable image|needs to be all text|all text or all",
        ),
        (
            "state.json",
            '{"_indices_data_files": [{}]}',
            r"holds a selection of rows; call flatten_indices\(\)",
        ),
        ("dataset_dict.json", '{"splits": ["../.."]}', r"needs a path inside the data folder"),
        ("dataset_dict.json", '{"splits": ["train"]}', r"train/state.json: cannot be read"),
        ("dataset_dict.json", '{"splits": 5}', r"no data set is recognised"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    write(tmp_path / name, text)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path, "train")


def test_a_missing_library_names_its_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = parquet_set(tmp_path)
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(
        MissingExtraError, match=r"pyarrow is not installed; run: pip install 'retinanet\[parquet\]'"
    ):
        open_dataset(folder, "train")


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = parquet_set(tmp_path / "data")
    monkeypatch.setenv("RETINANET_CACHE", str(write(tmp_path / "file", "x")))
    with pytest.raises(DataError, match=r"an image cannot be kept in the cache: .*; set RETINANET_CACHE"):
        open_dataset(folder, "train")


def test_without_images_sizes_are_those_of_the_columns(tmp_path: Path, cache: Path) -> None:
    dataset = open_dataset(parquet_set(tmp_path), "train", images="absent")
    assert dataset.size(0) == (40, 30)
    assert len(dataset) == 3
    assert os.listdir(cache) == []


anything = st.recursive(
    st.none() | st.integers(-9, 60) | st.floats() | st.sampled_from(["cat", "", "../x", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["bbox", "category", "label"]), inner)
    ),
    max_leaves=8,
)


@fuzzing
@given(objects=st.lists(anything, min_size=1, max_size=3), form=st.sampled_from(["auto", "xyxy", "xywh"]))
def test_any_objects_give_a_data_set_or_a_data_error(tmp_path: Path, objects: list[Any], form: Any) -> None:
    image = (
        write(tmp_path / "a.png", (tmp_path / "a.png").read_bytes())
        if (tmp_path / "a.png").exists()
        else picture(tmp_path / "a.png")
    )
    try:
        table = pyarrow.table({"objects": objects, "image": [image.name] * len(objects)})
        parquet.write_table(table, tmp_path / "train.parquet")
    except (pyarrow.ArrowException, TypeError, ValueError):
        return  # no table can hold this mixture
    refusal(lambda: open_dataset(tmp_path / "train.parquet", "train", box_format=form))


@settings(fuzzing, max_examples=40, derandomize=True)
@given(data=st.data(), saved=st.booleans())
def test_any_bytes_give_a_data_set_or_a_data_error(tmp_path: Path, data: Any, saved: bool) -> None:
    folder = (saved_set if saved else parquet_set)(tmp_path / str(saved))
    path = folder / ("train/data-00000-of-00001.arrow" if saved else "data/train-00000-of-00001.parquet")
    path.write_bytes(damage(path.read_bytes(), data.draw))
    said = refusal(lambda: open_dataset(folder, "train", box_format="xywh"))
    assert not said or str(folder) in said
