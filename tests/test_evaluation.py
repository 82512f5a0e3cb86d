"""Evaluation: COCO figures against pycocotools, VOC by hand, results files, operating points."""

import contextlib
import io
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinanet.errors import ConfigError, DataError
from retinanet.evaluation import (
    Metrics,
    choose_operating_points,
    evaluate_detections,
    read_results,
    voc_average_precision,
    write_results,
)
from retinanet.evaluation.metrics import FIGURES
from retinanet.records import Classes, Detections, GroundTruth, Ignore

CAT = Classes(("cat",))
PETS = Classes(("cat", "dog", "bird"), (7, 3, 11))
BOX = [0, 0, 10, 10]
FAR = [100, 100, 110, 110]
HALF = [0, 0, 10, 5]  # IoU with BOX is exactly 0.5


def truth(*boxes: list[float], labels: list[int] | None = None, **more: Any) -> GroundTruth:
    return GroundTruth(np.array(boxes, np.float32), np.array(labels or [0] * len(boxes)), **more)


def found(
    *rows: tuple[list[float], float], classes: Classes = CAT, labels: list[int] | None = None
) -> Detections:
    boxes, scores = [row[0] for row in rows], [row[1] for row in rows]
    return Detections(
        np.array(boxes, np.float32), np.array(scores), np.array(labels or [0] * len(rows)), classes, 200, 200
    )


NOTHING = found()


# pycocotools is the oracle ---------------------------------------------------------------------------------


def oracle(
    truths: list[GroundTruth], detections: list[Detections], classes: Classes, cap: int
) -> tuple[dict[str, float | None], dict[str, list[float | None]]]:
    """Return the figures and per class [AP, AP50, AP75], from pycocotools with maxDets {1, 10, cap}."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations: list[dict[str, Any]] = []
    for image, of_image in enumerate(truths, start=1):
        for box, label, area, ignore in zip(
            of_image.boxes, of_image.classes, of_image.areas, of_image.ignore, strict=True
        ):
            x1, y1, x2, y2 = (float(value) for value in box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(area),
                    "iscrowd": int(ignore != Ignore.NO),
                }
            )
    results: list[dict[str, Any]] = []
    for image, of_image in enumerate(detections, start=1):
        for box, score, name in zip(of_image.boxes, of_image.scores, of_image.names, strict=True):
            if name in classes.names:
                x1, y1, x2, y2 = (float(value) for value in box)
                label = classes.names.index(name)
                row = {"image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                results.append({**row, "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools' own use of NumPy
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(1, len(truths) + 1)],
            "categories": [{"id": label, "name": name} for label, name in enumerate(classes.names)],
            "annotations": annotations,
        }
        coco.createIndex()
        if results:
            judged = coco.loadRes(results)
        else:  # loadRes needs one result at least
            judged = COCO()
            judged.dataset = {**coco.dataset, "annotations": []}
            judged.createIndex()
        evaluator = COCOeval(coco, judged, "bbox")
        evaluator.params.maxDets = sorted({1, 10, cap})
        evaluator.evaluate()
        evaluator.accumulate()
        if cap == 100:
            evaluator.summarize()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    caps = evaluator.params.maxDets
    at = caps.index(cap)

    def mean(values: np.ndarray) -> float | None:
        return None if not (values > -1).any() else float(values[values > -1].mean())

    figures = {
        "ap": mean(precision[:, :, :, 0, at]),
        "ap50": mean(precision[0, :, :, 0, at]),
        "ap75": mean(precision[5, :, :, 0, at]),
        **{
            f"ap_{size}": mean(precision[:, :, :, 1 + k, at])
            for k, size in enumerate(("small", "medium", "large"))
        },
        "ar1": mean(recall[:, :, 0, caps.index(1)]),
        "ar10": mean(recall[:, :, 0, caps.index(10)]),
        **{
            f"ar_{size}": mean(recall[:, :, 1 + k, at]) for k, size in enumerate(("small", "medium", "large"))
        },
    }
    if cap == 100:
        figures["ar100"] = mean(recall[:, :, 0, at])
        stats = [None if value == -1 else float(value) for value in evaluator.stats]
        assert [figures[name] for name in FIGURES] == stats  # the oracle is read rightly
    per_class = {
        name: [mean(p[..., label, 0, at]) for p in (precision, precision[0], precision[5])]
        for label, name in enumerate(classes.names)
    }
    return figures, per_class


def of_pycocotools(
    truths: list[GroundTruth], detections: list[Detections], classes: Classes, cap: int = 100
) -> dict[str, Any]:
    """Return the oracle's figures, and its three of each class, by name, to be compared with `said`."""
    figures, per_class = oracle(truths, detections, classes, cap)
    return {name: near(value) for name, value in figures.items()} | {
        name: [near(value) for value in values] for name, values in per_class.items()
    }


