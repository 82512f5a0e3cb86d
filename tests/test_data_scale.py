"""Large data sets: what opening costs a box, that nothing grows with the number of faults or epochs."""

import gc
import importlib.util
import json
import multiprocessing
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retinanet.data import Dataset, read_coco
from retinanet.data.coco import document as coco_document
from retinanet.data.duplicates import drop_duplicates
from retinanet.data.faults import FAULTS_KEPT, FaultLog
from retinanet.data.kinds import Kind
from retinanet.data.rules import clip_box, clip_boxes

BOXES_A_COLUMN = 37  # bytes of a box in the columns of a `Dataset`


@pytest.fixture
def opening() -> ModuleType:
    file = Path(__file__).parents[1] / "bench" / "opening.py"
    loaded = importlib.util.spec_from_file_location("opening", file)
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return module


def write(path: Path, images: int, annotations: list[Any]) -> Path:
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    path.write_text(json.dumps(document))
    return path


def sound(count: int, images: int) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "image_id": i % images,
            "category_id": 1 + i % 2,
            "bbox": [i % 30, i % 20, 1 + i / count, 2],
        }
        for i in range(count)
    ]


# ---------------------------------------------------------------------------------------------------------
# Faults


def test_of_very_many_faults_the_first_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    wrong: list[Any] = []
    for i in range(7_000):
        wrong += [
            {"id": 4 * i, "image_id": 0, "category_id": 9, "bbox": [1, 1, 2, 2]},
            {"id": 4 * i + 1, "image_id": 0, "category_id": 1, "bbox": [-5, i % 20, 8 + i / 7000, 2]},
            {"id": 4 * i + 2, "image_id": 7, "category_id": 1, "bbox": [1, 1, 2, 2]},
            {"id": 4 * i + 3, "image_id": 0, "category_id": 2, "bbox": [1, 1, 2, 2]},
        ]
    dataset = read_coco(write(tmp_path / "x.json", 1, wrong), split="train", images="absent")
    assert len(dataset.faults) == FAULTS_KEPT
    assert dataset.fault_counts == {
        ("unknown class", "dropped"): 7_000,
        ("outside image", "repaired"): 7_000,
        ("orphan annotation", "dropped"): 7_000,
        ("duplicate box", "dropped"): 6_999,
    }
    assert dataset.fault_total == 27_999
    assert "27,999 faults (20,999 dropped, 7,000 repaired)" in dataset.summary()
    assert dataset.subset([0]).fault_counts == dataset.fault_counts
    records = [fault.record.split(" ")[0] for fault in dataset.faults[:4]]
    assert records == ["annotations[0]", "annotations[1]", "annotations[2]", "annotations[4]"]


def test_counts_are_those_of_the_faults_unless_given() -> None:
    log = FaultLog(limit=2)
    log.drop("f", "r", "why", Kind.EMPTY_BOX)
    log.repair("f", "r", "why", Kind.REVERSED_BOX, "do that")
    assert (log.room, [fault.fix for fault in log.kept]) == (0, [Kind.EMPTY_BOX.fix, "do that"])
    log.drop("f", "r", "why", Kind.EMPTY_BOX)
    log.count("dropped", Kind.EMPTY_BOX, 3)
    log.count("dropped", Kind.OTHER_SIZE, 0)
    assert len(log.kept) == 2
    assert log.counts == {("empty box", "dropped"): 5, ("reversed box", "repaired"): 1}


# ---------------------------------------------------------------------------------------------------------
# Columns are what single records would be


numbers = st.floats(-100, 100) | st.sampled_from([0.0, 40.0, 30.0, 1e300, -1e300, 39.999999999])


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=8))
def test_boxes_are_cut_together_as_each_alone(values: list[tuple[float, float, float, float]]) -> None:
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in values if a != c and b != d]
    cut, outside, flat, reached = clip_boxes(
        np.array(boxes, np.float64).reshape(-1, 4), np.array([(40, 30)] * len(boxes)).reshape(-1, 2)
    )
    for row, box in enumerate(boxes):
        alone, reason = clip_box(box, 40, 30)
        assert (alone is None) == bool(outside[row] | flat[row])
        assert (reason is not None) == bool(outside[row] | flat[row] | reached[row])
        if alone is not None:
            assert tuple(cut[row].tolist()) == alone


ROWS = st.tuples(
    st.integers(0, 2), st.integers(0, 1), st.sampled_from([0.0, -0.0, 1.0, 2.5]), st.integers(0, 1)
)


@given(st.lists(ROWS, max_size=30))
def test_doubles_are_those_of_a_plain_comparison(rows: list[tuple[int, int, float, int]]) -> None:
    images, labels, lefts, ignore = (
        (np.array(column) for column in zip(*rows, strict=True)) if rows else [np.zeros(0)] * 4
    )
    boxes = np.stack([lefts, lefts * 0, lefts + 3, lefts * 0 + 2], axis=1).astype(np.float32)
    kept, firsts = drop_duplicates(
        images.astype(np.int64), labels.astype(np.int64), boxes, ignore.astype(np.int8)
    )
    for place, row in enumerate(rows):
        assert firsts[place] == rows.index(row)
        assert kept[place] == (rows.index(row) == place)


