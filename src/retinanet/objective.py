"""The objective: anchors + matching + losses -> named losses. The model never sees it.

L = box_weight L_loc + L_cls (Section 4, Training): L_cls sums the focal loss over all anchors that are not
ignored, L_loc sums the box loss over the positive anchors, and both are divided by the same normaliser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from retinanet.anchors import AnchorSpec, all_anchors_of_image, anchors_of_image
from retinanet.batches import MatchState, RawPredictions, Targets
from retinanet.boxes import BoxCoding, iou
from retinanet.errors import ConfigError
from retinanet.losses import (
    giou_loss,
    hardest,
    hardest_one_to_three,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    sigmoid_hinge_loss,
    sigmoid_varifocal_loss,
    smooth_l1,
)
from retinanet.matching import Matches, match_anchors

Normalizer = Literal["image", "all-processes"]


class Matching(Protocol):
    """Anchors of images of the padded size height x width, boxes `[B, G, 4]` and which of them are regions to ignore
    `[B, G]` -> which anchor answers for which box. It sees no prediction."""

    def __call__(
        self, spec: AnchorSpec, height: int, width: int, boxes: Tensor, ignored: Tensor
    ) -> Matches: ...


@dataclass(frozen=True, kw_only=True)
class ByIou:
    """The paper's matching; see `match_anchors` for its settings."""

    positive_iou: float = 0.5
    negative_iou: float = 0.4
    low_quality: bool = False

    def __call__(self, spec: AnchorSpec, height: int, width: int, boxes: Tensor, ignored: Tensor) -> Matches:
        return match_anchors(
            all_anchors_of_image(spec, height, width, boxes.device),
            boxes,
            ignored,
            positive_iou=self.positive_iou,
            negative_iou=self.negative_iou,
            low_quality=self.low_quality,
        )


