"""Recipes: sets of training settings with a name. A recipe is a function; what it says, one can read here.

Every number that a user's option does not replace comes from one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from retinanet.data.transforms import Augmentation
from retinanet.model import ModelSpec, presets
from retinanet.objective import ClassLoss, Normalizer
from retinanet.records import Classes
from retinanet.training.configuration import LossName

# On a CPU: images a step, how much a run sees, and how many images at least (docs/decisions/0008).
CPU_BATCH, CPU_PIXELS, LEAST_IMAGES = 4, 150_000_000, 750


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a run that do not depend on the data.

    Args:
        model: the preset's model; the plan adds image size and anchors.
        anchors_fit: the plan takes anchors that fit the data; otherwise the model's stand.
        images_seen: training images in all, repetitions counted, unless what follows asks for more.
        pixels_seen: the same in pixels of resized images with their padding: with larger images fewer of them, each
            of which shows more objects and costs more.
        epochs: passes over the data at least.
        lr: for 16 images a step; with Muon, that of the AdamW beside it.
        warmup_steps: the rate rises linearly over them; a twentieth of the run at most.
        warmup_from: share of the rate at the first step.
        decay_all: weight decay also on norms and biases.
        clip_norm: largest norm of the gradient; None does not clip.
        loss_settings: what the class loss is told beyond its own `training.objectives.SETTINGS`.
        class_loss: a function in the place of `loss`: a loss of one's own.
        matching: who answers for which object: "iou" by thresholds, see `match_anchors` for the three that follow;
            "atss" by what each object's candidates reach, see `match_atss`.
        average_decay: of the exponential moving average of the weights that is validated and saved; None
            uses the weights themselves.
        repeat_rare: see `retinanet.data.sampling.repeat_factors`; 0 shows every image once an epoch.
    """

    name: str
    model: ModelSpec
    anchors_fit: bool = True
    image_size: int | None = None
    max_size: int | None = None
    batch_size: int = 16
    images_seen: int = 0
    pixels_seen: int = 0
    epochs: float = 0
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    lr: float = 0.01
    weight_decay: float = 1e-4
    decay_all: bool = False
    warmup_steps: int = 500
    warmup_from: float = 1 / 3
    schedule: Literal["step", "cosine"] = "step"
    clip_norm: float | None = None
    average_decay: float | None = None
    freeze: str = "none"
    loss: LossName = "focal"
    loss_settings: Mapping[str, float] = field(default_factory=dict)
    class_loss: ClassLoss | None = None
    prior: float = 0.01
    box_loss: Literal["smooth-l1", "l1", "giou"] = "smooth-l1"
    box_beta: float = 1.0
    box_weight: float = 1.0
    normalizer: Normalizer = "image"
    matching: Literal["iou", "atss"] = "iou"
    positive_iou: float = 0.5
    negative_iou: float = 0.4
    low_quality: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    repeat_rare: float = 0.0


def paper(classes: Classes, backbone: str, weights: str | None) -> Recipe:
    """Section 4 and 5 to the letter: 90k steps of 16 images, SGD 0.01 with a tenth at 60k and 80k, flips only.

    No anchor is matched below IoU 0.5, smooth L1 turns at 1, both losses are divided by the positives of
    the image, BatchNorm is frozen. The paper leaves open the warm-up (Detectron's 500 steps from a third
    are used), which stages stay fixed (Detectron's stem and first stage), and clipping (none).

    Published: 35.7 AP on COCO test-dev with ResNet-50 at 800 px (Table 1e). Not measured here.
    """
    return Recipe(
        name="paper",
        model=presets.paper(classes, backbone=backbone, weights=weights),
        anchors_fit=False,
        image_size=800,
        max_size=1333,
        images_seen=90_000 * 16,
        decay_all=True,
        freeze="stage1",
    )


