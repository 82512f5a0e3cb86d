"""Published figures of other projects, reproduced from their own files."""

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retinanet.evaluation import evaluate_detections, read_results, voc_average_precision
from retinanet.evaluation.voc import Interpolation
from retinanet.records import Classes, Detections, GroundTruth, Ignore

pytestmark = pytest.mark.skipif(
    "RETINANET_TEST_DATA" not in os.environ, reason="RETINANET_TEST_DATA names no data sets"
)
ROOT = Path(os.environ.get("RETINANET_TEST_DATA", ".")) / "eval_fixtures"
COCO_CASES = ("cocoapi_fakebbox100", "podm_bboxarea", "fce_small", "fce_ignore_test")
NAMES = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "APs": "ap_small",
    "APm": "ap_medium",
    "APl": "ap_large",
    "AR1": "ar1",
    "AR10": "ar10",
    "AR100": "ar100",
    "ARs": "ar_small",
    "ARm": "ar_medium",
    "ARl": "ar_large",
}
INTERPOLATIONS: tuple[Interpolation, ...] = ("every_point", "eleven_point")


def expected(case: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((ROOT / "expected.json").read_text())[case]
    return values


def coco_ground_truth(path: Path) -> tuple[list[int], list[tuple[int, int]], Classes, list[GroundTruth]]:
    content = json.loads(path.read_text())
    sizes = {int(image["id"]): (image["width"], image["height"]) for image in content["images"]}
    ids = sorted(sizes)
    categories = content["categories"]
    classes = Classes(tuple(c["name"] for c in categories), tuple(c["id"] for c in categories))
    index = classes.index_of_id()
    truths = []
    for image_id in ids:
        own = [a for a in content["annotations"] if int(a["image_id"]) == image_id]
        boxes = np.array([a["bbox"] for a in own], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        truths.append(
            GroundTruth(
                boxes,
                np.array([index[a["category_id"]] for a in own]),
                np.array([a["area"] for a in own]),
                np.array([Ignore.CROWD if a.get("iscrowd") else Ignore.NO for a in own]),
            )
        )
    return ids, [sizes[image_id] for image_id in ids], classes, truths


@pytest.mark.parametrize("case", COCO_CASES)
def test_coco_figures(case: str) -> None:
    figures = expected(case)
    ids, sizes, classes, truths = coco_ground_truth(ROOT / figures["gt"])
    detections = read_results(ROOT / figures["dt"], image_ids=ids, sizes=sizes, classes=classes)
    metrics = evaluate_detections(truths, detections, classes)
    for name, value in figures["pycocotools"].items():
        want = None if value == -1 else pytest.approx(value, abs=1e-9, rel=0)
        assert getattr(metrics, NAMES[name]) == want, name
    for name, value in figures.get("published", {}).items():
        digits = len(str(value).partition(".")[2])
        assert getattr(metrics, NAMES[name]) == pytest.approx(value, abs=0.51 * 10**-digits), name
    assert metrics.images == figures["images"]
    assert metrics.detections == figures["dets"]
    assert sum(map(len, truths)) == figures["gt_boxes"]
    assert metrics.ground_truths == sum(int((truth.ignore == 0).sum()) for truth in truths)


def read_lines(folder: Path) -> dict[str, list[list[str]]]:
    """Return the words of each line, by file name without its ending."""
    return {
        path.stem: [line.split() for line in path.read_text().splitlines() if line.strip()]
        for path in sorted(folder.glob("*.txt"))
    }


def voc_case(
    truth_rows: dict[str, list[list[str]]], found_rows: dict[str, list[list[str]]], *, xywh: bool
) -> tuple[list[GroundTruth], list[Detections], Classes]:
    """Rows are (class, four numbers, [difficult]) and (class, score, four numbers)."""
    rows = [row for rows in (*truth_rows.values(), *found_rows.values()) for row in rows]
    classes = Classes(tuple(sorted({row[0] for row in rows})))

    def boxes(values: Iterable[list[str]]) -> np.ndarray:
        corners = np.array([list(map(float, each)) for each in values]).reshape(-1, 4)
        if xywh:
            corners[:, 2:] += corners[:, :2]
        return corners

    truths, detections = [], []
    for name in sorted(truth_rows.keys() | found_rows.keys()):
        own = truth_rows.get(name, [])
        labels = np.array([classes.names.index(row[0]) for row in own], np.int64)
        difficult = [Ignore.DIFFICULT if row[5:] == ["difficult"] else Ignore.NO for row in own]
        truths.append(GroundTruth(boxes(row[1:5] for row in own), labels, ignore=np.array(difficult)))
        found = sorted(found_rows.get(name, []), key=lambda row: -float(row[1]))
        detections.append(
            Detections(
                boxes(row[2:6] for row in found),
                np.array([float(row[1]) for row in found]),
                np.array([classes.names.index(row[0]) for row in found], np.int64),
                classes,
                1000,
                1000,
            )
        )
    return truths, detections, classes


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("iou", ["0.1", "0.3", "0.5", "0.75"])
def test_voc_case_1(iou: str, interpolation: Interpolation) -> None:
    want = expected("podm_voc_test_case_1")
    folder = ROOT / "podm/tests/test_case_1"
    case = voc_case(read_lines(folder / "gts"), read_lines(folder / "dets"), xywh=True)
    assert (sum(map(len, case[0])), sum(map(len, case[1]))) == (want["gt_boxes"], want["dets"])
    found = voc_average_precision(*case, iou=float(iou), interpolation=interpolation, inclusive=True)
    assert found == {"object": pytest.approx(want["published"][interpolation][iou], abs=1e-9)}


@pytest.mark.parametrize(("iou", "value"), [(0.1, 0.280133), (0.3, 0.225397)])
def test_voc_case_1_with_continuous_boxes(iou: float, value: float) -> None:
    folder = ROOT / "podm/tests/test_case_1"
    case = voc_case(read_lines(folder / "gts"), read_lines(folder / "dets"), xywh=True)
    assert voc_average_precision(*case, iou=iou) == {"object": pytest.approx(value, abs=1e-6)}


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("iou", ["0.5", "0.75"])
def test_toy_cats(iou: str, interpolation: Interpolation, inclusive: bool) -> None:
    want = expected("podm_toyexample_cat")
    truth_rows: dict[str, list[list[str]]] = {}
    for path in sorted((ROOT / "podm/toyexample/gts_vocpascal_format").glob("*.xml")):
        truth_rows[path.stem] = [
            [
                str(each.findtext("name")),
                *(str(each.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")),
            ]
            for each in ElementTree.parse(path).getroot().iter("object")
        ]
    found_rows = read_lines(ROOT / "podm/toyexample/dets_classname_abs_xyx2y2")
    case = voc_case(truth_rows, found_rows, xywh=False)
    found = voc_average_precision(*case, iou=float(iou), interpolation=interpolation, inclusive=inclusive)
    assert found["cat"] == pytest.approx(want["published"][iou][interpolation], abs=5.1e-5)
    assert found["cat"] == pytest.approx(want["reproduced"][iou][interpolation], abs=1e-6)


def test_cartucho() -> None:
    want = expected("cartucho_map")
    folder = ROOT / "cartucho_map/input"
    case = voc_case(read_lines(folder / "ground-truth"), read_lines(folder / "detection-results"), xywh=False)
    assert len(case[0]) == want["images"]
    assert (sum(map(len, case[0])), sum(map(len, case[1]))) == (want["gt_boxes"], want["dets"])
    by_class = [ap for ap in voc_average_precision(*case, inclusive=True).values() if ap is not None]
    assert len(by_class) == want["classes"]
    assert np.mean(by_class) == pytest.approx(want["mAP_every_point_iou50"], abs=1e-9)
