"""The same weights in torchvision's RetinaNet and in ours: the same raw outputs and the same detections."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList

from retinanet.anchors import AnchorSpec, anchors_of_image
from retinanet.bench.torchvision_model import copied
from retinanet.inference.post_processing import post_process
from retinanet.model import BackboneSpec, HeadSpec, ModelSpec, PostProcessing, PyramidSpec
from retinanet.records import Classes

CLASSES = Classes(tuple(f"class {i}" for i in range(7)))
HEIGHT, WIDTH = 128, 160  # no multiple of 128: the strides of P6 and P7 come from the image
ANCHORS = AnchorSpec(center=0.0, rounding="torchvision", order="ratio-major", stride_rule="image")
POST = PostProcessing(max_detections=300, drop_empty=False)
SPECS = {
    "v1": ModelSpec(
        CLASSES,
        backbone=BackboneSpec(norm="frozen"),
        pyramid=PyramidSpec(p6_from="p5"),
        anchors=ANCHORS,
        post_processing=POST,
    ),
    "v2": ModelSpec(CLASSES, head=HeadSpec(norm="group"), anchors=ANCHORS, post_processing=POST),
}


def randomise(model: nn.Module) -> None:
    """Give every tensor a value that differs from its default, without letting the signal explode."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(1 + 0.2 * noise.abs())
        elif tensor.ndim == 4:
            tensor.copy_(noise * (1.4 / tensor[0].numel()) ** 0.5)
        elif name.endswith(("weight",)):
            # A residual branch at 0.3 keeps sixteen blocks from doubling the signal each.
            tensor.copy_((0.3 if ".bn3." in name else 1.0) * (1 + 0.1 * noise))
        else:
            tensor.copy_(0.1 * noise)


@pytest.fixture(scope="module", params=["v1", "v2"])
def case(request):
    """Their model, our spec, raw outputs of both, and the input."""
    build = {"v1": retinanet_resnet50_fpn, "v2": retinanet_resnet50_fpn_v2}[request.param]
    options = {"weights": None, "weights_backbone": None, "num_classes": len(CLASSES)}
    if request.param == "v1":  # as its published weights: BatchNorm frozen
        from torchvision.ops.misc import FrozenBatchNorm2d

        options["norm_layer"] = FrozenBatchNorm2d
    theirs = build(**options).eval()
    spec = SPECS[request.param]
    with torch.no_grad():
        randomise(theirs)
        ours = copied(theirs, spec)
        images = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
        features = list(theirs.backbone(images).values())
        outputs = theirs.head(features)
        raw = ours(images)
    return theirs, spec, features, outputs, raw


def test_raw_outputs_agree(case):
    _, _, _, outputs, raw = case
    for ours, theirs in ((raw.logits, outputs["cls_logits"]), (raw.deltas, outputs["bbox_regression"])):
        assert theirs.std() > 0.1  # something to compare
        torch.testing.assert_close(
            torch.cat(ours, dim=1), theirs, atol=1e-4 * max(1.0, theirs.std()), rtol=1e-4
        )


def test_anchors_agree(case):
    theirs, spec, features, _, _ = case
    sizes = [(HEIGHT, WIDTH)] * 2
    (expected, _) = theirs.anchor_generator(ImageList(torch.zeros(2, 3, HEIGHT, WIDTH), sizes), features)
    assert torch.equal(torch.cat(anchors_of_image(spec.anchors, HEIGHT, WIDTH)), expected)


def standardised(levels: tuple[Tensor, ...], mean: float, deviation: float) -> tuple[Tensor, ...]:
    """Shift and stretch raw outputs to where hundreds of candidates pass and NMS has work."""
    every = torch.cat([level.flatten() for level in levels])
    return tuple((level - every.mean()) / every.std() * deviation + mean for level in levels)


def test_detections_agree(case):
    theirs, spec, features, _, raw = case
    logits, deltas = standardised(raw.logits, -4.0, 1.2), standardised(raw.deltas, 0.0, 0.3)
    raw = type(raw)(logits, deltas, raw.grids)
    valid = [(HEIGHT, WIDTH), (HEIGHT - 20, WIDTH - 37)]  # the second is padded
    list_of = ImageList(torch.zeros(2, 3, HEIGHT, WIDTH), valid)
    anchors = [list(a.split([len(x[0]) for x in logits])) for a in theirs.anchor_generator(list_of, features)]
    expected = theirs.postprocess_detections(
        {"cls_logits": list(logits), "bbox_regression": list(deltas)}, anchors, valid
    )
    found = post_process(
        raw,
        anchors_of_image(spec.anchors, HEIGHT, WIDTH),
        [(width, height) for height, width in valid],
        coding=spec.coding,
        options=spec.post_processing,
    )
    for ours, wanted in zip(found, expected, strict=True):
        candidates = sum(int((x[0].sigmoid() > 0.05).sum()) for x in logits)
        assert candidates > 2 * len(ours.scores) > 200  # NMS had work
        assert len(ours.scores) == len(wanted["scores"])
        # As sets: a near tie may stand in another order.
        match = (
            (ours.labels[:, None] == wanted["labels"])
            & ((ours.boxes[:, None] - wanted["boxes"]).abs().amax(-1) < 0.05)
            & ((ours.scores[:, None] - wanted["scores"]).abs() < 1e-4)
        )
        assert match.any(dim=0).all()
        assert match.any(dim=1).all()
