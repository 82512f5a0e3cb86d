"""A whole run on a few small images: what it leaves behind, and that what it says is so."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

import retinanet
from made_up import Photographs
from retinanet.anchors import CPU
from retinanet.atss import match_atss
from retinanet.batches import RawPredictions
from retinanet.checkpoint import load_model
from retinanet.data import Dataset, open_dataset, write_coco
from retinanet.data.loading import training_batches
from retinanet.data.sampling import epoch_length
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.data.transforms import Augmentation
from retinanet.errors import ConfigError, DataError, TrainingError
from retinanet.images import Preprocessing
from retinanet.inference import Detector, validate
from retinanet.losses import (
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    sigmoid_hinge_loss,
    sigmoid_varifocal_loss,
)
from retinanet.model import BackboneSpec, HeadSpec, ModelSpec, PyramidSpec, RetinaNet, build_retinanet
from retinanet.objective import ByIou, QualityLoss
from retinanet.records import Classes, GroundTruth, Ignore
from retinanet.training import loop, recipes, timing
from retinanet.training.choosing import choose_rate
from retinanet.training.config_file import read_config, write_config
from retinanet.training.configuration import EVERY_SETTING, SETTINGS, LossName, TrainingOptions
from retinanet.training.deadline import Deadline
from retinanet.training.folder import RunFolder
from retinanet.training.muon import Muon
from retinanet.training.objectives import settings_of
from retinanet.training.optimizer import WeightAverage, build_optimizers, hidden_weights, rate, set_rate
from retinanet.training.plan import Plan
from retinanet.training.planning import plan_run
from retinanet.training.preparation import Prepared, open_splits
from retinanet.training.run import run_training
from retinanet.training.signals import StopRequest
from retinanet.training.sizing import (
    anchor_choices,
    choose_batch,
    choose_max_detections,
    choose_preprocessing,
    coverage,
    padded_pixels,
)
from retinanet.training.starting import build_network
from retinanet.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = {
    "backbone": "test_resnet",
    "pretrained": "none",
    "channels": 64,
    "image_size": 96,
    "batch_size": 2,
    "device": "cpu",
    "workers": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_shapes(
        tmp_path_factory.mktemp("data") / "shapes", train=6, val=4, spec=ShapesSpec(image_size=96)
    )


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    output = tmp_path_factory.mktemp("runs") / "tiny"
    return retinanet.train(data=str(data), output=str(output), steps=12, validate_every_steps=6, **TINY)


def test_the_run_folder_is_complete(run: object) -> None:
    names = {path.name for path in run.path.iterdir()}  # type: ignore[attr-defined]
    assert names - {"tensorboard", "memory.jsonl"} == {
        "config.yaml",
        "command.txt",
        "plan.json",
        "environment.json",
        "metrics.jsonl",
        "metrics.json",
        "best",
        "last",
        "checkpoints",
        ".lock",
        "curves.png",
        "pictures",
        "pictures.png",
        "report.html",
    }
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]  # type: ignore[attr-defined]
    trained = [line for line in lines if "loss" in line]
    judged = [line for line in lines if "ap" in line]
    assert [line["step"] for line in trained] == [6, 10, 12]
    assert [line["step"] for line in judged] == [6, 12]
    assert {"step", "epoch", "loss", "loss_class", "loss_box", "lr", "images_per_second"} <= set(trained[0])
    assert not any("memory_gb" in line for line in lines)  # of which no two runs hold the same
    assert trained[-1]["epoch"] == 12 * 2 / 6
    page = (run.path / "report.html").read_text()  # type: ignore[attr-defined]
    assert "data:image/jpeg;base64," in page
    assert "<svg" in page
    assert "memory at most" in page or not Path("/proc").exists()
    assert "http" not in page.split("</style>")[1]  # nothing is loaded from elsewhere


def test_metrics_json_is_what_evaluate_says_of_the_saved_model(run: object, data: Path) -> None:
    """Training validates as `evaluate` does: the same boxes, hence the same figures."""
    saved = json.loads((run.path / "metrics.json").read_text())  # type: ignore[attr-defined]
    again = retinanet.evaluate(retinanet.load(run.path, device="cpu"), data, batch_size=2)  # type: ignore[attr-defined]
    assert again.metrics.to_json() == saved == run.metrics  # type: ignore[attr-defined]
    assert run.detector.predict(open_dataset(data, "val").path(0), threshold=0)  # type: ignore[attr-defined]


def test_the_same_command_gives_the_same_weights(run: object, data: Path, tmp_path: Path) -> None:
    again = retinanet.train(
        data=str(data), output=str(tmp_path / "again"), steps=12, validate_every_steps=6, **TINY
    )
    first = load_file(run.path / "last" / "model.safetensors")  # type: ignore[attr-defined]
    second = load_file(again.path / "last" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_config_yaml_repeats_the_run(run: object) -> None:
    values = read_config(run.path / "config.yaml")  # type: ignore[attr-defined]
    assert TrainingOptions(**values).steps == 12
    assert yaml.safe_load((run.path / "config.yaml").read_text())["backbone"] == "test_resnet"  # type: ignore[attr-defined]


def test_an_existing_run_is_not_overwritten(run: object, data: Path) -> None:
    with pytest.raises(ConfigError, match="exists and is not empty"):
        retinanet.train(data=str(data), output=str(run.path), steps=1, **TINY)  # type: ignore[attr-defined]


def test_a_rate_that_is_too_high_ends_the_run_and_names_images(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**TINY, "lr": 1e30, "optimizer": "sgd", "steps": 30}
    with pytest.raises(TrainingError, match=r"the 10 steps until step 1\d were skipped: .* lower --lr, now "):
        retinanet.train(data=str(data), output=str(tmp_path / "nan"), **options)
    assert "was skipped, as the loss was nan; weights stay as they were. Its images: images/train/" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda coco: coco["categories"][0].update(name="globe"),
            "needs the same classes in train and val; got .* and .*globe",
        ),
        (lambda coco: coco["annotations"].clear(), "the val split of .* has none in 2 images"),
    ],
)
def test_a_val_split_that_is_of_no_use_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    data = generate_shapes(tmp_path / "shapes", train=2, val=2, spec=ShapesSpec(image_size=96))
    labels = data / "annotations" / "instances_val.json"
    coco = json.loads(labels.read_text())
    change(coco)
    labels.write_text(json.dumps(coco))
    with pytest.raises(DataError, match=message):
        open_splits(str(data))


# --- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "--lr needs a number above 0; got -1.0"),
        ({"batch_size": 0}, "--batch-size needs 1 or more; got 0"),
        ({"epochs": 0.0}, "--epochs needs a number above 0; got 0.0"),
        ({"steps": 0}, "--steps needs 1 or more"),
        ({"epochs": 1.0, "steps": 5}, "says how long; got --epochs and --steps"),
        ({"time": "5m", "steps": 5}, "says how long; got --steps and --time"),
        ({"time": "5"}, "--time needs a number with s, m or h, such as 20m; got '5'"),
        ({"time": "-5m"}, "--time needs a number"),
        ({"time": ""}, "--time needs a number"),
        ({"image_size": 8}, "--image-size needs 32 or more"),
        ({"image_size": 320, "max_size": 256}, "got 320 and 256"),
        ({"channels": 80}, "--channels needs a multiple of 32; got 80"),
        ({"head_depth": 0}, "--head-depth needs 1 or more; got 0"),
        ({"alpha": 1.5}, r"--alpha needs a number in \[0, 1\]; got 1.5"),
        ({"gamma": -1.0}, "--gamma needs 0 or more"),
        ({"gamma": float("nan")}, "--gamma needs 0 or more"),
        ({"prior": 0.0}, r"--prior needs a number in \(0, 1\)"),
        ({"freeze": "stage"}, r"--freeze needs none, stem, stage1 \.\. stage4 or backbone; got 'stage'"),
        ({"patience": 0}, "--patience needs 1 or more; got 0"),
        ({"seed": 2**64}, "--seed needs 0 or more and below 2.63"),
        ({"gamma": float("inf")}, "--gamma needs 0 or more"),
        ({"workers": -1}, "--workers needs 0 or more"),
        ({"box_beta": 0.1, "box_loss": "giou"}, "--box-beta belongs to --box-loss smooth-l1"),
        ({"beta": float("nan")}, "--beta needs a finite number; got nan"),
        ({"margin": 0.0}, r"--margin needs a number in \(0, 1\]; got 0"),
        ({"mining_batch": 3}, "--mining-batch needs 4 or more; got 3"),
        ({"mining_nms": 1.5}, r"--mining-nms needs a number in \[0, 1\]; got 1.5"),
        ({"loss": "fl-star", "gamma": 0.0}, "--loss fl-star needs --gamma above 0; got 0"),
        ({"anchors": "1,2,3"}, "--anchors needs five positive sizes"),
        ({"anchors": "a,b,c,d,e"}, "--anchors needs five positive sizes"),
        ({"mosaic": 1.5}, r"--mosaic needs a number in \[0, 1\]; got 1.5"),
        ({"repeat_rare": float("nan")}, r"--repeat-rare needs a number in \[0, 1\]; got nan"),
        ({"zoom": "2"}, "--zoom needs two factors, the smaller first, such as 0.8,1.4; got '2'"),
        ({"zoom": "1.4,0.8"}, "--zoom needs two factors, the smaller first"),
        ({"zoom": "0,1"}, "--zoom needs numbers above 0 with commas, such as 0.8,1; got '0,1'"),
        ({"scales": "large"}, "--scales needs numbers above 0 with commas"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingOptions(data="x", **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 4", "unknown|has no field 'batchsize'. Did you mean 'batch_size'"),
        ("batch_size: four", "batch_size needs a whole number or auto or nothing; got 'four'"),
        ("recipe: papr", "recipe needs one of auto, paper, paper-jitter, modern, small; got 'papr'"),
        ("lr: 1e-3", r"lr needs a number \(such as 0.001\) or nothing; got '1e-3'"),
        ("- 1", "one `option: value` a line; got list"),
        ("a: b: c", "is not YAML"),
        ("batch_size: 0", "--batch-size needs 1 or more"),
    ],
)
def test_a_wrong_config_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(file)


def test_a_missing_config_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config needs a YAML file; .*none.yaml does not exist"):
        read_config(tmp_path / "none.yaml")


def test_config_round_trip(tmp_path: Path) -> None:
    options = TrainingOptions(data="x", lr=0.1, epochs=3.0, box_loss="giou", anchors="8,16,32,64,128")
    write_config(tmp_path / "c.yaml", options)
    assert TrainingOptions(**read_config(tmp_path / "c.yaml")) == options


# Every option that a plan carries, with a value that is nobody's default, and where it must arrive.
MOVED = [
    ("backbone", "resnet34", lambda plan: plan.spec.backbone.name),
    ("image_size", 128, lambda plan: plan.spec.preprocessing.image_size),
    ("max_size", 500, lambda plan: plan.spec.preprocessing.max_size),
    ("anchors", "10,20,40,80,160", lambda plan: ",".join(f"{size:g}" for size in plan.spec.anchors.sizes)),
    ("channels", 96, lambda plan: plan.spec.pyramid.channels),
    ("head_depth", 1, lambda plan: plan.spec.head.depth),
    ("steps", 77, lambda plan: plan.steps),
    ("batch_size", 3, lambda plan: plan.batch_size),
    ("optimizer", "sgd", lambda plan: plan.recipe.optimizer),
    ("schedule", "step", lambda plan: plan.recipe.schedule),
    ("weight_decay", 0.123, lambda plan: plan.recipe.weight_decay),
    ("alpha", 0.77, lambda plan: plan.recipe.loss_settings["alpha"]),
    ("gamma", 3.5, lambda plan: plan.recipe.loss_settings["gamma"]),
    ("loss", "ce", lambda plan: plan.recipe.loss),
    ("prior", 0.2, lambda plan: plan.recipe.prior),
    ("box_loss", "smooth-l1", lambda plan: plan.recipe.box_loss),
    ("box_weight", 7.0, lambda plan: plan.objective.box_weight),
    ("max_detections", 17, lambda plan: plan.spec.post_processing.max_detections),
    ("workers", 5, lambda plan: plan.workers),
    ("validate_every_steps", 9, lambda plan: plan.validate_every),
    ("patience", 7, lambda plan: next(int(v.split()[1]) for s, v, _ in plan.reasons if s == "early stop")),
    ("recipe", "small", lambda plan: plan.recipe.name),
    ("flip", 0.25, lambda plan: plan.augmentation.flip),
    ("flip_vertical", 0.25, lambda plan: plan.augmentation.flip_vertical),
    ("quarter_turn", 0.25, lambda plan: plan.augmentation.quarter_turn),
    ("zoom", "0.5,2", lambda plan: "{:g},{:g}".format(*plan.augmentation.zoom)),
    ("scales", "0.5,0.7,1", lambda plan: ",".join(f"{scale:g}" for scale in plan.augmentation.scales)),
    ("photometric", 0.25, lambda plan: plan.augmentation.photometric),
    ("mosaic", 0.25, lambda plan: plan.augmentation.mosaic),
    ("repeat_rare", 0.25, lambda plan: plan.recipe.repeat_rare),
]


@pytest.mark.parametrize(("name", "value", "arrived"), MOVED, ids=[name for name, *_ in MOVED])
def test_no_option_is_ignored(data: Path, name: str, value: object, arrived: object) -> None:
    train = open_dataset(data, "train")
    plan = plan_run(TrainingOptions(data=str(data), device="cpu", **{name: value}), train)  # type: ignore[arg-type]
    assert arrived(plan) == value  # type: ignore[operator]


@pytest.mark.parametrize(
    ("optimizer", "lr", "why"),
    [
        ("sgd", 0.04, "0.16 at 16 images a step, times 4/16"),
        ("adamw", 0.08, "0.16 at 16 images a step, times the root of 4/16"),
        ("muon", 0.08, "0.16 at 16 images a step, times the root of 4/16; Muon's own rate is 4 times that"),
    ],
)
def test_lr_is_for_sixteen_images_and_epochs_become_steps(
    data: Path, optimizer: Literal["sgd", "adamw", "muon"], lr: float, why: str
) -> None:
    train = open_dataset(data, "train")
    options = TrainingOptions(
        data=str(data), device="cpu", lr=0.16, optimizer=optimizer, batch_size=4, epochs=10
    )
    plan = plan_run(options, train)
    assert plan.lr == pytest.approx(lr)
    assert ("lr", f"{lr:g}", why) in plan.reasons
    assert plan.steps == 15  # 10 epochs of 6 images, 4 a step


def test_from_scratch_a_run_sees_as_many_images_as_its_pixels_hold(data: Path) -> None:
    """Twice the side, a quarter of the images."""
    train = open_dataset(data, "train")

    def plan(size: int) -> Plan:
        return plan_run(
            TrainingOptions(data=str(data), backbone="resnet18", device="cpu", image_size=size), train
        )

    small, large = plan(128), plan(256)
    assert small.batch_size == 4
    assert small.steps == math.ceil(150e6 / 128**2 / 4)
    assert large.steps == math.ceil(150e6 / 256**2 / 4)
    steps, why = next((value, why) for setting, value, why in large.reasons if setting == "steps")
    assert steps == f"{large.steps:,}"
    assert why.startswith(
        "recipe small: 150 megapixels, of 0.066 an image with its padding; 382 passes over 6 images"
    )


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_batches_are_pinned_for_cuda_alone(data: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    train, val = open_dataset(data, "train"), open_dataset(data, "val")
    plan = dataclasses.replace(
        plan_run(TrainingOptions(data=str(data), **TINY), train), device=torch.device(kind)
    )
    asked = []

    def batches(*_: object, pin_memory: bool, **__: object) -> None:
        asked.append(pin_memory)
        raise InterruptedError

    for module in (loop, timing):
        monkeypatch.setattr(module, "training_batches", batches)
    monkeypatch.setattr(TrainingStep, "of", lambda *_: SimpleNamespace(shipped=None))
    with pytest.raises(InterruptedError):
        loop.train_network(Prepared(plan, None, train, val), RunFolder(data), None, StopRequest())  # type: ignore[arg-type]
    with pytest.raises(InterruptedError):
        timing._step_seconds(plan, None, train, 1.0)  # type: ignore[arg-type]
    assert asked == [kind == "cuda"] * 2


def test_logits_are_let_go_before_the_way_back(data: Path) -> None:
    train = open_dataset(data, "train")
    plan = plan_run(TrainingOptions(data=str(data), **TINY), train)
    network = build_network(plan)
    train_on = TrainingStep.of(plan, network)
    logits: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def forward(images: torch.Tensor) -> RawPredictions:
        found = network(images)
        logits.extend(map(weakref.ref, found.logits))
        return found

    train_on.forward = forward
    network.class_head.last.weight.register_hook(lambda _: alive.extend(ref() is not None for ref in logits))
    (batch,) = training_batches(train, plan.preprocessing, plan.augmentation, batch_size=2, seed=0, steps=1)
    train_on(batch, 1e-3)
    assert alive == [False] * 5


def test_pixels_are_those_of_padded_batches() -> None:
    """Images of two shapes pad each other, and the loader pads to multiples of 32."""
    wide, high = np.array([(96, 48)] * 8), np.array([(48, 96)] * 8)
    frame = Preprocessing(image_size=64, max_size=128, divisor=32)

    class Sized:
        def __init__(self, sizes: np.ndarray) -> None:
            self.sizes = sizes
            self.widths = sizes[:, 0]

        def size(self, index: int) -> tuple[int, int]:
            return tuple(self.sizes[index])

    assert padded_pixels(Sized(wide), frame, 4) == 128 * 64
    mixed = padded_pixels(Sized(np.concatenate((wide, high))), frame, 2)
    assert 128 * 64 < mixed < 128 * 128
    assert padded_pixels(Sized(wide[:1]), frame, 4) == 128 * 64  # fewer images than a batch
    assert padded_pixels(Sized(wide), dataclasses.replace(frame, image_size=72, max_size=144), 4) == 160 * 96
    one = padded_pixels(
        Sized(np.array([(48, 48)] * 4 + [(480, 48)])), dataclasses.replace(frame, max_size=640), 4
    )
    assert one == pytest.approx(
        0.2 * 64 * 64 + 0.8 * 640 * 64, rel=0.1
    )  # the large one in four batches of five


@pytest.mark.parametrize(
    ("recipe", "steps", "why"),
    [
        ({"images_seen": 0, "pixels_seen": 1, "epochs": 4}, 6, "; 4 passes"),  # 24 images
        # None of them is left out.
        ({"images_seen": 25, "pixels_seen": 1, "epochs": 4}, 7, ": at least 25 images; 4.7 passes"),
    ],
)
def test_a_run_sees_at_least_the_recipes_passes_and_images(
    data: Path, recipe: dict[str, Any], steps: int, why: str
) -> None:
    def change(usual: recipes.Recipe) -> recipes.Recipe:
        return dataclasses.replace(usual, **recipe)

    options = TrainingOptions(data=str(data), backbone="resnet18", device="cpu", image_size=128)
    plan = plan_run(options, open_dataset(data, "train"), change)
    said = {setting: (value, reason) for setting, value, reason in plan.reasons}
    assert said["steps"] == (f"{steps}", f"recipe small{why} over 6 images")
    assert "zoom" in said["augmentation"][0]  # they are not few


@pytest.mark.parametrize(
    ("options", "validations", "said"),
    [
        ({}, 5, None),
        ({"patience": 1}, 5, "after 1 validation of 5 without a better AP"),
        ({"patience": 5}, 20, "after 5 validations of 20 without a better AP"),
        ({"patience": 5, "validate_every_steps": 50}, 4, "never"),
        ({"patience": 3, "validate_every_steps": 50}, 4, "after 3 validations of 4 without a better AP"),
    ],
)
def test_with_patience_there_are_validations_enough_to_lose_it(
    data: Path, options: dict[str, Any], validations: int, said: str | None
) -> None:
    asked = TrainingOptions(data=str(data), steps=200, **{**TINY, **options})
    plan = plan_run(asked, open_dataset(data, "train"))
    assert sum(map(plan.judges, range(1, 201))) == validations
    assert {setting: value for setting, value, _ in plan.reasons}.get("early stop") == said
    stored = json.loads(json.dumps(plan.to_json()))
    begun = plan_run(asked, open_dataset(data, "train")).as_begun(stored)
    assert begun.reasons == plan.reasons
    # Where they would take too long they are few, and the row says what that means.
    if options == {"patience": 5}:
        few = plan.validating(1000 * plan.batch_size)  # 0.3 x 200 / 1000
        assert few.validate_every == 200
        assert ("early stop", "never") in [(setting, value) for setting, value, _ in few.reasons]
        assert plan.as_begun(json.loads(json.dumps(few.to_json()))).reasons == few.reasons


def test_on_cuda_steps_from_scratch_take_more_images() -> None:
    assert recipes.small(Classes(("a",)), "resnet18", "cpu").batch_size == 4
    assert recipes.small(Classes(("a",)), "resnet18", "cuda").batch_size == 16


def test_the_seed_decides_the_weights(data: Path) -> None:
    train = open_dataset(data, "train")
    options = {**TINY, "steps": 1}
    nets = [
        build_network(plan_run(TrainingOptions(data=str(data), seed=seed, **options), train))
        for seed in (0, 0, 1)
    ]
    first, same, other = (next(iter(net.parameters())) for net in nets)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# --- weights ---------------------------------------------------------------------------------------------------


def test_pretrained_file_chooses_recipe_modern_and_arrives_frozen(data: Path, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(1)
    source = timm.create_model("resnet18")
    file = tmp_path / "resnet18.safetensors"
    save_file(source.state_dict(), file)
    options = TrainingOptions(
        data=str(data), device="cpu", backbone="resnet18", pretrained=str(file), freeze="stage1"
    )
    plan = plan_run(options, open_dataset(data, "train"))
    assert plan.recipe.name == "modern"
    assert plan.spec.backbone.weights == "resnet18.safetensors"
    network = build_network(plan)
    assert torch.equal(network.backbone.network.conv1.weight, source.conv1.weight)
    assert not network.backbone.network.layer1[0].conv1.weight.requires_grad
    assert network.backbone.network.layer2[0].conv1.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pretrained": "none", "freeze": "stem"},
            "--freeze stem keeps a stage as loaded and needs .* or --weights MODEL, or leave --freeze out",
        ),
        (
            {"pretrained": "none", "box_beta": 0.1},
            "--box-beta belongs to --box-loss smooth-l1; recipe small has",
        ),
        (
            {"pretrained": "nowhere.pth"},
            "--pretrained needs auto, none or a weights file; nowhere.pth is no file",
        ),
        ({"recipe": "small", "pretrained": "x.pth"}, "--recipe small starts from scratch"),
        ({"recipe": "paper", "pretrained": "none"}, "freezes BatchNorm and needs weights for resnet50"),
        (
            {"recipe": "modern", "pretrained": "none"},
            "give --pretrained FILE or --weights MODEL, or use --recipe small",
        ),
    ],
)
def test_impossible_weights_are_refused(data: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_run(TrainingOptions(data=str(data), device="cpu", **options), open_dataset(data, "train"))


def test_recipe_paper_is_the_paper() -> None:
    recipe = recipes.paper(Classes(("a",)), "resnet50", "a1_in1k")
    assert recipe.images_seen == 90_000 * 16
    assert recipe.batch_size == 16
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.schedule) == ("sgd", 0.01, 1e-4, "step")
    assert (recipe.loss, settings_of(recipe)) == ("focal", {"alpha": 0.25, "gamma": 2.0})
    assert recipe.prior == 0.01
    assert (recipe.box_loss, recipe.box_beta, recipe.box_weight, recipe.normalizer) == (
        "smooth-l1",
        1.0,
        1.0,
        "image",
    )
    assert recipe.matching == "iou"
    assert (recipe.positive_iou, recipe.negative_iou, recipe.low_quality) == (0.5, 0.4, False)
    assert (recipe.augmentation.flip, recipe.augmentation.zoom) == (0.5, (1.0, 1.0))
    assert recipe.model.backbone.norm == "frozen"
    assert recipe.model.pyramid.channels == 256
    assert recipe.model.head == HeadSpec(depth=4, norm="none")


def test_recipe_paper_keeps_the_papers_anchors(data: Path, tmp_path: Path) -> None:
    """Where objects are far too small for them, too; --anchors may ask for others."""
    train, weights = open_dataset(data, "train"), tmp_path / "weights.safetensors"
    weights.touch()  # a plan does not read it
    for name in ("paper", "paper-jitter"):
        options = TrainingOptions(data=str(data), recipe=name, pretrained=str(weights), image_size=96)
        plan = plan_run(options, train)
        assert plan.spec.anchors == recipes.paper(train.classes, "resnet50", None).model.anchors
        (why,) = [why for setting, _, why in plan.reasons if setting == "anchors"]
        assert why.startswith(f"recipe {name}; ")
        assert any(setting == "anchors miss" for setting, _, _ in plan.reasons)
        asked = plan_run(dataclasses.replace(options, anchors="8,16,32,64,128"), train)
        assert asked.spec.anchors.sizes == (8, 16, 32, 64, 128)


def test_recipe_paper_jitter_is_longer_and_from_several_scales_only() -> None:
    classes = Classes(("a",))
    jitter = recipes.paper_jitter(classes, "resnet101", "a1_in1k")
    assert jitter.images_seen == 135_000 * 16
    assert jitter.augmentation.image_sizes(800) == (640, 672, 704, 736, 768, 800)
    usual = recipes.paper(classes, "resnet101", "a1_in1k")
    assert usual == dataclasses.replace(
        jitter, name="paper", images_seen=usual.images_seen, augmentation=usual.augmentation
    )


@pytest.mark.parametrize("backbone", ["convnext_atto", "mobilenetv3_small_100"])
def test_a_backbone_that_cannot_have_the_recipes_norm_keeps_its_own(data: Path, backbone: str) -> None:
    plan = plan_run(
        TrainingOptions(data=str(data), device="cpu", backbone=backbone, pretrained="none"),
        open_dataset(data, "train"),
    )
    assert plan.spec.backbone.norm == "native"
    assert any(setting == "backbone norm" for setting, *_ in plan.reasons)
    build_network(plan)


def test_brackets_in_messages_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from retinanet.training.progress import TrainingProgress, plain_console

    TrainingProgress(plain_console(), 10).say("skipped: [/photos]/a.jpg needs [x1, y1, x2, y2]")
    assert "[/photos]/a.jpg needs [x1, y1, x2, y2]" in capsys.readouterr().err


def fitted_to(seconds: float, plan: Plan, train: Dataset, val: Dataset) -> Plan:
    deadline = Deadline(time.monotonic() + seconds, seconds)
    return timing.fit_to_time(plan, timing.try_out(plan, build_network(plan), train, val, deadline), deadline)


def test_as_many_steps_as_fit_into_the_time(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = open_dataset(data, "train")
    plan = plan_run(TrainingOptions(data=str(data), time="100s", **TINY), train)
    monkeypatch.setattr(timing, "_step_seconds", lambda *_: 2.0)
    val = train.subset([0])
    fitted = fitted_to(100, plan, train, val)
    # 100 s x 0.92 / 2 s = 46, less what the trial and five validations of one image take
    assert 30 <= fitted.steps <= 46
    assert fitted.validate_every == -(-fitted.steps // 5)
    assert any("s left: 2.00 s a step" in why for _, _, why in fitted.reasons)


@pytest.mark.parametrize(
    ("images", "asked", "every"),
    [
        (10, None, 20),  # 5 validations of 10 images are nothing beside 400 that are trained on
        (40, None, 34),  # 3 of them take a tenth of the time
        (500, None, 100),  # the last one always takes place
        (500, 7, 7),  # as asked
    ],
)
def test_large_validation_sets_are_looked_at_less_often(
    data: Path, images: int, asked: int | None, every: int
) -> None:
    options = TrainingOptions(
        data=str(data), pretrained="none", device="cpu", steps=100, batch_size=4, validate_every_steps=asked
    )
    assert plan_run(options, open_dataset(data, "train")).validating(images).validate_every == every


def test_validations_that_take_long_become_few(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = open_dataset(data, "train")
    plan = plan_run(TrainingOptions(data=str(data), time="100s", **TINY), train)
    monkeypatch.setattr(timing, "_step_seconds", lambda *_: 0.1)
    monkeypatch.setattr(timing, "_validation_seconds", lambda *_: 3.0)  # 5 % of 10 s is less
    fitted = fitted_to(10, plan, train, train)
    assert fitted.validate_every == fitted.steps


@pytest.mark.parametrize("every", [None, 5])
def test_a_time_without_room_for_a_step_and_a_validation_is_refused(
    data: Path, monkeypatch: pytest.MonkeyPatch, every: int | None
) -> None:
    train = open_dataset(data, "train")
    options = TrainingOptions(data=str(data), time="20s", validate_every_steps=every, **TINY)  # type: ignore[arg-type]
    plan = plan_run(options, train)
    monkeypatch.setattr(timing, "_step_seconds", lambda *_: 2.0)
    monkeypatch.setattr(timing, "_validation_seconds", lambda *_: 18.0)
    with pytest.raises(
        ConfigError, match=r"--time 20s is too short: a step takes 2\.0 s here and a validation 18"
    ):
        fitted_to(20, plan, train, train)


def test_a_run_that_never_began_leaves_its_name_free(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_step_seconds", lambda *_: 2.0)
    monkeypatch.setattr(timing, "_validation_seconds", lambda *_: 18.0)
    options = TrainingOptions(data=str(data), output=str(tmp_path / "run"), time="10s", **TINY)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is too short"):
        run_training(options)
    assert not (tmp_path / "run").exists()


def test_the_last_validation_is_counted_when_the_cadence_is_asked_for(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = open_dataset(data, "train")
    options = TrainingOptions(data=str(data), time="100s", validate_every_steps=1000, **TINY)  # type: ignore[arg-type]
    plan = plan_run(options, train)
    monkeypatch.setattr(timing, "_step_seconds", lambda *_: 1.0)
    monkeypatch.setattr(timing, "_validation_seconds", lambda *_: 50.0)
    fitted = fitted_to(100, plan, train, train)
    assert 38 <= fitted.steps <= 40  # (100 x 0.92 - 50) / (1 + 50 / 1000)


def test_the_trial_ends_on_a_slow_machine(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = open_dataset(data, "train")
    plan = plan_run(TrainingOptions(data=str(data), time="1s", **TINY), train)
    network = build_network(plan)
    taken: list[int] = []
    network.register_forward_hook(lambda *_: taken.append(1))
    assert timing._step_seconds(plan, network, train, 1e-6) > 0
    assert len(taken) == 2


def test_zoom_waits_until_images_come_back(data: Path) -> None:
    train = open_dataset(data, "train")  # 6 images, 2 a step
    few = plan_run(TrainingOptions(data=str(data), steps=8, **TINY), train)
    many = few.lasting(9, "asked for")
    assert (few.augmentation.zoom, many.augmentation.zoom) == ((1.0, 1.0), (0.8, 1.4))
    assert any(
        setting == "augmentation" and "every image is still new" in why for setting, _, why in few.reasons
    )
    assert [setting for setting, *_ in few.reasons] == [setting for setting, *_ in many.reasons]


def test_the_plan_says_no_more_than_there_is_to_say(data: Path) -> None:
    train = open_dataset(data, "train")  # 6 images, 2 a step
    plan = plan_run(TrainingOptions(data=str(data), **TINY), train)
    for steps, passes in ((1, "0.33 passes"), (3, "1 pass"), (12, "4 passes"), (310, "103 passes")):
        said = {setting: (value, why) for setting, value, why in plan.lasting(steps, "asked for").reasons}
        assert said["steps"] == (f"{steps}", f"asked for; {passes} over 6 images")
        assert said["augmentation"][0] == ("flip 0.5" if steps < 9 else "flip 0.5, zoom 0.8 to 1.4")
    assert said["box weight"][0] == "2"
    matching = "ATSS: of each object's nearest anchors those 2 deviations above their mean IoU"
    assert said["matching"] == (matching, "recipe small")
    assert plan.objective.matching is match_atss
    by_iou = {"matching": "iou", "positive_iou": 0.3, "negative_iou": 0.2}
    loose = plan_run(plan.options, train, lambda recipe: dataclasses.replace(recipe, **by_iou))
    said = {setting: (value, why) for setting, value, why in loose.reasons}
    matching = "positive from IoU 0.3, background below 0.2, each object's best anchors positive"
    assert said["matching"] == (matching, "recipe small")
    assert loose.objective.matching == ByIou(positive_iou=0.3, negative_iou=0.2, low_quality=True)
    assert said["held in check by"][0] == (
        "weight decay 0.02, gradient norm 10, weights averaged over the last ninth of the steps, 500 at most"
    )


def test_augmentation_asked_for_is_kept_and_named(data: Path) -> None:
    """Also where a short run would not zoom by itself."""
    train = open_dataset(data, "train")
    options = TrainingOptions(data=str(data), **{**TINY, "zoom": "0.5,2", "mosaic": 0.5})  # type: ignore[arg-type]
    short = plan_run(options, train).lasting(1, "asked for")
    assert short.augmentation == Augmentation(zoom=(0.5, 2.0), mosaic=0.5)
    words = "flip 0.5, mosaic 0.5, zoom 0.5 to 2"
    assert ("augmentation", words, "asked for: mosaic, zoom; else recipe small") in short.reasons


def test_repeats_make_an_epoch_longer(data: Path) -> None:
    train = open_dataset(data, "train")
    times = epoch_length(train, 1.0) / len(train)
    assert times > 1
    plans = [
        plan_run(
            TrainingOptions(data=str(data), epochs=20, device="cpu", batch_size=2, repeat_rare=share), train
        )
        for share in (None, 1.0)
    ]
    assert plans[1].steps == math.ceil(20 * epoch_length(train, 1.0) / 2) > plans[0].steps
    assert plans[1].train_images == epoch_length(train, 1.0)
    why = "classes in fewer than 1 of the images are seen more often"
    assert ("epoch", f"{epoch_length(train, 1.0)} images of 6", why) in plans[1].reasons
    assert "epoch" not in [setting for setting, *_ in plans[0].reasons]


@pytest.mark.parametrize(
    ("module", "begin"),
    [
        (
            loop,
            lambda plan, train: loop.train_network(
                Prepared(plan, None, train, train), RunFolder(Path("run")), None, StopRequest()
            ),
        ),
        (timing, lambda plan, train: timing._step_seconds(plan, None, train, 1.0)),
    ],
)
def test_the_stream_of_a_run_is_the_plans(
    data: Path, monkeypatch: pytest.MonkeyPatch, module: object, begin: Any
) -> None:
    train = open_dataset(data, "train")
    options = TrainingOptions(data=str(data), **{**TINY, "repeat_rare": 0.5, "mosaic": 1.0})  # type: ignore[arg-type]
    plan = plan_run(options, train)
    asked: list[object] = []

    def batches(_: Dataset, __: Preprocessing, augmentation: Augmentation, **given: object) -> object:
        asked.extend([augmentation.mosaic, given["repeat_rare"]])
        raise InterruptedError

    monkeypatch.setattr(module, "training_batches", batches)
    monkeypatch.setattr(TrainingStep, "of", lambda *_: SimpleNamespace(shipped=None))
    with pytest.raises(InterruptedError):
        begin(plan, train)
    assert asked == [1.0, 0.5]


@pytest.mark.parametrize(
    ("augmentation", "words"),
    [
        (Augmentation(flip=0), "none"),
        (Augmentation(flip=0, zoom=(0.5, 2)), "zoom 0.5 to 2"),
        (Augmentation(scales=(0.8, 1.0)), "flip 0.5, size times 0.8 to 1"),
        (Augmentation(flip=0, flip_vertical=0.5, quarter_turn=0.25), "flip vertical 0.5, quarter turn 0.25"),
        (Augmentation(photometric=1, mosaic=0.1), "flip 0.5, photometric 1, mosaic 0.1"),
    ],
)
def test_an_augmentation_is_named_by_what_it_does(data: Path, augmentation: Augmentation, words: str) -> None:
    plan = plan_run(TrainingOptions(data=str(data), **TINY), open_dataset(data, "train"))
    recipe = dataclasses.replace(plan.recipe, augmentation=augmentation)
    long = dataclasses.replace(plan, recipe=recipe).lasting(30, "asked for")
    assert ("augmentation", words, "recipe small") in long.reasons


def test_a_reason_that_repeats_is_a_ditto_mark(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_run(TrainingOptions(data=str(data), **TINY), open_dataset(data, "train"))
    plan.show(Console(width=200))
    rows = {line.split("  ")[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert (rows["head depth"], rows["schedule"]) == ("small", '"')
    assert [why for *_, why in plan.reasons].count("recipe small") > 5  # the record repeats it


@pytest.mark.slow
def test_a_timed_run_takes_the_steps_of_its_plan_and_paths_are_taken(data: Path, tmp_path: Path) -> None:
    run = retinanet.train(data=data, output=tmp_path / "timed", time="30s", **TINY)  # type: ignore[arg-type]
    plan = json.loads((run.path / "plan.json").read_text())
    assert plan["steps"] == load_model(run.path / "last").training["step"]


# --- parts -----------------------------------------------------------------------------------------------------


def test_step_schedule_is_the_papers() -> None:
    def at(step: int) -> float:
        return rate(step, 90_000, schedule="step", warmup_steps=0, warmup_from=1)

    assert [at(step) for step in (0, 59_999)] == [1, 1]
    assert [at(step) for step in (60_000, 79_999)] == pytest.approx([0.1, 0.1])
    assert [at(step) for step in (80_000, 89_999)] == pytest.approx([0.01, 0.01])


def test_cosine_schedule_and_warm_up() -> None:
    def at(step: int, warmup: int = 0) -> float:
        return rate(step, 100, schedule="cosine", warmup_steps=warmup, warmup_from=0.1)

    assert at(0) == 1
    assert at(50) == pytest.approx(0.5)
    assert 0 < at(99) < 0.001
    assert at(0, warmup=10) == pytest.approx(0.1)
    assert at(5, warmup=10) == pytest.approx(0.55 * at(5))
    assert at(10, warmup=10) == at(10)


def test_weight_average_by_hand() -> None:
    model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(average.weight, 0.0)
    nn.init.constant_(model.weight, 1.0)
    kept = WeightAverage(average, decay=0.9)
    kept.update(model)  # decay min(0.9, 2 / 11)
    assert kept.model.weight.item() == pytest.approx(9 / 11)
    kept.update(model)  # decay min(0.9, 3 / 12)
    assert kept.model.weight.item() == pytest.approx(9 / 11 * 0.25 + 0.75)
    for _ in range(200):
        kept.update(model)
    nn.init.constant_(model.weight, 2.0)
    kept.update(model)
    assert kept.model.weight.item() == pytest.approx(1.1, abs=1e-5)


def small_network() -> RetinaNet:
    spec = ModelSpec(Classes(("a",)), backbone=BackboneSpec("resnet18"), pyramid=PyramidSpec(channels=64))
    return build_retinanet(spec)


def test_norms_and_biases_are_not_decayed_unless_asked() -> None:
    network = small_network()
    flat = sum(p.ndim == 1 for p in network.parameters())
    deep = sum(p.ndim > 1 for p in network.parameters())
    (decayed,) = build_optimizers(
        network, outputs=network.outputs, name="adamw", lr=1.0, weight_decay=0.1, decay_all=False
    )
    assert [(len(g["params"]), g["weight_decay"]) for g in decayed.param_groups] == [(deep, 0.1), (flat, 0.0)]
    (paper,) = build_optimizers(
        network, outputs=network.outputs, name="sgd", lr=1.0, weight_decay=0.1, decay_all=True
    )
    assert [(len(g["params"]), g["weight_decay"]) for g in paper.param_groups] == [(deep + flat, 0.1)]
    assert paper.defaults["momentum"] == 0.9


def test_muon_trains_what_lies_between_pixels_and_outputs_and_adamw_the_rest() -> None:
    network = small_network()
    network.backbone.freeze("stage1")
    muon, adamw = build_optimizers(
        network, outputs=network.outputs, name="muon", lr=1.0, weight_decay=0.1, decay_all=False
    )
    assert isinstance(muon, Muon)
    inside = {id(p) for group in muon.param_groups for p in group["params"]}
    beside = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert inside | beside == {id(p) for p in network.parameters() if p.requires_grad}
    assert not inside & beside
    assert id(network.class_head.tower[0].weight) in inside
    assert {id(network.class_head.last.weight), id(network.box_head.last.weight)} <= beside
    set_rate([muon, adamw], 0.1)
    assert [group["lr"] for group in muon.param_groups] == [0.4]
    assert [group["lr"] for group in adamw.param_groups] == [0.1, 0.1]


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_050", "resnext50_32x4d"])
def test_muon_leaves_pixels_outputs_and_grouped_convolutions_alone(backbone: str) -> None:
    spec = ModelSpec(Classes(("a",)), backbone=BackboneSpec(backbone), pyramid=PyramidSpec(channels=64))
    with torch.device("meta"):
        network = build_retinanet(spec)
    inside = {id(weight) for weight in hidden_weights(network, network.outputs)}
    convolutions = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    left_out = {name for name, m in convolutions.items() if id(m.weight) not in inside}
    grouped = {name for name, m in convolutions.items() if m.groups > 1}
    assert (len(grouped) > 0) == (backbone != "resnet18")
    first = "backbone.network.conv_stem" if "mobilenet" in backbone else "backbone.network.conv1"
    assert left_out == {first, "class_head.last", "box_head.last"} | grouped


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_that_are_all_to_be_ignored_are_no_objects(tmp_path: Path, split: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "val"):
        Image.new("RGB", (64, 64)).save(data / f"{name}.png")
        ignore = np.ones(1, np.int8) if name == split else np.zeros(1, np.int8)
        truth = GroundTruth(np.array([[4, 4, 36, 36]], np.float32), np.zeros(1), ignore=ignore)
        write_coco(
            data / f"instances_{name}.json", classes=Classes(("a",)), files=[f"{name}.png"], sizes=[(64, 64)],
            ground_truths=[truth],
        )  # fmt: skip
    with pytest.raises(
        DataError, match=f"the {split} split of .* has none in 1 images, besides 1 to be ignored"
    ):
        run_training(TrainingOptions(data=str(data), output=str(tmp_path / "run"), **TINY))


def test_coverage_by_hand(tmp_path: Path) -> None:
    """A 32 px square at an anchor's place is covered by the paper's anchors, a 6 px one is not."""
    (tmp_path / "x.png").write_bytes(b"")
    image = Image.new("RGB", (128, 128))
    image.save(tmp_path / "x.png")
    truth = GroundTruth(np.array([[4, 4, 36, 36], [57, 57, 63, 63]], np.float32), np.zeros(2))
    file = tmp_path / "instances_train.json"
    write_coco(file, classes=Classes(("a",)), files=["x.png"], sizes=[(128, 128)], ground_truths=[truth])
    from retinanet.anchors import AnchorSpec
    from retinanet.images import Preprocessing

    train = open_dataset(tmp_path, "train")
    assert coverage(AnchorSpec(), train, Preprocessing(image_size=128, max_size=128)) == 0.5
    small = AnchorSpec(sizes=(8.0, 16.0, 32.0, 64.0, 128.0))
    assert coverage(small, train, Preprocessing(image_size=128, max_size=128)) == 1.0


# --- splits ----------------------------------------------------------------------------------------------------


def test_splits_must_be_there(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is one set without splits\. Make them"):
        run_training(TrainingOptions(data=str(data / "annotations" / "instances_train.json")))
    with pytest.raises(DataError):
        run_training(TrainingOptions(data=str(tmp_path / "nowhere")))


def test_training_without_any_box_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    for split in ("train", "val"):
        write_coco(
            tmp_path / f"instances_{split}.json",
            classes=Classes(("a",)),
            files=["x.png"],
            sizes=[(64, 64)],
            ground_truths=[GroundTruth.empty()],
        )
    with pytest.raises(DataError, match="has none in 1 images"):
        run_training(TrainingOptions(data=str(tmp_path)))


# --- signals ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_after_saving(data: Path, tmp_path: Path, number: int, code: int) -> None:
    output = tmp_path / "run"
    arguments = [str(data), "--output", str(output), "--steps", "100000"]
    for name, value in TINY.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    process = subprocess.Popen(
        [sys.executable, "-m", "retinanet", "train", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    log = output / "metrics.jsonl"
    try:
        for _ in range(600):
            if log.is_file() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()  # it would train for hours
    assert process.returncode == code, said
    assert "stopped by a signal at step" in said
    assert load_model(output / "last").training["step"] >= 10


# --- overfitting -----------------------------------------------------------------------------------------------


def colourful(folder: Path, classes: int) -> Path:
    """20 images with one to three plain rectangles; the class is the colour."""
    import colorsys

    random = np.random.default_rng(classes)
    names = Classes(tuple(f"colour {i}" for i in range(classes)))
    files, truths = [], []
    (folder / "images").mkdir(parents=True)
    shown = 0
    for number in range(20):
        pixels = np.full((128, 128, 3), 128, np.uint8)
        boxes, labels = [], []
        for _ in range(int(random.integers(1, 4))):
            width, height = random.integers(24, 56, 2)
            x, y = random.integers(0, 128 - width), random.integers(0, 128 - height)
            if any(x < b[2] and b[0] < x + width and y < b[3] and b[1] < y + height for b in boxes):
                continue
            label = shown % classes
            shown += 1
            hue = label / classes
            pixels[y : y + height, x : x + width] = [
                int(255 * part) for part in colorsys.hsv_to_rgb(hue, 1.0, 1.0 if label % 2 else 0.6)
            ]
            boxes.append([x, y, x + width, y + height])
            labels.append(label)
        files.append(f"images/{number}.png")
        Image.fromarray(pixels).save(folder / files[-1])
        truths.append(GroundTruth(np.array(boxes, np.float32), np.array(labels)))
    for split in ("train", "val"):
        file = folder / f"instances_{split}.json"
        write_coco(file, classes=names, files=files, sizes=[(128, 128)] * 20, ground_truths=truths)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "steps"), [(1, 400), (2, 400), (20, 900)])
def test_twenty_images_are_learned_by_heart(tmp_path: Path, classes: int, steps: int) -> None:
    data = colourful(tmp_path / "data", classes)
    run = retinanet.train(
        data=str(data),
        output=str(tmp_path / "run"),
        backbone="test_resnet",  # small: the law is about the method
        pretrained="none",
        channels=64,
        image_size=128,
        batch_size=4,
        steps=steps,
        validate_every_steps=steps,
        device="cpu",
        precision="fp32",  # the same on every processor
        workers=0,
    )
    detector = Detector(load_model(run.path), device="cpu")
    assert (validate(detector, open_dataset(data, "train")).ap or 0) >= 0.95


def test_no_anchor_reaching_enough_objects_does_not_make_images_large() -> None:
    """Thin lines have no anchor at any size."""
    lines = squares(40)
    lines.boxes[:, 3] = lines.boxes[:, 1] + 4
    recipe = recipes.small(Classes(("a",)), "resnet18", "cuda")
    options = TrainingOptions(data="x")
    choices = anchor_choices(options, recipe, of_model=False)
    reasons: list[tuple[str, str, str]] = []
    size = choose_preprocessing(recipe, options, lines, choices, torch.device("cuda"), reasons).image_size  # type: ignore[arg-type]
    assert size == 320  # 16 px for the root of 40 x 4
    assert "reach" not in reasons[0][2]


class Images(SimpleNamespace):
    """As much of a data set as planning looks at."""

    def __len__(self) -> int:
        return len(self.widths)


def squares(side: float, native: int = 256) -> Images:
    """A data set of one image with 16 squares of one size, far apart and at odd places."""
    corners = (
        np.array([(x, y) for x in (5, 69, 131, 197) for y in (7, 71, 133, 195)], np.float32) * native / 256
    )
    return Images(
        widths=np.array([native]),
        heights=np.array([native]),
        boxes=np.hstack([corners, corners + np.float32(side)]),
        labels=np.zeros(16, np.int64),
        ignore=np.zeros(16, np.int8),
        offsets=np.array([0, 16]),
        classes=Classes(("a",)),
        size=lambda _: (native, native),
    )


@pytest.mark.parametrize(
    ("side", "native", "device", "anchors", "size", "why"),
    [
        # 16 px in the network's frame are comfortable, but no image is below 128.
        (40, 256, "cpu", None, 128, "half of class a is below 16% of its image's shortest side; 256 at most on cpu"),
        # Comfortable at 192, where the anchors are too large.
        (
            21, 256, "cuda", "32,64,128,256,512", 320,
            "half of class a is below 8.2% of its image's shortest side; "
            "from 192, where anchors reach 0% of objects, to 320, where 100%; at most twice their size",
        ),
        # As far as the device allows, and no more than twice the native size.
        (5, 256, "cpu", None, 256, "half of class a is below 2% of its image's shortest side; 256 at most on cpu"),
        (5, 100, "cuda", None, 192,
            "half of class a is below 5% of its image's shortest side; at most twice their size"),
        (20, 40, "cpu", None, 80,
            "half of class a is below 50% of its image's shortest side; at most twice their size"),
        # Sixteen objects an image: at 288 px, 150 megapixels would show fewer than 30,000 of them.
        (
            12, 256, "cpu", "8,16,32,64,128", 256,
            "half of class a is below 4.7% of its image's shortest side; 256 at most on cpu",
        ),
    ],
)  # fmt: skip
def test_images_are_as_large_as_objects_and_anchors_need(
    side: float, native: int, device: str, anchors: str | None, size: int, why: str
) -> None:
    reasons: list[tuple[str, str, str]] = []
    recipe = recipes.small(Classes(("a",)), "resnet18", device)
    choices = anchor_choices(TrainingOptions(data="x", anchors=anchors), recipe, of_model=False)
    chosen = choose_preprocessing(
        recipe,
        TrainingOptions(data="x", anchors=anchors),
        squares(side, native),  # type: ignore[arg-type]
        choices,
        torch.device(device),
        reasons,
    )
    assert (chosen.image_size, reasons[0][2]) == (size, why)


def test_images_full_of_objects_are_larger_and_fewer_a_step() -> None:
    """Beyond 256 px on a CPU as far as the pixels of the recipe show 30,000 objects, here 64 an image of 512 px."""
    full = squares(14, 512)
    full.boxes = np.concatenate([full.boxes + np.float32([x, y, x, y]) for x in (0, 20) for y in (0, 20)])
    full.labels, full.ignore = np.zeros(64, np.int64), np.zeros(64, np.int8)
    full.offsets = np.array([0, 64])
    recipe = recipes.small(Classes(("a",)), "resnet18", "cpu")
    options = TrainingOptions(data="x")
    reasons: list[tuple[str, str, str]] = []
    fewer = choose_batch(recipe, options, full, CPU, reasons, own=4)  # type: ignore[arg-type]
    assert fewer.batch_size == 1  # 80 objects a step
    assert reasons == [("batch size", "1", "an image holds 64 objects; at the rate of 4")]
    assert choose_rate(fewer)[0] == pytest.approx(choose_rate(recipe)[0])  # of a step
    by_sgd = dataclasses.replace(recipe, optimizer="sgd")
    fewer_by_sgd = choose_batch(by_sgd, options, full, CPU, [], own=4)  # type: ignore[arg-type]
    assert choose_rate(fewer_by_sgd)[0] == pytest.approx(choose_rate(by_sgd)[0])
    choices = anchor_choices(options, recipe, of_model=False)
    size = choose_preprocessing(fewer, options, full, choices, CPU, reasons).image_size  # type: ignore[arg-type]
    assert 256 < size <= 544
    assert 150e6 / size**2 * 64 > 29_000
    assert 150e6 / size**2 >= 750  # which a run sees at least
    assert "150 megapixels show 30,000 objects" in reasons[-1][2]
    # Where it sees more images than the pixels pay for, at the usual limit.
    often = dataclasses.replace(fewer, images_seen=2000)
    size = choose_preprocessing(often, options, full, choices, CPU, reasons).image_size  # type: ignore[arg-type]
    assert (size, reasons[-1][2].endswith("256 at most on cpu")) == (256, True)
    # Elsewhere the recipe's batch stands, and with usual images.
    on_cuda, cuda = recipes.small(Classes(("a",)), "resnet18", "cuda"), torch.device("cuda")
    assert choose_batch(on_cuda, options, full, cuda, [], own=16) is on_cuda  # type: ignore[arg-type]
    assert choose_batch(recipe, options, squares(40), CPU, [], own=4) is recipe  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_batch_that_the_plan_would_take_changes_nothing_when_it_is_asked_for(
    optimizer: Literal["sgd", "muon"],
) -> None:
    full = Photographs(20, objects=50, sides=(12, 20))

    def planned(**asked: Any) -> Plan:
        options = TrainingOptions(data="x", backbone="resnet18", device="cpu", optimizer=optimizer, **asked)
        return plan_run(options, full)  # type: ignore[arg-type]

    usual = planned()
    assert usual.batch_size < 4
    same, twice = planned(batch_size=usual.batch_size), planned(batch_size=2 * usual.batch_size)
    assert (same.lr, same.steps, same.spec) == (usual.lr, usual.steps, usual.spec)
    assert twice.lr / usual.lr == pytest.approx(2 if optimizer == "sgd" else 2**0.5)
    assert planned(lr=0.16).lr == planned(lr=0.16, batch_size=usual.batch_size).lr


@pytest.mark.parametrize(
    ("asked", "larger", "why"),
    [
        ({}, True, "where 150 megapixels show 30,000 objects"),
        ({"time": "2m"}, False, "256 at most on cpu in 2m"),
        ({"time": "1h"}, True, "where 360 megapixels in 1h show 30,000 objects"),
        ({"steps": 50}, False, "256 at most on cpu for 50 images"),
        ({"steps": 500}, True, "where 500 images show 30,000 objects"),
        # More images are no larger than the recipe's own.
        ({"steps": 1000}, True, "where 150 megapixels show 30,000 objects"),
        ({"epochs": 100.0}, False, "256 at most on cpu for 100 images"),
    ],
)
def test_images_are_as_large_as_the_run_that_is_asked_for_is_long(
    asked: dict[str, Any], larger: bool, why: str
) -> None:
    full = squares(14, 512)
    full.boxes = np.concatenate([full.boxes + np.float32([x, y, x, y]) for x in (0, 20) for y in (0, 20)])
    full.labels, full.ignore = np.zeros(64, np.int64), np.zeros(64, np.int8)
    full.offsets = np.array([0, 64])
    recipe = dataclasses.replace(recipes.small(Classes(("a",)), "resnet18", "cpu"), batch_size=1)
    options = TrainingOptions(data="x", **asked)
    reasons: list[tuple[str, str, str]] = []
    choices = anchor_choices(options, recipe, of_model=False)
    size = choose_preprocessing(recipe, options, full, choices, CPU, reasons).image_size  # type: ignore[arg-type]
    assert (size > 256) is larger
    assert reasons[-1][2].endswith(why)


def test_a_class_of_one_box_sets_no_size() -> None:
    """Where another has more; alone it has to."""
    options, recipe = TrainingOptions(data="x"), recipes.small(Classes(("a",)), "resnet18", "cpu")
    choices = anchor_choices(options, recipe, of_model=False)
    few = squares(40)
    few.classes, few.labels = Classes(("a", "mistake")), np.array([0] * 15 + [1])
    few.boxes[15, 2:] = few.boxes[15, :2] + 4
    reasons: list[tuple[str, str, str]] = []
    choose_preprocessing(recipe, options, few, choices, CPU, reasons)  # type: ignore[arg-type]
    assert "half of class a is below 16% of its image's shortest side" in reasons[0][2]
    few.boxes, few.labels, few.ignore = few.boxes[15:], few.labels[15:], few.ignore[15:]
    few.offsets = np.array([0, 1])
    choose_preprocessing(recipe, options, few, choices, CPU, reasons)  # type: ignore[arg-type]
    assert "half of class mistake is below 1.6% of its image's shortest side" in reasons[1][2]


@pytest.mark.parametrize("longest", [160, 256, 287])
def test_a_longest_side_that_is_asked_for_bounds_the_shortest(longest: int) -> None:
    recipe = dataclasses.replace(recipes.small(Classes(("a",)), "resnet18", "cpu"), max_size=longest)
    options = TrainingOptions(data="x")
    choices = anchor_choices(options, recipe, of_model=False)
    chosen = choose_preprocessing(recipe, options, squares(14, 512), choices, CPU, [])  # type: ignore[arg-type]
    assert (chosen.max_size, chosen.image_size <= longest) == (longest, True)


@pytest.mark.parametrize(
    ("width", "side", "size", "longest", "pixels"),
    [
        (640, 60, 128, 213, 128 * 171),  # usual pictures, as they were
        (853, 20, 256, 455, 256 * 455),  # 16:9
        (1590, 20, 192, 636, 192 * 636),  # where as many pixels as of 256 x 427 are the limit
        (4800, 48, 96, 960, 96 * 960),
    ],
)
def test_long_images_keep_their_shortest_side(
    width: int, side: int, size: int, longest: int, pixels: int
) -> None:
    images = squares(side, 480)
    images.widths, images.size = np.array([width]), lambda _: (width, 480)
    recipe, options = recipes.small(Classes(("a",)), "resnet18", "cpu"), TrainingOptions(data="x")
    reasons: list[tuple[str, str, str]] = []
    choices = anchor_choices(options, recipe, of_model=False)
    chosen = choose_preprocessing(recipe, options, images, choices, CPU, reasons)  # type: ignore[arg-type]
    assert (chosen.image_size, chosen.max_size) == (size, pytest.approx(longest, abs=1))
    assert math.prod(chosen.resized_size(width, 480)) == pytest.approx(pixels, rel=0.01)
    assert ("90% of the images are at most" in reasons[0][2]) is (width > 800)
    asked = dataclasses.replace(recipe, image_size=256)
    chosen = choose_preprocessing(asked, options, images, choices, CPU, [])  # type: ignore[arg-type]
    assert min(chosen.resized_size(width, 480)) == 256


def test_objects_are_measured_by_the_images_that_they_are_in() -> None:
    """All are a fifth of their image's side; most images are large, most objects in small ones."""
    sides = [4000] * 600 + [400] * 400
    holds = [1] * 600 + [8] * 400
    of_image = np.repeat(np.array(sides, np.float32), holds)[:, None]
    mixed = Images(
        widths=np.array(sides),
        heights=np.array(sides),
        boxes=np.hstack([of_image * 0.1, of_image * 0.1, of_image * 0.3, of_image * 0.3]),
        labels=np.zeros(len(of_image), np.int64),
        ignore=np.zeros(len(of_image), np.int8),
        offsets=np.concatenate(([0], np.cumsum(holds))),
        classes=Classes(("a",)),
        size=lambda index: (sides[index], sides[index]),
    )
    options, recipe = TrainingOptions(data="x"), recipes.small(Classes(("a",)), "resnet18", "cpu")
    choices = anchor_choices(options, recipe, of_model=False)
    reasons: list[tuple[str, str, str]] = []
    size = choose_preprocessing(recipe, options, mixed, choices, CPU, reasons).image_size  # type: ignore[arg-type]
    assert (size, reasons[0][2]) == (
        128,
        "half of class a is below 20% of its image's shortest side; 256 at most on cpu",
    )