class ClassLoss(Protocol):
    """logits `[B, R, K]`, class indices `[B, R]` (negative: no object), weight `[B, R]` -> the weighted sum.

    Any function of this form is a loss one can train with: `Objective(class_loss=...)`. It is called for each level of
    the pyramid; the weight is 0 where an anchor is ignored, else what divides by the normaliser.
    """

    def __call__(self, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class QualityLoss:
    """A class loss that is also told how good the boxes of objects are: their IoU with the object, 0 without one.

    Args:
        of: logits `[B, R, K]`, class indices, quality and weight, `[B, R]` each -> the weighted sum.
    """

    of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class BoxLoss(Protocol):
    """Deltas, anchors and ground truth of the positives, each `[P, 4]` -> one loss an anchor `[P]`."""

    def __call__(self, deltas: Tensor, anchors: Tensor, boxes: Tensor, coding: BoxCoding) -> Tensor: ...


class Mining(Protocol):
    """Losses of an image's anchors `[R]` (0 where ignored), anchors `[R, 4]`, which are positive `[R]` -> the indices
    of those that the class loss is taken of."""

    def __call__(self, losses: Tensor, anchors: Tensor, positive: Tensor) -> Tensor: ...


def focal(alpha: float | Tensor | None = 0.25, gamma: float = 2.0) -> ClassLoss:
    """The focal loss, the paper's alpha and gamma by default; without alpha and with gamma 0, cross entropy."""

    def loss(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, targets, alpha, gamma, "sum", weight=weight)

    return loss


def focal_star(alpha: float | Tensor | None = 0.25, gamma: float = 2.0, beta: float = 1.0) -> ClassLoss:
    """FL* of Appendix A."""

    def loss(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return sigmoid_focal_star_loss(logits, targets, alpha, gamma, beta, "sum", weight=weight)

    return loss


def varifocal(alpha: float | None = 0.25, gamma: float = 2.0) -> QualityLoss:
    """The varifocal loss: an object's class is to score the IoU of its box."""

    def loss(logits: Tensor, targets: Tensor, quality: Tensor, weight: Tensor) -> Tensor:
        return sigmoid_varifocal_loss(logits, targets, quality, alpha, gamma, "sum", weight=weight)

    return QualityLoss(loss)


def hinge(margin: float = 0.9) -> ClassLoss:
    """The hinge loss on p_t."""

    def loss(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return sigmoid_hinge_loss(logits, targets, margin, None, "sum", weight=weight)

    return loss


def ohem(batch: int = 128, nms_iou: float = 0.5) -> Mining:
    """The hardest anchors of each image."""

    def mine(losses: Tensor, anchors: Tensor, positive: Tensor) -> Tensor:
        return hardest(losses, anchors, batch=batch, nms_iou=nms_iou)

    return mine


def ohem_one_to_three(batch: int = 128, nms_iou: float = 0.5) -> Mining:
    """The hardest of each image, three negatives for every positive."""

    def mine(losses: Tensor, anchors: Tensor, positive: Tensor) -> Tensor:
        return hardest_one_to_three(losses, anchors, positive, batch=batch, nms_iou=nms_iou)

    return mine


def loss_of_anchors(class_loss: ClassLoss, logits: Tensor, targets: Tensor) -> Tensor:
    """Return any class loss of every anchor by itself, `[B, R]`: how fast the sum grows with the anchor's weight."""
    weight = torch.ones(targets.shape, device=logits.device, requires_grad=True)
    with torch.enable_grad():
        (each,) = torch.autograd.grad(class_loss(logits.detach(), targets, weight), weight)
    return each


def smooth_l1_of_deltas(beta: float = 1.0) -> BoxLoss:
    """Smooth L1 between predicted and encoded deltas, the paper's box loss; beta 0 is L1."""

    def loss(deltas: Tensor, anchors: Tensor, boxes: Tensor, coding: BoxCoding) -> Tensor:
        return smooth_l1(deltas, coding.encode(anchors, boxes), beta)

    return loss


def giou_of_boxes() -> BoxLoss:
    """1 - GIoU between decoded and ground-truth boxes."""

    def loss(deltas: Tensor, anchors: Tensor, boxes: Tensor, coding: BoxCoding) -> Tensor:
        return giou_loss(coding.decode(anchors, deltas), boxes)

    return loss


@dataclass(frozen=True)
class Losses:
    """Scalars of a batch: `total` carries the gradient; `positives` counts the positive anchors."""

    total: Tensor
    classes: Tensor
    boxes: Tensor
    positives: Tensor


class Assignment(NamedTuple):
    """What matching says of a batch's anchors: state, class index (-1: no object) and number of the box, `[B, R]`."""

    state: Tensor
    classes: Tensor
    box: Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Losses of raw predictions against targets.

    Args:
        anchors, coding: the model's.
        matching: who answers for which object: `ByIou`, the paper's by default, or `match_atss`.
        class_loss, box_loss: see the protocols, and `QualityLoss`; defaults are the paper's.
        mining: chooses the anchors that the class loss is taken of, image by image; None takes it of all, as the
            paper does. Boxes are learned from all positives and the normaliser counts them, either way.
        box_weight: lambda of L_loc; the paper's 1.
        normalizer: what the sums are divided by, never below 1: "image" divides each image's sums by its own
            positives and takes the mean over images (the paper's text); "all-processes" divides by the positives of
            the whole step, those of other processes included, so that N processes with b images train as one with
            N b.
    """

    anchors: AnchorSpec
    coding: BoxCoding
    matching: Matching = ByIou()
    class_loss: ClassLoss | QualityLoss = field(default_factory=focal)
    box_loss: BoxLoss = field(default_factory=smooth_l1_of_deltas)
    mining: Mining | None = None
    box_weight: float = 1.0
    normalizer: Normalizer = "image"

    def __post_init__(self) -> None:
        if not self.box_weight >= 0:
            raise ConfigError(f"--box-weight needs 0 or more; got {self.box_weight}")
        if self.mining is not None and isinstance(self.class_loss, QualityLoss):
            raise ConfigError("an Objective with mining needs a class loss that is told nothing of boxes")

    def __call__(
        self,
        predictions: RawPredictions,
        targets: Targets,
        *,
        height: int,
        width: int,
        shares: Tensor | None = None,
    ) -> Losses:
        """Return the losses for images of the padded size height x width, in float32.

        Args:
            shares: what each image's sums are multiplied by, `[B]`, where these images are a part of a step; by default
                they are all of it.
        """
        levels = anchors_of_image(self.anchors, height, width, targets.boxes.device)
        anchors = all_anchors_of_image(self.anchors, height, width, targets.boxes.device)
        state, classes, box = self.assign(targets, height=height, width=width)
        positive = state == MatchState.POSITIVE
        share = self.shares(positive.sum(dim=1)) if shares is None else shares
        counts = state != MatchState.IGNORED
        sizes = [len(level) for level in levels]
        if self.mining is not None:
            counts = self._mine(predictions, anchors, classes.split(sizes, 1), counts, positive)
        weight = counts * share[:, None]
        deltas = torch.cat(predictions.deltas, dim=1).float()
        # How many are positive only the device knows, and a host that asked would wait for it.
        on_device = deltas.is_cuda
        quality_of = self._quality_of_all if on_device else self._quality_of_positives
        sum_boxes = self._boxes_of_all if on_device else self._boxes_of_positives

        # Level by level, so that the logits are used where they lie and never concatenated.
        told: list[Tensor] = [classes]
        if isinstance(self.class_loss, QualityLoss):
            loss: Callable[..., Tensor] = self.class_loss.of
            told.append(quality_of(deltas, anchors, targets.boxes, positive, box))
        else:
            loss = self.class_loss
        parts = zip(predictions.logits, *(one.split(sizes, 1) for one in (*told, weight)), strict=True)
        class_loss = torch.stack([loss(*part) for part in parts]).sum()

        box_loss = sum_boxes(deltas, anchors, targets.boxes, positive, box, share)
        return Losses(class_loss + self.box_weight * box_loss, class_loss, box_loss, positive.sum())

    def positives(self, targets: Targets, *, height: int, width: int) -> Tensor:
        """Return how many positive anchors each image has, `[B]`; that needs no prediction."""
        state = self.assign(targets, height=height, width=width).state
        return (state == MatchState.POSITIVE).sum(dim=1)

    def shares(self, positives: Tensor, *, total: Tensor | None = None, images: int | None = None) -> Tensor:
        """Return what the sums of each image are multiplied by, `[B]`: 1 / normaliser.

        Args:
            positives: of each image, `[B]`.
            total, images: positive anchors and images of the whole step; by default those of these images.
        """
        if self.normalizer == "image":
            return 1 / (positives.clamp(min=1) * (len(positives) if images is None else images))
        total = positives.sum() if total is None else total
        return (1 / total.clamp(min=1)).expand(len(positives))

    @torch.no_grad()
    def assign(self, targets: Targets, *, height: int, width: int) -> Assignment:
        """Match the anchors of every image of the batch."""
        # Named for profiles: the fast path is no operation that torch knows.
        with record_function("match_anchors"):
            matches = self.matching(self.anchors, height, width, targets.boxes, targets.ignored)
        positive = matches.state == MatchState.POSITIVE
        classes = torch.full_like(matches.index, -1)
        if not positive.is_cuda:
            image, anchor = torch.nonzero(positive, as_tuple=True)
            classes[image, anchor] = targets.classes[image, matches.index[image, anchor]]
        elif targets.boxes.shape[1]:
            classes = torch.where(positive, targets.classes.gather(1, matches.index), classes)
        return Assignment(matches.state, classes, matches.index)

    def _mine(
        self,
        predictions: RawPredictions,
        anchors: Tensor,
        classes: Sequence[Tensor],
        counts: Tensor,
        positive: Tensor,
    ) -> Tensor:
        """Return `counts` of the anchors that `mining` chooses."""
        assert self.mining is not None
        assert not isinstance(self.class_loss, QualityLoss)
        of_level = zip(predictions.logits, classes, strict=True)
        losses = torch.cat([loss_of_anchors(self.class_loss, *level) for level in of_level], dim=1) * counts
        chosen = torch.zeros_like(counts)
        for image in range(len(counts)):
            chosen[image, self.mining(losses[image], anchors, positive[image])] = True
        return chosen & counts

    def _boxes_of_positives(
        self, deltas: Tensor, anchors: Tensor, boxes: Tensor, positive: Tensor, box: Tensor, share: Tensor
    ) -> Tensor:
        """Return the box loss, from the rows of positive anchors alone."""
        image, anchor = torch.nonzero(positive, as_tuple=True)
        matched = boxes[image, box[image, anchor]]
        per_box = self.box_loss(deltas[image, anchor], anchors[anchor], matched, self.coding)
        # A batch without positives gives an empty sum: 0, with the same graph on every process.
        return (per_box * share[image]).sum()

    def _boxes_of_all(
        self, deltas: Tensor, anchors: Tensor, boxes: Tensor, positive: Tensor, box: Tensor, share: Tensor
    ) -> Tensor:
        """Return the same from all rows, those that are not positive weighed 0: no shape depends on a value."""
        own = anchors.expand(len(deltas), -1, -1)
        matched = _boxes_of_anchors(own, boxes, positive, box)
        rows = [part.reshape(-1, 4) for part in (deltas, own, matched)]
        per_box = self.box_loss(rows[0], rows[1], rows[2], self.coding).view_as(positive)
        return torch.where(positive, per_box * share[:, None], 0).sum()

    @torch.no_grad()
    def _quality_of_positives(
        self, deltas: Tensor, anchors: Tensor, boxes: Tensor, positive: Tensor, box: Tensor
    ) -> Tensor:
        """Return the IoU of each positive's predicted box with the object that it answers for, `[B, R]`; else 0."""
        image, anchor = torch.nonzero(positive, as_tuple=True)
        predicted = self.coding.decode(anchors[anchor], deltas[image, anchor])
        quality = predicted.new_zeros(positive.shape)
        quality[image, anchor] = iou(predicted, boxes[image, box[image, anchor]])
        return quality

    @torch.no_grad()
    def _quality_of_all(
        self, deltas: Tensor, anchors: Tensor, boxes: Tensor, positive: Tensor, box: Tensor
    ) -> Tensor:
        """Return the same from all rows: no shape depends on a value."""
        own = anchors.expand(len(deltas), -1, -1)
        quality = iou(self.coding.decode(own, deltas), _boxes_of_anchors(own, boxes, positive, box))
        return torch.where(positive, quality, 0)


def _boxes_of_anchors(anchors: Tensor, boxes: Tensor, positive: Tensor, box: Tensor) -> Tensor:
    """Return the object that each positive answers for, `[B, R, 4]`; elsewhere the anchor, a box with a size."""
    if not boxes.shape[1]:
        return anchors
    return torch.where(positive[..., None], boxes.gather(1, box[..., None].expand(-1, -1, 4)), anchors)