def said(metrics: Metrics) -> dict[str, Any]:
    """Return our figures in the same form; pycocotools has an AR at 100 only where that is the cap."""
    names = [name for name in FIGURES if name != "ar100" or metrics.max_detections == 100]
    return {name: getattr(metrics, name) for name in names} | {
        name: [of["ap"], of["ap50"], of["ap75"]] for name, of in metrics.per_class.items()
    }


def near(value: float | None) -> Any:
    return None if value is None else pytest.approx(value, abs=1e-9, rel=0)


def scene(
    seed: int, images: int = 4, crowded: int = 0, model: Classes = PETS
) -> tuple[list[GroundTruth], list[Detections]]:
    """Draw boxes on a coarse grid and scores in steps, so that ties of IoU and of score are common."""
    rng = np.random.default_rng(seed)
    truths, detections = [], []
    for image in range(images):
        count = 0 if rng.random() < 0.2 else int(rng.integers(1, 8))
        corner = rng.integers(0, 30, (count, 2)) * 4
        boxes = np.concatenate([corner, corner + rng.integers(2, 36, (count, 2)) * 4], axis=1)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) * rng.choice([0.3, 0.7, 1.0], count)
        ignore = rng.choice([0, 0, 0, 1, 2, 3], count)
        labels = rng.integers(0, len(PETS), count)
        truths.append(GroundTruth(boxes, labels, areas, ignore))
        shots = 0 if rng.random() < 0.2 else int(rng.integers(1, 20))
        shots = crowded if crowded and image == 0 else shots
        near_one = rng.integers(0, count, shots) if count else None
        base = boxes[near_one] if near_one is not None else np.tile([0, 0, 40, 40], (shots, 1))
        moved = base + rng.integers(-2, 3, (shots, 4)) * 4
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2])  # some boxes have no area
        names = [PETS.names[k] for k in (labels[near_one] if near_one is not None else [0] * shots)]
        wrong = rng.random(shots) < 0.2
        known = [
            int(rng.integers(len(model))) if miss or name not in model.names else model.names.index(name)
            for name, miss in zip(names, wrong, strict=True)
        ]
        scores = -np.sort(-rng.integers(0, 11, shots) / 10)
        detections.append(Detections(moved, scores, np.array(known), model, 200, 200))
    return truths, detections


@pytest.mark.parametrize("cap", [100, 300, 5, 1])
@pytest.mark.parametrize("seed", range(6))
def test_every_figure_is_pycocotools(seed: int, cap: int) -> None:
    truths, detections = scene(seed, images=12, crowded=350 if seed % 2 else 0)
    metrics = evaluate_detections(truths, detections, PETS, max_detections=cap)
    assert said(metrics) == of_pycocotools(truths, detections, PETS, cap)
    if cap != 100:
        at_100, _ = oracle(truths, detections, PETS, 100)
        assert metrics.at_100 is not None
        assert {name: near(value) for name, value in at_100.items()} == metrics.at_100
        assert metrics.ar100 == near(at_100["ar100"])


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), images=st.integers(1, 4), cap=st.sampled_from([2, 100]))
def test_small_scenes_are_pycocotools(seed: int, images: int, cap: int) -> None:
    truths, detections = scene(seed, images)
    metrics = evaluate_detections(truths, detections, PETS, max_detections=cap)
    assert said(metrics) == of_pycocotools(truths, detections, PETS, cap)


def test_model_with_other_classes_in_another_order() -> None:
    # The model knows no bird, knows a fish, and has the rest in another order with other ids.
    model = Classes(("fish", "dog", "cat"), (1, 2, 90))
    truths, detections = scene(5, images=20, model=model)
    metrics = evaluate_detections(truths, detections, PETS)
    assert said(metrics) == of_pycocotools(truths, detections, PETS)
    fish = sum(names.count("fish") for names in (each.names for each in detections))
    assert metrics.unmatched_detections == fish > 0
    assert metrics.detections == sum(map(len, detections)) - fish
    assert metrics.per_class["bird"]["ap"] == 0
    assert metrics.per_class["bird"]["detections"] == 0


