"""Records are validated where they are made; afterwards nobody can change them."""

from __future__ import annotations

import numpy as np
import pytest

from retinanet.errors import DataError
from retinanet.records import Classes, Detections, GroundTruth, Ignore, OperatingPoints

CATS = Classes(("cat", "dog"), (17, 18))


def found(**changes: object) -> Detections:
    values: dict[str, object] = {
        "boxes": [[0, 0, 2, 3], [1, 1, 4, 5]],
        "scores": [0.9, 0.4],
        "labels": [1, 0],
        "classes": CATS,
        "width": 10,
        "height": 8,
    }
    return Detections(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Classes(()), "at least one class name"),
        (lambda: Classes(("a", "a")), "distinct names; given more than once: a"),
        (lambda: Classes(("a", "b"), (1, 1)), "distinct ids; given more than once: 1"),
        (lambda: Classes(("a", "b"), (1,)), "got 2 names and 1 ids"),
        (lambda: Classes(("a", " ")), "non-empty text"),
        (lambda: GroundTruth([[0, 0, 0, 5]], [0]), r"x2 > x1 and y2 > y1; box 0 is \[0.0, 0.0, 0.0, 5.0\]"),
        (lambda: GroundTruth([[0, 0, 1, float("nan")]], [0]), "finite numbers; box 0"),
        (lambda: GroundTruth([[0, 0, 1]], [0]), r"shape \[N, 4\]"),
        (lambda: GroundTruth([[0, 0, 1, 1]], [0, 1]), r"one value a box, shape \[1\]; got \[2\]"),
        (lambda: GroundTruth([[0, 0, 1, 1]], [-1]), "indices from 0; got -1"),
        (lambda: found(scores=[0.4, 0.9]), "descending order"),
        (lambda: found(scores=[1.4, 0.9]), r"needs \[0, 1\]"),
        (lambda: found(labels=[2, 0]), r"indices 0..1; got 0 to 2"),
        (lambda: OperatingPoints({"cat": 1.5}), r"OperatingPoints.best_f1\['cat'\] needs \[0, 1\]; got 1.5"),
    ],
)
def test_what_cannot_be_is_refused(make: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()  # type: ignore[operator]


def test_ground_truth_fills_in_what_is_not_given() -> None:
    truth = GroundTruth([[0, 0, 2, 3], [1, 1, 5, 2]], [0, 1])
    assert truth.areas.tolist() == [6, 4]
    assert truth.ignore.tolist() == [Ignore.NO, Ignore.NO]
    assert truth.ids.tolist() == [0, 1]
    assert len(GroundTruth.empty()) == 0
    assert truth.select(np.array([False, True])).ids.tolist() == [1]


def test_arrays_are_copies_that_cannot_be_written() -> None:
    mine = np.array([[0, 0, 2, 3]], np.float32)
    truth = GroundTruth(mine, [0])
    mine[0, 0] = 1
    assert truth.boxes[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        truth.boxes[0, 0] = 1


def test_detections_know_names_and_original_ids() -> None:
    assert found().names == ["dog", "cat"]
    assert found().category_ids.tolist() == [18, 17]
    assert found().above(0.5).names == ["dog"]
    assert len(Detections.none(CATS, 3, 4)) == 0


def test_detections_in_other_classes_meet_by_name() -> None:
    other = found().in_classes(Classes(("bird", "dog"), (5, 6)))
    assert other.names == ["dog"]
    assert other.category_ids.tolist() == [6]
    assert other.boxes.tolist() == [[0, 0, 2, 3]]


def test_to_supervision() -> None:
    supervision = pytest.importorskip("supervision")
    theirs = found().to_supervision()
    assert isinstance(theirs, supervision.Detections)
    assert theirs.xyxy.tolist() == found().boxes.tolist()
    assert theirs.data["class_name"].tolist() == ["dog", "cat"]


def test_operating_points_fill_missing_classes() -> None:
    assert OperatingPoints({"dog": 0.7}, {"dog": 0.9}).threshold_per_class(
        CATS, 0.25
    ).tolist() == pytest.approx([0.25, 0.7])
