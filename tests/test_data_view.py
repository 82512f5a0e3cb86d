"""`retinanet data view`: what is drawn is what training gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retinanet import drawing
from retinanet.cli import main
from retinanet.cli.data_view import View
from retinanet.data import open_dataset, write_coco
from retinanet.data.loading import training_batches
from retinanet.data.sampling import epoch_length
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.records import Classes, GroundTruth, Ignore
from retinanet.training.augmentation_options import AugmentationOptions
from retinanet.training.configuration import TrainingOptions
from retinanet.training.planning import plan_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_shapes(
        tmp_path_factory.mktemp("data") / "shapes", train=7, val=3, spec=ShapesSpec(image_size=96)
    )


class Seen:
    """What was drawn: each picture with its boxes, and the sheet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiles: list[tuple[np.ndarray, np.ndarray, dict[str, Any]]] = []
        self.captions: list[str] = []
        self.title = ""
        draw_boxes, contact_sheet = drawing.draw_boxes, drawing.contact_sheet

        def draw(image: np.ndarray, boxes: np.ndarray, **options: Any) -> Image.Image:
            self.tiles.append((image, boxes, options))
            return draw_boxes(image, boxes, **options)

        def sheet(tiles: list[Image.Image], **options: Any) -> Image.Image:
            self.captions, self.title = options["captions"], options["title"]
            return contact_sheet(tiles, **options)

        monkeypatch.setattr(drawing, "draw_boxes", draw)
        monkeypatch.setattr(drawing, "contact_sheet", sheet)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def result_of(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


OPTIONS: dict[str, Any] = {
    "image_size": 64,
    "batch_size": 2,
    "seed": 3,
    "flip": 0.9,
    "flip_vertical": 0.5,
    "quarter_turn": 0.5,
    "zoom": "0.7,1.6",
    "scales": "0.5,1",
    "photometric": 0.5,
    "mosaic": 0.5,
    "repeat_rare": 1.0,
}


def test_what_is_drawn_is_what_training_gets(data: Path, tmp_path: Path, seen: Seen) -> None:
    """The batches of a plan of train's with the same options, in epoch 2, number by number."""
    file = tmp_path / "deep" / "view.png"
    typed = [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert result_of("data", "view", data, "--output", file, "--images", 5, "--epoch", 2, *typed) == 0
    with Image.open(file) as sheet:
        assert sheet.size[0] > 500

    train = open_dataset(data, "train")
    plan = plan_run(TrainingOptions(data=str(data), **OPTIONS), train)
    first = -(-2 * epoch_length(train, 1.0) // 2)
    batches = training_batches(
        train,
        plan.preprocessing,
        plan.augmentation,
        batch_size=2,
        seed=3,
        first_step=first,
        steps=first + 3,
        repeat_rare=1.0,
    )
    expected = [
        (image, boxes[boxes[:, 2] > 0], index)
        for batch in batches
        for image, boxes, index in zip(batch.images, batch.targets.boxes, batch.indices, strict=True)
    ]
    assert len(seen.tiles) == 5
    for (picture, drawn, _), caption, (image, boxes, index) in zip(
        seen.tiles, seen.captions, expected[:5], strict=True
    ):
        height, width = image.shape[1:]
        assert picture.shape == (height, width, 3)
        assert (picture == plan.preprocessing.restore(image.numpy())).all()
        assert (drawn == boxes.numpy()).all()
        assert caption == f"{width} x {height}: {Path(str(train.files[index])).name}"


def test_classes_are_named_and_what_a_crop_left_over_is_ignored(
    data: Path, tmp_path: Path, seen: Seen
) -> None:
    asked = ("--images", 7, "--zoom", "2,2", "--mosaic", 0)
    assert result_of("data", "view", data, "--output", tmp_path / "a.png", *asked) == 0
    names = open_dataset(data, "train").classes.names
    kinds = set()
    for _, boxes, options in seen.tiles:
        assert len(boxes) == len(options["captions"])
        for caption, group, ignored in zip(
            options["captions"], options["groups"], options["ignored"], strict=True
        ):
            assert caption == names[group] + (", ignored" if ignored else "")
            kinds.add(bool(ignored))
    assert kinds == {True, False}


def test_one_class_is_named_once(tmp_path: Path, seen: Seen) -> None:
    """Also: a single annotation file will do."""
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "dark.png")
    truth = GroundTruth(
        np.array([[5, 6, 20, 30], [20, 30, 60, 60]], np.float32), [0, 0], ignore=[Ignore.NO, Ignore.CROWD]
    )
    write_coco(
        tmp_path / "cells.json",
        classes=Classes(("cell",)),
        files=["dark.png"],
        sizes=[(64, 64)],
        ground_truths=[truth],
    )
    output = tmp_path.parent / f"{tmp_path.name}.png"
    asked = ("--images", 1, "--zoom", "1,1", "--image-size", 64)
    assert result_of("data", "view", tmp_path / "cells.json", "--output", output, *asked) == 0
    assert seen.title.endswith("every box: cell")
    assert seen.tiles[0][2]["captions"] == ["", "ignored"]


@pytest.mark.parametrize("recipe", ["paper", "paper-jitter", "modern", "small"])
def test_recipes_need_no_weights_to_be_looked_at(data: Path, tmp_path: Path, seen: Seen, recipe: str) -> None:
    asked = ("--recipe", recipe, "--image-size", 96, "--max-size", 96, "--images", 1)
    assert result_of("data", "view", data, "--output", tmp_path / "a.jpg", *asked) == 0
    words = {"modern": "size times 0.8 to 1", "paper-jitter": "size times 0.8 to 1"}.get(recipe, "flip 0.5")
    assert f"recipe {recipe}: shortest side 96, longest 96; " in seen.title
    assert words in seen.title


def test_another_split_is_shown_as_training_would(data: Path, tmp_path: Path, seen: Seen) -> None:
    assert (
        result_of("data", "view", data, "--output", tmp_path / "a.png", "--split", "val", "--images", 3) == 0
    )
    files = {Path(str(file)).name for file in open_dataset(data, "val").files}
    assert {caption.split(": ")[1] for caption in seen.captions} == files
    of_train = View(data=str(data), output="x.png")._plan(open_dataset(data, "train"))
    assert f"shortest side {of_train.spec.preprocessing.image_size}," in seen.title


def test_the_same_request_gives_the_same_picture(data: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        assert result_of("data", "view", data, "--output", file, "--images", 2, "--mosaic", 1) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = generate_shapes(tmp_path / "shapes", train=3, val=1, spec=ShapesSpec(image_size=96))
    broken = open_dataset(data, "train").path(1)
    broken.write_bytes(b"no image")
    assert result_of("data", "view", data, "--output", tmp_path / "a.png", "--images", 3) == 1
    said = capsys.readouterr()
    assert said.err.count("left out") == 1
    assert str(broken) in said.err
    assert "3 images in" in said.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "a.gif"], "--output needs a file named .png or .jpg; got 'a.gif'"),
        (["--output", "a.png", "--images", "0"], "--images needs 1 or more; got 0"),
        (["--output", "a.png", "--epoch", "-1"], "--epoch needs 0 or more; got -1"),
        (["--output", "a.png", "--mosaic", "2"], "--mosaic needs a number in [0, 1]; got 2.0"),
        (["--output", "a.png", "--image-size", "8"], "--image-size needs 32 or more"),
        (["--output", "a.png", "--mosiac", "1"], "data view has no option --mosiac. Did you mean '--mosaic'"),
        ([], "data view needs --output; none was given"),
    ],
)
def test_wrong_requests_get_one_message(
    data: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert result_of("data", "view", data, *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_nothing_is_written_into_the_data(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert result_of("data", "view", data, "--output", data / "a.png") == 2
    assert "--output needs a place outside the data" in capsys.readouterr().err
    assert not (data / "a.png").exists()


def test_a_photograph_is_not_replaced_where_data_is_a_file(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next(path for path in sorted(data.rglob("*")) if path.suffix in (".png", ".jpg"))
    file = next(path for path in sorted(data.rglob("*.json")))
    before = image.read_bytes()
    assert result_of("data", "view", file, "--output", image) == 2
    assert "--output needs a place outside the data" in capsys.readouterr().err
    assert image.read_bytes() == before


def test_options_of_train_are_the_same_here() -> None:
    """Every option of augmentation, and those of both commands with the same kinds and defaults."""
    view, train = View(data="x", output="x.png"), TrainingOptions(data="x")
    shared = set(vars(view)) & set(vars(train)) - {"output"}
    assert shared >= {
        *AugmentationOptions.__dataclass_fields__,
        "image_size",
        "max_size",
        "batch_size",
        "seed",
    }
    assert {name: getattr(view, name) for name in shared} == {name: getattr(train, name) for name in shared}