def test_the_cap_matters_and_100_stays() -> None:
    # 150 false cats above one true one: only a cap beyond 150 reaches it.
    rows = [(FAR, 0.9)] * 150 + [(BOX, 0.5)]
    metrics = evaluate_detections([truth(BOX)], [found(*rows)], CAT, max_detections=300)
    assert metrics.ap == pytest.approx(1 / 151)
    assert metrics.ar100 == 0
    assert metrics.ar_small == 1
    assert metrics.at_100 is not None
    assert metrics.at_100["ap"] == 0
    assert evaluate_detections([truth(BOX)], [found(*rows)], CAT).at_100 is None


# Worked by hand ---------------------------------------------------------------------------------------------

THIRDS = [0, 0, 30, 10]
COCO_CASES: list[tuple[str, list[GroundTruth], list[Detections], float | None, float | None]] = [
    # what, ground truth, detections, AP, AP50
    ("perfect", [truth(BOX, FAR)], [found((BOX, 0.9), (FAR, 0.8))], 1, 1),
    # Recall stops at 0.5: of the 101 recall points 0.00 ... 0.50 have precision 1.
    ("one of two is missed", [truth(BOX, FAR)], [found((BOX, 0.9))], 51 / 101, 51 / 101),
    ("a duplicate after full recall costs nothing", [truth(BOX)], [found((BOX, 0.9), (BOX, 0.8))], 1, 1),
    # right, wrong, right: precision 1 up to recall 0.5, then 2/3.
    (
        "a duplicate between two",
        [truth(BOX, FAR)],
        [found((BOX, 0.9), (BOX, 0.8), (FAR, 0.7))],
        (51 + 50 * 2 / 3) / 101,
        (51 + 50 * 2 / 3) / 101,
    ),
    ("a false one above", [truth(BOX)], [found((FAR, 0.9), (BOX, 0.8))], 0.5, 0.5),
    ("IoU 0.5 counts at the first of ten thresholds", [truth(BOX)], [found((HALF, 0.9))], 0.1, 1),
    ("no detection", [truth(BOX)], [NOTHING], 0, 0),
    ("no ground truth", [GroundTruth.empty()], [found((BOX, 0.9))], None, None),
    ("neither", [GroundTruth.empty()], [NOTHING], None, None),
    ("a box without area is wrong", [truth(BOX)], [found(([5, 5, 5, 5], 0.9), (BOX, 0.8))], 0.5, 0.5),
    ("the other image's box does not count", [truth(BOX), truth(FAR)], [found((FAR, 0.9)), NOTHING], 0, 0),
    (
        "equal scores: image order",
        [truth(BOX), truth(FAR)],
        [found((BOX, 0.5)), found((BOX, 0.5))],
        51 / 101,
        51 / 101,
    ),
    *(
        (
            f"{kind.name}: many on it are neither right nor wrong",
            [truth(BOX, FAR, ignore=[kind, Ignore.NO])],
            [found((BOX, 0.9), (BOX, 0.8), ([2, 2, 4, 4], 0.7), (FAR, 0.6))],
            1,
            1,
        )
        for kind in (Ignore.CROWD, Ignore.DIFFICULT, Ignore.CUT)
    ),
    # The real box is preferred to the ignored one around it.
    (
        "object inside a crowd",
        [truth([0, 0, 50, 50], BOX, ignore=[Ignore.CROWD, Ignore.NO])],
        [found((BOX, 0.9), (BOX, 0.8))],
        1,
        1,
    ),
    ("only ignored boxes", [truth(BOX, ignore=[Ignore.CROWD])], [found((BOX, 0.9))], None, None),
]


@pytest.mark.parametrize(
    ("truths", "detections", "ap", "ap50"), [c[1:] for c in COCO_CASES], ids=[c[0] for c in COCO_CASES]
)
def test_coco_by_hand(
    truths: list[GroundTruth], detections: list[Detections], ap: float | None, ap50: float | None
) -> None:
    metrics = evaluate_detections(truths, detections, CAT)
    assert said(metrics) == of_pycocotools(truths, detections, CAT)
    # The rule's "tiny" in tp / (tp + fp + tiny) costs a rounding error.
    assert (metrics.ap, metrics.ap50) == (near(ap), near(ap50))


def test_no_images_at_all() -> None:
    metrics = evaluate_detections([], [], PETS)
    assert [getattr(metrics, name) for name in FIGURES] == [None] * 12
    assert (metrics.images, metrics.ground_truths, metrics.detections) == (0, 0, 0)
    assert voc_average_precision([], [], PETS) == dict.fromkeys(PETS.names)
    assert choose_operating_points([], [], PETS).best_f1 == {}


