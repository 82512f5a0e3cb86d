"""`bench import`: a fresh process from its start to the first boxes of an image, with all caches warm."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from retinanet.bench.inputs import CLASSES
from retinanet.bench.measuring import Contest
from retinanet.bench.torchvision_model import twins
from retinanet.checkpoint import Model, save_model

BACKBONE, SIDE = "resnet18", 256
OURS = """
import sys, retinanet
found = retinanet.load(sys.argv[1]).predict(sys.argv[2], threshold=0.05)
print(len(found[0].boxes), round(float(found[0].scores.sum()), 3))
"""
THEIRS = """
import sys, torch
from torchvision.io import decode_image
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
body = resnet_fpn_backbone(backbone_name=sys.argv[3], weights=None, returned_layers=[2, 3, 4],
                           extra_blocks=LastLevelP6P7(256, 256))
model = RetinaNet(body, int(sys.argv[4]), anchor_generator=_default_anchorgen(), min_size=256, max_size=256)
model.load_state_dict(torch.load(sys.argv[1], weights_only=True))
with torch.no_grad():
    found = model.eval()([decode_image(sys.argv[2]).float() / 255])
print(len(found[0]["boxes"]), round(float(found[0]["scores"].sum()), 3))
"""


def contests() -> Iterator[Contest]:
    """Ours and torchvision: import, build, load the same weights, decode a PNG, detect."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        ours, theirs, spec = twins(BACKBONE, CLASSES, SIDE)
        with torch.no_grad():  # scores above the threshold, so that there is something to suppress and return
            for last in (ours.class_head.last, theirs.head.classification_head.cls_logits):
                nn.init.constant_(cast(nn.Parameter, last.bias), -2.9)
        save_model(place / "ours", Model(ours, spec))
        torch.save(theirs.state_dict(), place / "theirs.pth")
        pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(place / "image.png")

        def call(code: str, *arguments: object) -> Callable[[], object]:
            command = [sys.executable, "-c", code, *map(str, arguments)]
            return lambda: subprocess.run(command, check=True, capture_output=True).stdout

        we = call(OURS, place / "ours", place / "image.png")
        they = call(THEIRS, place / "theirs.pth", place / "image.png", BACKBONE, CLASSES)
        yield Contest(
            "import",
            f"import to first boxes, {BACKBONE}, {SIDE} px",
            we,
            {"torchvision": they},
            {"torchvision": we() == they()},
        )
