"""torchvision's detectors in the place of ours: the same data, backbone, augmentation, optimiser, rates and time.

Faster R-CNN with FPN has two stages; SSD and FCOS have one, as RetinaNet. Each is torchvision's own code and keeps what
belongs to it (anchors or points, matching, sampling, losses, post-processing). What is not a detector's own is ours for
all: see `build_peer` and `train_peer`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from retinanet.batches import Batch
from retinanet.data import Dataset
from retinanet.data.loading import training_batches
from retinanet.devices import Precision, autocast
from retinanet.errors import DivergedError, ImageError
from retinanet.evaluation import Metrics, evaluate_detections
from retinanet.images import Preprocessing, UInt8Array, decode
from retinanet.model import ModelSpec
from retinanet.model.backbone import Backbone, build_backbone, load_backbone
from retinanet.paper.settings import PeerName
from retinanet.records import Classes, Detections
from retinanet.training.optimizer import WeightAverage, build_optimizers, rate, set_rate
from retinanet.training.plan import Plan

# Steps of the trial that says how many fit into the time, and the share of it that is planned: the rest is for the
# validation and what differs from the trial.
WARM_STEPS, TIMED_STEPS, PLANNED = 2, 10, 0.92
WEIGHTS = "peer.safetensors"

Norm: TypeAlias = Callable[..., nn.Module]


class Pyramid(nn.Module):
    """Our backbone under torchvision's feature pyramid."""

    def __init__(self, backbone: Backbone, width: int, top: nn.Module, norm: Norm | None) -> None:
        super().__init__()
        self.body = backbone
        self.pyramid = FeaturePyramidNetwork(
            list(backbone.channels), width, extra_blocks=top, norm_layer=norm
        )
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        levels: dict[str, Tensor] = self.pyramid({str(i): level for i, level in enumerate(self.body(images))})
        return levels