def test_class_only_in_the_ground_truth_counts_and_absent_class_does_not() -> None:
    truths = [truth(BOX, FAR, labels=[0, 1])]
    detections = [found((BOX, 0.9), (FAR, 0.4), classes=PETS, labels=[0, 2])]
    metrics = evaluate_detections(truths, detections, PETS)
    assert said(metrics) == of_pycocotools(truths, detections, PETS)
    assert [metrics.per_class[name]["ap"] for name in PETS.names] == [1, 0, None]
    assert metrics.ap == near(0.5)
    assert [metrics.per_class[name]["ground_truths"] for name in PETS.names] == [1, 1, 0]
    assert [metrics.per_class[name]["detections"] for name in PETS.names] == [1, 0, 1]


def test_sizes_go_by_the_annotated_area() -> None:
    detections = [found(([0, 0, 100, 100], 0.9))]
    for area, expected in ((10_000, (None, 1)), (500, (1, None))):
        truths = [truth([0, 0, 100, 100], areas=[area])]
        metrics = evaluate_detections(truths, detections, CAT)
        assert said(metrics) == of_pycocotools(truths, detections, CAT)
        assert (metrics.ap_small, metrics.ap_large) == expected


def test_ignored_boxes_are_not_counted_as_ground_truth() -> None:
    metrics = evaluate_detections([truth(BOX, FAR, ignore=[2, 0])], [NOTHING], CAT)
    assert metrics.ground_truths == 1
    assert metrics.per_class["cat"]["ground_truths"] == 1


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_laws(seed: int) -> None:
    truths, detections = scene(seed, images=5)
    metrics = evaluate_detections(truths, detections, PETS)
    for name in FIGURES:
        value = getattr(metrics, name)
        assert value is None or 0 <= value <= 1
    # AP asks only for the order of scores.
    squared = [Detections(d.boxes, d.scores**2, d.labels, d.classes, 200, 200) for d in detections]
    assert evaluate_detections(truths, squared, PETS) == metrics
    # The annotations as detections are perfect.
    ideal = [
        Detections(t.boxes, np.ones(len(t)), t.classes, PETS, 200, 200).select(t.ignore == 0) for t in truths
    ]
    assert evaluate_detections(truths, ideal, PETS).ap in (None, pytest.approx(1))
    assert set(voc_average_precision(truths, ideal, PETS).values()) <= {None, 1.0} or any(
        t.ignore.any() for t in truths
    )


