"""`bench/recipes.py`: what each variant changes, what is repeated, and the table."""

import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from made_up import Photographs
from retinanet.atss import DEVIATIONS, match_atss
from retinanet.data import open_dataset
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import Stopped
from retinanet.objective import Matching, Objective
from retinanet.paper.measuring import without_defaults
from retinanet.records import Classes
from retinanet.training import sizing
from retinanet.training.configuration import TrainingOptions
from retinanet.training.planning import plan_run
from retinanet.training.recipes import Recipe, small
from retinanet.training.starting import build_network
from retinanet.training.step import TrainingStep


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    script = Path(__file__).parents[1] / "bench" / "recipes.py"
    loaded = importlib.util.spec_from_file_location("recipe_sweep", script)
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    monkeypatch.syspath_prepend(script.parent)  # as for a script
    monkeypatch.setitem(sys.modules, "recipe_sweep", module)  # dataclasses look their module up
    loaded.loader.exec_module(module)
    monkeypatch.setattr(module, "KEPT", tmp_path / "recipes.jsonl")
    monkeypatch.setattr(module, "PAGE", tmp_path / "recipes.md")
    return module


def test_every_variant_changes_one_thing_and_is_possible(sweep: ModuleType) -> None:
    recipe, seen = small(Classes(("a",)), "resnet18", "cpu"), []
    for name, variant in sweep.VARIANTS.items():
        options = TrainingOptions(data="x", **variant.options)
        others = (variant.width, variant.side, variant.start)
        changed = (variant(recipe), options, variant.objective, others)
        usual = (recipe, TrainingOptions(data="x"), Objective, (1, 1, None))
        assert (changed == usual) is (name == sweep.BASE), name
        assert changed not in seen, name
        seen.append(changed)


