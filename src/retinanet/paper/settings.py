"""What an experiment trains: a setting (loss, anchors, depth, size ...) at a scale (how much of everything)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from retinanet.data.shapes import ShapesSpec
from retinanet.paper.own_loss import load_own_loss
from retinanet.training.configuration import LossName, TrainingOptions
from retinanet.training.recipes import Recipe

PAPER_SIDE = 600  # the shortest side of the ablations, pixels
ScaleName = Literal["tiny", "small", "paper"]
PeerName = Literal["faster-rcnn", "ssd", "fcos"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of a table: what is changed of the paper's RetinaNet with the focal loss, gamma 2 and alpha 0.25.

    Args:
        loss, told: as `--loss` and the options that belong to it.
        prior: pi; 0.5 is no prior at all, a bias of 0.
        scales: anchor sizes a level, 2^(k / scales) for k below it.
        ratios: 1 (squares) or 3.
        deep: the deeper of the scale's two backbones (ResNet-101).
        side: the shortest side in the paper; other scales have sides in the same proportions.
        jitter: scale jitter and 1.5 times as long (Table 2).
        last_map: the backbone's last map in the place of the pyramid, with the anchors of all levels on it.
        peer: a detector of torchvision's in the place of ours, trained for as long as ours was.
        own_loss: a file with a class loss of one's own in the place of `loss`, and the name of what was in it
            (`paper.own_loss.name_of_own_loss`).
    """

    loss: LossName = "focal"
    told: tuple[tuple[str, float], ...] = (("alpha", 0.25), ("gamma", 2.0))
    prior: float = 0.01
    scales: int = 3
    ratios: int = 3
    deep: bool = False
    side: int = PAPER_SIDE
    jitter: bool = False
    last_map: bool = False
    peer: PeerName | None = None
    own_loss: tuple[str, str] | None = None

    @property
    def key(self) -> str:
        """A name for its folder; equal settings have equal names and are trained once."""
        told = [f"{name.replace('_', '-')}-{value:g}" for name, value in self.told]
        usual, numbers = Setting(), ("prior", "scales", "ratios", "side")
        changed = [name for name in numbers if getattr(self, name) != getattr(usual, name)]
        numbered = [f"{name}-{getattr(self, name):g}" for name in changed]
        flags = [name.replace("_", "-") for name in ("deep", "jitter", "last_map") if getattr(self, name)]
        loss = [self.loss, *told] if self.own_loss is None else [self.own_loss[1]]
        return "_".join((*([self.peer] if self.peer else loss), *numbered, *flags))

    @property
    def ours(self) -> Setting:
        """The setting of ours that a peer is compared with."""
        return replace(self, peer=None)


def cross_entropy(alpha: float) -> Setting:
    """Alpha-balanced cross entropy, which is also the focal loss with gamma 0 (Tables 1a, 1b and 3)."""
    return Setting(loss="balanced-ce", told=(("alpha", alpha),))


def focal(gamma: float, alpha: float = 0.25) -> Setting:
    """The focal loss (Table 1b); with gamma 0 the same setting as cross entropy."""
    if gamma == 0:
        return cross_entropy(alpha)
    return Setting(told=(("alpha", alpha), ("gamma", gamma)))


def focal_star(gamma: float, beta: float) -> Setting:
    """FL* (Table 3, Figure 7); with gamma 1 and beta 0 the same setting as cross entropy."""
    if (gamma, beta) == (1, 0):
        return cross_entropy(0.25)
    return Setting(loss="fl-star", told=(("alpha", 0.25), ("gamma", gamma), ("beta", beta)))


