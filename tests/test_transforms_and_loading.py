"""Augmentation moves boxes with pixels; the stream of training images is a function of (seed, step) alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory as torch_pin_memory

from retinanet.batches import Batch
from retinanet.data import Dataset, loading, open_dataset
from retinanet.data.loading import Requests, training_batches
from retinanet.data.sampling import Epochs, generator
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.data.transforms import Augmentation, cut, flip, zoom
from retinanet.errors import ConfigError, DataError
from retinanet.images import Preprocessing
from retinanet.records import GroundTruth, Ignore


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_shapes(
        tmp_path_factory.mktemp("data") / "shapes", train=10, val=4, spec=ShapesSpec(image_size=96)
    )


def marked(boxes: list[list[float]], height: int = 40, width: int = 60) -> tuple[np.ndarray, GroundTruth]:
    """An image that is black but for its boxes, each filled with a grey of its own."""
    image = np.zeros((height, width, 3), np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes, start=1):
        image[int(y1) : int(y2), int(x1) : int(x2)] = 50 * number
    return image, GroundTruth(np.array(boxes, np.float32), np.arange(len(boxes)))


def extent(image: np.ndarray, value: int) -> list[int]:
    rows, columns = np.nonzero(image[:, :, 0] == value)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_a_box_too_thin_to_move_is_gone_and_not_an_error() -> None:
    truth = GroundTruth(np.array([[1000.0, 5, 1000.0002, 9], [1, 1, 5, 5]], np.float32), np.zeros(2))
    for width in range(1001, 1041):
        _, moved = flip(np.zeros((20, width, 3), np.uint8), truth)
        assert moved.ids.tolist() == [1]


def test_flip_moves_boxes_with_pixels_and_twice_is_nothing() -> None:
    image, truth = marked([[2, 3, 20, 10], [30, 5, 58, 38]])
    mirrored, moved = flip(image, truth)
    for number, box in enumerate(moved.boxes, start=1):
        assert extent(mirrored, 50 * number) == box.tolist()
    again, back = flip(mirrored, moved)
    assert (again == image).all()
    assert (back.boxes == truth.boxes).all()


@pytest.mark.parametrize("factor", [2.0, 1.25, 0.5, 0.8])  # windows inside the image, and canvases around it
@pytest.mark.parametrize("place", [(0.0, 0.0), (0.5, 0.3), (1.0, 1.0)])
def test_zoom_moves_boxes_with_pixels(factor: float, place: tuple[float, float]) -> None:
    image, truth = marked([[20, 12, 40, 30]])
    seen, moved = zoom(image, truth, factor=factor, place=place, min_visible=0.0)
    assert seen.shape[:2] == (round(40 / factor), round(60 / factor))
    for box in moved.boxes:
        assert extent(seen, 50) == box.tolist()


def test_a_cut_object_is_clipped_ignored_or_gone() -> None:
    truth = GroundTruth(
        np.array([[0, 0, 10, 10], [-5, 0, 5, 10], [-8, 0, 2, 10], [-20, 0, -1, 10]], np.float32), np.arange(4)
    )
    left = cut(truth, 30, 30, min_visible=0.3)
    assert left.ids.tolist() == [0, 1, 2]  # the last lies outside altogether
    assert left.ignore.tolist() == [Ignore.NO, Ignore.NO, Ignore.CUT]  # whole, half, a fifth visible
    assert left.areas.tolist() == pytest.approx([100, 50, 20])
    assert left.boxes[1].tolist() == [0, 0, 5, 10]


def test_what_was_ignored_stays_ignored_for_its_own_reason() -> None:
    truth = GroundTruth(np.array([[-9, 0, 1, 10]], np.float32), np.zeros(1), ignore=np.array([Ignore.CROWD]))
    assert cut(truth, 30, 30, min_visible=0.5).ignore.tolist() == [Ignore.CROWD]


@pytest.mark.parametrize(
    ("options", "field"),
    [({"flip": 1.5}, "flip"), ({"min_visible": -0.1}, "min_visible"), ({"zoom": (1.2, 0.8)}, "zoom")],
)
def test_impossible_augmentation_is_refused(options: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=f"Augmentation.{field} needs"):
        Augmentation(**options)


def test_every_epoch_is_a_permutation_and_epochs_differ() -> None:
    requests = Requests(Epochs(7, 5), batch_size=3, image_sizes=(64,), steps=14)
    stream = [request for step in requests for request in step]
    epochs = [[r.index for r in stream if r.epoch == epoch] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_a_run_that_starts_in_the_middle_sees_what_it_would_have_seen() -> None:
    whole = list(Requests(Epochs(7, 5), batch_size=3, image_sizes=(64, 96), steps=10))
    assert (
        list(Requests(Epochs(7, 5), batch_size=3, image_sizes=(64, 96), steps=10, first_step=4)) == whole[4:]
    )
    assert list(Requests(Epochs(7, 6), batch_size=3, image_sizes=(64, 96), steps=10)) != whole


def test_processes_share_each_step() -> None:
    whole = list(Requests(Epochs(7, 5), batch_size=4, image_sizes=(64,), steps=6))
    halves = [
        list(Requests(Epochs(7, 5), batch_size=4, image_sizes=(64,), steps=6, rank=rank, processes=2))
        for rank in (0, 1)
    ]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_random_streams_are_told_apart_by_every_word() -> None:
    draws = {generator(*words).random() for words in [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1), (0, 1, 3)]}
    assert len(draws) == 5


def batches(dataset: Dataset, workers: int = 0, first_step: int = 0) -> list:
    loader = training_batches(
        dataset,
        Preprocessing(image_size=64, max_size=64),
        Augmentation(zoom=(0.7, 1.4)),
        batch_size=3,
        seed=1,
        steps=5,
        first_step=first_step,
        workers=workers,
    )
    return list(loader)


def test_batches_do_not_depend_on_workers_or_on_where_the_run_began(shapes: Path) -> None:
    dataset = open_dataset(shapes, "train")
    alone, helped, resumed = batches(dataset), batches(dataset, workers=2), batches(dataset, first_step=2)
    for first, second in [*zip(alone, helped, strict=True), *zip(alone[2:], resumed, strict=True)]:
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.targets.boxes, second.targets.boxes)
        assert torch.equal(first.targets.classes, second.targets.classes)
        assert torch.equal(first.targets.ignored, second.targets.ignored)
        assert first.indices == second.indices


@pytest.mark.parametrize("asked", [True, False])
def test_batches_for_cuda_are_pinned(shapes: Path, monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    """Every tensor of a batch, by the function that torch's loader calls where it finds a device."""
    pinned = []

    def pin(tensor: torch.Tensor, *_: object) -> torch.Tensor:
        pinned.append(tensor.shape)
        return tensor.clone()

    def loader(*given: object, pin_memory: bool, **options: object) -> Iterator[Batch]:
        batches = DataLoader(*given, **options)  # type: ignore[arg-type]
        return map(torch_pin_memory, batches) if pin_memory else iter(batches)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(loading, "DataLoader", loader)
    (batch,) = training_batches(
        open_dataset(shapes, "train"),
        Preprocessing(64, 64),
        Augmentation(),
        batch_size=2,
        seed=0,
        steps=1,
        pin_memory=asked,
    )
    assert isinstance(batch, Batch)
    targets = batch.targets
    every = [x.shape for x in (batch.images, targets.boxes, targets.classes, targets.ignored)]
    assert pinned == (every if asked else [])