@pytest.mark.parametrize(
    ("images", "steps", "passes", "zoom"),
    [
        (50, 1526, "122 passes", True),
        (5_000, 1526, "1.2 passes", False),
        (20_000, 5_000, "1 pass", False),
    ],
)
def test_small_and_large_sets_have_sensible_plans(images: int, steps: int, passes: str, zoom: bool) -> None:
    """What the bare command does from scratch: 150 megapixels, and each image once at least."""
    plan = plan_run(TrainingOptions(data="x", backbone="resnet18", device="cpu"), Photographs(images))  # type: ignore[arg-type]
    said = {setting: (value, reason) for setting, value, reason in plan.reasons}
    assert plan.spec.preprocessing.image_size == 128
    assert (plan.steps, plan.batch_size) == (steps, 4)
    assert said["steps"][1].endswith(f"; {passes} over {images:,} images")
    assert (plan.augmentation.zoom != (1.0, 1.0)) is zoom
    assert plan.warmup_steps == min(100, steps // 20)


@pytest.mark.parametrize(
    ("made_up", "side", "batch", "megapixels"),
    [
        (Photographs(500), 128, 4, 150),
        # 750 images of 416 px cost that.
        (Photographs(20, objects=100, width=800, height=800, sides=(5, 8)), 416, 1, 150),
        # Each image once, at no more than the usual limit of 256 px.
        (Photographs(2_000, objects=60, width=1280, height=960, sides=(14, 20)), 256, 1, 2_000 * 256 * 352 / 1e6),
        (Photographs(300, width=1242, height=375, sides=(20, 30)), 192, 4, 150),  # long images
        (Photographs(300, width=4000, height=400, sides=(40, 60)), 96, 4, 150),
    ],
    ids=["usual", "large", "full", "long", "very long"],
)  # fmt: skip
def test_a_run_from_scratch_on_a_cpu_costs_what_the_recipe_says(
    made_up: Photographs, side: int, batch: int, megapixels: float
) -> None:
    """150 megapixels, or each image once where that is more."""
    plan = plan_run(TrainingOptions(data="x", backbone="resnet18", device="cpu"), made_up)  # type: ignore[arg-type]
    frame = plan.spec.preprocessing
    assert (frame.image_size, plan.batch_size) == (side, batch)
    assert min(frame.resized_size(*made_up.size(0))) == side
    cost = plan.steps * batch * padded_pixels(made_up, frame, batch) / 1e6  # type: ignore[arg-type]
    assert cost == pytest.approx(megapixels, rel=0.01)


def test_on_a_cpu_a_run_from_weights_is_as_long_as_one_from_scratch() -> None:
    classes = Classes(("a",))
    here, there = (recipes.modern(classes, "resnet18", None, device) for device in ("cpu", "cuda"))
    small = recipes.small(classes, "resnet18", "cpu")
    for name in ("batch_size", "epochs", "images_seen", "pixels_seen"):
        assert getattr(here, name) == getattr(small, name)
    assert (there.batch_size, there.epochs, there.images_seen, there.pixels_seen) == (16, 12, 8_000, 0)


@pytest.mark.parametrize(
    ("asked", "most", "candidates"), [(None, 1300, 1300), (2000, 2000, 2000), (50, 50, 1000)]
)
def test_a_level_has_candidates_for_all_detections(asked: int | None, most: int, candidates: int) -> None:
    full = Photographs(3, objects=1200, width=1280, height=960, sides=(14, 20))
    options = TrainingOptions(data="x", backbone="resnet18", device="cpu", max_detections=asked)
    found = plan_run(options, full).spec.post_processing  # type: ignore[arg-type]
    assert (found.max_detections, found.top_k) == (most, candidates)


@pytest.mark.parametrize(("fullest", "most"), [(0, 100), (99, 100), (100, 200), (369, 400)])
def test_as_many_detections_as_the_fullest_image_needs(fullest: int, most: int) -> None:
    counts = [3, fullest, 0]
    train = SimpleNamespace(offsets=np.cumsum([0, *counts]), ignore=np.zeros(sum(counts), np.int8))
    train.ignore[:3] = Ignore.CROWD  # no objects, however many
    reasons: list[tuple[str, str, str]] = []
    assert choose_max_detections(TrainingOptions(data="x"), train, reasons) == most  # type: ignore[arg-type]
    assert reasons == [
        ("detections", f"at most {most} an image", f"the fullest image holds {fullest} objects")
    ]
    assert choose_max_detections(TrainingOptions(data="x", max_detections=7), train, []) == 7  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- which loss


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "varifocal, alpha 0.25, gamma 2, prior 0.01"),
        ({"gamma": 1.5}, "varifocal, alpha 0.25, gamma 1.5, prior 0.01"),
        ({"loss": "focal", "gamma": 1.5}, "focal, alpha 0.25, gamma 1.5, prior 0.01"),
        ({"loss": "ce"}, "ce, prior 0.01"),
        ({"loss": "balanced-ce"}, "balanced-ce, alpha 0.75, prior 0.01"),
        ({"loss": "balanced-ce", "alpha": 0.9}, "balanced-ce, alpha 0.9, prior 0.01"),
        ({"loss": "fl-star", "gamma": 4.0, "beta": 0.0}, "fl-star, alpha 0.25, gamma 4, beta 0, prior 0.01"),
        ({"loss": "hinge", "margin": 0.5}, "hinge, margin 0.5, prior 0.01"),
        ({"loss": "ohem"}, "ohem, mining batch 128, mining nms 0.5, prior 0.01"),
        (
            {"loss": "ohem-1to3", "mining_batch": 256},
            "ohem-1to3, mining batch 256, mining nms 0.5, prior 0.01",
        ),
    ],
)
def test_the_loss_that_was_asked_for(data: Path, options: dict, words: str) -> None:
    asked = TrainingOptions(data=str(data), pretrained="none", device="cpu", steps=2, **options)
    plan = plan_run(asked, open_dataset(data, "train"))
    assert {setting: value for setting, value, _ in plan.reasons}["class loss"] == words
    logits, classes = torch.randn(1, 50, 3), torch.randint(-1, 3, (1, 50))
    weight, quality = torch.rand(1, 50), torch.rand(1, 50)
    told = settings_of(plan.recipe)
    expected = {
        "varifocal": lambda: sigmoid_varifocal_loss(
            logits, classes, quality, told["alpha"], told["gamma"], "sum", weight=weight
        ),
        "fl-star": lambda: sigmoid_focal_star_loss(
            logits, classes, told["alpha"], told["gamma"], told["beta"], "sum", weight=weight
        ),
        "hinge": lambda: sigmoid_hinge_loss(logits, classes, told["margin"], None, "sum", weight=weight),
    }.get(
        plan.recipe.loss,
        lambda: sigmoid_focal_loss(
            logits, classes, told.get("alpha"), told.get("gamma", 0), "sum", weight=weight
        ),
    )()
    if isinstance(plan.objective.class_loss, QualityLoss):
        found = plan.objective.class_loss.of(logits, classes, quality, weight)
    else:
        found = plan.objective.class_loss(logits, classes, weight)
    torch.testing.assert_close(found, expected)
    assert (plan.objective.mining is not None) == (plan.recipe.loss in ("ohem", "ohem-1to3"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ce", "gamma": 1.0}, "--gamma belongs to --loss focal, varifocal, fl-star; got --loss ce"),
        (
            {"loss": "ce", "alpha": 0.5},
            "--alpha belongs to --loss focal, varifocal, balanced-ce, fl-star; got --loss ce",
        ),
        ({"beta": 1.0}, "--beta belongs to --loss fl-star; got --loss varifocal"),
        ({"mining_nms": 0.7}, "--mining-nms belongs to --loss ohem, ohem-1to3; got --loss varifocal"),
    ],
)
def test_what_does_not_belong_to_a_loss_is_refused(data: Path, options: dict, message: str) -> None:
    if "loss" in options:  # before anything is read
        with pytest.raises(ConfigError, match=message):
            TrainingOptions(data="nowhere", **options)
        return
    asked = TrainingOptions(data=str(data), pretrained="none", device="cpu", **options)
    with pytest.raises(ConfigError, match=message):
        plan_run(asked, open_dataset(data, "train"))


def test_every_setting_of_a_loss_is_an_option() -> None:
    names = {field.name for field in dataclasses.fields(TrainingOptions)}
    assert names >= set(EVERY_SETTING)
    assert set(SETTINGS) == set(get_args(LossName))


@pytest.mark.parametrize(
    "loss",
    [
        "focal",
        "fl-star",
        "ohem",
        *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("ce", "balanced-ce", "hinge", "ohem-1to3")),
    ],
)
def test_a_run_with_each_loss(data: Path, tmp_path: Path, loss: str) -> None:
    run = retinanet.train(data=str(data), output=str(tmp_path / "run"), loss=loss, steps=2, **TINY)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(lines[0]["loss_class"])
    assert json.loads((run.path / "plan.json").read_text())["recipe"]["loss"] == loss
