"""Objectives that `bench/recipes.py` tries in place of the paper's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from retinanet.anchors import anchors_of_image
from retinanet.batches import MatchState, RawPredictions, Targets
from retinanet.boxes import area, iou
from retinanet.objective import Assignment, Losses, Objective


@dataclass(frozen=True, kw_only=True)
class AdaptiveObjective(Objective):
    """ATSS (Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection", 2020), with all anchors of
    a location.

    Candidates of an object are the anchors at the `nearest` locations of every level. Those are positive whose IoU
    reaches mean + standard deviation of the candidates' and whose centre lies inside; if there is none (which ATSS
    leaves at that), the best one is. An anchor wanted by several objects goes to that of the highest IoU. The others
    are background, or ignored where regions say so.
    """

    nearest: int = 9

    @torch.no_grad()
    def assign(self, anchors: Tensor, targets: Targets) -> Assignment:
        # Without objects the regions alone speak.
        regions = replace(targets, boxes=targets.boxes * targets.ignored[..., None])
        state, classes, box = super().assign(anchors, regions)
        near = self._locations(anchors)
        for image, boxes in enumerate(targets.boxes):
            objects = torch.nonzero((area(boxes) > 0) & ~targets.ignored[image]).squeeze(1)
            if len(objects):
                anchor, which = self._positives(anchors, near, boxes[objects])
                state[image, anchor] = int(MatchState.POSITIVE)
                box[image, anchor] = objects[which]
                classes[image, anchor] = targets.classes[image, objects[which]]
        return Assignment(state, classes, box)

    def _locations(self, anchors: Tensor) -> list[tuple[int, Tensor]]:
        """Return for every level the number of its first anchor and the centres of its locations."""
        first = anchors[:: self.anchors.per_location]
        # A location's smallest anchor tells the level.
        side = torch.stack(
            [area(anchors[i :: self.anchors.per_location]) for i in range(self.anchors.per_location)]
        )
        smallest = side.amin(dim=0)
        centre = (first[:, :2] + first[:, 2:]) / 2
        starts = [0, *(1 + torch.nonzero(smallest[1:] > 1.01 * smallest[:-1]).squeeze(1)).tolist()]
        ends = [*starts[1:], len(centre)]
        return [
            (start * self.anchors.per_location, centre[start:end])
            for start, end in zip(starts, ends, strict=True)
        ]

    def _positives(
        self, anchors: Tensor, near: list[tuple[int, Tensor]], boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the positive anchors and the box of each."""
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        shapes = torch.arange(self.anchors.per_location)
        parts = []
        for first, centres in near:
            distance = torch.cdist(middle, centres)
            locations = distance.topk(min(self.nearest, len(centres)), largest=False).indices
            parts.append((first + locations[..., None] * len(shapes) + shapes).flatten(1))
        candidates = torch.cat(parts, dim=1)
        of = anchors[candidates]
        overlap = iou(of, boxes[:, None].expand_as(of))
        centre = (of[..., :2] + of[..., 2:]) / 2
        inside = ((centre > boxes[:, None, :2]) & (centre < boxes[:, None, 2:])).all(dim=-1)
        enough = overlap.mean(dim=1) + overlap.std(dim=1)
        positive = (overlap >= enough[:, None]) & inside
        alone = ~positive.any(dim=1)
        positive[alone, overlap.argmax(dim=1)[alone]] = overlap.amax(dim=1)[alone] > 0
        which, at = torch.nonzero(positive, as_tuple=True)
        anchor, reached = candidates[which, at], overlap[which, at]
        best = torch.zeros(len(anchors)).scatter_reduce(0, anchor, reached, "amax")
        kept = reached == best[anchor]
        anchor, which = anchor[kept], which[kept]
        first = torch.full((len(anchors),), len(boxes)).scatter_reduce(0, anchor, which, "amin")
        alone = which == first[anchor]
        return anchor[alone], which[alone]


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
        state, classes, box = self.assign(anchors, targets)
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


@dataclass(frozen=True, kw_only=True)
class AdaptiveVarifocalObjective(AdaptiveObjective, VarifocalObjective):
    """Both."""