STRANGE: list[dict[str, Any]] = [
    {"id": "x", "image_id": "1", "category_id": 2.0, "bbox": [1, 2, 3, 4], "area": 5, "iscrowd": True},
    {"id": 7.0, "image_id": 1.0, "category_id": "1", "bbox": [1, 2, 3, 5], "area": None, "iscrowd": "1"},
    {"image_id": True, "category_id": 1, "bbox": [1, 2, 3, 4]},
    {"id": 5, "image_id": 2, "category_id": 1, "bbox": [1, "2", 3, 4], "area": "5"},
    {"id": 6, "image_id": 2, "category_id": 1, "bbox": [1, 2, -3, 4], "area": [5], "iscrowd": 1.0},
    {"id": [8], "image_id": {"a": 1}, "category_id": None, "bbox": 4},
    {"id": 2**80, "image_id": 0, "category_id": 1, "bbox": [0, 0, 1, 1], "area": 10**400},
]


def columns(dataset: Dataset) -> dict[str, Any]:
    names = ("boxes", "labels", "areas", "ignore", "annotation_ids", "offsets", "widths", "heights")
    return {name: getattr(dataset, name).tolist() for name in names} | {"faults": dataset.faults}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_it_does_not_matter_who_shares_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    path = write(tmp_path / "x.json", 3, [*STRANGE[:3], *sound(5, 3), *STRANGE[3:], 5, None])
    whole = columns(read_coco(path, split="train", images="absent"))
    assert len(whole["boxes"]) == 9
    assert [fault.kind for fault in whole["faults"]].count(Kind.ORPHAN_ANNOTATION) == 4
    monkeypatch.setattr(coco_document, "CHUNK", chunk)
    assert columns(read_coco(path, split="train", images="absent")) == whole


def test_plain_values_are_taken_as_typed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.json", 3, sound(9, 3))
    typed = columns(read_coco(path, split="train", images="absent"))
    monkeypatch.setattr(
        coco_document.Document,
        "_one",
        lambda self, decoder, section, index, nothing: self.plain(section, index),
    )
    path = write(
        tmp_path / "x.json", 3, [*sound(9, 3), {"id": 1, "image_id": 0, "category_id": 1, "bbox": "no"}]
    )
    plain = columns(read_coco(path, split="train", images="absent"))
    assert {**plain, "faults": ()} == typed


def test_fields_that_nobody_asks_for_may_hold_half_characters_but_no_nonsense(tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", 1, sound(2, 1))
    text = path.read_text().replace(
        '"annotations"', '"info": {"by": "cut \\ud83d", "to": "\\\\ud83d \\ud83d\\ude00"}, "annotations"'
    )
    path.write_text(text)
    assert len(read_coco(path, split="train", images="absent").boxes) == 2
    path.write_text(text.replace('"a"', '"\\ud83d"'))
    assert read_coco(path, split="train", images="absent").classes.names == ("\ufffd", "b")


# ---------------------------------------------------------------------------------------------------------
# Memory


def test_no_box_is_an_object(tmp_path: Path) -> None:
    small, large = (
        read_coco(write(tmp_path / "x.json", 10, sound(count, 10)), split="train", images="absent")
        for count in (100, 20_000)
    )
    assert len(large.boxes) > 10_000
    more = len(large.boxes) - len(small.boxes)
    growth = len(pickle.dumps(large)) - len(pickle.dumps(small))
    assert abs(growth - BOXES_A_COLUMN * more) < 100
    for dataset in (small, large):
        for value in vars(dataset).values():
            assert not isinstance(value, np.ndarray) or value.dtype != object
    gc.collect()
    before = len(gc.get_objects())
    copies = [pickle.loads(pickle.dumps(large)) for _ in range(3)]
    assert len(gc.get_objects()) - before < 300
    assert all(len(copy.boxes) == len(large.boxes) for copy in copies)


@pytest.mark.slow
def test_opening_costs_little_a_box(opening: ModuleType, tmp_path: Path) -> None:
    few, many = (10_000, 210_000)
    peaks = []
    for boxes in (few, many):
        folder = tmp_path / str(boxes)
        opening.generate_coco(folder, images=5_000, boxes=boxes, polygons=True)
        found = opening.measure(folder)
        assert (found["images"], found["boxes"], found["faults"]) == (5_000, boxes, 0)
        peaks.append(found["peak_bytes"])
    file = (tmp_path / str(many) / "instances_train.json").stat().st_size
    a_box = (peaks[1] - peaks[0] - file) / (many - few)
    assert a_box < 400  # 5 million boxes are 2 GB beside their file


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_workers_stays_flat_over_epochs(opening: ModuleType, tmp_path: Path) -> None:
    from PIL import Image

    from retinanet.data import open_dataset
    from retinanet.data.loading import training_batches
    from retinanet.data.transforms import Augmentation
    from retinanet.images import Preprocessing

    opening.generate_coco(tmp_path, images=400, boxes=200_000, polygons=False)
    Image.new("RGB", (640, 480)).save(tmp_path / "one.jpg")
    for path in (tmp_path / "train").iterdir():
        path.write_bytes((tmp_path / "one.jpg").read_bytes())
    dataset = open_dataset(tmp_path, "train")
    batches = training_batches(
        dataset,
        Preprocessing(image_size=64, max_size=64),
        Augmentation(),
        batch_size=4,
        seed=0,
        steps=400,  # four epochs
        workers=2,
    )
    own: list[list[int]] = []
    for step, _ in enumerate(batches, 1):
        if step in (100, 390):
            own.append([_private_bytes(child.pid or 0) for child in multiprocessing.active_children()])
    assert len(own[0]) == len(own[1]) == 2
    for first, last in zip(*own, strict=True):
        assert last - first < 12 * 2**20


def _private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
