"""`--weights`: which weights a network starts with when it goes on from a model with other classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import retinanet
from retinanet.anchors import AnchorSpec
from retinanet.checkpoint import Model, save_model
from retinanet.data import Dataset, open_dataset
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import CheckpointError, ConfigError
from retinanet.model import BackboneSpec, HeadSpec, ModelSpec, PyramidSpec, build_retinanet
from retinanet.records import Classes
from retinanet.training.configuration import TrainingOptions
from retinanet.training.plan import Plan
from retinanet.training.planning import plan_run
from retinanet.training.starting import build_network, start_from

SMALL = ModelSpec(
    Classes(("disk", "cube", "square")),
    backbone=BackboneSpec("resnet18", norm="group"),
    pyramid=PyramidSpec(channels=64),
    head=HeadSpec(depth=1, norm="group"),
    anchors=AnchorSpec(sizes=(12, 24, 48, 96, 192)),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_shapes(
        tmp_path_factory.mktemp("data") / "shapes", train=4, val=2, spec=ShapesSpec(image_size=96)
    )


@pytest.fixture(scope="module")
def train(data: Path) -> Dataset:
    return open_dataset(data, "train")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.manual_seed(1)
    network = build_retinanet(SMALL)
    torch.nn.init.normal_(network.class_head.last.bias)
    return Model(network, SMALL, training={"recipe": "small"})


@pytest.fixture(scope="module")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model") / "mine", model))


def plan(train: Dataset, saved: str, **more: Any) -> Plan:
    return plan_run(TrainingOptions(data="x", weights=saved, device="cpu", **more), train)


def said(plan: Plan) -> dict[str, tuple[str, str]]:
    return {setting: (value, why) for setting, value, why in plan.reasons}


def test_classes_of_the_same_name_keep_their_rows_and_new_ones_are_fresh(model: Model) -> None:
    classes = Classes(("square", "star", "disk"))
    torch.manual_seed(2)
    network = build_retinanet(dataclasses.replace(SMALL, classes=classes))
    fresh = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    start_from(model, network, classes)
    old, new = model.network.state_dict(), network.state_dict()
    anchors = SMALL.anchors.per_location
    for name, tensor in new.items():
        if not name.startswith("class_head.last"):
            assert torch.equal(tensor, old[name]), name
            continue
        for anchor in range(anchors):
            assert torch.equal(tensor[3 * anchor], old[name][3 * anchor + 2])  # square
            assert torch.equal(tensor[3 * anchor + 1], fresh[name][3 * anchor + 1])  # star
            assert torch.equal(tensor[3 * anchor + 2], old[name][3 * anchor])  # disk


def test_the_same_classes_give_the_same_outputs(model: Model, train: Dataset, saved: str) -> None:
    same = dataclasses.replace(plan(train, saved), spec=SMALL)
    network = build_network(same)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = network.eval()(images), model.network.eval()(images)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


def test_the_plan_says_what_it_starts_from_and_keeps_the_model(train: Dataset, saved: str) -> None:
    found = plan(train, saved)
    rows = said(found)
    assert rows["backbone"] == (f"resnet18, from model {saved}", "--weights")
    assert rows["classes"] == ("kept: disk, square; new: triangle; dropped: cube", "by name")
    assert rows["recipe"] == ("small", "auto: the model was trained by small")
    assert rows["channels"] == ("64", "the model's")
    assert rows["image size"][1].endswith("; the model had 800")
    assert rows["anchors"][0] == "12, 24, 48, 96, 192"
    assert rows["anchors"][1].startswith("the model's; ")
    assert found.spec.head == SMALL.head
    assert found.spec.classes == train.classes
    assert found.to_json()["weights"] == saved


def test_anchors_may_be_others_of_the_same_number(train: Dataset, saved: str) -> None:
    assert plan(train, saved, anchors="8,16,32,64,128").spec.anchors.sizes == (8, 16, 32, 64, 128)


def test_a_model_that_small_did_not_make_goes_on_with_modern(train: Dataset, tmp_path: Path) -> None:
    frozen = dataclasses.replace(SMALL, backbone=BackboneSpec("resnet18", norm="frozen"))
    file = str(save_model(tmp_path, Model(build_retinanet(frozen), frozen)))
    assert said(plan(train, file))["recipe"] == (
        "modern",
        "auto: the model was trained by a recipe unknown; modern goes on with it",
    )
    assert plan(train, file, recipe="paper").recipe.freeze == "stage1"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"backbone": "resnet34"}, "--backbone needs to be that of the model .* has resnet18; got resnet34"),
        ({"backbone": "resnet50"}, "has resnet18; got resnet50"),  # the default, where it is asked for
        ({"channels": 128}, "--channels needs to be that of the model .* has 64; got 128"),
        ({"head_depth": 4}, "--head-depth needs to be that of the model .* has 1; got 4"),
        (
            {"pretrained": "none"},
            "--weights brings a backbone's weights, too, and needs --pretrained auto; got none",
        ),
    ],
)
def test_options_for_another_network_are_refused(
    train: Dataset, saved: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(train, saved, **more)


def test_the_model_s_own_network_may_be_named(train: Dataset, saved: str) -> None:
    assert plan(train, saved, backbone="resnet18", channels=64, head_depth=1).spec.pyramid.channels == 64


def test_a_missing_model_is_named(train: Dataset) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        plan(train, "nowhere")


@pytest.mark.usefixtures("undrawn")
def test_a_run_goes_on_from_another(data: Path, model: Model, saved: str, tmp_path: Path) -> None:
    run = retinanet.train(
        data=data,
        output=tmp_path / "run",
        weights=saved,
        image_size=96,
        steps=1,
        lr=1e-7,  # so that what it started from is still to be seen
        batch_size=2,
        device="cpu",
        workers=0,
    )
    assert run.detector.spec.classes == open_dataset(data, "train").classes
    assert (run.path / "config.yaml").read_text().count(f"weights: {saved}") == 1
    assert run.detector.model.training["weights"] == saved
    name = "backbone.network.layer1.0.conv1.weight"
    mine, first = run.detector.model.network.state_dict()[name], model.network.state_dict()[name]
    torch.testing.assert_close(mine.cpu(), first, atol=1e-5, rtol=0)