class Maps(nn.Module):
    """Our backbone under SSD: C3 to C5, and two maps behind them, each half as large as the one before."""

    def __init__(self, backbone: Backbone, width: int, norm: Norm | None) -> None:
        super().__init__()
        self.body = backbone
        self.extra = nn.ModuleList()
        channels = backbone.channels[-1]
        for _ in range(2):
            self.extra.append(
                nn.Sequential(*_unit(channels, width // 2, 1, norm), *_unit(width // 2, width, 3, norm))
            )
            channels = width
        self.out_channels = [*backbone.channels, width, width]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        levels = list(self.body(images))
        for block in self.extra:
            levels.append(block(levels[-1]))
        return {str(i): level for i, level in enumerate(levels)}


def _unit(before: int, after: int, side: int, norm: Norm | None) -> list[nn.Module]:
    """A convolution (of side 3 with stride 2), its norm, ReLU."""
    convolution = nn.Conv2d(before, after, side, stride=1 + side // 3, padding=side // 3, bias=norm is None)
    return [convolution, *([norm(after)] if norm else []), nn.ReLU(inplace=True)]


class AsGiven(GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision is not typed
    """torchvision's batching without its resizing and normalisation, which ours has done."""

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        if self.fixed_size is None:
            return image, target
        resized: tuple[Tensor, dict[str, Tensor] | None] = super().resize(image, target)  # SSD has one size
        return resized

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Return the batch in the memory format that our convolutions run in."""
        batch: Tensor = super().batch_images(images, size_divisible)
        return batch.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Peer:
    """A detector of torchvision's in our frame.

    Args:
        square: SSD's images are all of one square size. They are padded to squares, here and there alike, as its own
            resizing would change their shape, and of a batch's otherwise than of a single one's.
        first_label: what it calls our class 0; those with a background class call that one 0.
        outputs: layers that Muon leaves to AdamW, as in ours: those that give the outputs; and fully connected ones,
            whose matrices are so large that orthogonalising them would cost more than the rest of the step.
    """

    model: Any  # torchvision's classes are not typed
    preprocessing: Preprocessing
    classes: Classes
    square: bool
    first_label: int
    outputs: Sequence[nn.Module]

    def loss(self, batch: Batch, device: torch.device, precision: Precision = "fp32") -> Tensor:
        """Return the sum of its losses. Boxes to be ignored are left out: torchvision knows none."""
        images = batch.images.to(device)
        targets = []
        for boxes, classes, ignored in zip(
            batch.targets.boxes, batch.targets.classes, batch.targets.ignored, strict=True
        ):
            real = (boxes[:, 2] > boxes[:, 0]) & ~ignored
            labels = classes[real] + self.first_label
            targets.append({"boxes": boxes[real].to(device), "labels": labels.to(device)})
        with autocast(device, precision):
            losses: dict[str, Tensor] = self.model.train()(list(self._canvas(images)), targets)
        return torch.stack([value.float() for value in losses.values()]).sum()

    @torch.inference_mode()
    def detect(self, image: UInt8Array) -> Detections:
        """Return what it finds in a decoded image."""
        pixels, geometry = self.preprocessing.prepare(image)
        device = next(self.model.parameters()).device
        (found,) = self.model.eval()([self._canvas(torch.from_numpy(pixels).to(device))])
        boxes = geometry.to_original(found["boxes"].cpu().numpy())
        solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return Detections(
            boxes=boxes[solid],
            scores=found["scores"].cpu().numpy()[solid],
            labels=found["labels"].cpu().numpy()[solid] - self.first_label,
            classes=self.classes,
            width=image.shape[1],
            height=image.shape[0],
        )

    def _canvas(self, images: Tensor) -> Tensor:
        """Return images `[..., H, W]` as the model takes them: SSD's with a margin right and below, up to a square."""
        if not self.square:
            return images
        height, width = images.shape[-2:]
        divisor = self.preprocessing.divisor
        side = -(-max(height, width) // divisor) * divisor
        return nn.functional.pad(images, (0, side - width, 0, side - height))


def build_peer(name: PeerName, spec: ModelSpec, weights: Path | None = None) -> Peer:
    """Build a peer of a RetinaNet: its backbone and weights, its width, anchors from its smallest (FCOS: the ranges of
    its levels in the same proportion to the paper's).

    Where torchvision's own defaults would harm a peer they are replaced. From scratch: where our heads have GroupNorm,
    so have its pyramid (ours has none) and SSD's maps; FCOS's heads always have it. In a narrow network: what Faster
    R-CNN does for each region would leave it a few steps in our time, so that proposals, sampled regions and the units
    of its fully connected layers are fewer in proportion to its channels. FCOS keeps scores from 0.05.
    """
    strides = (4, 8, 16, 32) if name == "faster-rcnn" else (8, 16, 32)
    body = build_backbone(spec.backbone, strides)
    if weights is not None:
        load_backbone(body, weights)
    norm = partial(nn.GroupNorm, 32) if spec.head.norm == "group" else None
    side = spec.preprocessing.image_size
    model, outputs = {"faster-rcnn": _faster_rcnn, "fcos": _fcos, "ssd": _ssd}[name](body, spec, norm)
    fixed = (side, side) if name == "ssd" else None
    divisor = 1 if fixed else spec.preprocessing.divisor
    model.transform = AsGiven(side, side, [0.0] * 3, [1.0] * 3, size_divisible=divisor, fixed_size=fixed)
    outputs += [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return Peer(model, spec.preprocessing, spec.classes, bool(fixed), 0 if name == "fcos" else 1, outputs)


def _faster_rcnn(body: Backbone, spec: ModelSpec, norm: Norm | None) -> tuple[Any, list[nn.Module]]:
    width = spec.pyramid.channels

    def share(usual: int) -> int:
        return round(usual * min(1, width / 256))

    units, proposals, tested = share(1024), share(2000), share(1000)
    sizes, ratios = tuple((size,) for size in spec.anchors.sizes), (spec.anchors.ratios,) * 5
    model = FasterRCNN(
        Pyramid(body, width, LastLevelMaxPool(), norm),
        rpn_anchor_generator=AnchorGenerator(sizes, ratios),
        rpn_pre_nms_top_n_train=proposals,
        rpn_post_nms_top_n_train=proposals,
        rpn_pre_nms_top_n_test=tested,
        rpn_post_nms_top_n_test=tested,
        box_head=TwoMLPHead(width * 49, units),
        box_predictor=FastRCNNPredictor(units, len(spec.classes) + 1),
        box_batch_size_per_image=share(512),
        box_detections_per_img=spec.post_processing.max_detections,
    )
    proposals, last = model.rpn.head, model.roi_heads.box_predictor
    return model, [proposals.cls_logits, proposals.bbox_pred, last.cls_score, last.bbox_pred]


def _fcos(body: Backbone, spec: ModelSpec, norm: Norm | None) -> tuple[Any, list[nn.Module]]:
    top = LastLevelP6P7(body.channels[-1], spec.pyramid.channels)
    top.use_P5 = spec.pyramid.p6_from == "p5"
    # A level answers for objects of 4 to 8 times its size here, and torchvision's are a quarter of the paper's anchors.
    points = AnchorGenerator(tuple((size / 4,) for size in spec.anchors.sizes), ((1.0,),) * 5)
    model = FCOS(
        Pyramid(body, spec.pyramid.channels, top, norm),
        len(spec.classes),
        anchor_generator=points,
        score_thresh=0.05,
        detections_per_img=spec.post_processing.max_detections,
    )
    classes, boxes = model.head.classification_head, model.head.regression_head
    return model, [classes.cls_logits, boxes.bbox_reg, boxes.bbox_ctrness]


def _ssd(body: Backbone, spec: ModelSpec, norm: Norm | None) -> tuple[Any, list[nn.Module]]:
    side = spec.preprocessing.image_size
    boxes = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2]], min_ratio=spec.anchors.sizes[0] / side, max_ratio=0.9
    )
    model = SSD(
        Maps(body, spec.pyramid.channels, norm),
        boxes,
        (side, side),
        len(spec.classes) + 1,
        detections_per_img=spec.post_processing.max_detections,
    )
    return model, [model.head.classification_head, model.head.regression_head]


def load_peer(name: PeerName, spec: ModelSpec, run: Path, device: torch.device) -> Peer:
    """Return the peer that a run trained, on the device and in the memory format that it was trained in."""
    peer = build_peer(name, spec)
    load_model(peer.model, run / WEIGHTS)
    peer.model.to(device, memory_format=torch.channels_last)
    return peer


@dataclass(frozen=True)
class Trained:
    """What a peer's training gave."""

    peer: Peer
    metrics: Metrics
    steps: int


def train_peer(
    name: PeerName, plan: Plan, train: Dataset, val: Dataset, seconds: float, run: Path
) -> Trained:
    """Train a peer by the plan of our own row, for as long as that took; validate and save it.

    Args:
        plan: batch, rate, optimiser, schedule, average, augmentation and seed are all taken from it.
        seconds: of `seconds_of`, validation included. How many steps that are is measured on a copy.
        run: folder for the weights.
    """
    clock = seconds_of(plan.device)
    began, recipe, seed = clock(), plan.recipe, plan.options.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peer = build_peer(name, plan.spec, plan.weights_file)
    peer.model.to(plan.device, memory_format=torch.channels_last)
    peer.model.backbone.body.freeze(recipe.freeze)
    trial = copy.deepcopy(peer)
    step = _Step(trial, plan)
    batches = _batches(plan, train, WARM_STEPS + TIMED_STEPS)
    timed = began
    for number, batch in enumerate(batches):
        if number == WARM_STEPS:
            timed = clock()
        step(batch, 0.0)
    each = (clock() - timed) / TIMED_STEPS
    steps = max(1, int((seconds * PLANNED - (clock() - began)) / each))
    plan = plan.lasting(steps, "as long as ours")
    step = _Step(peer, plan)
    for number, batch in enumerate(_batches(plan, train, steps)):
        torch.manual_seed(int(np.random.SeedSequence((seed, number + 1)).generate_state(1)[0]))
        factor = rate(
            number,
            steps,
            schedule=recipe.schedule,
            warmup_steps=plan.warmup_steps,
            warmup_from=recipe.warmup_from,
        )
        loss = step(batch, plan.lr * factor)
        if number % 50 == 0 or number == steps - 1:
            print(f"step {number} of {steps}: loss {float(loss):.3f}", flush=True)
            if not torch.isfinite(loss):
                raise DivergedError(f"the loss is {float(loss)} at step {number}")
    shipped = step.shipped
    run.mkdir(parents=True, exist_ok=True)
    save_model(shipped.model, str(run / WEIGHTS))
    return Trained(shipped, judge(shipped, val, plan.spec.post_processing.max_detections), steps)


def judge(peer: Peer, val: Dataset, max_detections: int) -> Metrics:
    """Return COCO's figures of a peer over the images that can be read, as `inference.validate` does ours."""
    truths, found = [], []
    for index in range(len(val)):
        try:
            image = decode(val.path(index))
            val.require_size(index, image.shape[1], image.shape[0])
        except ImageError as error:
            print(f"left out of the validation: {error}", flush=True)
            continue
        truths.append(val.ground_truth(index))
        found.append(peer.detect(image))
    return evaluate_detections(truths, found, val.classes, max_detections=max_detections)


def seconds_of(device: torch.device) -> Callable[[], float]:
    """Return the clock by which peers get as much as we: on a CPU this process's own seconds, which do not run while
    other processes have the cores; elsewhere those on the wall."""
    return time.process_time if device.type == "cpu" else time.monotonic


class _Step:
    """One step of a peer, as `training.step.TrainingStep` is ours."""

    def __init__(self, peer: Peer, plan: Plan) -> None:
        recipe = plan.recipe
        self.peer, self.device, self.clip_norm = peer, plan.device, recipe.clip_norm
        self.precision: Precision = plan.options.precision
        self.optimizers = build_optimizers(
            peer.model,
            outputs=peer.outputs,
            name=recipe.optimizer,
            lr=0.0,
            weight_decay=recipe.weight_decay,
            decay_all=recipe.decay_all,
        )
        self.average = None
        if recipe.average_decay:
            self.average = WeightAverage(copy.deepcopy(peer.model), recipe.average_decay)

    def __call__(self, batch: Batch, lr: float) -> Tensor:
        loss = self.peer.loss(batch, self.device, self.precision)
        loss.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.peer.model.parameters(), self.clip_norm, foreach=True)
        set_rate(self.optimizers, lr)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update(self.peer.model)
        return loss.detach()

    @property
    def shipped(self) -> Peer:
        """The peer with averaged weights, where they are averaged."""
        if self.average is None:
            return self.peer
        return replace(self.peer, model=self.average.model, outputs=())


def _batches(plan: Plan, train: Dataset, steps: int) -> Iterator[Batch]:
    return training_batches(
        train,
        plan.preprocessing,
        plan.augmentation,
        batch_size=plan.batch_size,
        seed=plan.options.seed,
        steps=steps,
        workers=plan.workers,
    )
