"""The model file: what is written is what is read; whatever else is named and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from retinanet.checkpoint import FILE_NAME, Model, find_model, load_model, save_model
from retinanet.errors import CheckpointError, DiskError
from retinanet.model import BackboneSpec, HeadSpec, ModelSpec, PyramidSpec, build_retinanet
from retinanet.records import Classes, OperatingPoints

GOLDEN = Path(__file__).parent / "golden" / "model-v1.json"
TINY = ModelSpec(
    Classes(("cat", "dog"), (17, 18)),
    backbone=BackboneSpec("test_resnet"),
    pyramid=PyramidSpec(channels=64),
    head=HeadSpec(depth=1, norm="group"),
)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    points = OperatingPoints({"cat": 0.4}, {"cat": 0.9})
    return Model(build_retinanet(TINY), TINY, points, {"step": 7, "ap": 0.5})


def test_round_trip(model: Model, tmp_path: Path) -> None:
    file = save_model(tmp_path / "model", model)
    again = load_model(file)
    assert file == tmp_path / "model" / FILE_NAME
    assert again.spec == model.spec
    assert again.operating_points == model.operating_points
    assert again.training == model.training
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name
    assert [path.name for path in file.parent.iterdir()] == [FILE_NAME]  # nothing half-written is left
    written = {save_model(tmp_path / f"{number}", model).read_bytes() for number in range(4)}
    assert written == {file.read_bytes()}  # the same model is the same file


def test_loading_leaves_the_random_generator_alone(model: Model, tmp_path: Path) -> None:
    file = save_model(tmp_path, model)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_model(file)
    assert torch.rand(1) == expected


def test_buffers_that_no_file_holds_are_computed_anew(tmp_path: Path) -> None:
    spec = dataclasses.replace(TINY, backbone=BackboneSpec("resnetblur18"))
    built = build_retinanet(spec)
    assert set(dict(built.named_buffers())) - set(built.state_dict())  # the kernels of its blurs
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    again = load_model(save_model(tmp_path, Model(built, spec))).network
    assert torch.rand(1) == expected
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        pairs = zip(built.eval()(images).logits, again.eval()(images).logits, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_loaded_model_does_not_depend_on_its_file(model: Model, tmp_path: Path) -> None:
    file = save_model(tmp_path, model)
    again = load_model(file)
    file.write_bytes(b"")  # in place: a map of the file would lose its pages
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in again.network.parameters())


def test_weights_of_half_precision_become_float32(model: Model, tmp_path: Path) -> None:
    file = save_model(tmp_path, model)
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    state = {name: t.half() if t.is_floating_point() else t for name, t in load_file(file).items()}
    save_file(state, file, metadata)
    assert {p.dtype for p in load_model(file).network.parameters()} == {torch.float32}


def test_a_run_stands_for_its_best_model_else_its_last(model: Model, tmp_path: Path) -> None:
    last = save_model(tmp_path / "last", model)
    assert find_model(tmp_path) == last
    best = save_model(tmp_path / "best", model)
    assert find_model(tmp_path) == best
    assert find_model(tmp_path / "last") == last
    assert find_model(last) == last


def test_golden_spec_of_version_1_loads() -> None:
    """The file is never regenerated: what it says must mean the same for ever."""
    spec = ModelSpec.from_json(json.loads(GOLDEN.read_text()))
    assert spec.classes == Classes(("cat", "dog"), (17, 18))
    assert spec.backbone == BackboneSpec("resnet50", "a1_in1k", "frozen", 0.0, True)
    assert spec.pyramid == PyramidSpec(128, "p5", False)
    assert spec.head == HeadSpec(3, "group")
    assert spec.anchors.sizes == (16.0, 32.0, 64.0, 128.0, 256.0)
    assert spec.anchors.order == "ratio-major"
    assert spec.anchors.rounding == "torchvision"
    assert spec.anchors.stride_rule == "image"
    assert spec.anchors.center == 0.0
    assert spec.coding.weights == (10.0, 10.0, 5.0, 5.0)
    assert spec.coding.clamp_both_sides
    assert spec.preprocessing.image_size == 640
    assert spec.preprocessing.channel_order == "bgr"
    assert spec.preprocessing.resize == "linear"
    assert spec.post_processing.score_threshold == (0.05, 0.05, 0.05, 0.05, 0.0)
    assert spec.post_processing.clip == "after-nms"
    assert spec.post_processing.max_detections == 300


def test_golden_file_of_version_1_loads() -> None:
    """A whole file, weights included, written by version 0.1.0."""
    model = load_model(GOLDEN.with_name("model-v1.safetensors"))
    assert model.spec.classes == Classes(("cat", "dog"), (17, 18))
    assert model.operating_points.best_f1 == {"cat": 0.4}
    total = sum(parameter.detach().double().abs().sum() for parameter in model.network.parameters())
    assert float(total) == pytest.approx(
        json.loads(GOLDEN.with_name("model-v1.sum.json").read_text()), rel=1e-9
    )


def rewrite(
    file: Path, *, drop: str = "", add: str = "", reshape: str = "", metadata: dict | None = None
) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        kept = content.metadata()
    state = load_file(file)
    if drop:
        del state[drop]
    if add:
        state[add] = torch.zeros(1)
    if reshape:
        state[reshape] = state[reshape][:1].clone()
    save_file(state, file, {**kept, **(metadata or {})})


BIAS = "class_head.last.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": BIAS}, f"lacks '{BIAS}'"),
        ({"add": "extra"}, "holds an unknown tensor 'extra'"),
        ({"reshape": BIAS}, rf"'{BIAS}' has shape \[1\], the spec says \[18\]"),
        ({"metadata": {"spec": "{"}}, "metadata of .* is damaged"),
        ({"metadata": {"spec": "[]"}}, "metadata of .* is damaged"),
        ({"metadata": {"spec": '{"format_version": 99}'}}, "format_version 1; got 99"),
        ({"metadata": {"operating_points": '{"best_f1": {"cat": 7}}'}}, r"needs \[0, 1\]; got 7"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    model: Model, tmp_path: Path, change: dict, message: str
) -> None:
    file = save_model(tmp_path, model)
    rewrite(file, **change)
    with pytest.raises(CheckpointError, match=message):
        load_model(file)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has none of them"):
        load_model(tmp_path)
    (tmp_path / "model.pth").write_bytes(b"\x80\x02pickle")
    with pytest.raises(CheckpointError, match="cannot be read as one"):
        load_model(tmp_path / "model.pth")
    save_file({"weight": torch.zeros(2)}, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="weights without a spec"):
        load_model(tmp_path / "bare.safetensors")


def test_a_cut_file_is_refused(model: Model, tmp_path: Path) -> None:
    file = save_model(tmp_path, model)
    content = file.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cannot be read as one"):
            load_model(file)


def test_a_failed_write_leaves_the_old_file(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save_model(tmp_path, model)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    told = rf"no room for model\.safetensors in {tmp_path}: {len(before):,} bytes are needed, [\d,]+ are free"
    with pytest.raises(DiskError, match=told):
        save_model(tmp_path, model)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before
