"""Coverage of objects by anchors, anchors fitted to them, and the file that carries them to training."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retinanet.anchors import AnchorSpec, all_anchors_of_image
from retinanet.boxes import iou, pairwise
from retinanet.cli import main
from retinanet.data import Dataset, anchor_fit, open_dataset, write_coco
from retinanet.data.anchor_fit import fit_anchors
from retinanet.data.coverage import (
    Coverage,
    NetworkObjects,
    best_overlaps,
    coverage_by_class,
    coverage_by_size,
    objects_in_network,
)
from retinanet.data.dataset import Annotation
from retinanet.errors import ConfigError, DataError
from retinanet.images import Preprocessing
from retinanet.records import Classes, GroundTruth, Ignore
from retinanet.training import recipes
from retinanet.training.anchor_file import AskedAnchors, parse_anchors, write_anchors
from retinanet.training.configuration import TrainingOptions
from retinanet.training.sizing import anchor_choices, choose_anchors, coverage

REAL_DATA = os.environ.get("RETINANET_TEST_DATA")
needs_real_data = pytest.mark.skipif(not REAL_DATA, reason="RETINANET_TEST_DATA is not set")


def objects_of(boxes: np.ndarray, width: int, height: int) -> NetworkObjects:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    padded = np.tile(np.array([[-(-width // 32) * 32, -(-height // 32) * 32]]), (len(boxes), 1))
    return NetworkObjects(boxes, padded, np.arange(len(boxes)))


def scattered(width: float, height: float, count: int = 60, side: int = 256, seed: int = 0) -> np.ndarray:
    """Boxes of one shape at random places of a square image."""
    corners = np.random.default_rng(seed).uniform(0, side - max(width, height), (count, 2))
    return np.hstack([corners, corners + np.array([width, height])])


def one_image(boxes: np.ndarray, labels: list[int], names: tuple[str, ...], side: int = 256) -> Dataset:
    annotations = [
        Annotation(0, tuple(box), label, (box[2] - box[0]) * (box[3] - box[1]), Ignore.NO, number)
        for number, (box, label) in enumerate(zip(boxes.tolist(), labels, strict=True))
    ]
    return Dataset.build(
        name="made", split="train", root=Path("/made"), classes=Classes(names), files=["a.png"], image_ids=[1],
        sizes=[(side, side)], annotations=annotations,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ coverage


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(20, 200), st.integers(20, 200)),
    center=st.sampled_from([0.0, 0.25, 0.5]),
    rounding=st.sampled_from(["none", "torchvision", "detectron"]),
    stride_rule=st.sampled_from(["fixed", "image"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_best_anchor_is_that_of_a_literal_search(size, center, rounding, stride_rule, seed) -> None:  # type: ignore[no-untyped-def]
    """All anchors, all IoUs: what the closed form replaces."""
    width, height = size
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 1, (20, 2, 2)) * [width, height]
    boxes = np.hstack([corners.min(axis=1), corners.max(axis=1) + 0.5]).astype(np.float32)
    spec = AnchorSpec(center=center, rounding=rounding, stride_rule=stride_rule)
    objects = objects_of(boxes, width, height)
    padded_width, padded_height = objects.padded[0].tolist()
    anchors = all_anchors_of_image(spec, padded_height, padded_width)
    expected = pairwise(iou, torch.from_numpy(boxes), anchors).amax(dim=1).numpy()
    np.testing.assert_allclose(best_overlaps(spec, objects), expected, atol=2e-5)


def test_coverage_by_hand() -> None:
    """A square of 32 at a location of P3 is an anchor itself; half as wide its IoU is 1/2; of 6 px it is small."""
    boxes = [[4, 4, 36, 36], [4, 4, 20, 36], [57, 57, 63, 63]]
    overlaps = best_overlaps(AnchorSpec(scales=(1.0,), ratios=(1.0,)), objects_of(boxes, 128, 128))
    assert overlaps.tolist()[0] == 1.0
    assert overlaps[2] == pytest.approx(36 / 1024)
    assert Coverage.of(overlaps).objects == 3
    assert Coverage.of(np.array([0.5, 0.49, 0.4, 0.39])) == Coverage(4, 0.25, 0.75, pytest.approx(0.445))
    assert Coverage.of(np.zeros(0)) == Coverage(0, None, None, None)


def test_objects_are_taken_as_the_network_sees_them() -> None:
    """200 x 100 at shortest side 50: half as large, padded to 128 x 64; what is ignored is no object."""
    dataset = Dataset.build(
        name="made", split="train", root=Path("/made"), classes=Classes(("a",)), files=["a.png", "b.png"],
        image_ids=[1, 2], sizes=[(50, 50), (200, 100)],
        annotations=[
            Annotation(1, (10, 20, 30, 60), 0, 800, Ignore.NO, 1),
            Annotation(1, (0, 0, 9, 9), 0, 81, Ignore.CROWD, 2),
            Annotation(0, (1, 2, 3, 4), 0, 4, Ignore.NO, 3),
        ],
    )  # fmt: skip
    objects = objects_in_network(dataset, Preprocessing(image_size=50, max_size=200))
    assert objects.boxes.tolist() == [[1, 2, 3, 4], [5, 10, 15, 30]]
    assert objects.padded.tolist() == [[64, 64], [128, 64]]
    assert objects.rows.tolist() == [0, 1]
    assert len(objects_in_network(dataset, Preprocessing(image_size=50, max_size=200), most=1)) == 1


def test_classes_and_sizes_are_told_apart() -> None:
    boxes = np.array([[0, 0, 32, 32], [0, 0, 33, 32], [0, 0, 97, 96]], float)
    dataset = one_image(boxes, [0, 0, 2], ("a", "none", "c"))
    rows, overlaps = np.arange(3), np.array([0.6, 0.45, 0.1])
    by_class = coverage_by_class(dataset, rows, overlaps)
    assert by_class["a"] == Coverage(2, 0.5, 1.0, pytest.approx(0.525))
    assert by_class["none"].objects == 0
    assert by_class["c"].at_40 == 0.0
    by_size = coverage_by_size(dataset, rows, overlaps)
    assert {name: of.objects for name, of in by_size.items()} == {"small": 1, "medium": 1, "large": 1}


# ------------------------------------------------------------------------------------------------ the fit


def test_fitted_anchors_reach_objects_that_the_usual_ones_do_not() -> None:
    objects = objects_of(np.vstack([scattered(12, 60), scattered(11, 50, seed=1)]), 256, 256)
    labels = np.zeros(len(objects), np.int64)
    fitted = fit_anchors(AnchorSpec(), objects, labels)
    before, after = ((best_overlaps(spec, objects) >= 0.5).mean() for spec in (AnchorSpec(), fitted))
    assert before < 0.1
    assert after > 0.9
    assert fitted.per_location == 9
    assert np.allclose(np.diff(np.log2(fitted.sizes)), 1, atol=0.03)  # doubling, rounded to tenths of a pixel
    assert fit_anchors(AnchorSpec(), objects, labels) == fitted  # equal input, equal anchors


def test_the_fit_is_never_worse_than_what_it_starts_from() -> None:
    """Every box is an anchor of the usual set: nothing can be better."""
    usual = AnchorSpec()
    anchors = all_anchors_of_image(usual, 256, 256)
    inside = anchors[(anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2:] <= 256).all(dim=1)][::97].numpy()
    objects = objects_of(inside, 256, 256)
    fitted = fit_anchors(usual, objects, np.zeros(len(objects), np.int64))
    assert best_overlaps(fitted, objects).mean() == pytest.approx(1)


def test_every_class_counts_alike() -> None:
    """A thousand large discs do not outvote twenty small ones."""
    boxes = np.vstack([scattered(100, 100, 1000), scattered(11, 11, 20, seed=3)])
    objects = objects_of(boxes, 256, 256)
    labels = np.repeat([0, 1], [1000, 20])
    found = best_overlaps(fit_anchors(AnchorSpec(), objects, labels), objects)
    assert (found[labels == 1] >= 0.5).mean() >= 0.75
    assert (found[labels == 0] >= 0.5).mean() >= 0.99


@pytest.mark.parametrize(
    ("classes", "each", "taken"), [(2, 2000, 1500), (20, 100, 1500), (120, 60, 6000), (3000, 5, 6000)]
)
def test_what_a_fit_looks_at_is_bounded(classes: int, each: int, taken: int) -> None:
    count = classes * each
    objects = objects_of(np.tile([[10, 10, 40, 50]], (count, 1)).astype(np.float32), 256, 256)
    labels = np.repeat(np.arange(classes), each)
    sample = anchor_fit._sample(AnchorSpec(), objects, labels)
    assert len(sample.weights) == taken
    assert sample.weights.sum() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("count", "shape"), [(1, {(1, 1)}), (4, {(2, 2)}), (6, {(2, 3), (3, 2)})])
def test_as_many_anchors_a_location_as_asked_for(count: int, shape: set[tuple[int, int]]) -> None:
    objects = objects_of(scattered(30, 20, 10), 256, 256)
    fitted = fit_anchors(AnchorSpec(), objects, np.zeros(10, np.int64), per_location=count)
    assert (len(fitted.scales), len(fitted.ratios)) in shape


def test_levels_may_have_sizes_of_their_own() -> None:
    boxes = np.vstack([scattered(20, 20, 40), scattered(120, 120, 40, seed=1)])
    objects, labels = objects_of(boxes, 256, 256), np.zeros(80, np.int64)
    free = fit_anchors(AnchorSpec(), objects, labels, per_location=1, levels="free")
    doubling = fit_anchors(AnchorSpec(), objects, labels, per_location=1)
    assert (np.diff(free.sizes) >= 0).all()
    shares = [float((best_overlaps(spec, objects) >= 0.5).mean()) for spec in (free, doubling)]
    assert shares[0] >= shares[1]


def test_a_fit_needs_objects_and_a_number_of_anchors() -> None:
    objects = objects_of(scattered(20, 20, 2), 256, 256)
    with pytest.raises(ConfigError, match="needs 1 to 36 anchors a location; got 0"):
        fit_anchors(AnchorSpec(), objects, np.zeros(2, np.int64), per_location=0)
    with pytest.raises(DataError, match="anchors are fitted to objects; the data set has none"):
        fit_anchors(AnchorSpec(), objects_of(np.zeros((0, 4)), 256, 256), np.zeros(0, np.int64))


# ------------------------------------------------------------------------------------------------ the file


def test_anchors_come_back_from_their_file(tmp_path: Path) -> None:
    asked = AskedAnchors((6.7, 13.4, 26.8, 53.6, 107.2), (1.0, 1.88), (0.45, 0.86, 1.58), 256)
    write_anchors(tmp_path / "a.yaml", asked, "Fitted\nto cells.")
    assert (tmp_path / "a.yaml").read_text().startswith("# Fitted\n# to cells.\nimage_size: 256\n")
    assert parse_anchors(str(tmp_path / "a.yaml")) == asked
    (tmp_path / "a.json").write_text('{"sizes": [8, 16, 32, 64, 128]}')
    assert parse_anchors(str(tmp_path / "a.json")) == AskedAnchors((8, 16, 32, 64, 128))
    assert parse_anchors("8,16,32,64,128") == AskedAnchors((8, 16, 32, 64, 128))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", r"needs `sizes: \[...\]`, and may have scales, ratios, image_size and max_size; got list"),
        ("scales: [1.0]", "needs the field 'sizes', which is absent"),
        ("sizes: [1, 2, 3]", "sizes needs 5 numbers, one for each of P3 to P7; got 3"),
        ("sizes: [1, 2, 3, 4, -5]", "sizes needs 1 to 36 numbers above 0; got .*-5"),
        ("sizes: [1, 2, 3, 4, .nan]", "sizes needs 1 to 36 numbers above 0; got .*nan"),
        ("sizes: [1, 2, 3, 4, 5]\nratios: []", r"ratios needs 1 to 36 numbers above 0; got \[\]"),
        ("sizes: [1, 2, 3, 4, 5]\nscale: [1]", "has no field 'scale'. Did you mean 'scales'"),
        ("sizes: [1, 2, 3, 4, five]", "sizes needs a number .*; got 'five'"),
        ("sizes: [1, 2, 3, 4, 5]\nimage_size: 0", "image_size needs 1 or more; got 0"),
        ("a: &a [1]\nsizes: *a", "needs plain lists of numbers; it has a YAML alias"),
        ("sizes: [1, 2", "is not YAML"),
        ("\udcff", "cannot be read: it is not text in UTF-8"),
        ("#" * 100_001, "needs a file below 100 kB"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "anchors.yaml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=f"--anchors {file}.*{message}"):
        parse_anchors(str(file))


@pytest.mark.parametrize("text", ["1,2,3", "0,1,2,3,4", "nowhere.yaml", "", "a\0b"])
def test_neither_sizes_nor_a_file_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--anchors needs five positive sizes with commas"):
        parse_anchors(text)


def test_training_takes_the_file_and_names_what_it_misses(tmp_path: Path) -> None:
    dataset = one_image(
        np.vstack([scattered(6, 6, 20), scattered(40, 40, 20, seed=1)]),
        [0] * 20 + [1] * 20,
        ("dots", "discs"),
    )
    file = tmp_path / "a.yaml"
    write_anchors(file, AskedAnchors((30, 60, 120, 240, 480), (1.0, 1.5), (0.8, 1.0, 1.25), 512), "made up")
    options = TrainingOptions(data="D", anchors=str(file))
    recipe = recipes.small(Classes(("a",)), "resnet18", "cpu")
    usual = recipe.model.anchors
    choices = anchor_choices(options, recipe, of_model=False)
    reasons: list[tuple[str, str, str]] = []
    frame = Preprocessing(image_size=256, max_size=426)
    spec = choose_anchors(options, dataset, choices, frame, reasons, "recipe small")
    assert spec == replace(usual, sizes=(30, 60, 120, 240, 480), scales=(1.0, 1.5), ratios=(0.8, 1.0, 1.25))
    assert reasons[0][:2] == ("anchors", "30, 60, 120, 240, 480; scales 1, 1.5; ratios 0.8, 1, 1.25")
    assert reasons[0][2].startswith("asked for and fitted at shortest side 512, not 256; ")
    name, missed, advice = reasons[1]
    assert (name, missed) == ("anchors miss", "100% of dots")
    again = "--image-size 256 --output anchors-256.yaml, then --anchors anchors-256.yaml"
    assert advice.endswith(f"a larger --image-size or fitted anchors help: retinanet data anchors D {again}")
    # Fitted at this very size: to fit them again is no advice.
    file.write_text(file.read_text().replace("512", "256"))
    choose_anchors(options, dataset, choices, frame, reasons, "recipe small")
    assert reasons[-1][2].endswith("a larger --image-size helps")
    choose_anchors(replace(options, anchors=None), dataset, choices, frame, reasons, "recipe small")
    assert "--output anchors.yaml, then --anchors anchors.yaml" in reasons[-1][2]
    with pytest.raises(
        ConfigError, match=r"needs 9 anchors a location .* as the model of --weights has; got 6"
    ):
        anchor_choices(options, recipe, of_model=True)


def test_anchors_are_fitted_where_those_of_no_usual_size_reach_enough() -> None:
    """Lines of 6:1, which ratios from 1:2 to 2:1 do not reach."""
    dataset = one_image(scattered(72, 12, 30), [0] * 30, ("line",))
    options, frame = TrainingOptions(data="D"), Preprocessing(image_size=256, max_size=426)
    recipe = recipes.small(Classes(("a",)), "resnet18", "cpu")
    reasons: list[tuple[str, str, str]] = []
    choices = anchor_choices(options, recipe, of_model=False)
    spec = choose_anchors(options, dataset, choices, frame, reasons, "recipe small")
    assert spec.per_location == recipe.model.anchors.per_location
    assert min(spec.ratios) < 0.25
    assert coverage(spec, dataset, frame) > 0.7
    ((name, shown, why),) = reasons
    assert name == "anchors"
    assert re.fullmatch(r"[\d., ]+; scales [\d., ]+; ratios [\d., ]+", shown)
    assert re.fullmatch(
        r"objects that reach IoU 0\.5: \d%+ from 32, \d+% from 16, \d+% from 8, \d+% from these, fitted to the data",
        why,
    )
    # The anchors of a model to go on from, and the paper's, stand.
    for of_model, fit in ((True, True), (False, False)):
        choices = anchor_choices(options, replace(recipe, anchors_fit=fit), of_model=of_model)
        kept = choose_anchors(options, dataset, choices, frame, reasons, "the model's")
        assert kept == recipe.model.anchors
        assert reasons[-2][2] == "the model's; 0% of objects reach IoU 0.5"
        assert reasons[-1][:2] == ("anchors miss", "100% of line")


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (256, 256)).save(folder / "a.png")
    truth = GroundTruth(
        np.vstack([scattered(12, 12, 20), scattered(50, 90, 10)]), np.repeat([0, 1], [20, 10])
    )
    for split, truths in (("train", truth), ("val", truth.select(np.zeros(30, bool)))):
        write_coco(
            folder / f"instances_{split}.json", classes=Classes(("dot", "rod", "none")), files=["a.png"],
            sizes=[(256, 256)], ground_truths=[truths],
        )  # fmt: skip
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), " ".join(out.split()), " ".join(err.split())


def test_the_command_shows_before_and_after_and_writes(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "anchors.yaml"
    code, out, _ = run(capsys, "data", "anchors", data, "--image-size", 256, "--output", file)
    assert code == 0
    assert "dot 20 0.0% (0.0%)" in out
    assert "none 0 - -" in out
    assert f"retinanet train {data} --image-size 256 --anchors {file}" in out
    asked = parse_anchors(str(file))
    assert asked.image_size == 256
    spec = replace(AnchorSpec(), sizes=asked.sizes, scales=asked.scales, ratios=asked.ratios)  # type: ignore[arg-type]
    objects = objects_in_network(open_dataset(data, "train"), Preprocessing(image_size=256, max_size=426))
    reached = float((best_overlaps(spec, objects) >= 0.5).mean())
    assert f"{reached:.1%} of them have an anchor of IoU 0.5, 33.3% with the usual ones." in file.read_text()
    assert reached > 0.8
    other = tmp_path / "my anchors.yaml"
    sizes = ("--image-size", 256, "--max-size", 300)
    code, out, _ = run(capsys, "data", "anchors", data, *sizes, "--output", other)
    assert f"retinanet train {data} --image-size 256 --max-size 300 --anchors '{other}'" in out
    assert parse_anchors(str(other)).max_size == 300
    code, again, _ = run(capsys, "data", "anchors", data, "--image-size", 256, "--json")
    values = json.loads(again)
    assert values["anchors"]["sizes"] == list(asked.sizes)
    assert values["fitted"]["overall"]["at_50"] == pytest.approx(reached)
    assert values["usual"]["per_class"]["none"]["at_50"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "data anchors needs --image-size; none was given"),
        (["--image-size", "0"], "image_size needs a whole number from 1; got 0"),
        (["--image-size", "99", "--max-size", "9"], "needs to be at most max_size"),
        (["--image-size", "99", "--split", "vla"], "has no split 'vla'"),
        (["--image-size", "99", "--split", "val"], "anchors are fitted to objects; the split val has none"),
        (["--image-size", "99", "--per-location", "0"], "--per-location needs 1 or more; got 0"),
        (["--image-size", "99", "--per-location", "37"], "needs 1 to 36 anchors a location; got 37"),
        (["--image-size", "99", "--seed", "-1"], "--seed needs 0 or more"),
        (["--image-size", "99", "--output", "{data}/a.yaml"], "--output needs a place outside the data folder"),
        (["--image-size", "99", "--output", "{data}/a.png"], "--output needs a"),
        (["--image-size", "99", "--image-root", "{tmp}/no"], "image_root in Python) needs a folder of images"),
        (["--image-size", "99", "--box-format", "xywh"], "COCO says itself what boxes are"),
        (["--image-size", "99", "--output", "{tmp}/no/a.yaml"], "there is no {tmp}/no"),
        (["--image-size", "99", "--output", "{tmp}"], "--output needs a new file; {tmp} exists"),
    ],
)  # fmt: skip
def test_a_wrong_request_gets_one_message(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    filled = [option.format(data=data, tmp=tmp_path) for option in options]
    code, out, err = run(capsys, "data", "anchors", data, *filled)
    assert (code, out) == (2, "")
    assert message.format(tmp=tmp_path) in err


@needs_real_data
@pytest.mark.parametrize(("side", "before", "after"), [(256, 0.18, 0.74), (512, 0.75, 0.95)])
def test_nuclei_get_the_anchors_that_they_lack(side: int, before: float, after: float) -> None:
    """Base size 32 reaches 17 % of the nuclei at shortest side 256 and 74 % at 512."""
    assert REAL_DATA
    train = open_dataset(Path(REAL_DATA) / "nuclei", "train")
    objects = objects_in_network(train, Preprocessing(image_size=side, max_size=round(side * 1333 / 800)))
    usual = AnchorSpec()
    fitted = fit_anchors(usual, objects, train.labels[objects.rows])
    shares = [Coverage.of(best_overlaps(spec, objects)).at_50 for spec in (usual, fitted)]
    assert shares[0] == pytest.approx(before, abs=0.01)
    assert shares[1] is not None
    assert shares[1] >= after
