"""`retinanet data check`: what it finds, what it says, what it leaves behind, and what it leaves alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retinanet.cli import main
from retinanet.data import Fault, anchor_fit, open_dataset, write_coco
from retinanet.data.auditing import ImageFacts
from retinanet.data.kinds import Kind
from retinanet.records import Classes, GroundTruth
from retinanet.report.data_page import _faults, _number
from retinanet.report.histograms import Histogram, draw_histograms
from retinanet.training import checking
from retinanet.training.advice import exit_code, sentences
from retinanet.training.checking import AuditedSplit, check, frame_of
from retinanet.training.configuration import TrainingOptions
from retinanet.training.findings import FaultCount, Findings, Leak
from retinanet.training.sentences import share

REAL_DATA = os.environ.get("RETINANET_TEST_DATA")
needs_real_data = pytest.mark.skipif(not REAL_DATA, reason="RETINANET_TEST_DATA is not set")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fit of few generations, at no size but that of training; the cache and runs/ somewhere of their own."""
    monkeypatch.setattr(anchor_fit, "GENERATIONS", 2)
    monkeypatch.setattr(checking, "SIDES", ())
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def boxes_at(*corners: tuple[float, float], side: float = 24) -> np.ndarray:
    return np.array([(x, y, x + side, y + side) for x, y in corners], np.float32).reshape(-1, 4)


def write_split(
    folder: Path,
    split: str,
    truths: Sequence[GroundTruth],
    names: tuple[str, ...] = ("cat", "dog"),
    seed: int = 0,
) -> None:
    """A split of noise images of 160 x 120, one a ground truth."""
    random = np.random.default_rng([seed, *split.encode()])
    (folder / split).mkdir(parents=True, exist_ok=True)
    files = [f"{split}/{number}.png" for number in range(len(truths))]
    for file in files:
        coarse = random.integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(coarse).resize((160, 120)).save(folder / file)
    write_coco(
        folder / f"instances_{split}.json", classes=Classes(names), files=files, sizes=[(160, 120)] * len(files),
        ground_truths=truths,
    )  # fmt: skip


def truth(*corners: tuple[float, float], side: float = 24, label: int = 0) -> GroundTruth:
    return GroundTruth(boxes_at(*corners, side=side), np.full(len(corners), label))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_split(folder, "train", [truth((3, 5), (60, 40)), truth((9, 9), label=1), truth()])
    write_split(folder, "val", [truth((30, 30)), truth((8, 60), label=1)])
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", *(str(argument) for argument in arguments), "--workers", "0"])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, " ".join(err.split())


def edit(file: Path, change: Any) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def fingerprint(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted([folder, *folder.rglob("*")])}


# ------------------------------------------------------------------------------------------------ the command


def test_a_clean_data_set_is_counted_and_left_alone(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    before = fingerprint(data)
    code, out, err = run(capsys, data, "--output", tmp_path / "report", "--json")
    assert code == 0, out
    assert fingerprint(data) == before
    assert f"open {tmp_path / 'report' / 'report.html'}" in err
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "report.json"}
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert json.loads(out) == found
    assert found["read_as"] == "read as COCO: 2 splits, 2 classes, 5 images"
    assert found["read_as"] in err
    train, val = found["splits"]
    assert (train["split"], train["images"], train["empty"], train["objects"]) == ("train", 3, 1, 3)
    assert train["per_class"] == {"cat": 2, "dog": 1}
    assert (train["fullest"], train["fullest_file"]) == (2, "train/0.png")
    assert (val["images"], val["objects"], val["unreadable"]) == (2, 2, 0)
    assert found["faults"] == found["leaks"] == []
    assert found["spreads"]["object_side"] == dict.fromkeys(
        ("least", "quarter", "half", "three_quarters", "most"), 24.0
    )
    assert found["spreads"]["image_ratio"]["half"] == 0.75
    assert found["anchors"]["overall"]["objects"] == 3
    assert [row["anchors"]["name"] for row in found["anchors"]["compared"]] == ["usual", "fitted"]
    assert set(found["anchors"]["suggested"]) == {"cpu", "cuda"}
    assert found["sentences"][0]["level"] == "look"  # few boxes


