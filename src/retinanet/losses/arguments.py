"""What the arguments of all these losses mean: alpha_t, targets in two forms, ignored examples, reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, SupportsFloat, TypeAlias

import torch
from torch import Tensor

from retinanet.errors import ConfigError

Reduction: TypeAlias = Literal["none", "mean", "sum"]
# Of numbers NumPy's, too, of which not all are a float.
Normalizer: TypeAlias = Literal["elements", "rows", "positives"] | SupportsFloat | Tensor
Alpha: TypeAlias = float | Tensor | None

# The loss of a hard label without alpha_t, of x_t: x where y = 1 and -x where y = 0.
OfMargin: TypeAlias = Callable[[Tensor], Tensor]


def sigmoid_loss(
    who: str,
    inputs: Tensor,
    targets: Tensor,
    hard: OfMargin,
    *,
    alpha: Alpha = None,
    reduction: Reduction,
    normalizer: Normalizer | None,
    weight: Tensor | None,
    ignore: Tensor | None,
    soft: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Check, and return alpha_t `hard`(x_t) of every logit, reduced.

    Args:
        who: the public function, for messages; the other arguments are as in `sigmoid_focal_loss`.
        soft: the loss of logits and targets in [0, 1]; by default y hard(x) + (1 - y) hard(-x).
    """
    by_index = require(who, inputs, targets, alpha, reduction, normalizer, weight, ignore)
    logits = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    unknown = None if ignore is None else of_elements(ignore, inputs)
    if unknown is not None:  # else the gradient of an infinite loss would be 0 times infinity
        logits = torch.where(unknown, 0, logits)
    of_positive, of_negative = balance(alpha, logits)
    if by_index:
        # Nearly every element has y = 0: one dense pass takes that for all, a sparse one corrects the rest.
        loss = of_negative * hard(-logits)
        where = torch.nonzero(targets >= 0, as_tuple=True)
        own = of_positive[targets[where]] if isinstance(of_positive, Tensor) else of_positive
        here = (*where, targets[where])
        loss = loss.index_put(here, own * hard(logits[here]))
    else:
        y = targets.to(logits.dtype)
        each = soft(logits, y) if soft else y * hard(logits) + (1 - y) * hard(-logits)
        loss = each * (of_positive * y + of_negative * (1 - y))
    if weight is not None:
        loss = loss * weight[..., None]
    if unknown is not None:
        loss = torch.where(unknown, 0, loss)
    return reduce(loss, targets, reduction, normalizer, ignore)


def reduce(
    loss: Tensor, targets: Tensor, reduction: Reduction, normalizer: Normalizer | None, ignore: Tensor | None
) -> Tensor:
    """Reduce the losses of all elements."""
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / divisor(loss, targets, normalizer, ignore)


def divisor(
    elements: Tensor, targets: Tensor, normalizer: Normalizer | None, ignore: Tensor | None
) -> float | Tensor:
    """Return what "mean" divides the sum by. Counts are of what is not ignored, and at least 1."""
    if isinstance(normalizer, Tensor):
        return normalizer.detach()
    if not (normalizer is None or isinstance(normalizer, str)):
        return float(normalizer)
    if normalizer == "positives":
        if targets.dtype == torch.int64:
            share = (targets >= 0).float()
            unknown = ignore
            if ignore is not None and ignore.ndim == elements.ndim and elements.shape[-1]:
                unknown = ignore.gather(-1, targets.clamp(min=0)[..., None])[..., 0]  # of its own class
        else:
            share = targets.detach().float()
            unknown = None if ignore is None else of_elements(ignore, elements)
        return (share if unknown is None else torch.where(unknown, 0, share)).sum().clamp(min=1)
    rows = normalizer == "rows"
    if ignore is not None:
        unknown = of_rows(ignore, elements) if rows else of_elements(ignore, elements)
        return (~unknown).sum().clamp(min=1)
    return max(1, elements[..., 0].numel() if rows and elements.numel() else elements.numel())


def of_elements(ignore: Tensor, elements: Tensor) -> Tensor:
    """Return a mask of rows or elements as one of elements."""
    return ignore if ignore.ndim == elements.ndim else ignore[..., None].expand(elements.shape)


