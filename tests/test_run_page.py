"""The page of a run: complete at any moment, one story of a run that was stopped and resumed, never a run's end."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from retinanet.data import open_dataset
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import DivergedError, Stopped
from retinanet.report import charts
from retinanet.report.charts import Line, averaged, line_chart
from retinanet.report.run_curves import best_validation
from retinanet.report.run_page import RunPage, Share, Status, write_run_page
from retinanet.training import run_report
from retinanet.training.configuration import TrainingOptions
from retinanet.training.examples import GAP, SIDE, Examples
from retinanet.training.folder import RunFolder
from retinanet.training.run import resume_training, run_training
from retinanet.training.run_report import advice_on, shares_of, slowest_part
from test_resume import TINY, Killed, kill, quiet, stop_at, terminate

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return generate_shapes(folder, train=6, val=5, spec=ShapesSpec(image_size=96))


def validation(step: int, ap: float | None, **classes: float | None) -> dict[str, Any]:
    figures = {"ap": ap, "ap50": ap, "ap75": None, "ap_small": None}
    return {"step": step, **figures, "per_class": {n: {"ap": v, "ap50": v} for n, v in classes.items()}}


def line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 1 / step,
        "loss_class": 0.5 / step,
        "loss_box": 0.5 / step,
        "lr": 0.1,
        **more,
    }


def page_of(**changes: Any) -> RunPage:
    page = RunPage(
        title="RetinaNet run <x>",
        lead="a lead",
        status=Status("running", "In training.", 0.4, "Then:", "retinanet train --resume runs/x"),
        history=[line(10), line(20), validation(20, 0.25, cat=0.3, dog=None)],
        resumes=[],
        facts=[("steps", "20")],
        classes={"cat": 7, "dog": 0},
        examples=[],
        shares=[],
        advice="",
        left_out=[],
        settings=[("lr", "0.1", "asked <for>")],
        commands=["retinanet train DATA"],
        environment={"torch": "2"},
        written="now",
    )
    return dataclasses.replace(page, **changes)


def written(tmp_path: Path, **changes: Any) -> str:
    write_run_page(tmp_path / "report.html", page_of(**changes))
    return (tmp_path / "report.html").read_text()


def pictures(page: str) -> list[Image.Image]:
    """Return every picture of a page, decoded."""
    found = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB") for one in found]


def drawn(page: str) -> list[ElementTree.Element]:
    """Return every chart of a page."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def text_of(page: str) -> str:
    """Return what a reader sees."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("</style>")[1]))


# ------------------------------------------------------------------------------------- the page


def test_a_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = written(tmp_path)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "RetinaNet run &lt;x&gt;" in page
    assert "asked &lt;for&gt;" in page
    assert len(drawn(page)) == 4  # AP, classes, losses, rate


def test_only_a_page_of_a_run_that_goes_on_loads_itself_anew(tmp_path: Path) -> None:
    assert '<meta http-equiv="refresh"' in written(tmp_path)
    for kind in ("finished", "stopped", "failed"):
        assert "refresh" not in written(tmp_path, status=Status(kind, "It is so.", 1.0))


def test_a_run_without_a_line_has_a_page(tmp_path: Path) -> None:
    page = written(tmp_path, history=[])
    assert "has not been tried on the validation images yet" in page
    assert drawn(page) == []


@pytest.mark.parametrize(
    ("aps", "step"), [([0.1, 0.3, 0.2], 20), ([0.3, 0.3], 20), ([None, 0.0], 20), ([None], 10), ([], None)]
)
def test_the_best_is_the_one_that_is_kept(aps: list[float | None], step: int | None) -> None:
    best = best_validation([validation(10 * i, ap) for i, ap in enumerate(aps, 1)])
    assert (best and best["step"]) == step


def test_of_many_classes_the_best_and_the_worst_have_curves(tmp_path: Path) -> None:
    names = [f"class {i:02d}" for i in range(30)]
    aps = {name: 0.9 - i / 50 for i, name in enumerate(names)}
    page = written(tmp_path, history=[line(10), validation(10, 0.5, **aps)], classes=dict.fromkeys(names, 3))
    assert "clearer ones. The best and the worst." in page
    shown = re.findall(r"</i>(class \d\d) \d", page)
    assert shown == [*names[:4], *names[-4:]]
    assert "and 20 more classes" not in page  # there are no example pictures that they would explain


def test_a_log_of_an_older_version_has_a_page(tmp_path: Path) -> None:
    old = {"step": 10, "ap": 0.5, "ap50": 0.6, "ap75": 0.4}
    page = written(tmp_path, history=[line(10), old])
    assert "0.500" in page
    assert "Class by class" not in page


def test_resumes_are_marked(tmp_path: Path) -> None:
    page = written(tmp_path, resumes=[(10, "22 Nov, 03:14"), (10, "22 Nov, 04:00")])
    for chart in drawn(page):
        (mark,) = [line for line in chart.iter("line") if line.get("class") == "mark"]
        middle = charts.LEFT + (charts.WIDTH - charts.LEFT - charts.RIGHT) / 2  # 10 of 20 steps
        assert float(mark.get("x1", 0)) == float(mark.get("x2", 0)) == pytest.approx(middle, abs=0.1)
    assert "went on after step 10 (22 Nov, 03:14), after step 10 (22 Nov, 04:00)" in page
    assert "Dashed lines" not in written(tmp_path)


def test_what_was_skipped_is_told(tmp_path: Path) -> None:
    history = [
        line(10),
        {"step": 12, "epoch": 1.0, "unreadable": ["a.jpg: is cut <short>"]},
        {"step": 15, "epoch": 1.0, "unreadable": ["b.jpg: is empty", "a.jpg: is cut <short>"]},
        *(
            {
                "step": step,
                "epoch": 2.0,
                "skipped": {"reason": "the loss is nan", "files": [f"{i}.jpg" for i in range(12)]},
            }
            for step in range(20, 80)
        ),
    ]
    page = text_of(written(tmp_path, history=history, left_out=["Of the annotations 3 were left out."]))
    assert "Of the annotations 3 were left out." in page
    assert page.count("a.jpg: is cut &lt;short&gt;") == 1
    assert "b.jpg: is empty" in page
    assert "20 the loss is nan 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg, 5.jpg, 6.jpg, 7.jpg and 4 more" in page
    assert "and 10 more in metrics.jsonl" in page
    assert "Nothing: every image and every step was used." in written(tmp_path)


# ------------------------------------------------------------------------------------- charts


def test_a_chart_holds_its_points_within_its_frame() -> None:
    points = [(0, 0.0), (50, 0.25), (100, 0.5), (75, 9.0)]
    chart = ElementTree.fromstring(line_chart([Line("a<b", "red", points)], last=100, highest=0.5))
    (corners,) = [one.get("points", "") for one in chart.iter("polyline")]
    places = [tuple(map(float, corner.split(","))) for corner in corners.split()]
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    middle = ((left + right) / 2, (top + bottom) / 2)
    assert places[:3] == [(left, bottom), middle, (right, top)]
    assert places[3][1] == top  # what is above the axis is cut there
    assert [title.text for title in chart.iter("title")][1] == "a<b, step 50: 0.25"
    numbers = [text.text for text in chart.iter("text")]
    assert {"0", "0.5", "100"} <= set(numbers)


def test_the_ring_is_around_the_best_and_later_of_equals() -> None:
    line = Line("AP", "blue", [(1, 0.5), (2, 0.7), (3, 0.7), (4, 0.1)])
    chart = ElementTree.fromstring(line_chart([line], last=4, highest=1.0, ring=0))
    (ring,) = [one for one in chart.iter("circle") if one.get("fill") == "none"]
    dots = [one for one in chart.iter("circle") if one.get("fill") == "blue"]
    assert (ring.get("cx"), ring.get("cy")) == (dots[2].get("cx"), dots[2].get("cy"))


@pytest.mark.parametrize("points", [[], [(0, 0.0)], [(1, 1e-9)]])
def test_charts_of_next_to_nothing(points: list[tuple[float, float]]) -> None:
    ElementTree.fromstring(line_chart([Line("a", "red", points)], last=0, highest=1.0, marks=[5], ring=0))


def test_long_curves_are_averaged() -> None:
    points = [(float(i), float(i % 2)) for i in range(100_000)]
    few = averaged(points)
    assert len(few) == charts.MOST_POINTS
    assert all(abs(value - 0.5) < 0.01 for _, value in few)
    assert averaged(points[:300]) == points[:300]
    assert "<circle" not in line_chart([Line("a", "red", few)], last=1e5, highest=1.0)


# ------------------------------------------------------------------------------------- time and advice


@pytest.mark.parametrize(
    ("seconds", "workers", "said"),
    [
        ({"step": 57, "data": 43}, 2, "43 % of the time waits for images: more --workers than 2"),
        ({"step": 57, "data": 43}, 0, "43 % of the time waits for images: some --workers, which take"),
        ({"step": 50, "data": 16, "validating": 34}, 2, "34 % of the time goes into validations: a larger"),
        ({"step": 80, "saving": 20}, 2, "20 % of the time goes into saving"),
        ({"step": 90, "data": 5, "validating": 5}, 2, "into the training steps themselves, as it should"),
        ({}, 2, "as it should"),
    ],
)
def test_advice_is_about_the_slowest_thing(seconds: dict[str, float], workers: int, said: str) -> None:
    record = {f"seconds_{name}": value for name, value in seconds.items()}
    assert said in advice_on(shares_of([record]), workers)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (
            {"step": 9, "data": 1},
            "The slowest part of a step is computing, 90 % of it; the rest waits for images.",
        ),
        (
            {"step": 1, "data": 3},
            "The slowest part of a step is waiting for images, 75 % of it; the rest computes.",
        ),
        ({"validating": 3}, ""),
    ],
)
def test_the_slowest_part_of_a_step_is_named(seconds: dict[str, float], said: str) -> None:
    assert slowest_part(shares_of([{f"seconds_{name}": value for name, value in seconds.items()}])) == said


def test_the_bar_shows_where_the_time_goes(tmp_path: Path) -> None:
    shares = [Share("training steps", 75.0, "1:15 min", "#000"), Share("saving", 25.0, "25 s", "#fff")]
    page = written(tmp_path, shares=shares, advice="All is well.")
    assert "training steps 75 % (1:15 min)" in page
    assert "All is well." in page


# ------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def stopped_and_resumed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that was stopped by a signal at step 5, killed at step 7 and then let go on; its page after each."""
    run = tmp_path_factory.mktemp("runs") / "run"
    pages = []
    with pytest.MonkeyPatch.context() as patch:
        stop_at(5, patch, terminate)
        with pytest.raises(Stopped):
            run_training(TrainingOptions(data=str(data), output=str(run), **TINY), quiet())
    pages.append((run / "report.html").read_text())
    with pytest.MonkeyPatch.context() as patch:
        stop_at(2, patch, kill)
        patch.setattr("retinanet.training.story.RunStory.__exit__", lambda *_: None)  # as SIGKILL leaves it
        with pytest.raises(Killed):
            resume_training(run, quiet())
    pages.append((run / "report.html").read_text())
    resume_training(run, quiet())
    pages.append((run / "report.html").read_text())
    return run, pages


