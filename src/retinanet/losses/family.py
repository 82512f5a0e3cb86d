"""The losses that the paper holds against the focal loss, each from logits and with the same arguments as it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from retinanet.errors import ConfigError
from retinanet.losses.arguments import Alpha, Normalizer, Reduction, sigmoid_loss
from retinanet.losses.focal import sigmoid_focal_loss


def sigmoid_cross_entropy(
    inputs: Tensor,
    targets: Tensor,
    reduction: Reduction = "none",
    *,
    weight: Tensor | None = None,
    ignore: Tensor | None = None,
    normalizer: Normalizer | None = None,
) -> Tensor:
    r"""Cross entropy of K independent sigmoids: CE(p_t) = -log(p_t), Eq. 1 and 2.

    The focal loss with gamma 0 and without alpha, and as fast. Arguments, shapes, targets (dense, soft or class
    indices) and errors: see `sigmoid_focal_loss`.
    """
    return sigmoid_focal_loss(
        inputs, targets, None, 0, reduction, weight=weight, ignore=ignore, normalizer=normalizer
    )


def sigmoid_balanced_cross_entropy(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | Tensor = 0.75,
    reduction: Reduction = "none",
    *,
    weight: Tensor | None = None,
    ignore: Tensor | None = None,
    normalizer: Normalizer | None = None,
) -> Tensor:
    r"""Alpha-balanced cross entropy: -alpha_t log(p_t), Eq. 3; alpha_t = alpha where y = 1, else 1 - alpha.

    Args:
        alpha: in [0, 1], one or `[K]`. The paper's best is 0.75 (Table 1a); see also `inverse_frequency_alpha`.

    The focal loss with gamma 0. The other arguments, shapes and errors: see `sigmoid_focal_loss`.
    """
    if not isinstance(alpha, Tensor) and not alpha >= 0:
        raise ConfigError(f"sigmoid_balanced_cross_entropy needs alpha in [0, 1]; got {alpha}")
    return sigmoid_focal_loss(
        inputs, targets, alpha, 0, reduction, weight=weight, ignore=ignore, normalizer=normalizer
    )


def sigmoid_focal_star_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = 0.25,
    gamma: float = 2,
    beta: float = 1,
    reduction: Reduction = "none",
    *,
    weight: Tensor | None = None,
    ignore: Tensor | None = None,
    normalizer: Normalizer | None = None,
) -> Tensor:
    r"""FL*, the other form of the focal loss: -alpha_t log(p_t*) / gamma with p_t* = sigmoid(gamma x_t + beta), Eq. 7
    and 8 (Appendix A); x_t = x where y = 1, else -x.

    Args:
        targets: soft ones weigh the losses of y = 1 and y = 0, as in cross entropy.
        gamma: above 0; how steep the loss is.
        beta: any number; shifts it. gamma 1 and beta 0 give alpha-balanced cross entropy.

    The paper's settings are (2, 1) and (4, 0), both with alpha 0.25 (Table 3). The other arguments, shapes and errors:
    see `sigmoid_focal_loss`.
    """
    if not 0 < gamma < float("inf"):
        raise ConfigError(f"sigmoid_focal_star_loss needs gamma > 0; got {gamma}")
    if not abs(beta) < float("inf"):
        raise ConfigError(f"sigmoid_focal_star_loss needs a finite beta; got {beta}")
    return sigmoid_loss(
        "sigmoid_focal_star_loss",
        inputs,
        targets,
        lambda x_t: -logsigmoid(gamma * x_t + beta) / gamma,
        alpha=alpha,
        reduction=reduction,
        normalizer=normalizer,
        weight=weight,
        ignore=ignore,
    )


def sigmoid_hinge_loss(
    inputs: Tensor,
    targets: Tensor,
    margin: float = 0.9,
    alpha: Alpha = None,
    reduction: Reduction = "none",
    *,
    weight: Tensor | None = None,
    ignore: Tensor | None = None,
    normalizer: Normalizer | None = None,
) -> Tensor:
    r"""Hinge loss on p_t: alpha_t max(0, margin - p_t), zero above p_t = margin (Section 5.1).

    The paper says only that it "sets loss to 0 above a certain value of p_t", that training was unstable and the
    results meaningless; the value and the straight line below it are ours. Its derivative below the margin is
    -y p_t (1 - p_t) with y = 1 or -1: hardly anything is learned from an object that is far from found.

    Args:
        targets: soft ones weigh the losses of y = 1 and y = 0.
        margin: in (0, 1].

    The other arguments, shapes and errors: see `sigmoid_focal_loss`.
    """
    if not 0 < margin <= 1:
        raise ConfigError(f"sigmoid_hinge_loss needs a margin in (0, 1]; got {margin}")
    return sigmoid_loss(
        "sigmoid_hinge_loss",
        inputs,
        targets,
        lambda x_t: relu(margin - x_t.sigmoid()),
        alpha=alpha,
        reduction=reduction,
        normalizer=normalizer,
        weight=weight,
        ignore=ignore,
    )


def inverse_frequency_alpha(positives: Tensor, examples: int) -> Tensor:
    """Return for every class the alpha that gives its positives and its negatives equal weight in all (Section 3.1).

    alpha = (1 / n_+) / (1 / n_+ + 1 / n_-) = n_- / (n_+ + n_-) with n_- = examples - n_+. The paper tried up to 0.999,
    and found lower values better.

    Args:
        positives: how many examples belong to each class, `[K]`.
        examples: of how many.
    """
    if not bool(((positives >= 0) & (positives <= examples)).all()) or examples < 1:
        raise ConfigError(
            f"inverse_frequency_alpha needs 1 example or more and of each class 0 to {examples} of them; "
            f"got {positives.tolist()} of {examples}"
        )
    return 1 - positives.double() / examples
