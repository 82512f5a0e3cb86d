"""Synthetic shapes: pure functions of their arguments, boxes that fit, classes told apart by shape alone."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinanet.data import shapes
from retinanet.data.scenes import _coverage, _is_empty, _moved, _new_shape, _place_objects, _Shape
from retinanet.data.shapes import CLASSES, ShapesSpec, draw_scene, generate_shapes, holds_shapes
from retinanet.errors import ConfigError, DataError
from retinanet.records import GroundTruth

SPEC = ShapesSpec()
SMALL = ShapesSpec(image_size=64, min_side=0.15, max_side=0.8, max_objects=3)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, GroundTruth]]:
    return [draw_scene(SPEC, 0, "train", index) for index in range(500)]


@pytest.fixture(scope="module")
def placed() -> list[list[_Shape]]:
    rng = np.random.default_rng(0)
    return [_place_objects(rng, SPEC) for _ in range(100)]


def all_of(scenes: list, field: str) -> np.ndarray:
    return np.concatenate([getattr(truth, field) for _, truth in scenes])


def sides_of(scenes: list) -> np.ndarray:
    boxes = all_of(scenes, "boxes")
    return np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


# --- determinism ---


def test_a_scene_depends_on_its_arguments_only(scenes: list) -> None:
    for index in (7, 3, 9):  # another order than the fixture's, and 9 is empty
        pixels, truth = draw_scene(SPEC, 0, "train", index)
        expected, known = scenes[index]
        assert pixels.shape == (160, 160, 3)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_array_equal(truth.boxes, known.boxes)
        np.testing.assert_array_equal(truth.classes, known.classes)


@pytest.mark.parametrize(
    ("seed", "split", "index"),
    [
        (1, "train", 3),  # another seed
        (0, "val", 3),  # another split
        (0, "train", 4),  # another image
    ],
)
def test_every_argument_changes_the_scene(scenes: list, seed: int, split: str, index: int) -> None:
    assert (draw_scene(SPEC, seed, split, index)[0] != scenes[3][0]).any()


def test_scenes_stay_the_same_from_version_to_version(scenes: list) -> None:
    # Results on this data are compared over months. A change here changes every one of them: say so in
    # CHANGELOG.md and raise GENERATOR. The last bit of a pixel may depend on the versions of NumPy and Pillow.
    pixels, truth = scenes[0]
    assert shapes.GENERATOR == 2
    np.testing.assert_allclose(pixels.mean(axis=(0, 1)), [71.93, 176.26, 142.02], atol=0.2)
    assert [CLASSES.names[label] for label in truth.classes] == ["disk", "disk", "square"]
    expected = [[81.85, 55.74, 97.23, 75.18], [53.18, 125.61, 66.13, 141.39], [39.10, 29.33, 57.17, 44.55]]
    np.testing.assert_allclose(truth.boxes, expected, atol=0.05)


# --- what the images hold ---


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [
        (0.1, 300, 30),
        (0.1, 2000, 200),
        (0.0, 300, 0),
        (1.0, 300, 300),
        (0.5, 300, 150),
    ],
)
def test_share_of_empty_images(share: float, count: int, expected: int) -> None:
    spec = ShapesSpec(empty_share=share)
    empty = [_is_empty(spec, index) for index in range(count)]
    assert abs(sum(empty) - expected) <= 3
    # No stride through the images meets empty ones only, or none.
    if 0 < share < 1:
        assert all(0 < np.mean(empty[start::10]) < 1 for start in range(10))


def test_empty_images_have_no_objects_but_something_in_them(scenes: list) -> None:
    for index, (_, truth) in enumerate(scenes):
        assert (len(truth) == 0) == _is_empty(SPEC, index)
        assert len(truth) <= SPEC.max_objects
    empty = [pixels for pixels, truth in scenes if not len(truth)]
    assert np.mean([pixels.std(axis=(0, 1)).max() > 5 for pixels in empty]) > 0.8


def test_sides_are_log_uniform_over_a_range_of_twelve(scenes: list) -> None:
    sides = np.sort(sides_of(scenes))
    assert sides[0] >= 0.07 * 160 * 0.999
    assert sides[-1] <= 0.84 * 160 * 1.001
    assert sides[-1] / sides[0] > 11.5
    share = np.log(sides / (0.07 * 160)) / math.log(12)
    ranks = (np.arange(len(share)) + 0.5) / len(share)
    assert np.abs(share - ranks).max() < 0.05  # the Kolmogorov-Smirnov distance; uniform sides give 0.4


def test_aspect_ratios_vary_mildly(scenes: list) -> None:
    boxes = all_of(scenes, "boxes")
    aspect = (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])
    assert aspect.min() >= 1 / 1.3 - 1e-3
    assert aspect.max() <= 1.3 + 1e-3
    assert np.quantile(aspect, 0.1) < 0.85
    assert np.quantile(aspect, 0.9) > 1.18


def test_every_coco_size_and_every_class_is_well_represented(scenes: list) -> None:
    areas, classes = all_of(scenes, "areas"), all_of(scenes, "classes")
    small, large = areas < 32**2, areas >= 96**2
    assert min(small.mean(), (~small & ~large).mean()) > 0.3
    assert large.mean() > 0.03
    assert np.abs(np.bincount(classes, minlength=3) / len(classes) - 1 / 3).max() < 0.05


# --- geometry ---


def test_coverage_of_a_rectangle_worked_by_hand() -> None:
    # From (0.5, 0.3) to (2, 1.5): half of the first column; of the sample lines at 1/8, 3/8, 5/8 and 7/8 of
    # each row, three of the first row and two of the second.
    corners = np.array([[0.5, 0.3], [2.0, 0.3], [2.0, 1.5], [0.5, 1.5]])
    expected = np.outer([0.75, 0.5], [0.5, 1.0, 0.0])
    np.testing.assert_allclose(_coverage(corners, 2, 3), expected, atol=1e-6)
    np.testing.assert_allclose(_coverage(corners[::-1], 2, 3), expected, atol=1e-6)


@pytest.mark.parametrize("kind", CLASSES.names)
@pytest.mark.parametrize("side", [11.0, 40.0, 134.0])
def test_a_shape_fills_its_box_to_all_four_sides(kind: str, side: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        shape = _moved(rng, _new_shape(rng, kind, side, 160), 160)
        x1, y1, x2, y2 = shape.box
        assert min(x1, y1) >= 0
        assert max(x2, y2) <= 160
        assert math.sqrt((x2 - x1) * (y2 - y1)) == pytest.approx(side, rel=1e-6)
        mask = np.zeros((160, 160))
        mask[shape.window] = shape.coverage
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        # A sharp corner may pass between two of the four sample lines of a row: half a pixel is allowed.
        drawn = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert (np.abs(np.array(drawn) - shape.box) < 1.5).all()
        assert (shape.coverage >= 0).all()
        assert (shape.coverage <= 1.00001).all()
        assert shape.area == pytest.approx(float(mask.sum()), rel=0.02)


def test_areas_are_those_of_whole_shapes(scenes: list) -> None:
    boxes, classes, areas = (all_of(scenes, field) for field in ("boxes", "classes", "areas"))
    filled = areas / ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    np.testing.assert_allclose(filled[classes == 0], math.pi / 4, atol=0.01)  # an ellipse
    assert filled[classes == 1].min() > 0.6  # a square turned by 20 degrees: 1 / (1 + sin 40) = 0.609
    assert filled[classes == 1].mean() == pytest.approx(math.pi / 4, abs=0.05)  # as a disk, on average
    assert filled[classes == 2].max() <= 0.5001  # a triangle in its box


def test_at_least_half_of_every_object_is_visible(placed: list) -> None:
    overlapping = 0
    for objects in placed:
        front = np.full((160, 160), -1)
        for number, shape in enumerate(objects):
            front[shape.window][shape.solid] = number
        shares = [(front == number).sum() / shape.solid.sum() for number, shape in enumerate(objects)]
        assert min(shares) >= 0.5
        overlapping += min(shares) < 1
    assert overlapping > 20  # of 100 images: overlaps are common


# --- classes differ by shape alone ---


def accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """The share of the last third that the 15 nearest of the first two thirds classify rightly."""
    split = len(labels) * 2 // 3
    known, asked = features[:split], features[split:]
    distance = (asked**2).sum(1)[:, None] + (known**2).sum(1) - 2 * asked @ known.T
    nearest = labels[:split][np.argsort(distance, axis=1)[:, :15]]
    votes = np.stack([(nearest == label).sum(axis=1) for label in range(3)], axis=1)
    return float((votes.argmax(axis=1) == labels[split:]).mean())


def test_mean_colour_and_box_size_do_not_tell_the_class_but_the_silhouette_does(scenes: list) -> None:
    colour_and_size, silhouettes = [], []
    for pixels, truth in scenes:
        for box in truth.boxes:
            crop = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BOX, box=tuple(map(float, box)))
            patch = np.asarray(crop, np.float64)
            colour_and_size.append([*patch.mean(axis=(0, 1)), *np.log(box[2:] - box[:2])])
            centre = np.median(patch[5:11, 5:11].reshape(-1, 3), axis=0)
            unlike = np.linalg.norm(patch - centre, axis=2).ravel()
            silhouettes.append(unlike / unlike.max())
    labels = all_of(scenes, "classes")
    standard = np.array(colour_and_size)
    standard = (standard - standard.mean(axis=0)) / standard.std(axis=0)
    assert accuracy(standard, labels) < 0.5  # chance: 0.33
    assert accuracy(np.array(silhouettes), labels) > 0.8  # the same images, boxes and classifier


# --- the data set on disk ---


def test_the_data_set_holds_the_scenes(tmp_path: Path) -> None:
    seen: list[int] = []
    folder = generate_shapes(
        tmp_path / "new" / "shapes", train=12, val=3, test=2, seed=5, spec=SMALL, progress=seen.append
    )
    assert folder == tmp_path / "new" / "shapes"
    assert seen == list(range(1, 18))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["shapes"]
    for split, count in (("train", 12), ("val", 3), ("test", 2)):
        document = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        assert [c["name"] for c in document["categories"]] == list(CLASSES.names)
        assert [i["file_name"] for i in document["images"]] == [
            f"images/{split}/{index:06d}.png" for index in range(count)
        ]
        for index, image in enumerate(document["images"]):
            pixels, truth = draw_scene(SMALL, 5, split, index)
            np.testing.assert_array_equal(np.asarray(Image.open(folder / image["file_name"])), pixels)
            mine = [a for a in document["annotations"] if a["image_id"] == image["id"]]
            boxes = np.array([a["bbox"] for a in mine]).reshape(-1, 4)
            np.testing.assert_allclose(boxes[:, :2], truth.boxes[:, :2], atol=0.01)
            np.testing.assert_allclose(boxes[:, 2:], truth.boxes[:, 2:] - truth.boxes[:, :2], atol=0.01)
            np.testing.assert_allclose([a["area"] for a in mine], truth.areas, atol=0.01)
            assert [a["category_id"] for a in mine] == [CLASSES.ids[label] for label in truth.classes]


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (
        generate_shapes(tmp_path / name, train=3, val=2, seed=1, spec=SMALL) for name in ("a", "b")
    )
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 7
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_the_data_set_says_what_it_was_drawn_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = generate_shapes(tmp_path / "shapes", train=2, val=1, seed=3, spec=SMALL)
    arguments = {"train": 2, "val": 1, "seed": 3, "spec": SMALL}
    assert holds_shapes(folder, **arguments)
    for change in ({"train": 3}, {"val": 2}, {"test": 1}, {"seed": 4}, {"spec": SPEC}):
        assert not holds_shapes(folder, **{**arguments, **change})
    assert not holds_shapes(tmp_path / "nowhere", **arguments)
    monkeypatch.setattr(shapes, "GENERATOR", shapes.GENERATOR + 1)
    assert not holds_shapes(folder, **arguments)


def test_a_data_set_that_says_nothing_is_not_taken_for_ours(tmp_path: Path) -> None:
    folder = generate_shapes(tmp_path / "shapes", train=1, val=0, spec=SMALL)
    page = folder / "annotations" / "instances_train.json"
    document = json.loads(page.read_text())
    for text in (json.dumps({**document, "info": {}}), json.dumps(document["images"]), "no JSON"):
        page.write_text(text)
        assert not holds_shapes(folder, train=1, val=0, spec=SMALL)


def test_a_split_without_images_is_not_written(tmp_path: Path) -> None:
    folder = generate_shapes(tmp_path / "shapes", train=0, val=1, spec=SMALL)
    assert [path.name for path in (folder / "annotations").iterdir()] == ["instances_val.json"]
    assert [path.name for path in (folder / "images").iterdir()] == ["val"]


def test_an_interrupted_call_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_shapes(tmp_path / "shapes", train=3, val=3, spec=SMALL, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--output needs a new folder; .* exists, .* Choose another name"):
        generate_shapes(tmp_path, train=1, val=0, spec=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--output .*: no folder can be made in .*file.*another place"):
        generate_shapes(tmp_path / "file" / "shapes", train=1, val=0, spec=SMALL)


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": -1}, r"--train needs 0 or more images; got -1"),
        ({"val": -2}, r"--val needs 0 or more images; got -2"),
        ({"train": 1, "test": -3}, r"--test needs 0 or more images; got -3"),
        ({"train": 0, "val": 0}, r"at least one image in train, val or test"),
        ({"train": 1, "seed": -1}, r"a data set needs seed >= 0; got -1"),
    ],
)
def test_impossible_data_sets_are_refused(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_shapes(tmp_path / "shapes", spec=SMALL, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seed", "index", "message"),
    [
        (-1, 0, r"draw_scene needs seed >= 0; got -1"),
        (0, -1, r"draw_scene needs index >= 0; got -1"),
    ],
)
def test_impossible_scenes_are_refused(seed: int, index: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw_scene(SMALL, seed, "train", index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 31}, r"image_size needs at least 32 pixels; got 31"),
        ({"min_side": 0.0}, r"0 < min_side < max_side <= 1 .* got min_side 0 and max_side 0.84"),
        ({"min_side": 0.5, "max_side": 0.5}, r"min_side 0.5 and max_side 0.5"),
        ({"max_side": 1.1}, r"min_side 0.07 and max_side 1.1"),
        ({"min_side": math.nan}, r"min_side nan"),
        ({"image_size": 64}, r"min_side \* image_size of at least 6 pixels.*got 0.07 \* 64 = 4.48"),
        ({"max_objects": 0}, r"max_objects needs at least 1; got 0"),
        ({"empty_share": -0.1}, r"empty_share needs \[0, 1\]; got -0.1"),
        ({"empty_share": 1.5}, r"empty_share needs \[0, 1\]; got 1.5"),
    ],
)
def test_impossible_specs_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShapesSpec(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    [
        ShapesSpec(image_size=32, min_side=0.2, max_side=1.0),  # the smallest images, objects up to the edges
        ShapesSpec(image_size=33, min_side=0.99, max_side=1.0, max_objects=1),  # every object fills the image
        ShapesSpec(max_objects=40, empty_share=0),  # more objects than there is room for
    ],
)
def test_extreme_specs_give_valid_scenes(spec: ShapesSpec) -> None:
    for index in range(20):
        pixels, truth = draw_scene(spec, 0, "train", index)
        assert pixels.shape == (spec.image_size, spec.image_size, 3)
        assert len(truth) <= spec.max_objects
        assert (truth.boxes >= 0).all()
        assert (truth.boxes <= spec.image_size).all()