def test_the_log_says_where_the_time_went_and_how_every_class_does(
    stopped_and_resumed: tuple[Path, list[str]],
) -> None:
    run, _ = stopped_and_resumed
    log = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    for record in log:
        if "loss" in record:
            assert record["seconds_data"] > 0
            assert record["seconds_step"] > 0
        else:
            assert record["seconds_validating"] > 0
            assert set(record["per_class"]["disk"]) == {"ap", "ap50"}


def test_every_page_tells_the_slowest_part_of_a_step(stopped_and_resumed: tuple[Path, list[str]]) -> None:
    for page in stopped_and_resumed[1]:
        assert re.search(r"The slowest part of a step is .*, \d+ % of it; the rest ", text_of(page))


def test_a_stopped_run_says_how_to_go_on(stopped_and_resumed: tuple[Path, list[str]]) -> None:
    run, (page, *_) = stopped_and_resumed
    assert f"Stopped at step 5 of 9. To go on: retinanet train --resume {run}" in text_of(page)
    assert 'class="status stopped"' in page


def test_the_page_of_a_killed_run_is_complete(stopped_and_resumed: tuple[Path, list[str]]) -> None:
    run, (_, page, _) = stopped_and_resumed
    assert page.endswith("</html>\n")
    words = text_of(page)
    assert "In training: step 5 of 9" in words
    assert f"the run was killed. To go on: retinanet train --resume {run}" in words
    assert "went on after step 5" in words


