"""One detector, whatever the image comes as and however many meet: the same boxes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import retinanet
from retinanet.batches import RawPredictions
from retinanet.checkpoint import Model, save_model
from retinanet.data import open_dataset
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import ConfigError, DataError, ImageError
from retinanet.images import Preprocessing, read_size
from retinanet.inference import Detector, validate
from retinanet.model import (
    BackboneSpec,
    HeadSpec,
    ModelSpec,
    PostProcessing,
    PyramidSpec,
    RetinaNet,
    build_retinanet,
)
from retinanet.records import Classes, Detections, OperatingPoints


def make_model(classes: tuple[str, ...] = ("disk", "square", "triangle"), **options: object) -> Model:
    """A small network whose scores are spread out, so that thresholds and NMS have work."""
    spec = ModelSpec(
        Classes(classes),
        backbone=BackboneSpec("resnet18", norm="group"),
        pyramid=PyramidSpec(channels=64),
        head=HeadSpec(depth=1, norm="group"),
        preprocessing=Preprocessing(image_size=96, max_size=160),
    )
    torch.manual_seed(0)
    network = build_retinanet(spec, prior=0.2)
    for parameter in network.class_head.last.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return Model(network, spec, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(make_model(), device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_shapes(
        tmp_path_factory.mktemp("data") / "shapes", train=2, val=9, spec=ShapesSpec(image_size=96)
    )


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of different shapes, so that a batch would have to be padded."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    files = []
    for i, (height, width) in enumerate(
        [(96, 96), (64, 120), (200, 96), (96, 96), (97, 131), (50, 40), (96, 110)]
    ):
        pixels = random.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        files.append(folder / f"{i}.png")
        Image.fromarray(pixels).resize((width, height)).save(files[-1])
    return files


def assert_same(first: Detections, second: Detections, pixels: float = 0.0, score: float = 0.0) -> None:
    assert len(first) == len(second) > 0
    unmatched = list(range(len(second)))
    for box, value, label in zip(first.boxes, first.scores, first.labels, strict=True):
        match = next(
            j
            for j in unmatched
            if second.labels[j] == label
            and abs(second.scores[j] - value) <= score
            and np.abs(second.boxes[j] - box).max() <= pixels
        )
        unmatched.remove(match)


def test_batch_size_does_not_change_what_is_found(detector: Detector, paths: list[Path]) -> None:
    alone = detector.predict(paths, threshold=0.05, batch_size=1)
    together = detector.predict(paths, threshold=0.05, batch_size=8)
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other, pixels=0.05, score=1e-4)


def test_images_pass_in_halves_where_there_is_no_memory_for_all(
    detector: Detector, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = detector.predict(paths, threshold=0.05, batch_size=1)
    forward, most = RetinaNet.forward, 2

    def refusing(self: RetinaNet, images: Tensor) -> RawPredictions:
        if len(images) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, images)

    monkeypatch.setattr(RetinaNet, "forward", refusing)
    for one, other in zip(expected, detector.predict(paths, threshold=0.05, batch_size=8), strict=True):
        assert_same(one, other, pixels=0.05, score=1e-4)
    most = 0
    with pytest.raises(
        ConfigError, match=r"no memory left on cpu for one image of \d+ x \d+ \(width x height\); use"
    ):
        detector.predict(paths)


def test_every_kind_of_input_gives_equal_boxes(detector: Detector, paths: list[Path]) -> None:
    path = paths[4]
    array = np.asarray(Image.open(path))
    by_path = detector.predict(path, threshold=0.05)[0]
    inputs = {
        "str": str(path),
        "bytes": path.read_bytes(),
        "PIL": Image.open(path),
        "array": array,
        "uint8 tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
        "float tensor": torch.from_numpy(array.copy()).permute(2, 0, 1) / 255,
    }
    for kind, image in inputs.items():
        found = detector.predict([image], threshold=0.05)  # type: ignore[list-item]
        assert isinstance(found, list), kind
        assert_same(by_path, found[0])
    opencv = detector.predict([array[:, :, ::-1]], threshold=0.05, bgr=True)[0]
    assert_same(by_path, opencv)


def test_detections_lie_in_the_original_image(detector: Detector, paths: list[Path]) -> None:
    for path, found in zip(paths, detector.stream(paths, threshold=0.05), strict=True):
        width, height = read_size(path)
        assert (found.width, found.height) == (width, height)
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, [0, 2]] <= width).all()
        assert (found.boxes[:, [1, 3]] <= height).all()
        assert len(found) <= 100


def test_stream_is_lazy_and_bounded(detector: Detector, paths: list[Path]) -> None:
    taken: list[int] = []

    def endless() -> object:
        for i in range(10_000):
            taken.append(i)
            yield paths[0]

    stream = detector.stream(endless(), batch_size=2)  # type: ignore[arg-type]
    assert not taken
    for _ in range(3):
        next(stream)
    assert len(taken) <= 8


def test_thresholds(paths: list[Path]) -> None:
    points = OperatingPoints({"disk": 0.9}, {"disk": 0.5})
    detector = Detector(make_model(operating_points=points), device="cpu")
    everything = detector.predict(paths[0], threshold=0.05)[0]
    chosen = detector.predict(paths[0])[0]
    limits = np.array([0.9, 0.3, 0.3])  # the stored one, and 0.3 where there is none
    assert len(chosen) == (everything.scores >= limits[everything.labels]).sum() < len(everything)
    with pytest.raises(ConfigError, match=r"threshold needs \[0, 1\]; got 2"):
        detector.predict(paths[0], threshold=2)


def test_the_cap_on_detections(paths: list[Path]) -> None:
    capped = Detector(make_model(), device="cpu", max_detections=3).predict(paths[0], threshold=0.05)[0]
    whole = Detector(make_model(), device="cpu").predict(paths[0], threshold=0.05)[0]
    assert len(capped) == 3
    assert capped.scores.tolist() == whole.scores[:3].tolist()


def test_an_unreadable_image_is_named_in_its_place(
    detector: Detector, paths: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff nothing")
    found = list(detector.detect([paths[0], broken, paths[1]], batch_size=2))
    assert [isinstance(one, ImageError) for one in found] == [False, True, False]
    assert str(broken) in str(found[1])
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        detector.predict([broken])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(5, 4, 4, dtype=torch.uint8), r"shape \[3, H, W\]"),
        (torch.full((3, 4, 4), 7.0), r"values in \[0, 1\]; got 7 to 7"),
        (torch.full((3, 4, 4), float("nan")), r"values in \[0, 1\]"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "needs uint8"),
        (np.zeros((4, 4, 3), np.float32), "uint8"),
    ],
)
def test_impossible_images_are_refused(detector: Detector, image: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        detector.predict([image])  # type: ignore[list-item]


def test_impossible_devices_and_batches_are_refused(detector: Detector, paths: list[Path]) -> None:
    with pytest.raises(ConfigError, match="--device needs auto, cpu, cuda"):
        Detector(make_model(), device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees none"):
            Detector(make_model(), device="cuda")
    for size in (0, -1):
        with pytest.raises(ConfigError, match="batch_size needs at least 1"):
            detector.predict(paths[0], batch_size=size)
    with pytest.raises(ConfigError, match="max_detections needs at least 1; got 0"):
        Detector(make_model(), device="cpu", max_detections=0)
    with pytest.raises(ConfigError, match="--device needs auto, cpu, cuda"):
        Detector(make_model(), device="meta")


def test_a_threshold_below_the_specs_is_honoured(paths: list[Path]) -> None:
    model = make_model()
    strict = dataclasses.replace(model.spec, post_processing=PostProcessing(score_threshold=0.9))
    detector = Detector(Model(model.network, strict), device="cpu")
    found, usual = (d.predict(paths[0], threshold=0.05)[0] for d in (detector, Detector(model, device="cpu")))
    assert found.scores.min() < 0.9
    np.testing.assert_array_equal(found.scores, usual.scores)


def test_validation_is_the_same_for_any_batch_and_from_a_saved_file(data: Path, tmp_path: Path) -> None:
    model = make_model()
    dataset = open_dataset(data, "val")
    small = validate(Detector(model, device="cpu"), dataset, batch_size=1)
    large = validate(Detector(model, device="cpu"), dataset, batch_size=8)
    save_model(tmp_path, model)
    again = retinanet.evaluate(retinanet.load(tmp_path, device="cpu"), data, split="val", batch_size=8)
    assert small.metrics.ap == pytest.approx(large.metrics.ap, abs=1e-3)
    assert again.metrics == large.metrics
    assert again.ap == again.metrics.ap
    assert set(again.per_class) == {"disk", "square", "triangle"}


def test_validation_names_what_it_cannot_read(data: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(data, tmp_path / "data")
    dataset = open_dataset(tmp_path / "data", "val")
    dataset.path(2).write_bytes(b"")
    Image.new("RGB", (50, 60)).save(dataset.path(4))  # not the size that its boxes were drawn on
    found = validate(Detector(make_model(), device="cpu"), dataset)
    assert list(found.failed) == [str(dataset.files[2]), str(dataset.files[4])]
    assert "as annotated; got 50 x 60" in found.failed[str(dataset.files[4])]
    assert found.metrics.images == len(dataset) - 2
    assert len(found.detections) == len(dataset)
    for index in range(len(dataset)):
        dataset.path(index).write_bytes(b"")
    with pytest.raises(DataError, match="none of 9 can"):
        validate(Detector(make_model(), device="cpu"), dataset)


def test_a_model_without_a_class_in_common_is_refused(data: Path) -> None:
    with pytest.raises(DataError, match="the model has cat, dog, the data set disk, square, triangle"):
        retinanet.evaluate(Detector(make_model(("cat", "dog")), device="cpu"), data)


def test_detections_go_to_other_libraries(detector: Detector, paths: list[Path]) -> None:
    found = detector.predict(paths[0], threshold=0.05)[0]
    tensors = found.torch()
    assert tensors["boxes"].shape == (len(found), 4)
    assert found.boxes.dtype == np.float32
    assert found.labels.dtype == np.int64
    assert all(isinstance(name, str) for name in found.names)
    assert found.draw(paths[0]).size[0] >= 96
