"""Augmentation: boxes and ignored areas travel with the pixels; every choice is its own function of the seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional

from retinanet.data import Dataset, open_dataset
from retinanet.data.loading import training_batches
from retinanet.data.mosaic import mosaic, mosaic_window, partners
from retinanet.data.photometric import adjusted, jitter
from retinanet.data.sampling import PICTURE, Epochs, generator
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.data.transforms import Augmentation, flip, flip_vertical, quarter_turn, zoom
from retinanet.errors import ConfigError
from retinanet.images import Preprocessing, decode
from retinanet.preparing import plain_prepare_batch
from retinanet.records import GroundTruth, Ignore

Picture = tuple[np.ndarray, GroundTruth]
BLACK, MARK = 0, 100


@st.composite
def pictures(draw: st.DrawFn, mark: int = MARK) -> Picture:
    """A black image with one box, filled with a grey; the other is ignored and not filled."""
    width, height = draw(st.integers(4, 60)), draw(st.integers(4, 60))
    x1, y1 = draw(st.integers(0, width - 2)), draw(st.integers(0, height - 2))
    x2, y2 = draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))
    image = np.full((height, width, 3), BLACK, np.uint8)
    image[y1:y2, x1:x2] = mark
    boxes = np.array([[x1, y1, x2, y2], [0, 0, width, height]], np.float32)
    return image, GroundTruth(boxes, np.array([0, 1]), ignore=np.array([Ignore.NO, Ignore.CROWD]), ids=[7, 8])


def extent(image: np.ndarray, value: int = MARK) -> list[int]:
    rows, columns = np.nonzero(image[:, :, 0] == value)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


TURNS: dict[str, Callable[..., Picture]] = {
    "flip": flip,
    "flip_vertical": flip_vertical,
    "quarter_turn": quarter_turn,
}


@given(picture=pictures())
@pytest.mark.parametrize("name", TURNS)
def test_a_marked_block_turns_with_its_box(name: str, picture: Picture) -> None:
    image, truth = TURNS[name](*picture)
    height, width = image.shape[:2]
    assert extent(image) == truth.boxes[0].tolist()
    assert truth.boxes[1].tolist() == [0, 0, width, height]
    assert truth.ignore.tolist() == [Ignore.NO, Ignore.CROWD]
    assert truth.ids.tolist() == [7, 8]


@given(picture=pictures())
@pytest.mark.parametrize(("name", "times"), [("flip", 2), ("flip_vertical", 2), ("quarter_turn", 4)])
def test_turned_often_enough_it_is_as_before(name: str, times: int, picture: Picture) -> None:
    found = picture
    for _ in range(times):
        found = TURNS[name](*found)
    assert (found[0] == picture[0]).all()
    assert (found[1].boxes == picture[1].boxes).all()


@given(picture=pictures(), factor=st.floats(0.4, 3), place=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_marked_block_is_cropped_with_its_box(
    picture: Picture, factor: float, place: tuple[float, float]
) -> None:
    image, truth = zoom(*picture, factor=factor, place=place, min_visible=0.5)
    height, width = image.shape[:2]
    for box, kind, number in zip(truth.boxes, truth.ignore, truth.ids, strict=True):
        assert (box >= 0).all()
        assert (box <= [width, height, width, height]).all()
        if number == 7 and factor > 1:  # a canvas may have the block's grey
            assert extent(image) == box.tolist()
        assert kind == (Ignore.CROWD if number == 8 else kind)


@given(four=st.lists(pictures(), min_size=4, max_size=4))
def test_a_mosaic_keeps_every_box_and_its_pixels(four: list[Picture]) -> None:
    image, truth = mosaic(four)
    height, width = image.shape[:2]
    assert truth.ignore.tolist() == [Ignore.NO, Ignore.CROWD] * 4
    assert truth.classes.tolist() == [0, 1] * 4
    assert (truth.boxes >= 0).all()
    assert (truth.boxes <= np.array([width, height, width, height]) + 1e-3).all()
    assert extent_within(image, truth.boxes[1]) == pytest.approx(truth.boxes[0].tolist())
    whole = truth.boxes[1::2]
    overlaps = np.minimum(whole[:, None, 2:], whole[None, :, 2:]) - np.maximum(
        whole[:, None, :2], whole[None, :, :2]
    )
    np.fill_diagonal(overlaps[..., 0], 0)
    assert (overlaps.min(axis=2) <= 1e-3).all()  # no picture covers another


def extent_within(image: np.ndarray, window: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = (round(float(side)) for side in window)
    left, top, right, bottom = extent(image[y1:y2, x1:x2])
    return [x1 + left, y1 + top, x1 + right, y1 + bottom]


def test_pictures_of_one_size_meet_in_the_middle_unchanged() -> None:
    greys = (40, 90, 140, 190)
    four = [
        (np.full((6, 8, 3), grey, np.uint8), GroundTruth(np.array([[1, 2, 5, 6]], np.float32), [number]))
        for number, grey in enumerate(greys)
    ]
    image, truth = mosaic(four)
    assert image.shape == (12, 16, 3)
    assert [image[y, x, 0] for y, x in ((0, 0), (5, 8), (6, 7), (11, 15))] == list(greys)
    assert truth.boxes.tolist() == [[1, 2, 5, 6], [9, 2, 13, 6], [1, 8, 5, 12], [9, 8, 13, 12]]


def test_a_partner_of_another_size_comes_in_the_size_of_the_first() -> None:
    first = (np.zeros((10, 16, 3), np.uint8), GroundTruth.empty())
    large = np.zeros((40, 60, 3), np.uint8)
    large[20:, 30:] = 200
    other = (large, GroundTruth(np.array([[30, 20, 60, 40]], np.float32), [0], areas=np.array([300.0])))
    strip = (np.zeros((10, 1000, 3), np.uint8), GroundTruth.empty())
    image, truth = mosaic([first, first, first, other])
    assert image.shape == (20, 32, 3)  # 40 x 60 became 10 x 15
    assert truth.boxes.tolist() == [[23.5, 15, 31, 20]]
    assert truth.areas.tolist() == [300 / 16]
    assert (image[16:20, 25:31] == 200).all()
    assert mosaic([first, strip, first, first])[0].shape[1] == 16 + round(10 * 1333 / 800)


def test_the_window_of_a_mosaic_lies_in_it() -> None:
    image = np.full((30, 40, 3), MARK, np.uint8)
    four = [(image, GroundTruth(np.array([[0, 0, 40, 30]], np.float32), [0]))] * 4
    sides = set()
    for number in range(60):
        seen, truth = mosaic_window(four, generator(9, number), min_visible=0.3)
        assert (seen == MARK).all()
        assert 30 <= seen.shape[0] <= 60
        assert (truth.boxes <= [seen.shape[1], seen.shape[0]] * 2).all()
        sides.add(seen.shape[0])
    assert len(sides) > 15


def test_partners_are_drawn_as_often_as_asked() -> None:
    drawn = [partners(generator(3, 0, 0, image), 9, 0.25) for image in range(4000)]
    assert np.mean([len(others) == 3 for others in drawn]) == pytest.approx(0.25, abs=0.03)
    assert {other for others in drawn for other in others} == set(range(9))
    assert not any(partners(generator(3, 0, 0, image), 9, 0.0) for image in range(100))


# Colours


def noise(seed: int = 0, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (23, 31, 3), dtype=np.uint8)


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0, 1.3, 1.5])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_change_as_torchvisions_do(name: str, factor: float) -> None:
    image = noise()
    theirs = getattr(functional, f"adjust_{name}")(torch.from_numpy(image).permute(2, 0, 1), factor)
    ours = adjusted(image, **{name: factor})
    difference = np.abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy().astype(int))
    assert difference.max() <= 1  # torchvision rounds down, and twice


def test_nothing_asked_changes_nothing() -> None:
    assert (adjusted(noise()) == noise()).all()
    assert (jitter(noise(), 0.5, 0.5, 0.5, 0.5) == noise()).all()  # the middle of every range


@pytest.mark.parametrize("hue", [-0.5, -0.05, 0.05, 0.2])
def test_hue_turns_colours_and_leaves_grey_and_brightness(hue: float) -> None:
    grey = np.repeat(noise()[:, :, :1], 3, axis=2)
    assert np.abs(adjusted(grey, hue=hue).astype(int) - grey).max() <= 1
    image = noise(low=90, high=160)  # of which no colour is clipped
    turned = adjusted(image, hue=hue)
    luma = [np.asarray(Image.fromarray(pixels).convert("L"), int) for pixels in (image, turned)]
    assert np.abs(luma[0] - luma[1]).max() <= 2
    assert np.abs(turned.astype(int) - image).max() > 3
    red = np.tile(np.uint8([200, 20, 20]), (2, 2, 1))
    assert adjusted(red, hue=0.05)[0, 0, 1] > adjusted(red, hue=-0.05)[0, 0, 1]  # to yellow, and to purple


def test_jitter_leaves_a_view_and_its_source_alone() -> None:
    image = noise()
    before = image.copy()
    changed = jitter(image[:, ::-1], 0.1, 0.9, 0.2, 0.8)
    assert (image == before).all()
    assert (changed[:, ::-1] == jitter(image, 0.1, 0.9, 0.2, 0.8)).all()


# All of it

OFF = {"flip": 0.0}
CHOICES: list[dict[str, Any]] = [
    {"flip": 1.0},
    {"flip_vertical": 1.0},
    {"quarter_turn": 1.0},
    {"photometric": 1.0},
    {"zoom": (0.5, 2.0)},
]


@pytest.mark.parametrize("options", CHOICES, ids=lambda options: next(iter(options)))
def test_every_setting_changes_the_picture(options: dict[str, Any]) -> None:
    truth = GroundTruth.empty()
    assert (Augmentation(**OFF)(noise(), truth, generator(1))[0] == noise()).all()
    changed, _ = Augmentation(**{**OFF, **options})(noise(), truth, generator(1))
    assert changed.shape != noise().shape or (changed != noise()).any()


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_one_setting_does_not_move_the_choices_of_others(seed: int) -> None:
    truth = GroundTruth(np.array([[5, 5, 20, 15]], np.float32), [0])

    def found(**options: Any) -> np.ndarray:
        return Augmentation(**{**OFF, **options})(noise(), truth, generator(seed))[1].boxes

    for options in ({"flip": 0.5}, {"flip_vertical": 0.5}, {"zoom": (0.5, 2.0)}):
        assert (found(**options) == found(photometric=0.5, **options)).all()
    unturned = found(quarter_turn=0.0, zoom=(0.5, 2.0))
    turned = found(quarter_turn=1.0, zoom=(0.5, 2.0))
    assert len(unturned) == len(turned)
    assert sorted(np.ptp(turned.reshape(-1, 2, 2), axis=1).ravel()) == pytest.approx(
        sorted(np.ptp(unturned.reshape(-1, 2, 2), axis=1).ravel())
    )


@pytest.mark.parametrize("name", ["flip_vertical", "quarter_turn", "photometric", "mosaic"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_impossible_probabilities_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"Augmentation.{name} needs \[0, 1\]; got"):
        Augmentation(**{name: value})


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = generate_shapes(
        tmp_path_factory.mktemp("data") / "shapes", train=7, val=0, spec=ShapesSpec(image_size=96)
    )
    return open_dataset(folder, "train")


FRAME = Preprocessing(64, 96)


def batches(dataset: Dataset, augmentation: Augmentation, **options: Any) -> list[Any]:
    given = {"batch_size": 3, "seed": 5, "steps": 6, **options}
    return list(training_batches(dataset, FRAME, augmentation, **given))


def test_what_is_off_leaves_pictures_as_they_were(shapes: Dataset) -> None:
    """Spelt out as it was before there was more than flips and zooms."""
    stream = batches(shapes, Augmentation(zoom=(0.7, 1.4)), steps=5)
    order = Epochs(len(shapes), 5)
    places = [(epoch, int(image)) for epoch in range(3) for image in order.order(epoch)[0]]
    for step, batch in enumerate(stream):
        images = []
        for epoch, index in places[3 * step : 3 * step + 3]:
            mirrored, position, *place = generator(PICTURE, 5, epoch, index).random(4)
            factor = np.exp(np.log(0.7) + position * np.log(1.4 / 0.7))
            picture = zoom(
                decode(shapes.path(index)),
                shapes.ground_truth(index),
                factor=float(factor),
                place=(place[0], place[1]),
                min_visible=0.3,
            )
            images.append((flip(*picture) if mirrored < 0.5 else picture)[0])
        assert torch.equal(batch.images, plain_prepare_batch(images, FRAME)[0])


EVERYTHING = Augmentation(
    zoom=(0.7, 1.4), scales=(0.7, 1.0), flip_vertical=0.5, quarter_turn=0.5, photometric=0.5, mosaic=0.5
)


@pytest.mark.parametrize("options", [{"workers": 2}, {"first_step": 2}], ids=str)
def test_everything_is_the_same_for_any_workers_and_wherever_a_run_goes_on(
    shapes: Dataset, options: dict[str, int]
) -> None:
    usual = batches(shapes, EVERYTHING, repeat_rare=1.0)[options.get("first_step", 0) :]
    others = batches(shapes, EVERYTHING, repeat_rare=1.0, **options)
    for first, second in zip(usual, others, strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.targets.boxes, second.targets.boxes)
        assert torch.equal(first.targets.ignored, second.targets.ignored)
        assert first.indices == second.indices


def test_boxes_of_every_batch_lie_in_their_image(shapes: Dataset) -> None:
    for batch in batches(shapes, EVERYTHING, steps=10):
        height, width = batch.images.shape[2:]
        assert (batch.targets.boxes >= 0).all()
        assert (batch.targets.boxes <= torch.tensor([width, height, width, height])).all()
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_copies_of_an_image_in_one_epoch_differ(shapes: Dataset) -> None:
    (batch,) = batches(shapes, EVERYTHING, batch_size=40, steps=1, repeat_rare=1.0)
    seen: dict[int, list[torch.Tensor]] = {}
    for index, image in zip(batch.indices, batch.images, strict=True):
        seen.setdefault(index, []).append(image)
    assert len(batch.indices) > len(seen)
    for images in seen.values():
        assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_a_partner_that_cannot_be_read_is_named_and_replaced(shapes: Dataset, tmp_path: Path) -> None:
    folder = generate_shapes(tmp_path / "shapes", train=3, val=0, spec=ShapesSpec(image_size=96))
    dataset = open_dataset(folder, "train")
    dataset.path(1).write_bytes(b"no image")
    stream = batches(dataset, Augmentation(mosaic=1.0))
    assert all(len(batch.indices) == 3 and 1 not in batch.indices for batch in stream)
    named = {name for batch in stream for name in batch.failed}
    assert len(named) == 1
    assert str(dataset.path(1)) in named.pop()
