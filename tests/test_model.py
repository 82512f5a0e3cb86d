"""The network: its size, its start, its layout, what freezing means, backbones, weights files, the spec."""

import dataclasses
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.functional import conv2d, interpolate

from retinanet.errors import CheckpointError, ConfigError
from retinanet.model import (
    BackboneSpec,
    Head,
    HeadSpec,
    ModelSpec,
    PostProcessing,
    PyramidSpec,
    build_backbone,
    build_retinanet,
    load_backbone,
)
from retinanet.model.fpn import FeaturePyramid, upsample_nearest
from retinanet.model.presets import from_scratch, modern, paper
from retinanet.records import Classes

COCO = Classes(tuple(f"class {i}" for i in range(80)))
FEW = Classes(("cat", "dog", "bird"))
SMALL = ModelSpec(FEW, backbone=BackboneSpec("test_resnet"))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_count():
    assert parameters(build_retinanet(ModelSpec(COCO))) == 37_968_692
    # P6 from P5 reads 256 channels instead of 2048; frozen BatchNorm has buffers, no parameters.
    p5 = ModelSpec(COCO, BackboneSpec(norm="frozen"), PyramidSpec(p6_from="p5"))
    assert parameters(build_retinanet(p5)) == 37_968_692 - 53_120 - (2048 - 256) * 256 * 9


@pytest.mark.parametrize(
    ("name", "body"),
    [
        # The body without its classifier, as torchvision counts it.
        ("resnet18", 11_176_512),
        ("resnet34", 21_284_672),
        ("resnet50", 23_508_032),
        ("resnet101", 42_500_160),
        ("resnext101_32x8d", 86_742_336),
    ],
)
def test_the_papers_backbones(name, body):
    with torch.device("meta"):
        model = build_retinanet(paper(COCO, backbone=name)).eval()
        raw = model(torch.empty(1, 3, 64, 96))
        native = build_backbone(BackboneSpec(name))
    assert parameters(native) == body
    assert raw.grids == ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))


def test_towers_with_group_norm_start_as_he_et_al():
    torch.manual_seed(0)
    tower = build_retinanet(from_scratch(FEW)).class_head.tower
    assert tower[0].weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    paper_tower = build_retinanet(SMALL).class_head.tower
    assert paper_tower[0].weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_the_start():
    torch.manual_seed(0)
    model = build_retinanet(SMALL).eval()
    with torch.no_grad():
        raw = model(torch.randn(1, 3, 64, 96))
    assert torch.cat(raw.logits, 1).sigmoid().mean().item() == pytest.approx(0.01, rel=0.1)
    assert model.class_head.last.bias.detach().unique().tolist() == pytest.approx([-4.59512])  # -log 99
    assert model.box_head.last.bias.abs().max() == 0
    for head in (model.class_head, model.box_head):
        convolutions = [*(one for one in head.tower if isinstance(one, torch.nn.Conv2d)), head.last]
        assert len(convolutions) == 5
        for convolution in convolutions:
            assert convolution.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert all(convolution.bias.abs().max() == 0 for convolution in convolutions[:-1])
    assert build_retinanet(SMALL, prior=0.5).class_head.last.bias.abs().max() == 0


def test_the_pyramid_by_hand():
    """P6 from C5, and P7 from P6 after ReLU; what is below from above and from the side."""
    torch.manual_seed(0)
    channels = (3, 5, 6)
    pyramid = FeaturePyramid(in_channels=channels, spec=PyramidSpec(channels=4))
    c3, c4, c5 = (torch.randn(1, n, side, side) for n, side in zip(channels, (16, 8, 4), strict=True))
    with torch.no_grad():
        p3, p4, p5, p6, p7 = pyramid((c3, c4, c5))
        m5 = pyramid.lateral[2](c5)
        m4 = pyramid.lateral[1](c4) + interpolate(m5, scale_factor=2)
        m3 = pyramid.lateral[0](c3) + interpolate(m4, scale_factor=2)
        for level, inner, output in zip((p3, p4, p5), (m3, m4, m5), pyramid.output, strict=True):
            torch.testing.assert_close(level, conv2d(inner, output.weight, output.bias, padding=1))
        expected = conv2d(c5, pyramid.p6.weight, pyramid.p6.bias, stride=2, padding=1)
        torch.testing.assert_close(p6, expected)
        assert (expected < 0).any()
        after = conv2d(expected.clamp(min=0), pyramid.p7.weight, pyramid.p7.bias, stride=2, padding=1)
        torch.testing.assert_close(p7, after)