def test_a_finished_run_is_one_story(stopped_and_resumed: tuple[Path, list[str]]) -> None:
    run, (*_, page) = stopped_and_resumed
    words = text_of(page)
    assert "Finished: all 9 steps." in words
    assert words.count("after step 5 (") == 2  # both times that it went on
    assert words.count("retinanet train --resume") == 0
    # Ground truth and three validations; and what they are of.
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions[0] == "annotated"
    assert [re.match(r"step (\d+): AP", caption)[1] for caption in captions[1:]] == ["4", "8", "9"]  # type: ignore[index]
    assert sum(caption.endswith(", the best") for caption in captions) == 1
    assert len(drawn(page)) == len(pictures(page)) == 4
    assert sorted(file.name for file in (run / "pictures").iterdir()) == [
        "00000004.jpg",
        "00000008.jpg",
        "00000009.jpg",
        "truth.jpg",
    ]
    assert "training steps" in words
    assert "Nothing: every image and every step was used." in words


def test_a_run_that_fails_says_so(data: Path, tmp_path: Path) -> None:
    options = {**TINY, "lr": 1e30, "optimizer": "sgd", "steps": 30, "validate_every_steps": 20}
    run = tmp_path / "run"
    with pytest.raises(DivergedError) as raised:
        run_training(TrainingOptions(data=str(data), output=str(run), **options), quiet())
    page = (run / "report.html").read_text()
    assert 'class="status failed"' in page
    assert str(raised.value)[:40] in text_of(page)