def test_the_page_is_one_file_for_people(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    edit(data / "instances_train.json", lambda d: d["annotations"][0].update(bbox=[500, 5, 9, 9]))
    edit(data / "instances_train.json", lambda d: d["categories"][1].update(name="<b>dog</b>"))
    edit(data / "instances_val.json", lambda d: d["categories"][1].update(name="<b>dog</b>"))
    code, out, _ = run(capsys, data, "--output", tmp_path / "report")
    assert code == 1
    page = (tmp_path / "report" / "report.html").read_text()
    for sign in ("<script", "http:", "https:", "href=", "url(", "<link", "<b>dog"):
        assert sign not in page
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert sorted(source.partition(";")[0] for source in sources) == ["data:image/jpeg", "data:image/png"]
    assert "&lt;b&gt;dog&lt;/b&gt;" in page
    assert page.index("worth a look") < page.index("What is in it")
    for term in ("A split is a part of the data", "starts from a grid of boxes", "measured by IoU"):
        assert term in page
    assert "annotations[0] (id 1) of train/0.png" in page
    said = " ".join(out.split())
    assert "Every image was readable. 1 " in said
    assert " was left out: 1 x " in said
    assert "instances_train.json, annotations[0] (id 1)" in said


def test_an_image_that_cannot_be_read_is_named(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    whole = (data / "train/1.png").read_bytes()
    (data / "train/1.png").write_bytes(whole[: len(whole) // 2])
    code, out, _ = run(capsys, data)
    said = " ".join(out.split())
    assert code == 1
    assert "1 of 5 images cannot be read. 1 image was left out: 1 x " in said
    assert "(train/1.png in train)" in said
    assert (Path("runs") / "check-1" / "report.html").is_file()
    found = json.loads((Path("runs") / "check-1" / "report.json").read_text())
    assert found["faults"][0]["split"] == "train"
    assert found["faults"][0]["fix"]


def test_strict_refuses_what_was_repaired(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    assert run(capsys, data, "--strict")[0] == 0
    edit(data / "instances_val.json", lambda d: d["annotations"][0].update(bbox=[-5, 5, 9, 9]))
    assert run(capsys, data)[0] == 1
    code, _, err = run(capsys, data, "--strict")
    assert code == 2
    assert f"retinanet: --strict: {data} has 1 fault, the first: instances_val.json: annotations[0]" in err


def test_images_in_two_splits_are_told(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    (data / "val/0.png").write_bytes((data / "train/2.png").read_bytes())
    with Image.open(data / "train/0.png") as image:
        image.convert("RGB").save(data / "val/1.png", compress_level=1, optimize=False)
    code, out, _ = run(capsys, data, "--json")
    found = json.loads(out)
    assert code == 0  # nothing was repaired or dropped
    assert [(leak["file_a"], leak["file_b"], leak["equal"]) for leak in found["leaks"]] == [
        ("train/2.png", "val/0.png", True),
        ("train/0.png", "val/1.png", False),
    ]
    assert any(
        "2 images of val stand in train, too, or look like one there, 1 of them byte for byte "
        "(val/0.png and train/2.png, for one)" in one["text"]
        for one in found["sentences"]
    )


@pytest.mark.parametrize("place", ["{data}", "{data}/report", "{data}/train/../x"])
def test_nothing_is_written_into_the_data_folder(
    capsys: pytest.CaptureFixture[str], data: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(data)
    code, _, err = run(capsys, data, "--output", place.format(data=data))
    assert code == 2
    assert "--output needs a" in err
    monkeypatch.chdir(data)  # where runs/check-1 would lie in it
    code, _, err = run(capsys, ".")
    assert code == 2
    assert "--output needs a place outside the data folder .; got runs/check-1" in err
    assert "The working directory lies in the data: say --output FOLDER" in err
    code, _, err = run(capsys, "instances_val.json")
    assert code == 2
    assert f"--output needs a place outside the data folder {data}; got runs/check-1" in err
    assert fingerprint(data) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere: does not exist"),
        (["{data}", "--image-size", "8"], "--image-size needs 32 or more; got 8"),
        (["{data}", "--anchors", "1,2"], "--anchors needs five positive sizes"),
        (["{data}", "--output", "{data}/.."], "--output needs a new folder"),
    ],
)
def test_a_wrong_request_gets_one_message(
    capsys: pytest.CaptureFixture[str], data: Path, options: list[str], message: str
) -> None:
    code, out, err = run(capsys, *(option.format(data=data) for option in options))
    assert (code, out) == (2, "")
    assert message in err


def test_workers_cannot_be_fewer_than_none(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", str(data), "--workers=-1"])
    assert stop.value.code == 2
    assert "--workers needs 0 or more; got -1" in capsys.readouterr().err


def unusable(capsys: pytest.CaptureFixture[str], data: Path) -> str:
    code, out, _ = run(capsys, data)
    assert code == 2
    assert out.startswith("!! ")
    return " ".join(out.split())


def test_a_split_that_cannot_be_read_does_not_hide_the_others(
    capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    (data / "instances_val.json").write_text("{")
    said = unusable(capsys, data)
    assert "The split val could not be read: " in said
    assert "train 3 1 3 cat 2, dog 1" in said
    assert "Every box and every image of train was readable: 3 boxes in 3 images. " in said
    assert "left out" not in said


def test_training_goes_on_without_a_test_split_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    (data / "instances_test.json").write_text("{")
    code, out, _ = run(capsys, data)
    assert code == 1
    assert not out.startswith("!!")
    assert " ! The split test could not be read: " in out
    assert "No image stands in two of the splits that could be read." in " ".join(out.split())
    code, _, err = run(capsys, data, "--strict")
    assert code == 2
    assert "splits that cannot be read, the first: " in err


def test_no_split_that_can_be_read_is_one_message(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    for split in ("train", "val"):
        (data / f"instances_{split}.json").write_text("{")
    code, out, err = run(capsys, data)
    assert (code, out) == (2, "")
    assert err.startswith(f"retinanet: {data}/instances_train.json: needs JSON")


def test_no_box_at_all_is_unusable(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_split(tmp_path / "d", "train", [truth(), truth()])
    write_split(tmp_path / "d", "val", [truth()])
    assert "The split train has no box in 2 images" in unusable(capsys, tmp_path / "d")
    found = json.loads((Path("runs") / "check-1" / "report.json").read_text())
    assert found["anchors"] is None
    assert found["spreads"]["object_side"] is None
    assert "Do the anchors fit" not in (Path("runs") / "check-1" / "report.html").read_text()


def test_splits_of_other_classes_are_unusable(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    write_split(data, "val", [truth((1, 1))], names=("cat", "cow"))
    assert "cat (id 0), dog (id 1) in train, cat (id 0), cow (id 1) in val" in unusable(capsys, data)


def test_one_file_of_one_image_will_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The one class with a box is judged, the other one named; a lone val.json is the split val."""
    write_split(tmp_path / "d", "val", [truth((5, 5))])
    code, out, _ = run(capsys, tmp_path / "d" / "instances_val.json")
    said = " ".join(out.split())
    assert code == 0, said
    assert "one to judge by, val; there is only val." in said
    assert "dog: no box in val, so nobody can say how well it is found." in said


def test_one_set_is_told_how_to_make_splits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_split(tmp_path / "my data", "train", [truth((5, 5))])
    file = tmp_path / "my data" / "annotations.json"
    (tmp_path / "my data" / "instances_train.json").rename(file)
    said = " ".join(run(capsys, file)[1].split())
    assert "this is one set without splits. Make them, a fifth of the images for val: " in said
    assert f"retinanet data convert '{file}' OUT --format coco --split-shares 0.8,0.2" in said


def test_images_may_lie_elsewhere(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    """Where they lie nothing is written, either."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for split in ("train", "val"):
        (data / split).rename(elsewhere / split)
    code, out, _ = run(capsys, data, "--image-root", elsewhere)
    assert code == 0, out
    code, _, err = run(capsys, data, "--image-root", elsewhere, "--output", elsewhere / "train" / "report")
    assert code == 2
    assert f"--output needs a place outside the data folder {elsewhere}" in err
    assert run(capsys, data, "--box-format", "xyxy")[2].endswith("COCO says itself what boxes are")


def test_every_command_takes_images_from_elsewhere(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for split in ("train", "val"):
        (data / split).rename(elsewhere / split)
    (tmp_path / "found.json").write_text("[]")
    view = ["--output", str(tmp_path / "seen.png"), "--images", "1", "--image-size", "64"]
    train = ["--dry-run", "--pretrained", "none", "--device", "cpu", "--steps", "1"]
    train += ["--backbone", "test_resnet", "--channels", "64", "--image-size", "64", "--batch-size", "1"]
    for command, rest in {
        "data view": view,
        "data anchors": ["--image-size", "64"],
        "train": train,
        "evaluate": ["--detections", str(tmp_path / "found.json")],
    }.items():
        start = [*command.split(), str(data), *rest]
        for options, code, message in (
            (["--image-root", str(elsewhere)], 0, ""),
            (["--image-root", str(tmp_path / "no")], 2, "image_root in Python) needs a folder of images"),
            (["--image-root", str(elsewhere), "--box-format", "xywh"], 2, "COCO says itself what boxes are"),
        ):
            with pytest.raises(SystemExit) as stop:
                main([*start, *options])
            assert (command, int(stop.value.code or 0)) == (command, code)
            assert message in " ".join(capsys.readouterr().err.split())


def test_modes_and_frames_are_shown(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    for number, (mode, exif) in enumerate([("L", None), ("I;16", None), ("RGB", turned)]):
        with Image.open(data / f"train/{number}.png") as image:
            changed = (
                image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
            )
            changed = changed.transpose(Image.Transpose.ROTATE_90) if exif else changed
            changed.save(data / f"train/{number}.png", **({"exif": exif} if exif else {}))
    _, out, _ = run(capsys, data, "--json", "--output", tmp_path / "report")
    rows = {row["how"]: (row["images"], row["becomes"]) for row in json.loads(out)["stored"]}
    assert rows == {
        "colour, RGB": (3, "taken as it is"),
        "grey, 8 bits": (1, "three equal channels"),
        "grey, 16 bits": (1, "scaled to 8 bits (0..65535 becomes 0..255), three equal channels"),
        "turned by EXIF": (1, "turned upright; labels follow the image: 1 as people see the picture"),
    }
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<td>grey, 8 bits</td><td>1</td><td>three equal channels</td>" in page


def test_an_image_twice_in_a_split_is_told(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    (data / "train/2.png").write_bytes((data / "train/0.png").read_bytes())
    code, out, _ = run(capsys, data, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["doubles"] == [{"split": "train", "file": "train/0.png", "again": "train/2.png"}]
    assert any(
        "1 image of train is byte for byte an earlier one there under another name (train/2.png and train/0.png"
        in one["text"]
        for one in found["sentences"]
    )


def test_classes_of_val_alone_and_large_numbers_are_on_the_page(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    write_split(data, "val", [truth((1, 1))], names=("cat", "cow"))
    run(capsys, data, "--output", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<td>cow</td><td>0</td><td>0</td>" in page
    assert _number(12345.6) == "12,346"
    assert (_number(99.55), _number(0.75)) == ("99.55", "0.75")


# ------------------------------------------------------------------------------------------------ what is said


def facts_of(number: int, seed: int) -> list[ImageFacts]:
    random = np.random.default_rng(seed)
    return [
        ImageFacts(i, 160, 120, 1, "RGB", 1, 255, f"{seed}-{i}", int(random.integers(2**63)))
        for i in range(number)
    ]


def findings(data: Path, faults: Sequence[Fault] = (), **options: Any) -> Findings:
    splits = []
    for seed, split in enumerate(("train", "val")):
        dataset = open_dataset(data, split)
        splits.append(AuditedSplit(dataset, facts_of(len(dataset), seed), tuple(faults) if not seed else ()))
    train = splits[0].dataset
    frame = frame_of(TrainingOptions(data=str(data), **options), train, "cpu")
    return check(str(data), splits, refused={}, others=(), frame=frame, suggested={})


def said_of(found: Findings) -> str:
    return " | ".join(f"{one.level}: {one.text}" for one in sentences(found))


def test_more_objects_than_detections_are_told(tmp_path: Path) -> None:
    grid = truth(*((x, y) for x in range(0, 150, 10) for y in range(0, 110, 10)), side=9)
    write_split(tmp_path, "train", [grid, truth((1, 1), label=1)])
    write_split(tmp_path, "val", [truth((1, 1))])
    said = said_of(findings(tmp_path))
    assert "look: Up to 165 objects stand in an image while 100 detections are kept" in said
    assert "65 of those in train/0.png could never be found" in said
    assert "--max-detections 200" in said


def test_classes_out_of_balance_and_few_are_told(tmp_path: Path) -> None:
    many = truth(*((x, y) for x in range(0, 120, 20) for y in range(0, 90, 20)))
    write_split(tmp_path, "train", [many, many, truth((1, 1), label=1)], names=("cat", "dog", "cow"))
    write_split(tmp_path, "val", [truth((1, 1))], names=("cat", "dog", "cow"))
    said = said_of(findings(tmp_path))
    assert "cat has 60 times as many boxes as dog (60 and 1)" in said
    assert "cow: no box in train, so it cannot be learned." in said
    assert "dog, cow: no box in val" in said
    assert "Fewer than 50 boxes to learn from: dog (1)." in said


def test_objects_without_an_anchor_are_explained_and_something_helps(tmp_path: Path) -> None:
    dots = truth(*((x, y) for x in range(0, 150, 25) for y in range(0, 110, 25)), side=7)
    write_split(tmp_path, "train", [dots, truth((20, 20), side=60, label=1)])
    write_split(tmp_path, "val", [truth((1, 1))])
    found = findings(tmp_path, image_size=128, anchors="32,64,128,256,512")
    assert found.anchors
    cat = found.anchors.per_class["cat"]
    assert (cat.coverage.at_50, cat.too_small, cat.too_large) == (0.0, 1.0, 0.0)
    assert [row.anchors.name for row in found.anchors.compared] == ["usual", "asked for", "fitted"]
    said = said_of(found)
    assert (
        "100 % of the objects of class cat have no anchor that fits (100 % are smaller than the smallest anchor"
        in said
    )
    assert "An anchor is a box of fixed size and shape" in said
    assert f"retinanet data anchors {tmp_path} --image-size 128 --output anchors.yaml" in said


def test_every_size_has_the_anchors_that_training_takes_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "SIDES", (256,))
    write_split(tmp_path, "train", [truth(*((x, y) for x in (0, 50, 100) for y in (0, 50)), side=40)])
    write_split(tmp_path, "val", [truth((1, 1))])
    small, large = (findings(tmp_path, image_size=side).anchors for side in (48, 256))
    assert small
    assert large
    assert small.anchors.name == "training's choice"
    assert small.anchors.sizes[0] < large.anchors.sizes[0]
    # A table by size has no other anchors for 256 pixels because it was made at 48.
    rows = [[row for row in at.compared if row.image_size == 256] for at in (small, large)]
    assert [row.anchors for row in rows[0]] == [row.anchors for row in rows[1]]
    assert large.anchors in [row.anchors for row in rows[0]]


def test_positives_are_counted_as_training_matches(tmp_path: Path) -> None:
    """One anchor a location of P3 and one object that is such an anchor: its neighbours 8 px off share 24 x 32."""
    write_split(tmp_path, "train", [GroundTruth(boxes_at((52, 44), side=32), np.zeros(1))])
    write_split(tmp_path, "val", [truth((1, 1))])
    (tmp_path / "a.yaml").write_text("sizes: [32, 640, 1280, 2560, 5120]\nscales: [1]\nratios: [1]\n")
    found = findings(tmp_path, image_size=120, anchors=str(tmp_path / "a.yaml"))
    assert found.anchors
    # 24 x 32 of 1,280 is 0.6; 24 x 24 of 1,472 is 0.39. By IoU 0.5 five would be positive; by ATSS those from 0.67 on,
    # as the 35 candidates have a mean of 0.14 and a deviation of 0.26.
    assert (found.anchors.positives.mean, found.anchors.positives.least) == (1, 1)
    assert found.anchors.positives.anchors == 20 * 16 + 10 * 8 + 5 * 4 + 3 * 2 + 2 * 1


def test_faults_are_counted_named_and_what_to_do_is_said(data: Path) -> None:
    click = Fault(
        "a.xml", "object 2 (cat)", "corners are equal", "dropped", Kind.EQUAL_CORNERS, "Draw it again"
    )
    faults = [*(replace(click, file=f"{name}.xml") for name in "abcd")]
    said = said_of(findings(data, faults))
    assert (
        "look: Every image was readable. 4 boxes were left out: 4 x equal corners (a.xml, object 2 (cat) in train, "
        "b.xml, object 2 (cat) in train, c.xml, object 2 (cat) in train and 1 more). What to do: Draw it again."
    ) in said
    turned = replace(click, action="repaired", kind=Kind.REVERSED_BOX)
    animated = Fault("x.gif", "image", "holds 3 pictures", "repaired", Kind.ANIMATED_IMAGE)
    said = said_of(findings(data, [click, turned, animated]))
    assert "1 box was left out: 1 x equal corners" in said
    assert (
        "look: 2 entries were repaired, as only one thing can have been meant: 1 x reversed box (a.xml, object 2 (cat) "
        "in train); 1 x animated image (x.gif in train). What to do about reversed box: Draw it again."
    ) in said


def test_of_many_kinds_the_worst_come_first_and_none_is_hidden(data: Path) -> None:
    def fault(kind: Kind, fix: str = "", file: str = "a.xml") -> Fault:
        return Fault(file, "object 2", "why", "dropped", kind, fix)

    clicks = [fault(Kind.EQUAL_CORNERS, "Draw it") for _ in range(3)]
    unknown = [
        fault(Kind.UNKNOWN_CLASS, f"add {name} to classes.csv") for name in ("'cow'", "'owl'", "'cow'")
    ]
    others = [fault(kind, "no") for kind in (Kind.EMPTY_BOX, Kind.DUPLICATE_BOX)]
    lost = fault(Kind.MISSING_IMAGE, "Put it there", "b.png")
    said = said_of(findings(data, [*clicks, *unknown, *others, lost]))
    assert "9 entries were left out: 1 x missing image (b.png in train); 3 x equal corners" in said
    assert (
        "; and 2 more kinds (empty box, duplicate box). What to do about missing image: Put it there." in said
    )
    assert said.count("What to do about") == 3
    assert "What to do about unknown class: add 'cow' to classes.csv; add 'owl' to classes.csv." in said


def test_a_split_without_label_files_is_told_once(data: Path) -> None:
    bare = Fault(
        "data.yaml",
        "test",
        "none of the 2 images has labels",
        "repaired",
        Kind.MISSING_ANNOTATION,
        "add them",
    )
    found = findings(data)
    counts = (FaultCount("test", "missing annotation", "repaired", 1),)
    of_test, of_val = (
        replace(split, split=name, objects=0)
        for split, name in zip(found.splits, ("test", "val"), strict=True)
    )
    said = said_of(replace(found, splits=(of_test,), faults=(("test", bare),), fault_counts=counts))
    assert "look: data.yaml: none of the 2 images has labels. What to do: add them." in said
    assert "good: Every image was readable." in said
    assert "only one thing can have been meant" not in said
    said = said_of(replace(found, splits=(of_val,), faults=(("val", bare),), fault_counts=counts))
    assert "stop: The split val has no box in 2 images" in said
    assert "exported with the images. data.yaml: none of the 2 images has labels." in said
    assert "What to do: add them" not in said


def test_one_image_that_stands_in_two_splits_is_named_once_where_its_names_are_alike(data: Path) -> None:
    leak = Leak("train", "a.png", "val", "a.png", equal=True, bits=0)
    found = findings(data)
    said = said_of(replace(found, leaks=(leak,)))
    assert "1 image of val stands in train, too, byte for byte (a.png)." in said
    said = said_of(replace(found, leaks=(replace(leak, file_b="b.png", equal=False, bits=2),)))
    assert "1 image of val stands in train, too, or looks like one there (b.png and a.png)." in said


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Kind.MISSING_IMAGE, "2 of 7 images cannot be read."),
        (Kind.UNREADABLE_IMAGE, "2 of 7 images cannot be read."),
        (Kind.TRUNCATED_IMAGE, "2 of 7 images cannot be read."),
        (Kind.UNREADABLE_LABELS, "2 images have labels that cannot be read."),
    ],
)
def test_what_the_reader_could_not_read_is_not_readable(data: Path, kind: Kind, said: str) -> None:
    """Its images are gone from the data set, and not among those that were decoded."""
    whole = said_of(findings(data, [Fault(f"{name}", "image", "why", "dropped", kind) for name in "ab"]))
    assert said in whole
    assert "Every image was readable" not in whole


def test_faults_that_are_only_counted_count(data: Path) -> None:
    datasets = [open_dataset(data, split) for split in ("train", "val")]
    kept = (Fault("a.xml", "object 2", "why", "dropped", Kind.EQUAL_CORNERS),)
    datasets[0] = replace(datasets[0], faults=kept, fault_counts={("equal corners", "dropped"): 12_000})
    splits = [AuditedSplit(one, facts_of(len(one), seed), ()) for seed, one in enumerate(datasets)]
    found = check("d", splits, refused={}, others=(), frame=None, suggested={})
    assert found.fault_total == 12_000
    assert (
        "12,000 boxes were left out: 12,000 x equal corners (a.xml, object 2 in train and 11,999 more)"
        in (said_of(found))
    )
    values = found.to_json()
    assert list(values["fault_counts"]) == [
        {"split": "train", "kind": "equal corners", "action": "dropped", "count": 12_000}
    ]
    page = _faults(values["faults"], values["fault_counts"])
    assert "equal corners: 12,000" in page
    assert "There are 12,000 in all; the first 1 are shown" in page
    of_nothing = replace(datasets[0], faults=(), fault_counts={("equal corners", "dropped"): 3})
    found = check(
        "d", [AuditedSplit(of_nothing, facts_of(3, 0), ())], refused={}, others=(), frame=None, suggested={}
    )
    assert exit_code(found) == 1


def test_the_exit_code_says_how_it_went(data: Path) -> None:
    assert exit_code(findings(data)) == 0
    assert exit_code(findings(data, [Fault("f", "r", "why", "repaired")])) == 1
    assert exit_code(replace(findings(data), refused={"test": "why"})) == 1
    assert exit_code(replace(findings(data), refused={"val": "why"})) == 2


def test_what_matters_most_comes_first(data: Path) -> None:
    found = replace(findings(data, [Fault("f", "r", "why", "repaired")]), refused={"val": "why"})
    levels = [one.level for one in sentences(found)]
    assert levels == sorted(levels, key=["stop", "look", "good"].index)
    assert set(levels) == {"stop", "look", "good"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0 %"), (0.004, "less than 1 %"), (0.183, "18 %"), (0.26, "a quarter"), (0.33, "a third"),
        (0.5, "half"), (0.66, "two thirds"), (0.76, "three quarters"), (0.996, "nearly all"), (1.0, "100 %"),
    ],
)  # fmt: skip
def test_shares_are_said_as_people_say_them(value: float, words: str) -> None:
    assert share(value) == words


def test_histograms_are_equal_files_for_equal_values() -> None:
    panels = [Histogram("some", "pixels", np.array([3, 4, 5, 90])), Histogram("none", "pixels", np.zeros(0))]
    drawn = draw_histograms(panels)
    assert drawn.startswith(b"\x89PNG")
    assert draw_histograms(panels) == drawn


# ------------------------------------------------------------------------------------------------ real data


@needs_real_data
def test_bccd_has_two_clicks_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert REAL_DATA
    code, out, _ = run(capsys, Path(REAL_DATA) / "bccd" / "BCCD", "--json")
    found = json.loads(out)
    assert code == 1
    assert [(f["split"], Path(f["file"]).name, f["action"]) for f in found["faults"]] == [
        ("train", "BloodImage_00343.xml", "dropped"),
        ("val", "BloodImage_00338.xml", "dropped"),
    ]
    assert found["leaks"] == []
    assert [split["objects"] for split in found["splits"]] == [2804, 1137, 945]
    assert "RBC has 11 times as many boxes as Platelets" in str(found["sentences"])


@needs_real_data
def test_nuclei_stand_369_in_an_image() -> None:
    assert REAL_DATA
    found = findings(Path(REAL_DATA) / "nuclei", image_size=512, anchors="32,64,128,256,512")
    said = said_of(found)
    assert "Up to 369 objects stand in an image while 100 detections are kept" in said
    assert "At 512 pixels" in said
    assert "a quarter of the objects of class nucleus have no anchor that fits" in said
    assert exit_code(found) == 0