def test_gradients_of_a_single_place_are_numbers_in_bf16():
    torch.manual_seed(0)
    model = build_retinanet(SMALL).train().to(memory_format=torch.channels_last)
    for _ in range(10):
        images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            raw = model(images)
        sum(one.float().square().mean() for one in (*raw.logits, *raw.deltas)).backward()
        assert all(weight.grad.isfinite().all() for weight in model.parameters())
        assert model.pyramid.p7.weight.grad[:, :, 0].abs().max() == 0  # met padding alone
        model.zero_grad()


def test_shapes():
    with torch.no_grad():
        raw = build_retinanet(SMALL).eval()(torch.randn(2, 3, 64, 96))
    assert raw.grids == ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1)) == SMALL.anchors.grids(64, 96)
    for (rows, columns), logits, deltas in zip(raw.grids, raw.logits, raw.deltas, strict=True):
        assert logits.shape == (2, rows * columns * 9, 3)
        assert deltas.shape == (2, rows * columns * 9, 4)


def test_anchor_is_fastest_and_channels_last_is_a_view():
    head = Head(channels=32, anchors=9, values=3, spec=HeadSpec(depth=0))
    level = torch.randn(1, 32, 4, 5)
    with torch.no_grad():
        before = head(level)
        head.last.bias[2 * 3 + 1] += 1  # anchor 2, class 1
        moved = (head(level) - before).abs() > 0.5
        last = head.last(level.contiguous(memory_format=torch.channels_last))
    assert moved.nonzero().tolist() == [[0, location * 9 + 2, 1] for location in range(20)]
    kept = []
    head.last.register_forward_hook(lambda _m, _i, out: kept.append(out))
    with torch.no_grad():
        logits = head.to(memory_format=torch.channels_last)(
            level.contiguous(memory_format=torch.channels_last)
        )
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert logits.data_ptr() == kept[0].data_ptr()


