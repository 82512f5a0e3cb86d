"""`bench/torchvision_training.py`: the peer trains in its time, and its row stands beside the recipe's."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from retinanet.data.shapes import ShapesSpec, generate_shapes


def test_the_peers_row_stands_beside_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")  # as for a script
    recipes = importlib.import_module("recipes")
    script = importlib.import_module("torchvision_training")
    monkeypatch.setattr(recipes, "KEPT", tmp_path / "recipes.jsonl")
    monkeypatch.setattr(recipes, "PAGE", tmp_path / "recipes.md")
    data = generate_shapes(tmp_path / "shapes", train=4, val=2, spec=ShapesSpec(image_size=96))
    base = recipes.Job("shapes", "base", 0, None, "test_resnet", 64)
    metrics = {"ap": 0.9, "ap50": 0.95}
    recipes.keep(recipes.row_of(base, what="the recipe as it is", metrics=metrics, seconds=60, threads=2))

    arguments = ["--image-size", "64", "--batch-size", "2", "--time", "5", "--keep", "shapes"]
    monkeypatch.setattr(sys, "argv", ["torchvision_training.py", str(data), *arguments])
    script.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = recipes.known_rows()
    assert [row["variant"] for row in rows] == ["base", "torchvision-0.0833m"]
    assert rows[1]["ap"] == told["ap"]
    assert rows[1]["seconds"] == told["seconds"] <= 10  # as fast as a loaded machine is
    assert told["images_seen"] >= 2
    heading, table = (tmp_path / "recipes.md").read_text().split("## ")[2].split("\n", 1)
    assert heading == "shapes: test_resnet, 64 wide, the recipe's length"
    assert f"torchvision's RetinaNet in 0.0833 minutes: {told['images_seen']} images of 64 px" in table
    assert f"| {told['ap'] - 0.9:+.3f} |" in table
    monkeypatch.setattr(sys, "argv", ["torchvision_training.py", str(data), "--time", "0.0001"])
    with pytest.raises(SystemExit):
        script.main()
    assert "--time 0.0001 is too short: the validation alone takes" in capsys.readouterr().err