def test_drawings_that_fail_end_no_run_and_are_told_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no font is found")

    monkeypatch.setattr("retinanet.training.examples.draw_boxes", broken)
    monkeypatch.setattr(run_report, "write_run_page", broken)
    console = Console(record=True, width=200, file=io.StringIO())
    run = run_training(TrainingOptions(data=str(data), output=str(tmp_path / "run"), **TINY), console)
    assert run is not None
    said = console.export_text()
    for what in ("pictures", "report.html"):
        assert said.count(f"{what} cannot be written, the run goes on without: no font is found") == 1


def test_images_that_cannot_be_read_are_on_the_page(tmp_path: Path) -> None:
    own = generate_shapes(tmp_path / "shapes", train=4, val=3, spec=ShapesSpec(image_size=96))
    for split in ("train", "val"):
        first = sorted((own / "images" / split).iterdir())[0]
        first.write_bytes(b"no image")
    run = tmp_path / "run"
    run_training(TrainingOptions(data=str(own), output=str(run), **TINY), quiet())
    told = [json.loads(text).get("unreadable") for text in (run / "metrics.jsonl").read_text().splitlines()]
    failures = [failure for one in told if one for failure in one]
    assert len(failures) == len(set(failures)) == 2
    listed = (run / "report.html").read_text().split("What was skipped")[1]
    assert all(Path(failure.split(": ")[0]).name in listed for failure in failures)


# ------------------------------------------------------------------------------------- examples


def test_columns_are_few_with_the_first_and_the_last(tmp_path: Path, data: Path) -> None:
    examples = Examples(open_dataset(data, "val"), tmp_path / "pictures")
    assert examples.columns([10, 20], 6) == []
    (tmp_path / "pictures").mkdir()
    for name in ("truth", *(f"{step:08d}" for step in range(10, 210, 10))):
        (tmp_path / "pictures" / f"{name}.jpg").touch()
    steps = [step for step, _ in examples.columns(list(range(10, 310, 10)), 6)]
    assert steps == [None, 10, 60, 110, 150, 200]
    assert [step for step, _ in examples.columns([10, 20], 6)] == [None, 10, 20]


def test_strips_of_every_validation_show_the_same_images(
    stopped_and_resumed: tuple[Path, list[str]],
) -> None:
    run, _ = stopped_and_resumed
    strips = [Image.open(file) for file in sorted((run / "pictures").iterdir())]
    assert {strip.size for strip in strips} == {(SIDE, 4 * SIDE + 3 * GAP)}
    # Without boxes they are the same: corners show no more than the image.
    corners = [np.asarray(strip.convert("RGB"))[:4, :4].astype(int) for strip in strips]
    assert max(np.abs(corner - corners[0]).max() for corner in corners) < 40


def test_a_damaged_line_of_resumes_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.resumes() == []
    folder.note_resume(5)
    with (tmp_path / "resumes.jsonl").open("a") as file:
        file.write('{"step": 6, "a')
    assert [record["step"] for record in folder.resumes()] == [5]