def test_a_variant_trains_with_its_objective(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = generate_shapes(tmp_path / "shapes", train=2, val=1, spec=ShapesSpec(image_size=96))
    seen: list[Matching] = []

    def plan(options: TrainingOptions, change: Callable[[Recipe], Recipe]) -> None:
        seen.append(plan_run(options, open_dataset(data, "train"), change).objective.matching)

    monkeypatch.setattr(sweep, "run_training", plan)
    for name in ("atss-3", sweep.BASE):
        sweep.run(sweep.Job("d", name, 0, None), {"d": str(data)}, tmp_path)
    assert isinstance(seen[0], partial)
    assert seen[0].keywords == {"deviations": 3.0}
    assert seen[1] is match_atss


def test_finished_runs_are_not_repeated_and_failed_ones_are_told(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def run(command, **_):
        job = sweep.Job(**json.loads(command[command.index("--job") + 1]))
        started.append((job.data, job.variant, job.seed))
        if job.variant == "adamw":
            return SimpleNamespace(returncode=1)
        job.folder(tmp_path).mkdir()
        figures = {"ap": 0.5 + job.seed / 10, "ap50": 0.8}
        (job.folder(tmp_path) / "metrics.json").write_text(json.dumps(figures))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(sweep.subprocess, "run", run)

    def call(*arguments: str) -> str:
        started.clear()
        monkeypatch.setattr(
            sys, "argv", ["recipes.py", "--data", "x=/x", "--runs", str(tmp_path), *arguments]
        )
        sweep.main()
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match="2 of 4 runs failed; the same command tries them again"):
        call("--variants", "base", "adamw", "--seeds", "0", "1")
    capsys.readouterr()
    assert started == [("x", "base", 0), ("x", "adamw", 0), ("x", "base", 1), ("x", "adamw", 1)]
    with pytest.raises(SystemExit):
        call("--variants", "base", "adamw")
    assert "(done)" in capsys.readouterr().out
    assert started == [("x", "adamw", 0)]
    call("--list")
    assert started == []
    call("--variants", "base", "--images", "800")  # another length is another run
    assert started == [("x", "base", 0)]
    page = (tmp_path / "recipes.md").read_text()
    assert "| base: the recipe as it is | 2 | 0.550 ± 0.050 |  | 0.800 ± 0.000 |" in page
    assert "## x: resnet18, 256 wide, 800 images seen" in page


def row(variant: str, ap: float, images: int | None = None, recipe: str = "now") -> dict[str, object]:
    return {
        "data": "x", "variant": variant, "seed": 0, "images": images, "ap": ap, "ap50": ap, "seconds": 90,
        "recipe": recipe, "what": "what it changes",
    }  # fmt: skip


def test_the_table_compares_with_the_base_of_equal_length(sweep: ModuleType) -> None:
    page = sweep.page([row("base", 0.2, 800), row("adamw", 0.3, 800), row("base", 0.5), row("adamw", 0.4)])
    heading = "## x: resnet18, 256 wide, "
    longer, shorter = page.index(f"{heading}the recipe's length"), page.index(f"{heading}800 images seen")
    assert longer < shorter  # the latest first
    assert "| adamw: what it changes | 1 | 0.400 | -0.100 | 0.400 | 1.5 |" in page[longer:shorter]
    assert "| 0.300 | +0.100 | 0.300 | 1.5 |" in page[shorter:]


def test_the_page_begins_with_what_each_change_of_todays_recipe_did(sweep: ModuleType) -> None:
    rows = [
        row("base", 0.5, recipe=sweep.RECIPE) | {"data": "bccd"},
        row("adamw", 0.45, recipe=sweep.RECIPE) | {"data": "bccd"},
        row("base", 0.3, recipe=sweep.RECIPE) | {"data": "shapes"},
        row("depth-1", 0.34, recipe=sweep.RECIPE) | {"data": "shapes"},
        row("adamw", 0.1, recipe="an older one") | {"data": "shapes"},
        row("base", 0.53, recipe=sweep.RECIPE) | {"data": "bccd", "seed": 1},
    ]
    page = sweep.page(rows)
    short = page[: page.index("\n## ", page.index("## Today's recipe") + 1)]
    what = {name: f"{name}: {sweep.VARIANTS[name].what}" for name in ("base", "adamw", "depth-1")}
    assert short.splitlines()[-3:] == [
        f"| {what['base']} | 0.515 ± 0.015 | 0.300 |",
        f"| {what['adamw']} | -0.050 |  |",
        f"| {what['depth-1']} |  | +0.040 |",
    ]
    assert "up to 0.030 apart" in short
    assert short.count("bccd: resnet18, 256 wide, the recipe's length |") == 1
    assert "Today's recipe" not in sweep.page([one | {"recipe": "an older one"} for one in rows])


def test_rows_of_an_older_recipe_keep_their_own_base(sweep: ModuleType) -> None:
    page = sweep.page(
        [row("base", 0.2, recipe="before"), row("adamw", 0.3, recipe="before"), row("base", 0.5)]
    )
    assert "| 0.300 | +0.100 |" in page[page.index("Recipe: before.") :]


def test_what_was_measured_with_an_older_recipe_is_measured_again(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.KEPT.write_text(json.dumps(row("base", 0.2, recipe="before")) + "\n")
    arguments = ["--data", "x=/x", "--variants", "base", "--runs", str(tmp_path), "--list"]
    monkeypatch.setattr(sys, "argv", ["recipes.py", *arguments])
    sweep.main()
    assert "(done)" not in capsys.readouterr().out
    sweep.KEPT.write_text(json.dumps(row("base", 0.2, recipe=sweep.RECIPE)) + "\n")
    sweep.main()
    assert "(done)" in capsys.readouterr().out


def test_the_label_is_that_of_the_recipe(sweep: ModuleType) -> None:
    recipe = small(Classes(("a",)), "resnet18", "cpu")
    step = f"{sizing.OBJECTS_A_STEP} objects and {recipe.batch_size} images a step at most"
    length = f"{recipe.pixels_seen / 1e6:.0f} megapixels of {sizing.OBJECTS_SEEN:,} objects"
    said = f"{step}, {length}, {recipe.matching.upper()} of {DEVIATIONS:g} deviations, {recipe.loss}"
    assert said == sweep.RECIPE
    # Another recipe, or another rule, needs another RECIPE, or its rows would be compared with those of this one. Then
    # change this, too.
    usual = Photographs(205, objects=12, sides=(30, 110))
    full = Photographs(502, objects=42, width=340, height=270, sides=(12, 24))
    demo = Photographs(4000, objects=3, width=160, height=160, sides=(11, 120))
    whole = [without_defaults(recipe)]
    for made_up in (usual, full, demo):
        planned = plan_run(TrainingOptions(data="x", backbone="resnet18", device="cpu"), made_up).to_json()
        sizes = [round(size, 1) for size in planned["spec"]["anchors"]["sizes"]]
        rules = [planned[name] for name in ("batch_size", "steps", "augmentation")]
        whole.append([*rules, round(planned["lr"], 6), sizes, planned["spec"]["preprocessing"]])
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:8]
    assert digest == "4182d225"


def test_the_page_is_that_of_the_rows(sweep: ModuleType) -> None:
    bench = Path(__file__).parents[1] / "bench"
    rows = [json.loads(line) for line in (bench / "recipes.jsonl").read_text().splitlines()]
    assert (bench.parent / "docs" / "recipes.md").read_text() == sweep.page(rows)


def test_a_shortened_run_sees_that_many_images(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else says how long a recipe's run is."""
    data = generate_shapes(tmp_path / "shapes", train=2, val=1, spec=ShapesSpec(image_size=96))
    planned = []

    def run_training(options: TrainingOptions, change: Callable[[Recipe], Recipe]) -> None:
        planned.append(plan_run(options, open_dataset(data, "train"), change))

    monkeypatch.setattr(sweep, "run_training", run_training)
    for images in (800, None):
        sweep.run(sweep.Job("x", "batch-8", 0, images), {"x": str(data)}, tmp_path / "runs")
    shortened, whole = planned
    assert (shortened.batch_size, shortened.steps) == (8, 100)
    assert whole.steps > 2 * shortened.steps
    assert whole.spec.preprocessing == shortened.spec.preprocessing


def test_other_anchors_train_at_the_side_of_the_base(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would reach more objects in larger images, which are another change."""
    spec = ShapesSpec(image_size=192, min_side=0.1, max_side=0.11)
    data = generate_shapes(tmp_path / "shapes", train=8, val=1, spec=spec)
    found = []

    def train(options: TrainingOptions, change: Callable[[Recipe], Recipe]) -> None:
        found.append(plan_run(options, open_dataset(data, "train"), change).spec)

    monkeypatch.setattr(sweep, "run_training", train)
    for name in (sweep.BASE, "anchors-32"):
        sweep.run(sweep.Job("x", name, 0, None), {"x": str(data)}, tmp_path / "runs")
    base, changed = found
    assert base.anchors != changed.anchors
    assert base.preprocessing == changed.preprocessing


def test_what_an_older_recipe_left_unfinished_does_not_go_on(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = sweep.Job("x", "base", 0, None)
    now = job.folder(tmp_path)
    monkeypatch.setattr(sweep, "RECIPE", "another")
    assert job.folder(tmp_path) != now


def test_another_network_has_a_table_of_its_own(sweep: ModuleType) -> None:
    small_one = {"backbone": "resnet10t", "channels": 64}
    page = sweep.page([row("base", 0.5), row("base", 0.2) | small_one, row("adamw", 0.3) | small_one])
    assert "| adamw: what it changes | 1 | 0.300 | +0.100 |" in page
    assert page.index("## x: resnet10t, 64 wide") < page.index("## x: resnet18, 256 wide")


def test_a_variant_of_the_network_is_trained_as_it_says(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = generate_shapes(tmp_path / "shapes", train=2, val=1, spec=ShapesSpec(image_size=96))
    found = {}

    def train(options: TrainingOptions, change: Callable[[Recipe], Recipe]) -> None:
        plan = plan_run(options, open_dataset(data, "train"), change)
        head = build_network(plan).class_head
        deviation = next(head.tower.parameters()).std().item()
        found[name] = (plan.spec.preprocessing.image_size, plan.spec.pyramid.channels, deviation)

    monkeypatch.setattr(sweep, "run_training", train)
    for name in ("base", "side-larger", "width-double", "start-0.01"):
        job = sweep.Job("x", name, 0, None, "resnet10t", 64)
        sweep.run(job, {"x": str(data)}, tmp_path / "runs")
    (side, width, deviation), *_ = found.values()
    assert width == 64
    assert found["side-larger"][:2] == (round(side * 4 / 3 / 32) * 32, 64)
    assert found["side-larger"][0] > side
    assert found["width-double"][:2] == (side, 128)
    assert deviation > 0.03
    assert found["start-0.01"][2] == pytest.approx(0.01, rel=0.05)


def test_runs_side_by_side_share_the_cores_and_say_nothing_of_time(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, told = [0], [0], []
    both = threading.Barrier(2, timeout=60)

    def run(command, env, **_):
        told.append(env["OMP_NUM_THREADS"])
        running[0] += 1
        most[0] = max(most[0], running[0])
        both.wait()
        running[0] -= 1
        job = sweep.Job(**json.loads(command[command.index("--job") + 1]))
        job.folder(tmp_path).mkdir()
        (job.folder(tmp_path) / "metrics.json").write_text(json.dumps({"ap": 0.5, "ap50": 0.8}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    monkeypatch.setattr(sweep, "available_cores", lambda: [0, 1, 2, 3])
    arguments = ["--data", "x=/x", "--runs", str(tmp_path), "--variants", "base", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", ["recipes.py", *arguments, "--parallel", "2"])
    sweep.main()
    assert most == [2]
    assert told == ["2", "2"]
    rows = sweep.known_rows()
    assert [row["timed"] for row in rows] == [False, False]
    assert "| base: the recipe as it is | 2 | 0.500 ± 0.000 |  | 0.800 ± 0.000 |  |" in sweep.page(rows)


@pytest.mark.parametrize(
    ("variant", "options", "code", "said"),
    [
        ("batch-norm", {}, 3, "changes nothing here"),  # test_resnet can have no GroupNorm
        ("batch-8", {"batch_size": 8}, 3, "changes nothing here"),
        ("width-half", {}, 4, "cannot be here"),  # 32 channels
    ],
)
def test_what_changes_nothing_or_cannot_be_is_told_and_not_run(
    sweep: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variant: str,
    options: dict[str, int],
    code: int,
    said: str,
) -> None:
    data = generate_shapes(tmp_path / "shapes", train=2, val=1, spec=ShapesSpec(image_size=96))
    monkeypatch.setattr(sweep, "run_training", lambda *_, **__: pytest.fail("it was run"))
    job = sweep.Job("x", variant, 0, None, "test_resnet", 64, **options)
    assert sweep.run(job, {"x": str(data)}, tmp_path / "runs") == code

    def outcome_of(*_: object) -> tuple[int, None]:
        return code, None

    monkeypatch.setattr(sweep, "outcome_of", outcome_of)
    monkeypatch.setattr(sys, "argv", ["recipes.py", "--data", "x=/x", "--variants", variant])
    sweep.main()  # no failure
    assert f" {said}: see " in capsys.readouterr().out


def test_zoom_is_as_the_variant_says_whatever_the_passes(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = generate_shapes(tmp_path / "shapes", train=8, val=1, spec=ShapesSpec(image_size=96))
    found = []

    def train(options: TrainingOptions, change: Callable[[Recipe], Recipe]) -> None:
        found.append(plan_run(options, open_dataset(data, "train"), change).augmentation.zoom)

    monkeypatch.setattr(sweep, "run_training", train)
    for images in (16, 800):  # 2 passes, and 100
        for name in ("no-zoom", sweep.BASE, "zoom", "zoom-wide"):
            sweep.run(sweep.Job("x", name, 0, images), {"x": str(data)}, tmp_path / "runs")
    none, usual, wide = (1.0, 1.0), (0.8, 1.4), (0.5, 2.0)
    assert found == [none, none, usual, wide, none, usual, wide]  # where it is on, "zoom" changes nothing


def test_an_interrupted_run_goes_on_and_says_nothing_of_time(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = generate_shapes(tmp_path / "shapes", train=4, val=1, spec=ShapesSpec(image_size=96))
    job = sweep.Job("x", "box-weight-1", 0, 16, "test_resnet", 64, 2)
    folder = job.folder(tmp_path)
    step, made = TrainingStep.__call__, []

    def counted(self: TrainingStep, *rest: Any) -> Any:
        made.append(self)
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *rest)

    monkeypatch.setattr(TrainingStep, "__call__", counted)
    with pytest.raises(Stopped, match="stopped by a signal at step 3"):
        sweep.run(job, {"x": str(data)}, tmp_path)
    assert sweep.has_state(folder)
    monkeypatch.setattr(sweep, "run_training", lambda *_, **__: pytest.fail("it began anew"))

    def here(command: list[str], **_: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=sweep.run(job, {"x": str(data)}, tmp_path))

    monkeypatch.setattr(sweep.subprocess, "run", here)
    code, found = sweep.outcome_of(job, [f"x={data}"], tmp_path, 1)
    assert code == 0
    assert len(made) == 8
    assert found["timed"] is False
    assert not sweep.has_state(folder)


def test_a_sweep_in_the_background_says_where_its_log_is(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "bench" / "recipes.py"
    arguments = ["--list", "--variants", "base", "--data", "x=/x", "--runs", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments, "--background"], capture_output=True, text=True, timeout=120
    )
    log = tmp_path / "sweep.log"
    assert re.fullmatch(rf"process \d+; what it says is in {re.escape(str(log))}\n", done.stdout)
    until = time.monotonic() + 60
    while not log.read_text() and time.monotonic() < until:
        time.sleep(0.1)
    assert log.read_text().startswith("1/1 resnet18-256-x-base-0-")


def test_seeds_are_compared_with_the_same_seeds_in_the_same_precision(sweep: ModuleType) -> None:
    base = [row("base", 0.50), row("base", 0.70) | {"seed": 1, "precision": "bf16"}]
    one = row("adamw", 0.52)
    two = [row("no-clip", ap) | {"seed": seed} for seed, ap in enumerate((0.53, 0.9))]
    page = sweep.page(
        [*base, one, *two, row("focal", 0.6) | {"precision": "bf16"}, row("torchvision-5m", 0.5)]
    )
    assert "| adamw: what it changes | 1 | 0.520 | +0.020 |" in page
    assert "| no-clip: what it changes | 2 | 0.715 ± 0.185 | +0.030 (1 of 2) |" in page
    assert "| focal: what it changes | 1 | 0.600 |  |" in page
    assert "| torchvision-5m: what it changes | 1 | 0.500 | -0.100 |" in page


def test_minutes_name_bf16_where_the_cpu_computed_in_it(sweep: ModuleType) -> None:
    slow, fast = row("base", 0.5) | {"seconds": 180}, row("base", 0.5) | {"precision": "bf16"}
    page = sweep.page([slow, fast, row("adamw", 0.4) | {"precision": "fp32"}])
    assert "| base: what it changes | 2 | 0.500 ± 0.000 |  | 0.500 ± 0.000 | 3.0; 1.5 bf16 |" in page
    assert "| adamw: what it changes | 1 | 0.400 | -0.100 | 0.400 | 1.5 |" in page
