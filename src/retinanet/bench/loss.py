"""`bench loss`: the class loss, forward and backward, as a head needs it: from matches and labels to a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.models.detection.retinanet import RetinaNetClassificationHead

from retinanet.anchors import CPU
from retinanet.batches import MatchState
from retinanet.bench.inputs import CLASSES, SIDE, boxes, labels, levels_of, logits
from retinanet.bench.measuring import Contest, can_compile
from retinanet.losses import sigmoid_focal_loss, sigmoid_varifocal_loss
from retinanet.matching import Matches, match_anchors


def contests(
    side: int = SIDE,
    classes: int = CLASSES,
    count: int = 10,
    *,
    compiled: bool = True,
    device: torch.device = CPU,
) -> Iterator[Contest]:
    """Ours and torchvision's `RetinaNetClassificationHead.compute_loss`, eager and compiled, for one image.

    Where fvcore is installed, also the loss that Detectron2's head takes from it. Then the varifocal loss beside our
    focal loss.
    """
    anchors = torch.cat(levels_of(side, device=device))
    matches = match_anchors(anchors, boxes(count, side, device=device), low_quality=True)
    classes_of_boxes = labels(count, classes, device=device)
    # A head's output is no leaf but a view of a convolution's, in channels_last.
    grid = logits(len(anchors), classes, -4.6, 1.0, device=device).flatten().requires_grad_()
    head = RetinaNetClassificationHead(8, 1, classes)
    matched = torch.where(matches.state == MatchState.POSITIVE, matches.index, -1)
    matched = torch.where(matches.state == MatchState.IGNORED, head.BETWEEN_THRESHOLDS, matched)

    def rows() -> tuple[Tensor, Tensor, Tensor]:
        count: Tensor | int
        positive = matches.state == MatchState.POSITIVE
        if positive.is_cuda:  # asking which are positive would wait for the device
            wanted = torch.where(positive, classes_of_boxes[matches.index], -1)
            count = positive.sum().clamp(min=1)
        else:
            which = torch.nonzero(positive).squeeze(1)
            wanted = torch.full_like(matches.index, -1)
            wanted[which] = classes_of_boxes[matches.index[which]]
            count = max(1, len(which))
        weight = (matches.state != MatchState.IGNORED) / count
        return grid.view(1, -1, classes), wanted[None], weight[None]

    def ours() -> Tensor:
        x, wanted, weight = rows()
        return sigmoid_focal_loss(x, wanted, reduction="sum", weight=weight)

    quality = torch.linspace(0, 1, len(anchors), device=anchors.device)[None]

    def varifocal() -> Tensor:
        x, wanted, weight = rows()
        return sigmoid_varifocal_loss(x, wanted, quality, reduction="sum", weight=weight)

    def theirs() -> Tensor:
        x = grid.view(1, -1, classes)
        loss: Tensor = head.compute_loss([{"labels": classes_of_boxes}], {"cls_logits": x}, [matched])
        return loss

    peers = {"torchvision": theirs}
    if compiled and can_compile(device):
        peers["torchvision compiled"] = torch.compile(theirs)
    of_fvcore = _focal_loss_of_fvcore()
    if of_fvcore is not None:
        peers["detectron2's (fvcore)"] = lambda: _as_detectron2(
            of_fvcore, grid.view(-1, classes), matches, classes_of_boxes
        )
    expected = _step(ours, grid)
    yield Contest(
        "loss",
        f"{len(anchors):,} anchors, {classes} classes, {count} boxes",
        lambda: _step(ours, grid),
        {name: lambda call=call: _step(call, grid) for name, call in peers.items()},  # type: ignore[misc]
        {name: _agree(expected, _step(call, grid)) for name, call in peers.items()},
    )
    yield Contest(
        "loss",
        f"{len(anchors):,} anchors, {classes} classes, {count} boxes, varifocal",
        lambda: _step(varifocal, grid),
        {"ours, focal": lambda: _step(ours, grid)},
        {"ours, focal": None},
    )


def _focal_loss_of_fvcore() -> Callable[..., Tensor] | None:
    try:
        from fvcore.nn import sigmoid_focal_loss_jit
    except ImportError:
        return None
    loss: Callable[..., Tensor] = sigmoid_focal_loss_jit
    return loss


def _as_detectron2(
    focal_loss: Callable[..., Tensor], logits: Tensor, matches: Matches, classes_of_boxes: Tensor
) -> Tensor:
    """Return the class loss as Detectron2's RetinaNet computes it: labels, then one-hot rows of the valid ones.

    It divides by a moving average of the number of positives; here by the number, which the others divide by.
    """
    classes = logits.shape[1]
    label = classes_of_boxes[matches.index]
    label[matches.state == MatchState.NEGATIVE] = classes
    label[matches.state == MatchState.IGNORED] = -1
    valid = label >= 0
    positives = (valid & (label != classes)).sum().item()
    wanted = one_hot(label[valid], num_classes=classes + 1)[:, :-1]
    total = focal_loss(logits[valid], wanted.to(logits.dtype), alpha=0.25, gamma=2.0, reduction="sum")
    return total / max(positives, 1)


def _step(loss: Callable[[], Tensor], grid: Tensor) -> tuple[Tensor, Tensor]:
    value = loss()
    value.backward()
    gradient, grid.grad = grid.grad, None  # whoever made it pays for letting go of it
    assert gradient is not None
    return value.detach(), gradient


def _agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-9) for a, b in zip(ours, theirs, strict=True))
