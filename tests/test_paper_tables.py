"""Tables of the paper: published numbers, settings, which runs a study takes, and what its page says of them."""

import dataclasses
import json
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import kendalltau

import fresh
from retinanet.checkpoint import Model, save_model
from retinanet.cli.main import main
from retinanet.data import open_dataset
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import ConfigError, DataError
from retinanet.folders import write_json
from retinanet.model import BackboneSpec, ModelSpec, PyramidSpec, build_retinanet
from retinanet.objective import ByIou
from retinanet.paper import imbalance, measuring, running, speed
from retinanet.paper.comparison import compare_order, difference, interval, spread_of
from retinanet.paper.measuring import check_rows, measure, prepare
from retinanet.paper.page import Picture, Table, write_page
from retinanet.paper.results import Measured, Request, common_spread, what_is_known
from retinanet.paper.running import Job, Store, job_of, run_all, run_one
from retinanet.paper.settings import (
    SCALES,
    Scale,
    Setting,
    change_of,
    cross_entropy,
    focal,
    focal_star,
    options_of,
)
from retinanet.paper.study_page import page_of
from retinanet.paper.tables import STUDIES, Published, with_peers
from retinanet.records import Classes
from retinanet.training import recipes
from retinanet.training.optimizer import drops_of, rate
from retinanet.training.planning import plan_run
from retinanet.training.skipping import IN_A_ROW
from retinanet.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = SCALES["tiny"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return generate_shapes(folder, train=8, val=4, spec=ShapesSpec(image_size=96))


# ---------------------------------------------------------------------------------- published and settings


# As printed in the paper: AP, AP50, AP75; in 1e and 2 also APs, APm and APl, in 1e milliseconds.
PRINTED = {
    "table1a": """
        0.0 0.0 0.0 | 10.8 16.0 11.7 | 30.2 46.7 32.8 | 31.1 49.4 33.0 | 30.8 49.7 32.3 | 28.7 47.4 29.9 |
        25.1 41.7 26.1""",
    "table1b": """
        31.1 49.4 33.0 | 31.4 49.9 33.1 | 31.9 50.7 33.4 | 32.9 51.7 35.2 | 33.7 52.0 36.2 | 34.0 52.5 36.5 |
        32.2 49.6 34.8""",
    "table1c": """
        30.3 49.0 31.8 | 31.9 50.0 34.0 | 31.8 49.4 33.7 | 32.4 52.3 33.9 | 34.2 53.1 36.5 | 34.0 52.5 36.5 |
        33.8 52.1 36.2""",
    "table1d": """
        31.1 47.2 33.2 | 31.8 48.8 33.9 | 30.6 47.0 32.6 | 32.8 50.3 35.1 | 31.0 47.4 33.0 | 27.6 42.0 29.2 |
        31.1 47.2 33.2 | 28.3 42.4 30.3 | 24.0 35.5 25.8 | 36.0 54.9 38.7""",
    "table1e": """
        30.5 47.8 32.7 11.2 33.8 46.1 64 | 32.5 50.9 34.8 13.9 35.8 46.7 72 | 34.3 53.2 36.9 16.2 37.4 47.4 98 |
        35.1 54.2 37.7 18.0 39.3 46.4 121 | 35.7 55.0 38.5 18.9 38.9 46.3 153 |
        31.9 49.5 34.1 11.6 35.8 48.5 81 | 34.4 53.1 36.8 14.7 38.5 49.1 90 | 36.0 55.2 38.7 17.4 39.6 49.7 122 |
        37.1 56.6 39.8 19.1 40.6 49.4 154 | 37.8 57.5 40.8 20.2 41.1 49.2 198""",
    "table2": """
        34.9 55.7 37.4 15.6 38.7 50.9 | 36.2 59.1 39.0 18.2 39.0 48.2 | 34.7 55.5 36.7 13.5 38.1 52.0 |
        36.8 57.7 39.2 16.2 39.8 52.1 | 21.6 44.0 19.2 5.0 22.4 35.5 | 31.2 50.4 33.3 10.2 34.5 49.8 |
        33.2 53.3 35.2 13.0 35.4 51.1 | 39.1 59.1 42.3 21.8 42.7 50.2 | 40.8 61.1 44.1 24.1 44.2 51.2""",
    "table3": "31.1 49.4 33.0 | 34.0 52.5 36.5 | 33.8 52.7 36.3 | 33.9 51.8 36.4",
}  # fmt: skip


@pytest.mark.parametrize("study", PRINTED)
def test_published_figures(study: str) -> None:
    printed = [tuple(map(float, row.split())) for row in PRINTED[study].split("|")]
    rows = STUDIES[study](TINY).rows
    held = [astuple(row.published)[: len(numbers)] for row, numbers in zip(rows, printed, strict=True)]
    assert held == printed


def test_published_figures_outside_of_tables() -> None:
    known = {
        (name, row.name): (row.published.ap, row.published.ap50, row.published.ap75)
        for name in ("prior", "pyramid", "hinge", "fig7")
        for row in STUDIES[name](TINY).rows
        if row.published.ap is not None
    }
    focal_2 = (34.0, 52.5, 36.5)
    assert known == {
        ("prior", "CE, pi 0.01"): (30.2, 46.7, 32.8),
        ("prior", "FL, pi 0.01"): focal_2,
        ("pyramid", "P3 to P7"): focal_2,
        ("hinge", "FL, gamma 2"): focal_2,
        ("fig7", "CE"): (31.1, 49.4, 33.0),
        ("fig7", "FL*, gamma 1, beta 0"): (10.8, 16.0, 11.7),
        ("fig7", "FL*, gamma 2, beta 1"): (33.8, 52.7, 36.3),
        ("fig7", "FL*, gamma 4, beta 0"): (33.9, 51.8, 36.4),
    }
    said = {row.name: row.published.said for make in STUDIES.values() for row in make(TINY).rows}
    assert {name: words for name, words in said.items() if words != "-"} == {
        "CE, pi 0.5 (no prior)": "diverged",
        "C5 alone": "low",
        "hinge, zero above p_t 0.5": "meaningless",
        "hinge, zero above p_t 0.9": "meaningless",
    }
    assert speed.OTHERS == {
        "YOLOv2": (21.6, 25), "SSD321": (28.0, 61), "DSSD321": (28.0, 85), "R-FCN (extrapolated)": (29.9, 85),
        "SSD513": (31.2, 125), "DSSD513": (33.2, 156), "FPN Faster R-CNN": (36.2, 172),
    }  # fmt: skip


def test_every_published_row_is_complete() -> None:
    for make in STUDIES.values():
        study = make(TINY)
        assert len({row.name for row in study.rows}) == len(study.rows)
        for row in study.rows:
            if study.name.startswith("table"):
                assert all(getattr(row.published, figure) is not None for figure in study.figures), row


def test_equal_settings_are_one() -> None:
    def settings(name: str) -> dict[str, Setting | None]:
        return {row.name: row.setting for row in STUDIES[name](TINY).rows}

    quarter = focal(2)
    assert settings("table1a")["alpha 0.75"] == settings("table1b")["gamma 0, alpha 0.75"]
    assert settings("table1a")["alpha 0.75"] == settings("table3")["CE"]
    assert settings("table1a")["alpha 0.5"] == settings("prior")["CE, pi 0.01"]
    assert settings("table2")["RetinaNet, R101"] == quarter  # at this scale
    for name, row in (
        ("table1b", "gamma 2, alpha 0.25"),
        ("table1c", "3 x 3"),
        ("table1d", "FL, gamma 2, alpha 0.25"),
        ("table3", "FL, gamma 2"),
        ("pyramid", "P3 to P7"),
    ):
        assert settings(name)[row] == quarter
    every = {setting for name in STUDIES for setting in settings(name).values() if setting is not None}
    assert len({setting.key for setting in every}) == len(every)


def test_a_setting_becomes_a_plan(data: Path) -> None:
    train = open_dataset(data, "train")
    setting = replace(focal_star(4, 0), prior=0.5, scales=2, ratios=1, deep=True, side=800, jitter=True)
    plan = plan_run(options_of(setting, TINY, str(data), seed=3), train, change_of(setting, 2.0))
    assert plan.recipe.loss == "fl-star"
    assert plan.recipe.loss_settings == {"alpha": 0.25, "gamma": 4.0, "beta": 0.0}
    assert plan.recipe.prior == 0.5
    assert plan.spec.backbone.name == TINY.deep
    assert plan.spec.anchors.scales == (1.0, 2**0.5)
    assert plan.spec.anchors.ratios == (1.0,)
    assert plan.spec.anchors.sizes == (16, 32, 64, 128, 256)
    assert plan.spec.preprocessing.image_size == 224  # 160 * 800 / 600, a multiple of 32
    assert plan.augmentation.scales[0] == 0.8
    assert plan.steps == 900
    usual = plan_run(options_of(focal(2), TINY, str(data), seed=3), train, change_of(focal(2), 1.0))
    assert plan.lr == pytest.approx(2 * usual.lr)
    assert usual.spec.preprocessing.image_size == 160
    assert usual.steps == TINY.steps
    # The paper's matching, whatever the recipe that trains has.
    assert usual.objective.matching == ByIou(positive_iou=0.5, negative_iou=0.4, low_quality=True)


def test_the_imbalance_of_images() -> None:
    one = imbalance.imbalance_of(ShapesSpec(max_objects=1, empty_share=0.5), images=20)
    assert one.anchors == 4842
    assert 0.3 < one.objects < 0.7
    assert one.ratio == pytest.approx(one.negatives / one.positives)
    assert one.positives + one.negatives <= 4842


def test_the_candidate_nearest_to_one_in_a_thousand_is_chosen() -> None:
    def candidate(ratio: float, empty: float) -> imbalance.Imbalance:
        return imbalance.Imbalance(ShapesSpec(empty_share=empty), 5000, 1.0, 1.0, ratio)

    far, near, emptier, fuller = (
        candidate(400, 0.1),
        candidate(900, 0.5),
        candidate(950, 0.7),
        candidate(1100, 0.6),
    )
    assert imbalance.choose([far, near, emptier, fuller]) is near
    assert imbalance.choose([far, emptier, fuller]) is fuller
    assert imbalance.choose([candidate(2000, 0.1), far]).ratio == 2000  # twice is nearer than two fifths


def test_the_tiny_images_are_those_that_were_chosen() -> None:
    """The page was made before anything was trained on them: `retinanet paper setting`."""
    chosen = json.loads((Path(__file__).parents[1] / "docs" / "paper" / "setting.json").read_text())
    assert TINY.shapes is not None
    spec = TINY.shapes[0]
    assert (spec.max_objects, spec.empty_share) == (chosen["max_objects"], chosen["empty_share"])


# ---------------------------------------------------------------------------------- statistics


def test_interval_by_hand() -> None:
    found = interval([0.30, 0.32, 0.34])
    # s = 0.02, t of 2 degrees of freedom = 4.3027
    assert found.mean == pytest.approx(0.32)
    assert found.half == pytest.approx(4.3027 * 0.02 / 3**0.5, rel=1e-4)
    assert found.percent() == "32.0 ± 5.0"
    assert interval([0.5]).percent() == "50.0"


def test_the_order_of_rows() -> None:
    same = compare_order([1, 2, 3], [[0.1, 0.11], [0.5, 0.51], [0.9, 0.91]])
    assert (same.tau, same.same, same.rows) == (1, True, 3)
    sure = compare_order([1, 2, 3], [[0.1] * 5, [0.5] * 5, [0.9] * 5])
    assert (sure.tau, sure.low, sure.high) == (1, 1, 1)
    assert sure.in_words().startswith(
        "The order of the paper's rows is reproduced: Kendall's tau over 3 rows is 1.00 (1"
    )
    reverse = compare_order([1, 2, 3], [[0.3, 0.3], [0.2, 0.2], [0.1, 0.1]])
    assert reverse.tau == -1
    assert "The order of the paper's rows is reversed: " in reverse.in_words()
    nearly = compare_order([1, 2, 3, 4], [[0.4, 0.4], [0.2, 0.2], [0.3, 0.3], [0.1, 0.1]])
    assert "is reversed in part: " in nearly.in_words()
    part = compare_order([1, 2, 3, 4], [[0.1, 0.1], [0.3, 0.3], [0.2, 0.2], [0.4, 0.4]])
    assert part.tau is not None
    assert 0 < part.tau < 1
    assert "is reproduced in part" in part.in_words()
    # Noise as large as the differences: the means are in order, and nobody knows whether the rows are.
    noisy = compare_order([1, 2, 3], [[0.1, 0.3], [0.15, 0.3], [0.2, 0.3]])
    assert noisy.same
    assert noisy.low is not None
    assert noisy.low < 0
    assert "is neither confirmed nor refuted by these seeds" in noisy.in_words()
    # Equal published rows need no order, and tau-b below 1 says that there are some.
    tied = compare_order([1, 1, 2], [[0.2], [0.1], [0.3]])
    assert tied.same
    assert tied.tau == pytest.approx(0.816, abs=1e-3)
    alone = compare_order([1, 2, 3], [[0.1], [0.2], [0.3]])
    assert alone.low is None
    assert "are in the paper's order" in alone.in_words()
    assert "no row has two seeds" in alone.in_words()
    alike = compare_order([1, 2, 3], [[0.1, 0.2], [0.1, 0.2], [0.1, 0.2]])
    assert alike.tau is None
    assert "all alike" in alike.in_words()


def test_seeds_of_all_rows_say_how_far_they_spread() -> None:
    rows = [[0.30, 0.32, 0.34], [0.10, 0.11, 0.15, 0.16], [0.2], []]
    # Squares around the means 0.32 and 0.13: 2 x 0.02^2, and 2 x (0.03^2 + 0.02^2).
    found = spread_of(rows)
    assert found is not None
    assert found.freedom == 2 + 3
    assert found.deviation == pytest.approx(((2 * 0.02**2 + 2 * (0.03**2 + 0.02**2)) / 5) ** 0.5)
    assert spread_of([[0.1], [0.2]]) is None
    # t of 5 degrees of freedom = 2.5706
    assert interval(rows[0], found).half == pytest.approx(2.5706 * found.deviation / 3**0.5, rel=1e-4)
    assert interval(rows[2], found).half == pytest.approx(2.5706 * found.deviation, rel=1e-4)
    apart = difference(rows[0], rows[1], spread=found)
    half = 2.5706 * found.deviation * (1 / 3 + 1 / 4) ** 0.5
    assert apart.mean == pytest.approx(0.19)
    assert (apart.low, apart.high) == pytest.approx((0.19 - half, 0.19 + half), rel=1e-4)
    # Two comparisons at once: t of 0.9875 = 3.1634
    wide = difference(rows[0], rows[1], spread=found, comparisons=2)
    assert 0.19 - (wide.low or 0) == pytest.approx(half * 3.1634 / 2.5706, rel=1e-4)
    alone = difference([0.3], [0.1], spread=found)
    assert 0.2 - (alone.low or 0) == pytest.approx(2.5706 * found.deviation * 2**0.5, rel=1e-4)


@pytest.mark.parametrize(("times", "low"), [(0.8, -1), (1.2, 1)])
def test_the_order_of_two_rows_is_known_where_their_difference_is(times: float, low: int) -> None:
    """Two rows are in the other order as often as Student's t says: at its quantile 0.975, in 2.5 % of all draws."""
    first = [0.10, 0.12, 0.14]
    # s = 0.02, t of 4 degrees of freedom = 2.7764
    second = [seed + times * 2.7764 * 0.02 * (2 / 3) ** 0.5 for seed in first]
    found = compare_order([1, 2], [first, second])
    assert (found.low, found.high) == (low, 1)


def test_rows_that_diverged_do_not_say_how_far_seeds_spread() -> None:
    sound = Measured({1.0: 0.3}, 1.0, [{"ap": 0.3}, {"ap": 0.4}])
    gone = Measured({1.0: 0.3}, 1.0, [{"ap": 0.3}, {"ap": 0.0, "diverged": "the loss is nan"}])
    assert common_spread([sound, gone]) == common_spread([sound]) == spread_of([[0.3, 0.4]])
    # What all seeds found alike is certain, whatever others do.
    order = compare_order([0, 1], [[0.0, 0.0], [0.2, 0.3]], spread_of([[0.2, 0.3]]))
    assert order.low is not None


def test_a_command_trains_what_was_asked_for(tmp_path: Path) -> None:
    request = Request(SCALES["tiny"], None, Path("here"), 3, (), 1)
    drawn = replace(request, data=Path("here/data/shapes-tiny"))
    assert request.command("table1e") == drawn.command("table1e") == "retinanet paper table1e --output here"
    own = replace(
        request,
        data=Path("my data"),
        scale=replace(SCALES["small"], steps=7, sgd=True),
    )
    assert own.command("table1b", "gamma 2") == (
        "retinanet paper table1b --rows 'gamma 2' --scale small --data 'my data' --steps 7 --sgd --output here"
    )


def test_committed_pages_are_those_of_the_committed_results(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "docs" / "paper"
    pages = [file for file in sorted(folder.rglob("*.json")) if file.stem in STUDIES]
    assert pages
    for file in pages:
        known = json.loads(file.read_text())
        (results,) = [one.name for one in (file.parent / "results").iterdir() if one.is_dir()]
        scale = SCALES[known["scale"]]
        scale = replace(scale, sgd=file.parent.name == "sgd")
        data = file.parent / "data" / f"shapes-{scale.name}"
        request = Request(
            scale, data, file.parent, seeds=max(len(row["results"]) for row in known["rows"]), rows=(), parallel=1,
            about_data=known["data"], images=4000, conditions=results.rpartition("-")[2],
            peers=any((row["setting"] or {}).get("peer") for row in known["rows"]),
        )  # fmt: skip
        write_page(page_of(request.study(file.stem), request, Store(file.parent)), tmp_path)
        for kind in (".md", ".json"):
            assert (tmp_path / file.name).with_suffix(kind).read_text() == file.with_suffix(
                kind
            ).read_text(), file


def test_tau_is_scipys() -> None:
    random = np.random.default_rng(0)
    for rows in (3, 4, 9):
        published = random.integers(0, 5, rows).astype(float)
        measured = random.integers(0, 4, rows).astype(float)
        expected = kendalltau(published, measured).statistic
        found = compare_order(published.tolist(), [[value] for value in measured]).tau
        assert found == (None if np.isnan(expected) else pytest.approx(expected))


def test_one_row_is_above_another_where_the_seeds_do_not_explain_it() -> None:
    low, high, wide = [0.20, 0.21, 0.22], [0.24, 0.25, 0.26], [0.15, 0.25, 0.35]
    # Two intervals of 0.025 on either side meet; that of the difference does not hold 0.
    assert (interval(low).half or 0) + (interval(high).half or 0) > 0.04
    assert difference(high, low).above is True
    assert difference(low, high).above is False
    assert difference(wide, low).above is None
    assert difference([0.3], [0.2]).above is None  # of one seed nobody knows


def test_what_seeds_say_of_a_published_difference() -> None:
    low, high = [0.20, 0.21, 0.22], [0.24, 0.25, 0.26]
    above, below = difference(high, low), difference(low, high)
    said = [above.verdict(2.9), below.verdict(2.9), below.verdict(-2.9)]
    assert said == ["as published", "the other way", "as published"]
    assert [above.verdict(None), below.verdict(None), above.verdict(0)] == ["above", "below", "above"]
    assert difference([0.1, 0.3], low).verdict(2.9) == "not told apart"
    assert difference([0.3], low).verdict(2.9) == "of one seed"


def test_differences_are_of_rows_that_can_be_trained() -> None:
    for scale in SCALES.values():
        for name, study in STUDIES.items():
            for one in (study(scale), *([with_peers(study(scale))] if name == "table2" else [])):
                rows = [row.name for row in one.rows if row.setting is not None]
                assert {row for pair in one.against for row in pair} <= set(rows), name
                assert set(one.here) <= set(rows)


# ---------------------------------------------------------------------------------- running


def request(data: Path, output: Path, **changes: Any) -> Request:
    usual = Request(scale=TINY, data=data, output=output, seeds=3, rows=(), parallel=2)
    return replace(usual, about_data="blood: 8 training images, 25% without objects", **changes)


def fake(monkeypatch: pytest.MonkeyPatch, ap: Any, *, drawn: bool = False) -> list[Job]:
    """Put a function of the job in the place of training; return the list of what was run.

    Figures become files only where asked: a page is written after every run.
    """
    ran: list[Job] = []
    if not drawn:
        monkeypatch.setattr("retinanet.paper.page._png", lambda _: b"")

    def run_apart(job: Job, store: Store, *_: object) -> tuple[int, str]:
        ran.append(job)
        value = ap(job)
        if value is None:
            return 2, "retinanet: something was wrong"
        file = store.file(job)
        file.parent.mkdir(parents=True, exist_ok=True)
        figures = dict.fromkeys(running.FIGURES, 0.0 if value == "nan" else value)
        result = {**figures, "diverged": "the loss is nan at step 10"} if value == "nan" else figures
        write_json(file, {**result, "seconds": 60.0})
        return 0, ""

    monkeypatch.setattr(running, "_run_apart", run_apart)
    return ran


def test_rates_are_tried_until_the_best_has_no_better_neighbour() -> None:
    def tried(ap: dict[float, float], scale: Scale = TINY) -> list[float]:
        known: dict[float, float] = {}
        while rates := scale.next_rates(known):
            known |= {rate: ap.get(rate, 0.0) for rate in rates}
        return sorted(known)

    assert tried({0.25: 0.1, 0.5: 0.3, 1: 0.2, 2: 0.4}) == [
        0.25,
        0.5,
        1,
    ]  # what lies beyond a worse one stays unknown
    assert tried({1: 0.3, 2: 0.2}) == [0.5, 1, 2]
    assert tried({0.125: 0.4, 0.25: 0.3, 0.5: 0.2, 1: 0.1}) == [0.125, 0.25, 0.5, 1]  # the edge of the grid
    assert tried({1: 0.1, 2: 0.2, 4: 0.3}) == [0.5, 1, 2, 4]
    assert tried({}) == [0.125, 0.25, 0.5, 1]  # what diverges everywhere is tried as low as there is
    assert tried({0.25: 0.2}) == [0.125, 0.25, 0.5, 1]
    assert tried({}, SCALES["paper"]) == [1]
    assert TINY.rates == SCALES["small"].rates == (0.125, 0.25, 0.5, 1, 2, 4)


def test_rates_with_one_seed_then_the_best_with_the_others(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {"CE": 2.0, "FL, gamma 2": 1.0, "FL*, gamma 2, beta 1": 0.5, "FL*, gamma 4, beta 0": 1.0}
    rows = STUDIES["table3"](TINY).rows
    wanted = {row.setting: best[row.name] for row in rows}

    def ap(job: Job) -> float:
        return 0.3 + 0.01 * job.seed + 0.1 * (job.rate == wanted.get(job.setting)) + 0.001 * job.rate

    ran = fake(monkeypatch, ap)
    said: list[str] = []
    assert measure(["table3"], request(data, tmp_path), said.append) == []
    assert len(ran) == 4 + 3 * 3 + 4 * 3 == len(said)
    looked_at = {0.5: [0.25, 0.5, 1], 1.0: [0.5, 1, 2], 2.0: [0.5, 1, 2, 4]}
    for row in rows:
        mine = [job for job in ran if job.setting == row.setting]
        assert sorted(job.rate for job in mine if job.seed == 0) == looked_at[best[row.name]]
        assert sorted((job.rate, job.seed) for job in mine if job.seed) == [
            (best[row.name], 1),
            (best[row.name], 2),
            (best[row.name], 3),
        ]
        known = what_is_known(row.setting, request(data, tmp_path), Store(tmp_path))
        assert known.rate == best[row.name]
        assert known.of("ap").mean == pytest.approx(
            0.42 + 0.001 * best[row.name]
        )  # seed 0 chose, and counts no more
    # What is there is not made again; another table takes it over.
    ran.clear()
    measure(["table3"], request(data, tmp_path), said.append)
    assert ran == []
    measure(["table1b"], request(data, tmp_path, rows=("gamma 2", "gamma 0, alpha 0.75")), said.append)
    assert ran == []
    measure(["table1b"], request(data, tmp_path, rows=("gamma 5",)), said.append)
    assert {job.setting for job in ran} == {focal(5)}


def test_figure_7_draws_the_rows_that_are_known(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = focal_star(4, 1)
    ran = fake(monkeypatch, lambda job: 0.3 if job.setting == better else 0.2)
    asked = request(data, tmp_path, seeds=2, rows=("CE", "gamma 4, beta 1", "gamma 1, beta 0"))
    measure(["fig7"], asked, lambda _: None)
    assert {job.setting for job in ran} == {cross_entropy(0.75), better, cross_entropy(0.25)}
    page = page_of(STUDIES["fig7"](TINY), asked, Store(tmp_path))
    (picture,) = [part for part in page.parts if isinstance(part, Picture)]
    lines = {line.get_label(): line.get_color() for line in picture.figure.axes[0].lines}
    assert set(lines) >= {"CE", "$\\gamma$ 4, $\\beta$ 1: 30.0 ± 0.0", "$\\gamma$ 1, $\\beta$ 0: 20.0 ± 0.0"}
    assert lines["$\\gamma$ 4, $\\beta$ 1: 30.0 ± 0.0"] != lines["$\\gamma$ 1, $\\beta$ 0: 20.0 ± 0.0"]
    assert "Kendall" not in (tmp_path / "fig7.md").read_text()


def test_a_page_while_rows_are_missing_and_when_all_are_there(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(data, tmp_path, rows=("CE",))
    fake(monkeypatch, lambda job: 0.2 + 0.02 * job.seed)
    measure(["table3"], asked, lambda _: None)
    text = (tmp_path / "table3.md").read_text()
    assert "| CE | 31.1 | 49.4 | 33.0 | 24.0 ± 5.0 | 24.0 ± 5.0 | 24.0 ± 5.0 | x 0.125 | 3 |" in text
    assert "| FL, gamma 2 | 34.0 | 52.5 | 36.5 | not measured |  |  |  |  |" in text
    assert "Kendall" not in text
    assert "on blood: 8 training images, 25% without objects; " in text
    assert "600 steps of 8, recipe small, 160 px" in text
    measure(["table3"], replace(asked, rows=()), lambda _: None)
    text = (tmp_path / "table3.md").read_text()
    assert "The 4 measured rows are all alike, and have no order." in text
    assert "![AP of the rows" in text
    values = json.loads((tmp_path / "table3.json").read_text())
    assert [len(row["results"]) for row in values["rows"]] == [3] * 4
    assert values["rows"][0]["rates"] == {"0.125": 0.2, "0.25": 0.2, "0.5": 0.2, "1": 0.2}
    assert values["rows"][0]["published"]["ap"] == 31.1


def test_a_run_that_diverged_is_a_result_and_one_that_failed_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ap(job: Job) -> float | str | None:
        if job.setting.prior == 0.5:
            return "nan"
        return None if job.setting == focal(2) and job.rate == 0.25 else 0.3

    ran = fake(monkeypatch, ap)
    said: list[str] = []
    failures = measure(["prior"], request(data, tmp_path, seeds=2), said.append)
    key = focal(2).key
    assert failures == [f"{key}/rate-0.25-seed-0: exit code 2; retinanet: something was wrong"]
    assert any(line.endswith("diverged, 1.0 min") for line in said)
    assert any("failed (retinanet: something was wrong)" in line for line in said)
    text = (tmp_path / "prior.md").read_text()
    assert "CE, pi 0.5 (no prior): 2 of 2 runs diverged (the loss is nan at step 10)." in text
    cells = "diverged | diverged | diverged | diverged |"  # down to the grid's end
    assert f"| CE, pi 0.5 (no prior) | {cells}" in text
    assert "| FL, pi 0.01 | 34.0 | 52.5 | 36.5 | not measured |" in text  # one of its rates is missing
    assert not any(job.setting == focal(2) and job.seed for job in ran)
    # Given again, the command tries what failed.
    ran.clear()
    fake(monkeypatch, lambda job: 0.3)
    assert measure(["prior"], request(data, tmp_path, seeds=2), said.append) == []


def test_results_under_other_conditions_do_not_mix(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    job = Job(focal(2), "tiny", "/a/blood", 1.0, 0)
    jobs = [
        job,
        replace(job, scale="small"),
        replace(job, data="/a/cells"),
        replace(job, conditions="1a2b"),
        replace(job, rate=2.0),
        replace(job, rate=0.5),
        replace(job, rate=0.5, seed=1),
        replace(job, seed=1),
        replace(job, setting=focal(1)),
    ]
    for place in (store.file, store.run, store.log):
        assert len({place(one) for one in jobs}) == len(jobs)
    # Data of the same name, other weights, another length: all of that is in the conditions.
    other = generate_shapes(tmp_path / "shapes", train=8, val=4, seed=1, spec=ShapesSpec(image_size=96))
    assert other.name == data.name
    usual = request(data, tmp_path)
    asked = [
        usual,
        replace(usual, data=other),
        replace(usual, pretrained="none"),
        replace(usual, scale=replace(TINY, steps=601)),
        replace(usual, scale=replace(TINY, options={**TINY.options, "channels": 96})),
    ]
    conditions = [prepare(one, lambda _: None, draw=True).conditions for one in asked]
    assert len(set(conditions)) == len(asked)
    # A recipe that has changed since is another condition, too.
    monkeypatch.setattr(measuring, "small", lambda *of: replace(recipes.small(*of), average_decay=0.9))
    assert prepare(usual, lambda _: None, draw=True).conditions not in conditions
    monkeypatch.undo()
    # Not so its own loss and matching, in whose place the paper's stand.
    own = {"loss": "hinge", "matching": "atss", "positive_iou": 0.6}
    monkeypatch.setattr(measuring, "small", lambda *of: replace(recipes.small(*of), **own))
    assert prepare(usual, lambda _: None, draw=True).conditions == conditions[0]
    monkeypatch.undo()
    # Which rates are tried changes no result.
    one_rate = replace(usual, scale=replace(TINY, rates=(1.0,), first_rates=(1.0,)))
    assert prepare(one_rate, lambda _: None, draw=True).conditions == conditions[0]
    copy = shutil.copytree(data, tmp_path / "elsewhere" / data.name)
    assert prepare(replace(usual, data=copy), lambda _: None, draw=True).conditions == conditions[0]
    about = prepare(usual, lambda _: None, draw=True).about_data
    said = r"shapes: 8 training images, \d+% without objects, anchors with IoU 0.5 for \d+% of the objects"
    assert re.fullmatch(said, about)


def test_a_real_run(data: Path, tmp_path: Path) -> None:
    job = Job(replace(cross_entropy(0.75), side=240), "tiny", str(data), 0.5, 1, steps=2)
    assert job_of(json.dumps(dataclasses.asdict(job))) == job
    store = Store(tmp_path)
    run_one(job, store)
    result = store.result(job)
    assert result is not None
    assert set(result) >= {"ap", "ap50", "ap75", "seconds", "setting", "rate", "seed", "torch"}
    assert result["setting"]["told"] == [["alpha", 0.75]]
    plan = json.loads((store.run(job) / "plan.json").read_text())
    assert plan["recipe"]["loss"] == "balanced-ce"
    assert plan["steps"] == plan["validate_every"] == 2
    assert not (store.run(job) / "last").exists()


def interrupted(job: Job, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train to the third step, of which a state is kept after the second."""

    class Killed(BaseException):
        pass

    steps, step = [], TrainingStep.__call__

    def counting(self: TrainingStep, batch: Any, lr: float) -> Any:
        steps.append(lr)
        if len(steps) == 3:
            raise Killed
        return step(self, batch, lr)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingStep, "__call__", counting)
        with pytest.raises(Killed):
            run_one(job, store)
    assert store.result(job) is None


def test_a_run_that_was_interrupted_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        SCALES, "tiny", replace(TINY, steps=4, side=64, options={**TINY.options, "save_every_steps": 2})
    )
    job, whole, store = Job(focal(2), "tiny", str(data), 0.5, 1), Store(tmp_path / "a"), Store(tmp_path / "b")
    run_one(job, whole)
    interrupted(job, store, monkeypatch)
    run_one(job, store)
    expected, result = whole.result(job), store.result(job)
    assert expected is not None
    # How long it took before is not known, and peers are not given that time.
    assert result == {name: expected[name] for name in expected if name not in ("seconds", "own_seconds")}
    weights = [load_file(one.run(job) / "best" / "model.safetensors") for one in (whole, store)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (store.run(job) / "resumes.jsonl").read_text().count("\n") == 1
    assert not (store.run(job) / "checkpoints").exists()


def test_a_run_that_cannot_go_on_says_how_it_begins_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        SCALES, "tiny", replace(TINY, steps=4, side=64, options={**TINY.options, "save_every_steps": 2})
    )
    job, store = Job(focal(2), "tiny", str(data), 0.5, 1), Store(tmp_path)
    interrupted(job, store, monkeypatch)
    run = store.run(job)
    (run / "plan.json").unlink()
    with pytest.raises(
        ConfigError, match=rf"needs the run's plan.json; .*\. To begin this run anew, remove {run}$"
    ):
        run_one(job, store)
    shutil.rmtree(run)
    run_one(job, store)
    assert "seconds" in (store.result(job) or {})


def test_a_run_that_another_process_is_at_is_waited_for(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, store = Job(focal(2), "tiny", str(data), 0.5, 1), Store(tmp_path)
    other = FileLock(store.run(job).with_name(f"{store.run(job).name}.lock"))
    store.run(job).parent.mkdir(parents=True)
    other.acquire()
    monkeypatch.setattr(running, "run_training", None)  # nothing is trained
    waiting = threading.Thread(target=run_one, args=(job, store))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    store.file(job).parent.mkdir(parents=True)
    write_json(store.file(job), {"ap": 0.5})
    other.release()
    waiting.join(60)
    assert not waiting.is_alive()
    assert store.result(job) == {"ap": 0.5}


@pytest.mark.slow
def test_what_cannot_be_trained_ends_its_own_process_with_a_message_and_the_command_goes_on(
    tmp_path: Path,
) -> None:
    store, said = Store(tmp_path), list[str]()
    absent = Job(focal(2), "tiny", str(tmp_path / "absent"), 0.5, 1)
    (failure,) = run_all([absent], store, parallel=1, say=said.append, done=lambda: None)
    assert "exit code 2; retinanet: " in failure
    assert "absent" in failure
    assert store.result(absent) is None


def test_a_loss_that_is_not_finite_is_kept_as_a_result(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first step spoils the weights, and then so many in a row are skipped that the run ends.
    monkeypatch.setitem(SCALES, "tiny", replace(TINY, steps=1 + IN_A_ROW))
    job = Job(replace(cross_entropy(0.75), side=240), "tiny", str(data), 1e30, 0)
    store = Store(tmp_path)
    run_one(job, store)
    result = store.result(job)
    assert result is not None
    assert "were skipped: a loss or gradient of theirs was not finite" in result["diverged"]
    assert [result[figure] for figure in running.FIGURES] == [0.0] * 6


# ---------------------------------------------------------------------------------- data and the command


def test_images_are_drawn_once_and_known_again(tmp_path: Path) -> None:
    small = replace(TINY, shapes=(ShapesSpec(image_size=96), 3, 2))
    asked = replace(request(tmp_path, tmp_path), scale=small, data=None)
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"nothing is trained at scale tiny in .* yet; train a table first"):
        prepare(asked, said.append, draw=False)
    made = prepare(asked, said.append, draw=True)
    assert made.data == tmp_path / "data" / "shapes-tiny"
    assert prepare(asked, said.append, draw=False) == made
    assert len(said) == 1
    other = replace(asked, scale=replace(small, shapes=(ShapesSpec(image_size=96), 4, 2)))
    with pytest.raises(DataError, match="holds other images than this version draws for --scale tiny"):
        prepare(other, said.append, draw=True)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["paper", *arguments])
    return int(stopped.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("iou", "--seeds", "2"), "--seeds belongs to items that are measured, such as table1b"),
        (("iou", "--dry-run"), "--dry-run belongs to items that are measured"),
        (("table1b", "--seeds", "0"), "--seeds needs 1 or more; got 0"),
        (("table1b", "--steps", "0"), "--steps needs 1 or more; got 0"),
        (("iou", "--sgd"), "--sgd belongs to items that are measured"),
        (("table3", "--sgd", "--scale", "paper", "--data", "x"), "--sgd belongs to scales tiny and small"),
        (("iou", "--steps", "5"), "--steps belongs to items that are measured"),
        (("table1b", "--parallel", "0"), "--parallel needs 1 or more; got 0"),
        (("table1b", "--scale", "paper"), "--scale paper needs --data: a folder with COCO's annotations"),
        (("fig4", "--scale", "paper"), "--scale paper needs --data: a folder with COCO's annotations"),
        (("table1b", "--pretrained", "x"), "--pretrained belongs to --scale paper; tiny starts from scratch"),
        (("iou", "--seeds", "0"), "--seeds belongs to items that are measured"),
        (("iou", "--rows", ""), "--rows belongs to items that are measured"),
        (("table2", "--rows", "YOLO"), "--rows: no row that is trained has a name with 'YOLO' in it"),
        (("table1b", "--scale", "large"), "--scale needs one of tiny, small, paper; got 'large'"),
        (
            ("table1b", "--rows", "gamma 3"),
            "--rows: no row that is trained has a name with 'gamma 3' in it.* There are: gamma 0, alpha",
        ),
        (("table1z",), "Did you mean 'table1"),
    ],
)
def test_wrong_requests(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert re.search(message, " ".join(err.split()))


def test_tables_of_another_length_are_others(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = fake(monkeypatch, lambda job: 0.3)
    asked = ("table3", "--rows", "CE", "--data", str(data), "--output", str(tmp_path), "--seeds", "1")
    run(capsys, *asked)
    assert {job.steps for job in ran} == {TINY.steps}
    usual = {job.folder for job in ran}
    ran.clear()
    run(capsys, *asked, "--steps", "7")
    assert {job.steps for job in ran} == {7}
    assert usual.isdisjoint(job.folder for job in ran)
    text = (tmp_path / "table3.md").read_text()
    assert "; 7 steps of 8" in text
    assert "Muon with a cosine" in text


def test_tables_by_the_papers_optimizer_are_others(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = prepare(request(data, tmp_path), lambda _: None, draw=True).conditions
    ran = fake(monkeypatch, lambda job: 0.3)
    run(
        capsys, "table3", "--rows", "CE", "--data", str(data), "--output", str(tmp_path), "--seeds", "1", "--sgd"
    )  # fmt: skip
    assert usual not in {job.conditions for job in ran}
    assert "a cosine for the rate of the paper's SGD" in (tmp_path / "table3.md").read_text()
    job = ran[0]
    assert job.rate == 0.5
    options = options_of(job.setting, TINY, job.data, seed=0)
    plan = plan_run(options, open_dataset(data, "train"), job.change)
    paper = recipes.paper(plan.spec.classes, "resnet50", None)
    for name in ("optimizer", "weight_decay", "decay_all", "clip_norm"):
        assert getattr(plan.recipe, name) == getattr(paper, name)
    assert plan.recipe.lr == paper.lr / 2
    assert plan.lr == paper.lr / 4  # for 8 images a step


def test_the_command_measures_and_tells(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, lambda job: 0.3 if job.setting != cross_entropy(0.75) else None, drawn=True)
    code, out, _ = run(
        capsys,
        "table3",
        "iou",
        "--data",
        str(data),
        "--output",
        str(tmp_path),
        "--seeds",
        "1",
        "--rows",
        "FL, ; CE",
    )
    assert code == 1
    assert f"iou: {tmp_path / 'iou'}.md" in out
    assert f"table3: {tmp_path / 'table3'}.md (.html, .json)" in out  # one row is no picture
    assert out.count("failed: ") == 2
    fake(monkeypatch, lambda job: 0.3)
    code, out, _ = run(
        capsys, "table3", "--data", str(data), "--output", str(tmp_path), "--seeds", "1", "--rows", "CE"
    )
    assert code == 0
    assert f"table3: {tmp_path / 'table3'}.md (.html, .json, .png)" in out


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as COCO has them: 80 classes would take 80 categories; three are enough for the layout."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train2017", 4), ("val2017", 2)):
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(1, count + 1):
            name = f"{number:012d}.jpg"
            Image.fromarray(random.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(root / split / name)
            images.append({"id": number, "file_name": name, "width": 80, "height": 60})
            annotations.append(
                {"id": number, "image_id": number, "category_id": 1 + number % 3, "bbox": [5, 5, 40, 30],
                 "area": 1200, "iscrowd": 0, "segmentation": []}
            )  # fmt: skip
        (root / "annotations" / f"instances_{split}.json").write_text(
            json.dumps(
                {
                    "images": images,
                    "annotations": annotations,
                    "categories": [{"id": i, "name": name} for i, name in enumerate(("a", "b", "c"), 1)],
                }
            )
        )
    return root


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("weights") / "resnet50.safetensors"
    save_file(timm.create_model("resnet50").state_dict(), file)
    return file


def test_the_scale_of_the_paper_is_the_papers(
    capsys: pytest.CaptureFixture[str], coco: Path, resnet50: Path, tmp_path: Path
) -> None:
    code, _, out = run(
        capsys, "table1b", "--scale", "paper", "--data", str(coco), "--pretrained", str(resnet50),
        "--output", str(tmp_path), "--dry-run", "--seeds", "1",
    )  # fmt: skip
    said = " ".join(out.split())
    assert code == 0
    assert "7 settings, each at rate x 1 with 1 seed; 0 runs" in said
    assert "gamma 0.1, alpha 0.75 gamma 0.2, alpha 0.75" in said
    assert "rate 0.01, a tenth of it from steps 60,000 and 80,000; 90,000 steps of 16 images" in said
    assert "train2017 is the paper's trainval35k" in said
    assert "val2017 its minival" in said
    assert re.search(r"shortest side 600,? .{0,20}longest .{0,20}1000", said)  # the table wraps
    assert "resnet50, from weights of" in said
    assert not any(tmp_path.iterdir())
    assert drops_of(90_000) == (60_000, 80_000)
    steps = [
        rate(s, 90_000, schedule="step", warmup_steps=0, warmup_from=1)
        for s in (59_999, 60_000, 79_999, 80_000)
    ]
    assert steps == pytest.approx([1, 0.1, 0.1, 0.01])


def test_a_dry_run_before_the_images_are_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, out = run(capsys, "table3", "--output", str(tmp_path), "--dry-run")
    assert code == 0
    assert "4 settings" in out
    assert "which are done is not known before the images are drawn" in " ".join(out.split())
    assert "the plan is known when the images are drawn: without --dry-run" in " ".join(out.split())
    assert not any(tmp_path.iterdir())


def test_the_first_steps_at_the_scale_of_the_paper(
    coco: Path, resnet50: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Everything but the number of steps, of images a step and their size is as on a GPU.
    short = replace(SCALES["paper"], steps=2, side=64, options={**SCALES["paper"].options, "batch_size": 2})
    monkeypatch.setitem(SCALES, "paper", short)
    job = Job(focal(2), "paper", str(coco), 1.0, 0, pretrained=str(resnet50))
    store = Store(tmp_path)
    run_one(job, store)
    result = store.result(job)
    assert result is not None
    assert "diverged" not in result
    plan = json.loads((store.run(job) / "plan.json").read_text())
    assert plan["recipe"]["name"] == "paper"
    assert plan["spec"]["backbone"]["norm"] == "frozen"


def test_a_page_without_measured_rows(data: Path, tmp_path: Path) -> None:
    page = page_of(STUDIES["table2"](TINY), request(data, tmp_path), Store(tmp_path))
    (table,) = [part for part in page.parts if isinstance(part, Table)]
    assert len(table.rows) == 9
    assert [row[7] for row in table.rows] == ["-"] * 7 + ["not measured", "-"]
    assert STUDIES["table2"](TINY).rows[0].published == Published(34.9, 55.7, 37.4, 15.6, 38.7, 50.9)


def test_figure_2_from_the_rows_that_are_trained(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(capsys, "fig2", "--data", str(data), "--output", str(tmp_path))
    assert code == 2
    assert "fig2 needs rows of table1e with their models, of which none is in" in err
    fake(monkeypatch, lambda job: 0.3 if job.setting.deep else 0.2)
    asked = prepare(request(data, tmp_path), lambda _: None, draw=False)
    measure(["table1e"], replace(asked, rows=("50, 400", "50, 600", "101, 400")), lambda _: None)
    code, _, err = run(capsys, "fig2", "--data", str(data), "--output", str(tmp_path))
    assert code == 2
    assert "is gone and its result is left: remove " in err
    for file in (tmp_path / "results").rglob("*.json"):
        run_of = str(file).replace("/results/", "/runs/").removesuffix(".json")
        (Path(run_of) / "best").mkdir(parents=True)
    monkeypatch.setattr(speed, "_of_ours", lambda model, _: 20.0 if "deep" in str(model) else 10.0)
    code, _, _ = run(capsys, "fig2", "--data", str(data), "--output", str(tmp_path))
    assert code == 0
    text = (tmp_path / "fig2.md").read_text()
    assert re.findall(r"\| (\d+, \d+ px).*\| ([\d.]+) \| (\d+) \| ([\d.]+) ± .*\| ([\d.]+) \|", text) == [
        ("50, 400 px", "30.5", "64", "20.0", "10.0"),
        ("50, 600 px", "34.3", "98", "20.0", "10.0"),
        ("101, 400 px", "31.9", "81", "30.0", "20.0"),
    ]
    assert re.search(r"\| 101, 800 px: .* \| 37\.8 \| 198 \| - \| - \|", text)
    assert "| FPN Faster R-CNN | 36.2 | 172 | - | - |" in text


def test_the_speed_of_a_model(data: Path, tmp_path: Path) -> None:
    network_spec = ModelSpec(
        Classes(("disk", "square", "triangle")),
        backbone=BackboneSpec("test_resnet"),
        pyramid=PyramidSpec(channels=64),
    )
    model = save_model(tmp_path, Model(build_retinanet(network_spec), network_spec))
    assert 0 < speed._of_ours(model, str(data)) < 10_000


def test_check_rows_takes_parts_of_names() -> None:
    asked = request(Path("data"), Path("output"), rows=("gamma 2", "alpha 0.75"))
    check_rows(["table1b"], asked)
    with pytest.raises(ConfigError, match="no row that is trained has a name with"):
        check_rows(["table1b"], replace(asked, rows=("OHEM",)))


@pytest.mark.parametrize(
    ("table", "rows", "trained"),
    [
        ("table1b", ("gamma 2, alpha 0.25",), [focal(2)]),
        ("table1b", ("gamma 2",), [focal(2)]),
        ("table1b", ("gamma 2", "gamma 5"), [focal(2), focal(5)]),
        ("table1b", ("alpha 0.5",), [focal(0.5, 0.5)]),
        # A whole name is that row alone, though others begin with it.
        ("table1a", ("alpha 0.9",), [cross_entropy(0.9)]),
        ("table1a", ("alpha 0.9", "alpha 0.99"), [cross_entropy(0.9), cross_entropy(0.99)]),
    ],
)
def test_rows_by_name(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    table: str,
    rows: tuple[str, ...],
    trained: list[Setting],
) -> None:
    ran = fake(monkeypatch, lambda job: 0.3)
    measure([table], request(data, tmp_path, seeds=1, rows=rows), lambda _: None)
    assert {job.setting for job in ran} == set(trained)


# ---------------------------------------------------------------------------------- processes and devices


def test_devices_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert running.visible_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5f")
    assert running.visible_devices() == ["2", "GPU-5f"]


def test_runs_are_spread_over_the_devices(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "visible_devices", lambda: ["2", "5"])
    given: list[str | None] = []
    together = threading.Barrier(4)

    def run_apart(job: Job, store: Store, parallel: int, device: str | None, _: object) -> tuple[int, str]:
        given.append(device)
        together.wait(60)
        return 1, "x"

    monkeypatch.setattr(running, "_run_apart", run_apart)
    jobs = [Job(focal(2), "tiny", str(data), 1.0, seed) for seed in range(4)]
    run_all(jobs, Store(tmp_path), parallel=4, say=lambda _: None, done=lambda: None)
    assert sorted(given, key=str) == ["2", "2", "5", "5"]


SLEEPER = """
import signal, sys
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts behind itself ignore it
from retinanet.paper import running
from retinanet.paper.settings import focal

def sleep(job, store, parallel, device, children):
    asleep = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    return children.run(asleep, {}, Path(sys.argv[1]) / f"{job.seed}.log"), ""

running._run_apart = sleep
jobs = [running.Job(focal(2), "tiny", "x", 1.0, seed) for seed in range(3)]
running.run_all(jobs, running.Store(Path(sys.argv[1])), parallel=2, say=print, done=lambda: None)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_run_behind(tmp_path: Path, number: signal.Signals) -> None:
    parent = fresh.start(SLEEPER, tmp_path, said=tmp_path / "said")
    try:
        until = time.monotonic() + 120
        while len(logs := [file for file in tmp_path.glob("*.log") if file.read_text()]) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        children = [int(file.read_text()) for file in logs]
        assert parent.pid is not None
        os.kill(parent.pid, number)
        parent.join(50)
        assert parent.exitcode
    finally:
        parent.kill()
        parent.join()
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert len(list(tmp_path.glob("*.log"))) == 2  # the third never began
