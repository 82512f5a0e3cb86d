"""`bench/fine_tuning.py`: what each half holds, and what is trained."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from retinanet.data import open_dataset
from retinanet.data.shapes import ShapesSpec, generate_shapes


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    file = Path(__file__).parents[1] / "bench" / "fine_tuning.py"
    loaded = importlib.util.spec_from_file_location("fine_tuning", file)
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return generate_shapes(tmp_path / "shapes", train=7, val=3, spec=ShapesSpec(image_size=96))


def test_halves_share_no_training_image_and_name_their_classes_anew(
    script: ModuleType, data: Path, tmp_path: Path
) -> None:
    whole = {split: open_dataset(data, split) for split in ("train", "val")}
    first, second = script.write_halves(str(data), tmp_path / "halves")
    for folder, number, names in (
        (first, 0, ("disk", "square")),
        (second, 1, ("square", "triangle")),
    ):
        train, val = open_dataset(folder, "train"), open_dataset(folder, "val")
        assert train.classes.names == val.classes.names == names
        assert len(val) == 3
        taken = list(range(number, 7, 2))
        assert len(train) == len(taken)
        for i, source in enumerate(taken):
            assert train.path(i).read_bytes() == whole["train"].path(source).read_bytes()
            truth, original = train.ground_truth(i), whole["train"].ground_truth(source)
            stays = [whole["train"].classes.names[label] in names for label in original.classes]
            np.testing.assert_allclose(truth.boxes, original.boxes[stays])
            assert [names[label] for label in truth.classes] == [
                whole["train"].classes.names[label] for label in original.classes[stays]
            ]


def test_the_second_half_is_trained_from_scratch_and_from_the_first_in_equal_time(
    script: ModuleType,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    called = []

    def train(folder: Path, output: Path, options: list[str]) -> float:
        called.append((folder.name, output.name, options))
        output.mkdir()
        ap = {"scratch": 0.25, "tuned": 0.5}.get(output.name[:-2], 0.0)
        (output / "metrics.json").write_text(json.dumps({"ap": ap, "ap50": ap}))
        return 90.0

    monkeypatch.setattr(script, "train", train)
    runs = tmp_path / "runs"
    monkeypatch.setattr(sys, "argv", ["x", str(data), "--time", "7s", "--seeds", "4", "--runs", str(runs)])
    script.main()
    new = ["--backbone", "resnet18", "--time", "7s", "--seed", "4"]
    assert called == [
        ("data-first", "first-4", new),
        ("data-second", "scratch-4", new),
        ("data-second", "tuned-4", ["--weights", str(runs / "first-4"), "--time", "7s", "--seed", "4"]),
    ]
    said = capsys.readouterr().out
    assert "seed 4: from scratch AP 0.250, AP50 0.250 in 1.5 min; from the model AP 0.500" in said
    assert "mean of 1: from scratch 0.250, from the model 0.500" in said
