"""The options of a training run, once: for the command line, `config.yaml` and `retinanet.train`. No torch.

An option left at None is decided by the recipe and printed before step 1.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, cast, get_args

import tyro

from retinanet.errors import ConfigError, did_you_mean
from retinanet.training.anchor_file import AskedAnchors, parse_anchors
from retinanet.training.augmentation_options import AugmentationOptions
from retinanet.training.hints import (
    BY_LOSS,
    BY_RECIPE,
    OPTIONAL,
    OPTIONAL_FOLDER,
    Flag,
    option,
    shown,
    shown_or_recipe,
)

DEFAULT_BACKBONE = "resnet50"
LossName: TypeAlias = Literal[
    "focal", "varifocal", "ce", "balanced-ce", "fl-star", "hinge", "ohem", "ohem-1to3"
]
WriterName: TypeAlias = Literal["tensorboard", "wandb", "mlflow"]

# What may be given beside --resume: nothing else of how a run is computed may change on its way.
ALSO_RESUMED = ("workers", "accumulate", "checkpoint_gradients")

# What each loss can be told, and what it is told where nobody says anything: the paper's best.
SETTINGS: dict[LossName, dict[str, float]] = {
    "focal": {"alpha": 0.25, "gamma": 2.0},
    "varifocal": {"alpha": 0.25, "gamma": 2.0},
    "ce": {},
    "balanced-ce": {"alpha": 0.75},
    "fl-star": {"alpha": 0.25, "gamma": 2.0, "beta": 1.0},
    "hinge": {"margin": 0.9},
    "ohem": {"mining_batch": 128, "mining_nms": 0.5},
    "ohem-1to3": {"mining_batch": 128, "mining_nms": 0.5},
}
EVERY_SETTING = sorted({name for settings in SETTINGS.values() for name in settings})


@dataclass(frozen=True, kw_only=True)
class _RunOptions:
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Data set of any format that is read, with splits train and val: a folder, or YOLO's data.yaml."""
    output: Annotated[str | None, OPTIONAL_FOLDER] = None
    """Run directory, made new; runs/train-N by default."""
    recipe: Literal["auto", "paper", "paper-jitter", "modern", "small"] = "auto"
    """Set of defaults. auto: modern with pretrained weights for the backbone, else small; with --weights, small for a
    model that small has trained, else modern."""
    backbone: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=f"(default: {DEFAULT_BACKBONE})")
    ] = None
    """timm model with features at strides 8, 16 and 32; with --weights, the model's."""
    weights: Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint=shown)] = None
    """Model to go on from: a run directory or model file; classes of the same name keep what it knows of them."""
    pretrained: Annotated[str, tyro.conf.arg(metavar="FILE")] = "auto"
    """ImageNet weights of the backbone: auto (those in timm's cache), none, or a file."""
    image_size: Annotated[int | None, OPTIONAL] = None
    """Shortest side of the network input, pixels."""
    max_size: Annotated[int | None, OPTIONAL] = None
    """Longest side of the network input, pixels."""
    anchors: Annotated[str | None, tyro.conf.arg(metavar="SIZES|FILE", help_behavior_hint=shown)] = None
    """Base sizes of the anchors on P3 to P7, pixels: five numbers with commas; or a file of
    `retinanet data anchors`."""
    channels: Annotated[int | None, BY_RECIPE] = None
    """Width of pyramid and heads: 64, 96, 128 ..."""
    head_depth: Annotated[int | None, BY_RECIPE] = None
    """3x3 convolutions of each head before its last one; with --weights, the model's."""
    epochs: Annotated[float | None, OPTIONAL] = None
    """Passes over the training images; not together with --steps."""
    steps: Annotated[int | None, OPTIONAL] = None
    """Optimiser steps; not together with --epochs."""
    time: Annotated[str | None, tyro.conf.arg(metavar="TIME", help_behavior_hint=shown)] = None
    """As many steps as end in that time, such as 90s, 20m or 2h; measured on this machine before step 1,
    and corrected, schedule included, where it turns out slower or faster."""
    batch_size: Annotated[int | Literal["auto"] | None, BY_RECIPE] = None
    """Images a step, of all processes together. auto: as many as fit into memory, found out before step 1; on a CPU no
    more than the recipe's."""
    accumulate: int = 1
    """Parts in which a process's images of a step pass through the network, for less memory: same steps, same rate."""
    checkpoint_gradients: Flag = False
    """Compute activations again in the backward pass: less memory, more time, the same weights."""
    lr: Annotated[float | None, BY_RECIPE] = None
    """Learning rate for 16 images a step; scaled to the batch size, for AdamW and Muon by its root."""
    optimizer: Annotated[Literal["sgd", "adamw", "muon"] | None, BY_RECIPE] = None
    """Optimiser; muon is Muon for the convolutions inside and AdamW for the rest."""
    schedule: Annotated[Literal["step", "cosine"] | None, BY_RECIPE] = None
    """step: a tenth at 2/3 and at 8/9 of the run; cosine: down to nothing."""
    weight_decay: Annotated[float | None, BY_RECIPE] = None
    """Weight decay of convolutions; norms and biases have none, except in recipes paper and paper-jitter."""
    freeze: Annotated[str | None, tyro.conf.arg(metavar="STAGE", help_behavior_hint=shown_or_recipe)] = None
    """Backbone stages that stay as loaded: none, stem, stage1 .. stage4, backbone."""
    loss: Annotated[LossName | None, BY_RECIPE] = None
    """Class loss: the focal loss, varifocal, which asks for good boxes, too, what the paper holds against it, or cross
    entropy of the hardest anchors."""
    alpha: Annotated[float | None, BY_LOSS] = None
    """focal, balanced-ce, fl-star: weight of objects, in [0, 1]; varifocal: 1 less the weight of background."""
    gamma: Annotated[float | None, BY_LOSS] = None
    """focal, varifocal: how fast easy examples lose weight, 0 or more; fl-star: how steep it is, above 0."""
    beta: Annotated[float | None, BY_LOSS] = None
    """fl-star: by how much it is shifted."""
    margin: Annotated[float | None, BY_LOSS] = None
    """hinge: the p_t above which an anchor costs nothing, in (0, 1]."""
    mining_batch: Annotated[int | None, BY_LOSS] = None
    """ohem, ohem-1to3: anchors chosen an image."""
    mining_nms: Annotated[float | None, BY_LOSS] = None
    """ohem, ohem-1to3: IoU above which an anchor gives way to a harder one."""
    prior: Annotated[float | None, BY_RECIPE] = None
    """Probability that every class score starts at; with --weights, those of new classes."""
    box_loss: Annotated[Literal["smooth-l1", "l1", "giou"] | None, BY_RECIPE] = None
    """Box loss."""
    box_beta: Annotated[float | None, BY_RECIPE] = None
    """Where smooth L1 turns from square to linear: the paper's 1, Detectron's 1/9."""
    box_weight: Annotated[float | None, BY_RECIPE] = None
    """Weight of the box loss: L = box_weight L_loc + L_cls."""
    max_detections: Annotated[int | None, OPTIONAL] = None
    """Detections kept an image; by default 100, more where images hold more objects."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the device computes it natively."""
    compile: Flag = False
    """Run the network through torch.compile: minutes of compilation first; sizes in steps of 128 pixels. On two CPU
    cores a step then took 0 to 13 % less time."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: Annotated[int | None, OPTIONAL] = None
    """Processes that decode and augment; by default none on a CPU, else one a spare core, at most 8."""
    seed: int = 0
    """Order, augmentation and initial weights follow from it."""
    deterministic: Flag = False
    """Refuse operations whose result depends on timing."""
    validate_every_steps: Annotated[int | None, OPTIONAL] = None
    """Steps between validations; the last step always has one."""
    patience: Annotated[int | None, OPTIONAL] = None
    """Validations without a better AP after which the run stops; none by default. The schedule is not changed."""
    save_every_steps: Annotated[int | None, OPTIONAL] = None
    """Steps between training states, of which the last two stay; every validation, signal and the end save one, too."""
    save_every_minutes: float = 10.0
    """Minutes between training states."""
    log_to: Annotated[str, tyro.conf.arg(metavar="WRITERS")] = "auto"
    """Where figures go beside metrics.jsonl: auto (tensorboard where it is installed), none, or tensorboard, wandb and
    mlflow, several with commas."""
    resume: Annotated[str | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="(default: a new run)")] = (
        None
    )
    """Run to go on with, as if it had never stopped; needs nothing else, and takes --workers and, for less memory from
    now on, --accumulate and --checkpoint-gradients alone."""
    image_root: Annotated[str | None, OPTIONAL_FOLDER] = None
    """Folder of the images, where it is another than the format says; links may lead there, nowhere else."""
    box_format: Literal["auto", "xyxy", "xywh"] = "auto"
    """How boxes of a Hugging Face data set are written; auto takes what they prove."""
    strict: Flag = False
    """Refuse a data set of which anything has to be repaired or dropped."""
    dry_run: Flag = False
    """Print what would be done, and stop."""

    def __post_init__(self) -> None:
        for name in ("data", "output", "weights", "pretrained", "image_root"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ConfigError(f"--batch-size needs a whole number or auto; got {self.batch_size!r}")
        for name, least in (
            ("image_size", 32),
            ("max_size", 32),
            ("channels", 64),
            ("head_depth", 1),
            ("steps", 1),
            ("batch_size", 1),
            ("accumulate", 1),
            ("max_detections", 1),
            ("validate_every_steps", 1),
            ("patience", 1),
            ("save_every_steps", 1),
            ("workers", 0),
            ("seed", 0),
            ("gamma", 0),
            ("box_beta", 0),
            ("mining_batch", 4),
            ("box_weight", 0),
            ("weight_decay", 0),
        ):
            value = getattr(self, name)
            if value not in (None, "auto") and not least <= value < 2**63:
                limit = " and below 2^63" if value > least else ""
                raise ConfigError(f"{option(name)} needs {least} or more{limit}; got {value}")
        for name in ("epochs", "lr", "save_every_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{option(name)} needs a number above 0; got {value}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(f"--alpha needs a number in [0, 1]; got {self.alpha}")
        if self.beta is not None and not abs(self.beta) < float("inf"):
            raise ConfigError(f"--beta needs a finite number; got {self.beta}")
        if self.margin is not None and not 0 < self.margin <= 1:
            raise ConfigError(f"--margin needs a number in (0, 1]; got {self.margin}")
        if self.mining_nms is not None and not 0 <= self.mining_nms <= 1:
            raise ConfigError(f"--mining-nms needs a number in [0, 1]; got {self.mining_nms}")
        if self.loss is not None:
            require_of_loss(self.loss, self)
        if self.loss == "fl-star" and self.gamma == 0:
            raise ConfigError("--loss fl-star needs --gamma above 0; got 0")
        if self.prior is not None and not 0 < self.prior < 1:
            raise ConfigError(f"--prior needs a number in (0, 1); got {self.prior}")
        given = [name for name in ("epochs", "steps", "time") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"one of --epochs, --steps and --time says how long; got --{' and --'.join(given)}"
            )
        if self.weights is not None and self.pretrained != "auto":
            raise ConfigError(
                f"--weights brings a backbone's weights, too, and needs --pretrained auto; got {self.pretrained}"
            )
        if self.freeze is not None and not re.fullmatch(r"none|stem|stage\d|backbone", self.freeze):
            raise ConfigError(f"--freeze needs none, stem, stage1 .. stage4 or backbone; got {self.freeze!r}")
        if self.time is not None:
            self.seconds()
        if self.checkpoint_gradients and self.compile:
            raise ConfigError(
                "--checkpoint-gradients and --compile exclude each other: the compiler decides by itself what is "
                "computed again; leave one of them out"
            )
        if self.channels is not None and self.channels % 32:
            raise ConfigError(f"--channels needs a multiple of 32; got {self.channels}")
        if None not in (self.image_size, self.max_size) and self.image_size > self.max_size:  # type: ignore[operator]
            raise ConfigError(
                f"--image-size (shortest side) needs to be at most --max-size (longest); "
                f"got {self.image_size} and {self.max_size}"
            )
        if self.box_beta is not None and self.box_loss not in (None, "smooth-l1"):
            raise ConfigError(f"--box-beta belongs to --box-loss smooth-l1; got --box-loss {self.box_loss}")
        self.asked_anchors()
        self.writers()

    def resumed_with(self, asked: TrainingOptions) -> TrainingOptions:
        """Return the options of a run, with those of `ALSO_RESUMED` that are asked for now.

        Raises:
            ConfigError: fewer parts of a step are asked for than the run has had.
        """
        if 1 < asked.accumulate < self.accumulate:
            raise ConfigError(
                f"--resume takes --accumulate of the run's {self.accumulate} or more, for less memory; got "
                f"{asked.accumulate}"
            )
        given = {one.name: getattr(asked, one.name) for one in dataclasses.fields(asked)}
        usual = {one.name: one.default for one in dataclasses.fields(asked)}
        changed = {name: given[name] for name in ALSO_RESUMED if given[name] != usual[name]}
        return dataclasses.replace(cast(TrainingOptions, self), **changed)

    def asked_batch(self) -> int | None:
        """Return `--batch-size` where it is a number."""
        return None if isinstance(self.batch_size, str) else self.batch_size

    def backbone_name(self) -> str:
        """Return `--backbone`, or its default where it is left out."""
        return self.backbone or DEFAULT_BACKBONE

    def seconds(self) -> float | None:
        """Return `--time` in seconds."""
        if self.time is None:
            return None
        number, unit = self.time[:-1], self.time[-1:]
        try:
            seconds = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
        except (KeyError, ValueError):
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise ConfigError(f"--time needs a number with s, m or h, such as 20m; got {self.time!r}")
        return seconds

    def writers(self) -> tuple[WriterName, ...] | None:
        """Return the writers of `--log-to`, each once; None is auto."""
        if self.log_to == "auto":
            return None
        asked = [] if self.log_to == "none" else [name.strip() for name in self.log_to.split(",")]
        known: tuple[WriterName, ...] = get_args(WriterName)
        for name in asked:
            if name not in known:
                near = did_you_mean(name, [*known, "auto", "none"])
                raise ConfigError(
                    f"--log-to needs auto, none, or some of {', '.join(known)} with commas; got {self.log_to!r}.{near}"
                )
        return tuple(name for name in known if name in asked)

    def asked_anchors(self) -> AskedAnchors | None:
        """Return the anchors of `--anchors`."""
        return None if self.anchors is None else parse_anchors(self.anchors)


# In this order its fields come last: the usual ones stand first in `--help`.
@dataclass(frozen=True, kw_only=True)
class TrainingOptions(AugmentationOptions, _RunOptions):
    """Train on the `train` split of DATA, validate on its `val` split."""

    def __post_init__(self) -> None:
        _RunOptions.__post_init__(self)
        AugmentationOptions.__post_init__(self)


def require_of_loss(loss: LossName, options: _RunOptions) -> None:
    """Refuse settings that do not belong to a loss."""
    for name in EVERY_SETTING:
        if getattr(options, name) is not None and name not in SETTINGS[loss]:
            those = ", ".join(other for other, settings in SETTINGS.items() if name in settings)
            raise ConfigError(f"{option(name)} belongs to --loss {those}; got --loss {loss}")


def nothing_else(given: str) -> ConfigError:
    """Return the error of what may not be given beside --resume."""
    *others, last = (option(name) for name in ALSO_RESUMED)
    return ConfigError(
        f"--resume goes on with the run's own settings and takes {', '.join(others)} and {last} alone; got {given}"
    )