@pytest.mark.parametrize("size", [(2, 2), (5, 4), (7, 9), (1, 1), (13, 21)])
def test_upsampling_is_nearest(size):
    coarse = torch.randn(2, 3, -(-size[0] // 2), -(-size[1] // 2), dtype=torch.float64, requires_grad=True)
    fine = upsample_nearest(coarse, *size)
    assert torch.equal(fine, interpolate(coarse, size=size, mode="nearest"))
    assert torch.autograd.gradcheck(lambda x: upsample_nearest(x, *size), coarse)


def train_once(model):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    raw = model(torch.randn(2, 3, 64, 64) + 1)
    (sum(x.square().mean() for x in raw.logits) + sum(x.square().mean() for x in raw.deltas)).backward()
    optimizer.step()


def copies(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def test_frozen_batch_norm_does_not_move():
    model = build_retinanet(dataclasses.replace(SMALL, backbone=BackboneSpec("resnet18", norm="frozen")))
    before = copies(model.backbone.network.state_dict())
    train_once(model)
    after = model.backbone.network.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if "bn" in name or "running" in name or "downsample.1" in name]


@pytest.mark.parametrize(
    ("through", "frozen"),
    [
        ("none", ()),
        ("stem", ("conv1", "bn1")),
        ("stage1", ("conv1", "bn1", "layer1")),
        ("stage3", ("conv1", "bn1", "layer1", "layer2", "layer3")),
        ("backbone", ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
    ],
)
def test_freeze(through, frozen):
    model = build_retinanet(SMALL)
    model.backbone.freeze(through)
    before = copies(model.backbone.network.state_dict())
    train_once(model)
    for name, tensor in model.backbone.network.state_dict().items():
        still = bool(frozen) and name.startswith(frozen)
        if (
            still or "running" in name
        ):  # statistics move with every batch, weights only as far as their gradient
            assert torch.equal(before[name], tensor) == still, name
    for name, parameter in model.backbone.network.named_parameters():
        assert parameter.requires_grad != (bool(frozen) and name.startswith(frozen))
    assert model.backbone.network.layer4.training == (through != "backbone")
    model.eval().train()
    assert model.backbone.network.bn1.training == (not frozen)


def test_freeze_error():
    with pytest.raises(
        ConfigError, match="none, stem, stage1, stage2, stage3, stage4, backbone; got 'stage9'"
    ):
        build_backbone(BackboneSpec("resnet18")).freeze("stage9")


@pytest.mark.parametrize(
    "spec",
    [
        BackboneSpec("convnext_atto"),
        BackboneSpec("mobilenetv3_small_100"),
        BackboneSpec("resnext50_32x4d"),
        BackboneSpec("resnet18", norm="group"),
        BackboneSpec("efficientnet_b0", norm="frozen"),
    ],
    ids=lambda spec: spec.name,
)
def test_backbones(spec):
    backbone = build_backbone(spec).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape[2:]) for x in features] == [(8, 12), (4, 6), (2, 3)]
    assert tuple(x.shape[1] for x in features) == backbone.channels
    backbone.freeze("backbone")
    assert not [name for name, p in backbone.named_parameters() if p.requires_grad]


def test_norms():
    kinds = {type(m).__name__ for m in build_backbone(BackboneSpec("resnet18", norm="group")).modules()}
    assert "GroupNorm" in kinds
    assert not [kind for kind in kinds if "BatchNorm" in kind]
    for norm in ("native", "frozen"):
        backbone = build_backbone(BackboneSpec("resnet18", norm=norm, norm_eps=0.0))
        assert {m.eps for m in backbone.modules() if hasattr(m, "eps")} == {0.0}


def test_stride_in_1x1():
    usual, caffe = (build_backbone(BackboneSpec(stride_in_1x1=x)) for x in (False, True))
    assert parameters(usual) == parameters(caffe)
    for stage in (2, 3, 4):
        for backbone, strides in ((usual, (1, 2)), (caffe, (2, 1))):
            block = backbone.network.get_submodule(f"layer{stage}.0")
            assert (block.conv1.stride[0], block.conv2.stride[0]) == strides
    with torch.no_grad():
        assert caffe.eval()(torch.zeros(1, 3, 64, 64))[0].shape[2:] == (8, 8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            BackboneSpec("resnet5O"),
            "name of a timm model, such as resnet50; got 'resnet5O'. Did you mean 'resnet50'",
        ),
        (BackboneSpec("vit_tiny_patch16_224"), "feature maps at strides 8, 16 and 32; timm's 'vit_tiny"),
        (BackboneSpec("swin_tiny_patch4_window7_224"), "feature maps at strides 8, 16 and 32; timm's 'swin"),
        (
            BackboneSpec("resnet18", stride_in_1x1=True),
            "network of bottlenecks, such as resnet50; got 'resnet18'",
        ),
        (BackboneSpec("convnext_atto", norm="group"), "'convnext_atto' is none: use norm 'native'"),
        (BackboneSpec("mobilenetv3_small_100", norm="group"), "is none: use norm 'native'"),
    ],
)
def test_backbone_errors(spec, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(spec)


@pytest.mark.parametrize("prior", [0.0, 1.0, -1.0])
def test_prior_error(prior):
    with pytest.raises(ConfigError, match=r"--prior needs a probability in \(0, 1\); got"):
        build_retinanet(SMALL, prior=prior)


# ---------------------------------------------------------------------------------- weights files


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("name", "norm"), [("resnet18", "frozen"), ("convnext_atto", "native"), ("resnet18", "group")]
)
def test_load_backbone(tmp_path, name, norm, suffix):
    torch.manual_seed(1)
    options = {"norm_layer": timm.layers.GroupNorm} if norm == "group" else {}
    source = timm.create_model(name, **options).eval()
    path = tmp_path / f"weights{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(
        source.state_dict(), path
    )
    backbone = build_backbone(BackboneSpec(name, norm=norm)).eval()
    load_backbone(backbone, path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = source.forward_intermediates(images, intermediates_only=True)[-3:]
        torch.testing.assert_close(list(backbone(images)), list(expected), rtol=1e-4, atol=1e-5)


def test_load_backbone_errors(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    shape = {**state, "layer1.0.conv1.weight": torch.zeros(1, 2, 3, 3)}
    lacking = {name: tensor for name, tensor in state.items() if name != "layer2.0.conv1.weight"}
    native, group = (build_backbone(BackboneSpec("resnet18", norm=norm)) for norm in ("native", "group"))
    cases = [
        (lacking, native, r"lacks 'layer2\.0\.conv1\.weight'"),
        (shape, native, r"'layer1\.0\.conv1\.weight' has shape \[1, 2, 3, 3\], required is \[64, 64, 3, 3\]"),
        (state, group, "was trained with BatchNorm, the backbone has none"),
        ({"epoch": 3}, native, "named tensors only"),
        ([1, 2], native, "named tensors only"),
    ]
    for content, backbone, message in cases:
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=message):
            load_backbone(backbone, tmp_path / "w.pth")
    for name in ("no.pth", "no.safetensors", "text.pth", "text.safetensors"):
        if name.startswith("text"):
            (tmp_path / name).write_text("this is no weights file")
        with pytest.raises(CheckpointError, match="needs a weights file that can be read"):
            load_backbone(native, tmp_path / name)


# ---------------------------------------------------------------------------------- the spec


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(COCO),
        paper(FEW),
        modern(FEW, weights="tv_in1k"),
        from_scratch(Classes(("a", "b"), (7, 90))),
        ModelSpec(
            FEW,
            BackboneSpec("resnet101", norm_eps=0.0, stride_in_1x1=True),
            PyramidSpec(128, "p5", False),
            post_processing=PostProcessing(score_threshold=(0.05, 0.05, 0.05, 0.05, 0.0), clip="after-nms"),
        ),
    ],
)
def test_spec_round_trip(spec):
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format_version=99), "needs format_version 1; got 99"),
        (lambda v: v.pop("format_version"), "needs format_version 1; got None"),
        (
            lambda v: v["backbone"].update(nmae="x"),
            "ModelSpec.backbone has no field 'nmae'. Did you mean 'name'",
        ),
        (lambda v: v.pop("classes"), "ModelSpec needs the field 'classes', which is absent"),
        (lambda v: v["head"].update(depth="4"), "ModelSpec.head.depth needs a whole number; got '4'"),
        (lambda v: v["head"].update(depth=True), "ModelSpec.head.depth needs a whole number; got True"),
        (lambda v: v["backbone"].update(norm="layer"), "ModelSpec.backbone.norm needs .*; got 'layer'"),
        (lambda v: v.update(pyramid=3), "ModelSpec.pyramid needs an object; got 3"),
        (lambda v: v["coding"].update(weights=[1, 1]), "ModelSpec.coding.weights needs .*"),
    ],
)
def test_spec_reading_errors(change, message):
    values = json.loads(json.dumps(SMALL.to_json()))
    change(values)
    with pytest.raises(ConfigError, match=message):
        ModelSpec.from_json(values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PyramidSpec(channels=0), "PyramidSpec.channels needs at least 1; got 0"),
        (lambda: HeadSpec(depth=-1), "HeadSpec.depth needs 0 or more; got -1"),
        (lambda: PostProcessing(score_threshold=1.0), "score_threshold needs .*; got 1.0"),
        (lambda: PostProcessing(nms_threshold=2.0), "nms_threshold needs .*; got 2.0"),
        (lambda: PostProcessing(top_k=0), "top_k needs at least 1; got 0"),
        (lambda: PostProcessing(max_detections=0), "max_detections needs at least 1; got 0"),
        (
            lambda: ModelSpec(FEW, post_processing=PostProcessing(score_threshold=(0.1, 0.2))),
            "one number or 5",
        ),
        (
            lambda: ModelSpec(FEW, pyramid=PyramidSpec(40), head=HeadSpec(norm="group")),
            r"64, 96, 128 \.\.\.; got 40",
        ),
    ],
)
def test_spec_errors(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_frozen_norm_without_batch_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a network with BatchNorm; 'convnext_atto' has none"):
        build_backbone(BackboneSpec("convnext_atto", norm="frozen"))


@pytest.mark.parametrize("name", ["dla34", "hrnet_w18_small"])
def test_a_backbone_whose_stages_cannot_be_told_apart_is_refused(name):
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match=f"stages can be told apart; .* of timm's '{name}'"),
    ):
        build_backbone(BackboneSpec(name))
