"""Objectives that `bench/recipes.py` tries in place of the paper's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from retinanet.anchors import anchors_of_image
from retinanet.batches import MatchState, RawPredictions, Targets
from retinanet.boxes import iou
from retinanet.objective import Losses, Objective


@dataclass(frozen=True, kw_only=True)
class VarifocalObjective(Objective):
    """Class targets that say how good the box is (Zhang et al., "VarifocalNet", 2021).

    A positive's own class is to score q, the IoU of its predicted box: q BCE(p, q). Everything else is to score 0, by
    the focal loss as it is.
    """

    def __call__(
        self,
        predictions: RawPredictions,
        targets: Targets,
        *,
        height: int,
        width: int,
        shares: Tensor | None = None,
    ) -> Losses:
        levels = anchors_of_image(self.anchors, height, width)
        anchors = torch.cat(levels)
        state, classes, box = self.assign(targets, height=height, width=width)
        positive = state == MatchState.POSITIVE
        share = self.shares(positive.sum(dim=1)) if shares is None else shares
        weight = (state != MatchState.IGNORED) * share[:, None]
        image, anchor = torch.nonzero(positive, as_tuple=True)
        own = classes[image, anchor]
        matched = targets.boxes[image, box[image, anchor]]
        deltas = torch.cat(predictions.deltas, dim=1)[image, anchor]
        per_box = self.box_loss(deltas, anchors[anchor], matched, self.coding)
        box_loss = (per_box * share[image]).sum()

        # All but the positives' own classes: as if nothing were an object, with those taken out again.
        none = torch.full_like(classes, -1)
        sizes = [len(level) for level in levels]
        parts = zip(predictions.logits, none.split(sizes, 1), weight.split(sizes, 1), strict=True)
        background = torch.stack([self.class_loss(*part) for part in parts]).sum()
        logits = torch.cat(predictions.logits, dim=1)[image, anchor, own]
        as_background = self.class_loss(
            logits[None, :, None], none.new_full((1, len(own)), -1), share[image][None]
        )
        with torch.no_grad():
            quality = iou(self.coding.decode(anchors[anchor], deltas), matched).clamp(0, 1)
        per_object = quality * binary_cross_entropy_with_logits(logits, quality, reduction="none")
        class_loss = background - as_background + (per_object * share[image]).sum()
        return Losses(class_loss + self.box_weight * box_loss, class_loss, box_loss, positive.sum())