def paper_jitter(classes: Classes, backbone: str, weights: str | None) -> Recipe:
    """As `paper`, with scale jitter and 1.5 times as long: the model of Table 2.

    The paper does not say from which scales; Detectron draws the shortest side from 640 to 800 px.

    Published: 39.1 AP on COCO test-dev with ResNet-101, 40.8 with ResNeXt-101 (Table 2). Not measured here.
    """
    recipe = paper(classes, backbone, weights)
    return replace(
        recipe,
        name="paper-jitter",
        images_seen=recipe.images_seen * 3 // 2,
        augmentation=replace(recipe.augmentation, scales=tuple(side / 800 for side in range(640, 801, 32))),
    )


def modern(classes: Classes, backbone: str, weights: str | None, device: str) -> Recipe:
    """What works better today from pretrained weights: GIoU, GroupNorm in the heads, AdamW at 2e-4, averaged weights;
    a cosine over 12 passes, at least 8,000 images. On a CPU, where that would be a night for 5,000 images, steps and
    pixels of `small`.

    Published by torchvision for a recipe of this kind: 41.5 AP on COCO val2017 (26 epochs, ResNet-50).
    Not measured here, nor published for 12.

    Args:
        device: its type.
    """
    on_cpu = device == "cpu"
    return Recipe(
        name="modern",
        model=presets.modern(classes, backbone=backbone, weights=weights),
        batch_size=CPU_BATCH if on_cpu else 16,
        epochs=1 if on_cpu else 12,
        images_seen=LEAST_IMAGES if on_cpu else 8_000,
        pixels_seen=CPU_PIXELS if on_cpu else 0,
        optimizer="adamw",
        lr=2e-4,
        weight_decay=0.05,
        schedule="cosine",
        clip_norm=10.0,
        average_decay=0.9998,
        box_loss="giou",
        box_weight=2.0,
        normalizer="all-processes",
        low_quality=True,
        augmentation=Augmentation(zoom=(0.7, 1.5), scales=(0.8, 0.85, 0.9, 0.95, 1.0)),
    )


def from_weights(name: str, classes: Classes, backbone: str, weights: str | None, device: str) -> Recipe:
    """Return the recipe of a name, one of those for pretrained weights."""
    if name == "modern":
        return modern(classes, backbone, weights, device)
    return {"paper": paper, "paper-jitter": paper_jitter}[name](classes, backbone, weights)


def small(classes: Classes, backbone: str, device: str) -> Recipe:
    """From scratch on few images: GroupNorm in the heads, and in the backbone where it allows it, nothing frozen, Muon,
    cosine, averaged weights, ATSS, the varifocal loss.

    Published: nothing of this kind. Measured here (docs/recipes.md, docs/decisions/0006, 0008 to 0010), ResNet-18 on
    two cores, three seeds: val of BCCD (205 photographs) 56.7 AP in 17 minutes, of 502 micrographs of nuclei 48.4 AP in
    12, where the cores compute in bf16. Before ATSS and the varifocal loss: 54.9 and 46.7, in 29 and 22 minutes of
    cores that do not.

    Args:
        device: its type. On a CPU a step costs what its images cost, so that few images a step mean more steps for
            the same work, and 150 megapixels are half an hour of two cores with ResNet-18 at 192 px. What other
            devices get is not measured: 4 small images cost them nearly what 16 do, and pixels little.
    """
    on_cpu = device == "cpu"
    return Recipe(
        name="small",
        model=presets.from_scratch(classes, backbone=backbone),
        batch_size=CPU_BATCH if on_cpu else 16,
        epochs=1,
        images_seen=LEAST_IMAGES,
        pixels_seen=CPU_PIXELS if on_cpu else 4_000_000_000,
        optimizer="muon",
        lr=0.004,
        weight_decay=0.02,
        warmup_steps=100,
        warmup_from=0.01,
        schedule="cosine",
        clip_norm=10.0,
        average_decay=0.998,
        loss="varifocal",
        box_loss="giou",
        box_weight=2.0,
        normalizer="all-processes",
        matching="atss",
        low_quality=True,  # where matching is by IoU, as in the paper's tables at the smaller scales
        augmentation=Augmentation(zoom=(0.8, 1.4)),
    )