def test_a_picture_changes_from_epoch_to_epoch(shapes: Path) -> None:
    stream = batches(open_dataset(shapes, "train"))
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in stream:
        for index, image in zip(batch.indices, batch.images, strict=True):
            seen.setdefault(index, []).append(image)
    twice = [images for images in seen.values() if len(images) > 1]
    assert twice
    assert not any(torch.equal(a, b) for a, b, *_ in twice)


def test_an_unreadable_image_is_named_and_replaced(shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "broken"
    shutil.copytree(shapes, data)
    dataset = open_dataset(data, "train")
    dataset.path(3).write_bytes(b"no image")
    stream = batches(dataset)
    named = {name for batch in stream for name in batch.failed}
    assert len(named) == 1
    assert str(dataset.path(3)) in named.pop()
    assert all(len(batch.indices) == 3 and 3 not in batch.indices for batch in stream)
    for index in range(len(dataset)):
        dataset.path(index).write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^training needs images that can be read; none of 10 can"):
            batches(dataset, workers=workers)


def test_an_image_of_another_size_than_annotated_is_named_and_replaced(shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "other"
    shutil.copytree(shapes, data)
    dataset = open_dataset(data, "train")
    with Image.open(dataset.path(3)) as image:
        smaller = image.resize((image.width // 2, image.height))
    smaller.save(dataset.path(3))
    side = dataset.size(3)[0]
    named = {name for batch in batches(dataset) for name in batch.failed}
    assert named == {
        f"{dataset.path(3)}: needs {side} x {side} pixels, as annotated; got {side // 2} x {side}. "
        "`retinanet data check` says more"
    }


def test_scales_become_input_sizes_of_whole_cells() -> None:
    assert Augmentation().image_sizes(150) == (150,)
    assert Augmentation(scales=(0.8, 0.9, 1.0)).image_sizes(800) == (640, 704, 800)
    assert Augmentation(scales=(0.1,)).image_sizes(64) == (32,)


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, -1.0), (float("nan"),), (float("inf"),)])
def test_impossible_scales_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"Augmentation\.scales needs numbers above 0"):
        Augmentation(scales=scales)


def test_every_batch_draws_a_scale(tmp_path: Path) -> None:
    data = generate_shapes(tmp_path / "shapes", train=4, val=0, spec=ShapesSpec(image_size=96))
    batches = training_batches(
        open_dataset(data, "train"),
        Preprocessing(image_size=96, max_size=96),
        Augmentation(scales=(0.66, 1.0)),
        batch_size=2,
        seed=0,
        steps=12,
    )
    assert {batch.images.shape[2] for batch in batches} == {64, 96}