def of_rows(ignore: Tensor, elements: Tensor) -> Tensor:
    """Return a mask of rows or elements as one of rows, of which nothing is known."""
    return ignore if ignore.ndim < elements.ndim else ignore.all(dim=-1)


def balance(alpha: Alpha, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Return alpha_t of y = 1 and of y = 0; a negative number is torchvision's way to say None."""
    if isinstance(alpha, Tensor):
        alpha = alpha.to(like)
    elif alpha is None or alpha < 0:
        return 1.0, 1.0
    return alpha, 1 - alpha


def require(
    who: str,
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha,
    reduction: Reduction,
    normalizer: Normalizer | None,
    weight: Tensor | None,
    ignore: Tensor | None,
) -> bool:
    """Raise ConfigError for what does not fit together; return whether targets are class indices."""
    rows = inputs.shape[:-1]
    if isinstance(alpha, Tensor):
        if alpha.shape != inputs.shape[-1:]:  # it could broadcast to something else in silence
            raise ConfigError(
                f"{who} needs one alpha, or one a class, of shape {list(inputs.shape[-1:])}; got {list(alpha.shape)}"
            )
        if known(alpha) and not ((alpha >= 0) & (alpha <= 1)).all():
            raise ConfigError(f"{who} needs every alpha in [0, 1]; got {alpha.tolist()}")
    elif alpha is not None and not alpha <= 1:
        raise ConfigError(f"{who} needs alpha in [0, 1] or None; got {alpha}")
    if reduction not in ("none", "mean", "sum"):
        raise ConfigError(f"{who} needs reduction 'none', 'mean' or 'sum'; got {reduction!r}")
    _require_normalizer(who, reduction, normalizer)
    by_index = targets.shape == rows and targets.dtype == torch.int64
    if not by_index and not (targets.shape == inputs.shape and targets.is_floating_point()):
        raise ConfigError(
            f"{who} needs floating targets of shape {list(inputs.shape)} or int64 class indices "
            f"of shape {list(rows)}; got {targets.dtype} of shape {list(targets.shape)}"
        )
    if weight is not None and weight.shape != rows:
        raise ConfigError(
            f"{who} needs a weight of shape {list(rows)}, one a row of inputs; got {list(weight.shape)}"
        )
    if ignore is not None and not (ignore.dtype == torch.bool and ignore.shape in (rows, inputs.shape)):
        raise ConfigError(
            f"{who} needs a boolean ignore of shape {list(rows)} or {list(inputs.shape)}; "
            f"got {ignore.dtype} of shape {list(ignore.shape)}"
        )
    if by_index and targets.numel() and known(targets):
        highest = int(targets.max())
        if highest >= inputs.shape[-1]:
            raise ConfigError(
                f"{who} needs class indices below {inputs.shape[-1]}, the size of the last dimension of inputs; "
                f"got {highest}"
            )
    elif not by_index and targets.numel() and known(targets):
        asked = targets if ignore is None else torch.where(of_elements(ignore, inputs), 0, targets)
        low, high = (float(one) for one in torch.aminmax(asked.detach()))
        if not (low >= 0 and high <= 1):
            raise ConfigError(
                f"{who} needs targets in [0, 1], or ignore=MASK where nothing is known; got {low:g} to {high:g}"
            )
    return by_index


def _require_normalizer(who: str, reduction: Reduction, normalizer: Normalizer | None) -> None:
    if normalizer is None:
        return
    if reduction != "mean":
        raise ConfigError(
            f"{who} needs reduction='mean' for a normalizer, which is what the sum is divided by; got {reduction!r}"
        )
    if isinstance(normalizer, Tensor):
        fits = normalizer.ndim == 0 and not (known(normalizer) and not 0 < float(normalizer) < float("inf"))
    elif isinstance(normalizer, str):
        fits = normalizer in ("elements", "rows", "positives")
    else:
        fits = 0 < float(normalizer) < float("inf")
    if not fits:
        of_tensor = isinstance(normalizer, Tensor) and normalizer.ndim > 0
        got = f"shape {list(normalizer.shape)}" if of_tensor else repr(normalizer)  # type: ignore[union-attr]
        raise ConfigError(
            f"{who} needs normalizer 'elements', 'rows', 'positives', a number above 0 or a scalar tensor; got {got}"
        )


def known(tensor: Tensor) -> bool:
    """Return whether one may look at values: on a device the question would wait for it, a compiler has none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
