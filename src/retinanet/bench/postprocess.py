"""`bench postprocess`: from the logits and deltas of an image to its detections."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from retinanet.anchors import CPU
from retinanet.batches import RawPredictions
from retinanet.bench.inputs import CLASSES, SIDE, TORCHVISION_ANCHORS, levels_of, logits
from retinanet.bench.measuring import Contest
from retinanet.boxes import BoxCoding
from retinanet.inference import Found, post_process
from retinanet.model import PostProcessing

# Mean and deviation of the logits. A trained network is sure of nearly everything: a few thousand of ten million
# scores pass 0.05. At the start all stand around the prior, and a tenth of them passes.
CASES = {"trained-like": (-9.0, 1.7), "early training": (-4.6, 1.3)}
OPTIONS = PostProcessing(max_detections=300, drop_empty=False)


class _Body(torch.nn.Module):
    out_channels = 8


def contests(side: int = SIDE, classes: int = CLASSES, *, device: torch.device = CPU) -> Iterator[Contest]:
    """Ours and torchvision's `RetinaNet.postprocess_detections`."""
    anchors = levels_of(side, device=device)
    model = RetinaNet(
        _Body(), classes, anchor_generator=AnchorGenerator(((32, 40, 50),) * 5, ((0.5, 1.0, 2.0),) * 5)
    )
    for name, (mean, deviation) in CASES.items():
        scores = tuple(
            logits(len(level), classes, mean, deviation, device=device, seed=seed)[None]
            for seed, level in enumerate(anchors)
        )
        deltas = tuple(
            logits(len(level), 4, 0.0, 0.2, device=device, seed=9 + seed)[None]
            for seed, level in enumerate(anchors)
        )
        raw = RawPredictions(scores, deltas, TORCHVISION_ANCHORS.grids(side, side))

        def ours(raw: RawPredictions = raw) -> list[Found]:
            return post_process(raw, anchors, [(side, side)], coding=BoxCoding(), options=OPTIONS)

        def theirs(raw: RawPredictions = raw) -> list[dict[str, Tensor]]:
            outputs = {"cls_logits": list(raw.logits), "bbox_regression": list(raw.deltas)}
            found: list[dict[str, Tensor]] = model.postprocess_detections(
                outputs, [list(anchors)], [(side, side)]
            )
            return found

        with torch.no_grad():
            equal = _agree(ours()[0], theirs()[0])
        yield Contest(
            "postprocess",
            f"{side} x {side}, {classes} classes, {name}",
            ours,
            {"torchvision": torch.no_grad()(theirs)},
            {"torchvision": equal},
        )


def _agree(ours: Found, theirs: dict[str, Tensor]) -> bool:
    if len(ours.scores) != len(theirs["scores"]):
        return False
    # A near tie may stand in another order: each of ours needs one of theirs.
    near = (ours.boxes[:, None] - theirs["boxes"]).abs().amax(-1) < 0.01
    near &= (ours.scores[:, None] - theirs["scores"]).abs() < 1e-5
    near &= ours.labels[:, None] == theirs["labels"]
    return bool((near.sum(0) == 1).all() and (near.sum(1) == 1).all())
