"""`bench/recipes.py`: what each variant changes, what is repeated, and the table."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from retinanet.data import open_dataset
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.records import Classes
from retinanet.training.configuration import TrainingOptions
from retinanet.training.planning import plan_run
from retinanet.training.recipes import Recipe, small


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    script = Path(__file__).parents[1] / "bench" / "recipes.py"
    loaded = importlib.util.spec_from_file_location("recipe_sweep", script)
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    monkeypatch.setitem(sys.modules, "recipe_sweep", module)  # dataclasses look their module up
    loaded.loader.exec_module(module)
    monkeypatch.setattr(module, "KEPT", tmp_path / "recipes.jsonl")
    monkeypatch.setattr(module, "PAGE", tmp_path / "recipes.md")
    return module


def test_every_variant_changes_one_thing_and_is_possible(sweep: ModuleType) -> None:
    recipe, seen = small(Classes(("a",)), "resnet18", "cpu"), []
    for name, variant in sweep.VARIANTS.items():
        options = TrainingOptions(data="x", **variant.options)
        changed = (variant(recipe), options)
        assert (changed == (recipe, TrainingOptions(data="x"))) is (name == sweep.BASE), name
        assert changed not in seen, name
        seen.append(changed)


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

    call("--variants", "base", "adamw", "--seeds", "0", "1")
    assert started == [("x", "base", 0), ("x", "adamw", 0), ("x", "base", 1), ("x", "adamw", 1)]
    assert "(done)" in call("--variants", "base", "adamw")
    assert started == [("x", "adamw", 0)]
    call("--list")
    assert started == []
    call("--variants", "base", "--images", "800")  # another length is another run
    assert started == [("x", "base", 0)]
    page = (tmp_path / "recipes.md").read_text()
    assert "| base: the recipe as it is | 2 | 0.550 ± 0.050 |  | 0.800 ± 0.000 |" in page
    assert ": x, 800 images seen" in page


def row(variant: str, ap: float, images: int | None = None, recipe: str = "now") -> dict[str, object]:
    return {
        "data": "x", "variant": variant, "seed": 0, "images": images, "ap": ap, "ap50": ap, "seconds": 90,
        "recipe": recipe, "what": "what it changes",
    }  # fmt: skip


def test_the_table_compares_with_the_base_of_equal_length(sweep: ModuleType) -> None:
    page = sweep.page([row("base", 0.2, 800), row("adamw", 0.3, 800), row("base", 0.5), row("adamw", 0.4)])
    longer, shorter = page.index("now: x, the recipe's length"), page.index("now: x, 800 images seen")
    assert longer < shorter  # the latest first
    assert "| adamw: what it changes | 1 | 0.400 | -0.100 | 0.400 | 1.5 |" in page[longer:shorter]
    assert "| 0.300 | +0.100 | 0.300 | 1.5 |" in page[shorter:]


def test_rows_of_an_older_recipe_keep_their_own_base(sweep: ModuleType) -> None:
    page = sweep.page(
        [row("base", 0.2, recipe="before"), row("adamw", 0.3, recipe="before"), row("base", 0.5)]
    )
    assert "| 0.300 | +0.100 |" in page[page.index("before: x") :]


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
    said = f"{recipe.batch_size} images a step, {recipe.pixels_seen / 1e6:.0f} megapixels"
    assert said == sweep.RECIPE  # else rows of two recipes would be compared


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
        sweep.run(sweep.Job("x", "batch-8", 0, images), {"x": str(data)}, "resnet18", tmp_path / "runs")
    shortened, whole = planned
    assert (shortened.batch_size, shortened.steps) == (8, 100)
    assert whole.steps > 2 * shortened.steps
