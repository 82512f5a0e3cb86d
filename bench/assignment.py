"""Ways to assign anchors to objects that `bench/recipes.py` tries beside the thresholds on IoU of the paper."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retinanet.batches import MatchState, Targets
from retinanet.boxes import area, iou
from retinanet.objective import Assignment, Objective


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