def mined(loss: LossName, batch: int, nms: float) -> Setting:
    """OHEM and OHEM 1:3 (Table 1d)."""
    return Setting(loss=loss, told=(("mining_batch", batch), ("mining_nms", nms)))


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the experiments are: backbones, image side, length, and the rates that every setting is tried at.

    Args:
        base, deep: timm backbones in the places of ResNet-50 and ResNet-101.
        side: pixels in the place of the paper's 600.
        steps: of training.
        rates: factors on the recipe's rate, the same grid for every setting, of which a setting is trained at
            `first_rates` with a seed of its own, and then beside the best until that has no better neighbour; the best
            on val is what the seeds of the tables train at.
        options: of `retinanet train`, the same for all settings, base sizes of the anchors among them.
        shapes: the synthetic images made where no --data is given, and how many of train and val. Those of
            `tiny` were chosen by their imbalance (`paper.imbalance`).
        sgd: the paper's optimiser, `PAPERS_SGD`, in the place of the recipe's.
    """

    name: ScaleName
    what: str
    base: str
    deep: str
    side: int
    steps: int
    rates: tuple[float, ...]
    first_rates: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    shapes: tuple[ShapesSpec, int, int] | None = None
    sgd: bool = False

    def next_rates(self, known: Mapping[float, float]) -> list[float]:
        """Return the rates that a setting has to be trained at next; none are left when the best has its neighbours.

        Args:
            known: AP at the rates that were tried. Of equal ones the lowest is the best, so that what diverges, which
                counts as 0, is tried lower down to the grid's end.
        """
        lacking = [rate for rate in self.first_rates if rate not in known]
        if lacking:
            return lacking
        at = self.rates.index(best_rate(known))
        return [rate for rate in self.rates[max(0, at - 1) : at + 2] if rate not in known]

    def pixels(self, setting: Setting) -> int:
        """Return the shortest side of a setting's images: the paper's own, elsewhere a multiple of 32."""
        if self.side == PAPER_SIDE:
            return setting.side
        return max(32, round(self.side * setting.side / PAPER_SIDE / 32) * 32)


def best_rate(known: Mapping[float, float]) -> float:
    """Return the rate with the highest AP, of equal ones the lowest."""
    return max(known, key=lambda rate: (known[rate], -rate))


# Section 4.1: rate for 16 images, decay of every parameter, no clipping; momentum 0.9 is SGD's own.
PAPERS_SGD: Mapping[str, Any] = {
    "optimizer": "sgd",
    "lr": 0.01,
    "weight_decay": 1e-4,
    "decay_all": True,
    "clip_norm": None,
}

# Twice and half as much, from an eighth of the recipe's rate to four times it.
GRID = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)

SCALES: dict[ScaleName, Scale] = {
    "tiny": Scale(
        name="tiny",
        what="a CPU, minutes a run: timm's smallest ResNet, from scratch",
        base="test_resnet",
        deep="resnet10t",
        side=160,
        steps=600,
        rates=GRID,
        first_rates=(0.5, 1.0),
        # fp32: no slower than bf16 at this size, and rows from different CPUs can be compared.
        options={
            "recipe": "small",
            "channels": 64,
            "batch_size": 8,
            "anchors": "16,32,64,128,256",
            "precision": "fp32",
        },
        shapes=(ShapesSpec(max_objects=1, empty_share=0.25), 4000, 500),
    ),
    "small": Scale(
        name="small",
        what="one GPU, hours a table: ResNet-18 and ResNet-50 from scratch",
        base="resnet18",
        deep="resnet50",
        side=320,
        steps=6000,
        rates=GRID,
        first_rates=(0.5, 1.0),
        options={"recipe": "small", "batch_size": 16, "anchors": "32,64,128,256,512"},
        shapes=(ShapesSpec(image_size=320, max_objects=3, empty_share=0.25), 20_000, 2_000),
    ),
    "paper": Scale(
        name="paper",
        what="COCO: ResNet-50 and ResNet-101, 90,000 steps of 16 images, the paper's schedule",
        base="resnet50",
        deep="resnet101",
        side=600,
        steps=90_000,
        rates=(1.0,),
        first_rates=(1.0,),
        options={
            "recipe": "paper",
            "batch_size": 16,
            "anchors": "32,64,128,256,512",
            "precision": "fp32",  # as the paper's was
        },
    ),
}


def options_of(
    setting: Setting, scale: Scale, data: str, *, seed: int, pretrained: str = "auto"
) -> TrainingOptions:
    """Return the options that train a setting.

    Args:
        pretrained: as of `retinanet train`; a folder holds a file BACKBONE.safetensors for each.
    """
    side = scale.pixels(setting)
    backbone = scale.deep if setting.deep else scale.base
    if Path(pretrained).is_dir():
        pretrained = str(Path(pretrained) / f"{backbone}.safetensors")
    told: dict[str, Any] = {**dict(setting.told), **scale.options}
    return TrainingOptions(
        data=data,
        pretrained=pretrained,
        backbone=backbone,
        image_size=side,
        max_size=longest_of(side),
        loss=setting.loss,
        prior=setting.prior,
        steps=round(scale.steps * (1.5 if setting.jitter else 1)),
        seed=seed,
        **told,
    )


def longest_of(side: int) -> int:
    """Return the longest side of images with a shortest one, as Detectron's: 1,000 beside 600, 1,333 beside 800."""
    return round(side * 5 / 3)


def by_the_papers_thresholds(recipe: Recipe) -> Recipe:
    """Return a recipe that matches by the paper's thresholds: an anchor is an object's from IoU 0.5, background below
    0.4. Those of recipe small keep its low-quality matches, which the paper has not."""
    return replace(recipe, matching="iou", positive_iou=0.5, negative_iou=0.4)


def change_of(setting: Setting, rate: float, *, sgd: bool = False) -> Any:
    """Return what is changed of the recipe besides: the rate, the anchors' scales and ratios, scale jitter, with `sgd`
    the optimiser; anchors are matched by the paper's thresholds."""

    def change(recipe: Recipe) -> Recipe:
        recipe = replace(recipe, **(PAPERS_SGD if sgd else {}))
        pyramid, anchors = recipe.model.pyramid, recipe.model.anchors
        octaves = 1
        if setting.last_map:
            octaves = len(anchors.sizes)
            pyramid = replace(pyramid, levels="c5")
            anchors = replace(anchors, sizes=anchors.sizes[:1], strides=pyramid.strides)
        anchors = replace(
            anchors,
            scales=tuple(2 ** (k / setting.scales) for k in range(octaves * setting.scales)),
            ratios=(0.5, 1.0, 2.0) if setting.ratios == 3 else (1.0,),
        )
        own = None if setting.own_loss is None else load_own_loss(Path(setting.own_loss[0]))
        augmentation = recipe.augmentation
        if setting.jitter:
            augmentation = replace(augmentation, scales=tuple(s / 800 for s in range(640, 801, 32)))
        return replace(
            by_the_papers_thresholds(recipe),
            lr=recipe.lr * rate,
            model=replace(recipe.model, anchors=anchors, pyramid=pyramid),
            augmentation=augmentation,
            class_loss=own,
        )

    return change