def test_it_is_silent(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        evaluate_detections([truth(BOX)], [found((BOX, 0.9))], CAT)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# Metrics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [100, 20])
def test_metrics_survive_json(cap: int) -> None:
    metrics = evaluate_detections(*scene(3), PETS, max_detections=cap)
    written = metrics.to_json()
    assert Metrics.from_json(json.loads(json.dumps(written, allow_nan=False))) == metrics
    assert list(written)[:12] == list(FIGURES)
    assert written["max_detections"] == cap


METRICS_FAULTS: list[tuple[str, Any, str]] = [
    # field, value, what the message must say
    ("ap", 1.5, r"Metrics.ap needs a number in \[0, 1\] or null; got 1.5"),
    ("ap", True, "Metrics.ap needs a number"),
    ("ap", float("nan"), "Metrics.ap needs a number"),
    ("images", -1, "Metrics.images needs a whole number from 0; got -1"),
    ("images", 2.0, "Metrics.images needs a whole number"),
    ("per_class", [], r"Metrics.per_class needs an object; got \[\]"),
    ("per_class", {"cat": {"ap": 1}}, r"Metrics.per_class\['cat'\] needs an object with the fields ap, ap50"),
    ("at_100", {"ap": 1}, "Metrics.at_100 needs an object with the fields"),
    ("speed", 1, "Metrics does not know speed"),
]


@pytest.mark.parametrize(("field", "value", "message"), METRICS_FAULTS)
def test_metrics_refuse_what_they_did_not_write(field: str, value: Any, message: str) -> None:
    written = evaluate_detections([], [], CAT).to_json()
    with pytest.raises(DataError, match=message):
        Metrics.from_json({**written, field: value})


def test_metrics_need_all_fields() -> None:
    with pytest.raises(DataError, match=r"Metrics lacks ap, .*images.*; write it with"):
        Metrics.from_json({})
    with pytest.raises(DataError, match="named fields; got list"):
        Metrics.from_json([])  # type: ignore[arg-type]


def test_table() -> None:
    metrics = evaluate_detections(
        [truth(BOX)],
        [found((HALF, 0.9), classes=Classes(("fish", "cat")), labels=[1])],
        PETS,
        max_detections=7,
    )
    lines = metrics.table().splitlines()
    assert lines[0].startswith("AP 0.100  AP50 1.000  AP75 0.000  AP small 0.100  AP medium     -")
    assert lines[1].startswith(
        "AR1 0.100  AR10 0.100  AR100 0.100  AR small 0.100  AR medium     -  AR large     -"
    )
    assert "7 detections" in lines[2]
    assert lines[5] == "(at most 100)"
    assert lines[6] == "1 images, 1 ground-truth boxes, 1 detections"
    assert lines[8].split() == ["cat", "0.100", "1.000", "0.000", "1", "1"]
    assert lines[-1] == "(found: every detection, right or wrong, however low its score)"
    other = evaluate_detections([truth(BOX)], [found((BOX, 1), classes=Classes(("fish",)))], CAT)
    assert "1 detections of classes that the data set does not have" in other.table()


# Requests that cannot be met --------------------------------------------------------------------------------

JUDGES = [evaluate_detections, voc_average_precision, choose_operating_points]


@pytest.mark.parametrize("judge", JUDGES)
def test_both_sides_must_fit(judge: Any) -> None:
    with pytest.raises(DataError, match=r"one GroundTruth and one Detections an image.* got 1 and 2"):
        judge([truth(BOX)], [NOTHING, NOTHING], CAT)
    with pytest.raises(DataError, match=r"classes 0\.\.0; image 1 \(from 0\) has 4"):
        judge([truth(BOX), truth(BOX, labels=[4])], [NOTHING, NOTHING], CAT)


@pytest.mark.parametrize("cap", [0, -1, True, 1.5])
def test_max_detections_is_a_count(cap: Any) -> None:
    with pytest.raises(ConfigError, match="max_detections needs a whole number from 1; got"):
        evaluate_detections([], [], CAT, max_detections=cap)


@pytest.mark.parametrize("judge", [voc_average_precision, choose_operating_points])
@pytest.mark.parametrize("iou", [0, -0.1, 1.1, float("nan")])
def test_iou_is_a_share(judge: Any, iou: float) -> None:
    with pytest.raises(ConfigError, match=r"iou needs a number in \(0, 1\]; got"):
        judge([], [], CAT, iou=iou)


def test_interpolation_is_one_of_two() -> None:
    with pytest.raises(ConfigError, match="'every_point' or 'eleven_point'; got 'all'"):
        voc_average_precision([], [], CAT, interpolation="all")  # type: ignore[arg-type]


# VOC --------------------------------------------------------------------------------------------------------

VOC_CASES: list[tuple[str, GroundTruth, Detections, float | None, float | None]] = [
    # what, ground truth, detections, every point, eleven points
    ("perfect", truth(BOX, FAR), found((BOX, 0.9), (FAR, 0.8)), 1, 1),
    # Points 0.0 ... 0.5 are six of eleven.
    ("one of two", truth(BOX, FAR), found((BOX, 0.9)), 0.5, 6 / 11),
    (
        "a duplicate between",
        truth(BOX, FAR),
        found((BOX, 0.9), (BOX, 0.8), (FAR, 0.7)),
        5 / 6,
        (6 + 5 * 2 / 3) / 11,
    ),
    ("exactly at the threshold", truth(BOX), found((HALF, 0.9)), 1, 1),
    (
        "difficult: many are neither",
        truth(BOX, FAR, ignore=[2, 0]),
        found((BOX, 0.9), (BOX, 0.8), (FAR, 0.7)),
        1,
        1,
    ),
    # Unlike COCO's crowds, a small one inside a difficult box is wrong.
    (
        "small one in difficult",
        truth(BOX, FAR, ignore=[2, 0]),
        found(([2, 2, 4, 4], 0.9), (FAR, 0.7)),
        0.5,
        0.5,
    ),
    # It looks at its best box only, though that one is taken: [0,0,10,10] -> wrong, not the second.
    ("no second choice", truth(BOX, [0, 0, 10, 8]), found((BOX, 0.9), ([0, 0, 10, 9.5], 0.8)), 0.5, 6 / 11),
    # 3 of 10 objects are recall 0.3, just below 3 * 0.1: points 0.0, 0.1, 0.2 only, as others publish.
    (
        "three tenths",
        truth(*[[20 * k, 0, 20 * k + 10, 10] for k in range(10)]),
        found(*[([20 * k, 0, 20 * k + 10, 10], 0.9) for k in range(3)]),
        0.3,
        3 / 11,
    ),
    ("nothing found", truth(BOX), NOTHING, 0, 0),
    ("nothing there", GroundTruth.empty(), found((BOX, 0.9)), None, None),
    ("only difficult", truth(BOX, ignore=[2]), found((BOX, 0.9)), None, None),
]


@pytest.mark.parametrize(
    ("objects", "shots", "every", "eleven"), [c[1:] for c in VOC_CASES], ids=[c[0] for c in VOC_CASES]
)
def test_voc_by_hand(
    objects: GroundTruth, shots: Detections, every: float | None, eleven: float | None
) -> None:
    assert voc_average_precision([objects], [shots], CAT) == {"cat": near(every)}
    assert voc_average_precision([objects], [shots], CAT, interpolation="eleven_point") == {
        "cat": near(eleven)
    }


def test_voc_inclusive_pixels() -> None:
    # Pixels 0..9 and 0..4 of ten columns: 10 x 10 and 10 x 5 pixels, IoU 1/2; as continuous boxes 4/9.
    case = [truth([0, 0, 9, 9])], [found(([0, 0, 9, 4], 0.9))], CAT
    assert voc_average_precision(*case) == {"cat": 0}
    assert voc_average_precision(*case, inclusive=True) == {"cat": 1}


def test_voc_best_first_over_all_images_and_names() -> None:
    # The wrong dog of the second image comes before the right one of the first.
    model = Classes(("dog", "fish"))
    shots = [found((BOX, 0.6), (BOX, 0.5), classes=model, labels=[0, 1]), found((FAR, 0.9), classes=model)]
    precision = voc_average_precision([truth(BOX, labels=[1]), truth(BOX)], shots, PETS)
    assert precision == {"cat": 0, "dog": 0.5, "bird": None}


# Operating points -------------------------------------------------------------------------------------------

TWO = truth(BOX, FAR)
POINT_CASES: list[tuple[str, GroundTruth, Detections, float | None, float]] = [
    # what, ground truth, detections, threshold, F1
    ("both", TWO, found((BOX, 0.75), (FAR, 0.5)), 0.5, 1),
    # At 0.75: 1 right, 1 missed: 2/3. At 0.25: 2 right, 3 wrong: 4/7.
    (
        "the second costs too much",
        TWO,
        found((BOX, 0.75), *[([50, 50, 60, 60], 0.5)] * 3, (FAR, 0.25)),
        0.75,
        2 / 3,
    ),
    # At 0.75 2/3; at 0.25 2 right, 2 wrong, 0 missed: 4/6. The higher one is taken.
    ("equal F1", TWO, found((BOX, 0.75), *[([50, 50, 60, 60], 0.5)] * 2, (FAR, 0.25)), 0.75, 2 / 3),
    # A threshold cannot part equal scores: 1 right and 1 wrong at 0.5, whichever comes first.
    ("equal scores", truth(BOX), found((BOX, 0.5), (FAR, 0.5)), 0.5, 2 / 3),
    ("equal scores, wrong first", truth(BOX), found((FAR, 0.5), (BOX, 0.5)), 0.5, 2 / 3),
    ("a duplicate is wrong", truth(BOX), found((BOX, 0.75), (BOX, 0.5)), 0.75, 1),
    ("second choice, as COCO", truth(BOX, [0, 0, 10, 8]), found((BOX, 0.75), ([0, 0, 10, 9.5], 0.5)), 0.5, 1),
    (
        "ignored is neither",
        truth(BOX, FAR, ignore=[1, 0]),
        found((BOX, 0.75), ([1, 1, 2, 2], 0.5), (FAR, 0.25)),
        0.25,
        1,
    ),
    # The first overlaps both by 9/11 and takes the last, as COCO; the second reaches only the first box.
    (
        "equal overlaps",
        truth(BOX, [2, 0, 12, 10]),
        found(([1, 0, 11, 10], 0.75), ([-2, 0, 8, 10], 0.5)),
        0.5,
        1,
    ),
    ("a score of 0", truth(BOX), found((BOX, 0.0)), 0.0, 1),
    ("nothing right", truth(BOX), found((FAR, 0.5)), None, 0),
    ("nothing found", truth(BOX), NOTHING, None, 0),
    ("nothing there", GroundTruth.empty(), found((FAR, 0.5)), None, 0),
]


@pytest.mark.parametrize(
    ("objects", "shots", "threshold", "f1"), [c[1:] for c in POINT_CASES], ids=[c[0] for c in POINT_CASES]
)
def test_operating_points_by_hand(
    objects: GroundTruth, shots: Detections, threshold: float | None, f1: float
) -> None:
    points = choose_operating_points([objects], [shots], CAT)
    assert points.best_f1 == ({} if threshold is None else {"cat": threshold})
    assert points.f1 == ({} if threshold is None else {"cat": near(f1)})


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_operating_points_are_the_best_of_all_thresholds(seed: int) -> None:
    truths, detections = scene(seed, images=6)
    points = choose_operating_points(truths, detections, PETS)
    for label, name in enumerate(PETS.names):
        best = (0.0, -1.0)
        for score in np.unique(np.concatenate([d.scores for d in detections])).tolist():
            best = max(best, (f1_at(truths, detections, label, score), score))
        assert (points.f1.get(name, 0.0), points.best_f1.get(name, -1.0)) == (
            near(best[0]),
            best[1] if best[0] else -1,
        )


def f1_at(truths: list[GroundTruth], detections: list[Detections], label: int, threshold: float) -> float:
    """COCO's matching at IoU 0.5 with plain loops."""
    right = wrong = objects = 0
    for t, d in zip(truths, detections, strict=True):
        own = t.select(t.classes == label)
        taken = [False] * len(own)
        objects += int((own.ignore == 0).sum())
        for box in d.above(threshold).select(d.above(threshold).labels == label).boxes.tolist():
            best, chosen, forgiven = 0.5, None, False
            for k, other in enumerate(own.boxes.tolist()):
                width = min(box[2], other[2]) - max(box[0], other[0])
                height = min(box[3], other[3]) - max(box[1], other[1])
                common = max(width, 0) * max(height, 0)
                area = (box[2] - box[0]) * (box[3] - box[1])
                other_area = (other[2] - other[0]) * (other[3] - other[1])
                if own.ignore[k]:
                    forgiven |= common > 0 and common / area >= 0.5
                elif not taken[k] and common / (area + other_area - common) >= best:
                    best, chosen = common / (area + other_area - common), k
            if chosen is not None:
                taken[chosen] = True
                right += 1
            elif not forgiven:
                wrong += 1
    return 2 * right / (right + wrong + objects) if objects else 0.0


def test_threshold_keeps_the_score_it_was_chosen_from() -> None:
    shots = found((BOX, 0.1), (FAR, 0.05))
    points = choose_operating_points([truth(BOX)], [shots], CAT)
    assert len(shots.above(points.best_f1["cat"])) == 1


# Results files ----------------------------------------------------------------------------------------------


def read(path: Path) -> list[Detections]:
    return read_results(path, image_ids=[5, "b"], sizes=[(640, 480), (20, 30)], classes=PETS)


def test_results_round_trip(tmp_path: Path) -> None:
    truths, detections = scene(11, images=6)
    ids = [3, "x", 1, 90, 5, "7"]
    path = tmp_path / "detections.json"
    write_results(path, detections, ids)
    again = read_results(path, image_ids=ids, sizes=[(200, 200)] * 6, classes=PETS)
    for one, other in zip(detections, again, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        np.testing.assert_array_equal(one.scores, other.scores)
        np.testing.assert_array_equal(one.labels, other.labels)
        assert (other.width, other.height) == (200, 200)
    assert evaluate_detections(truths, again, PETS) == evaluate_detections(truths, detections, PETS)
    assert os.listdir(tmp_path) == ["detections.json"]


def test_results_are_coco(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    write_results(
        path, [NOTHING, found(([1, 2, 5, 4], 0.5), ([3, 3, 2, 3], 0.25), classes=PETS, labels=[2, 1])], [1, 2]
    )
    assert json.loads(path.read_text()) == [
        {"image_id": 2, "category_id": 11, "bbox": [1, 2, 4, 2], "score": 0.5},
        {"image_id": 2, "category_id": 3, "bbox": [3, 3, 0, 0], "score": 0.25},
    ]


def test_results_sort_by_score_and_keep_the_order_of_ties(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    rows = [("5", 1, 0.5), (5, 2, 0.75), ("b", 3, 1), (5, 4, 0.5)]
    records = [{"image_id": i, "category_id": 3, "bbox": [x, 0, 1, 2], "score": s} for i, x, s in rows]
    path.write_text(json.dumps(records))
    first, second = read(path)
    assert first.boxes.tolist() == [[2, 0, 3, 2], [1, 0, 2, 2], [4, 0, 5, 2]]
    assert first.names == ["dog"] * 3
    assert (second.width, second.height, len(second)) == (20, 30, 1)


def test_writing_fails_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.json"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_results(path, [NOTHING], [1])
    assert os.listdir(tmp_path) == ["d.json"]
    assert path.read_text() == "before"


def test_requests_about_results_must_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one image id a Detections; got 1 and 2"):
        write_results(tmp_path / "d.json", [NOTHING], [1, 2])
    with pytest.raises(DataError, match="one size an image; got 1 ids, 0 sizes"):
        read_results(tmp_path / "d.json", image_ids=[1], sizes=[], classes=CAT)
    with pytest.raises(DataError, match="ids that differ as text"):
        read_results(tmp_path / "d.json", image_ids=[1, "1"], sizes=[(1, 1)] * 2, classes=CAT)
    with pytest.raises(DataError, match=r"d\.json: cannot be read: No such file"):
        read(tmp_path / "d.json")


GOOD = {"image_id": 5, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.5}
RECORD_FAULTS: list[tuple[Any, str]] = [
    # second record, what the message must say
    (1, "needs an object with image_id, category_id, bbox, score; got a number"),
    ({k: v for k, v in GOOD.items() if k != "score"}, "lacks 'score'"),
    ({**GOOD, "image_id": 6}, "image_id 6 is not an image of the data set"),
    ({**GOOD, "image_id": True}, "image_id needs a whole number or text; got True"),
    ({**GOOD, "image_id": 5.0}, r"image_id needs a whole number or text; got 5\.0"),
    ({**GOOD, "category_id": 1}, r"category_id 1 is none of the data set's ids \[3, 7, 11\]"),
    ({**GOOD, "category_id": "3"}, "category_id needs a whole number; got '3'"),
    ({**GOOD, "category_id": True}, "category_id needs a whole number; got True"),
    ({**GOOD, "bbox": [0, 0, 1]}, r"bbox needs four finite numbers .* got \[0, 0, 1\]"),
    ({**GOOD, "bbox": [0, 0, 1, float("nan")]}, "bbox needs four finite numbers"),
    ({**GOOD, "bbox": [0, 0, 1, float("inf")]}, "bbox needs four finite numbers"),
    ({**GOOD, "bbox": [0, 0, 1, 10**400]}, "bbox needs four finite numbers"),
    ({**GOOD, "bbox": [0, 0, 1, True]}, "bbox needs four finite numbers"),
    ({**GOOD, "bbox": {"x": 1}}, "bbox needs four finite numbers"),
    ({**GOOD, "bbox": [9, 9, -1, 4]}, r"bbox needs width and height >= 0; got \[9, 9, -1, 4\]. Write"),
    ({**GOOD, "score": 1.01}, r"score needs a number in \[0, 1\]; got 1.01"),
    ({**GOOD, "score": float("nan")}, "score needs a number"),
    ({**GOOD, "score": None}, "score needs a number"),
    ({**GOOD, "score": True}, "score needs a number"),
]


@pytest.mark.parametrize(("record", "message"), RECORD_FAULTS)
def test_faulty_records_are_named(tmp_path: Path, record: Any, message: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([GOOD, record]))
    with pytest.raises(DataError, match=rf"d\.json: record 1:? ?.*{message}"):
        read(path)


FILE_FAULTS: list[tuple[bytes, str]] = [
    (b"", "is not JSON"),
    (b"[{]", "is not JSON"),
    (b"\xff\xfe\xff", "is not JSON"),
    (b'{"images": []}', "is a list of detections; got an object"),
    (b"null", "is a list of detections; got null"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"a":' * 200_000, "nested too deeply"),
    (b"[" + b"9" * 5000 + b"]", "is not JSON"),
]


@pytest.mark.parametrize(
    ("content", "message"), FILE_FAULTS, ids=[c[1] + str(i) for i, c in enumerate(FILE_FAULTS)]
)
def test_faulty_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"d\.json: .*{message}"):
        read(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*GOOD, "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(changes=st.dictionaries(st.sampled_from([*GOOD]), json_values, max_size=2), other=json_values)
def test_any_json_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], other: Any
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "d.json"
    for content in ([{**GOOD, **changes}], [GOOD, other], other):
        path.write_text(json.dumps(content))
        with contextlib.suppress(DataError):
            assert len(read(path)) == 2
