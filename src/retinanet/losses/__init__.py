"""Losses as pure functions of tensors; usable without the rest of the library.

Classification, from logits: the focal loss, what the paper compares it with and what asks for good boxes, too
(`sigmoid_...`), its form for classes that exclude each other (`softmax_focal_loss`), and their derivatives. Boxes:
`smooth_l1`, `l1`, `giou_loss`. Choosing examples instead of weighing them: `mining`.
"""

from retinanet.losses.arguments import Alpha, Normalizer, Reduction
from retinanet.losses.box import giou_loss, l1, smooth_l1
from retinanet.losses.derivatives import (
    cross_entropy_derivative,
    focal_loss_derivative,
    focal_star_loss_derivative,
)
from retinanet.losses.family import (
    inverse_frequency_alpha,
    sigmoid_balanced_cross_entropy,
    sigmoid_cross_entropy,
    sigmoid_focal_star_loss,
    sigmoid_hinge_loss,
)
from retinanet.losses.focal import sigmoid_focal_loss
from retinanet.losses.mining import balanced_sample, hardest, hardest_one_to_three
from retinanet.losses.softmax import softmax_focal_loss
from retinanet.losses.varifocal import sigmoid_varifocal_loss

__all__ = [
    "Alpha",
    "Normalizer",
    "Reduction",
    "balanced_sample",
    "cross_entropy_derivative",
    "focal_loss_derivative",
    "focal_star_loss_derivative",
    "giou_loss",
    "hardest",
    "hardest_one_to_three",
    "inverse_frequency_alpha",
    "l1",
    "sigmoid_balanced_cross_entropy",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "sigmoid_focal_star_loss",
    "sigmoid_hinge_loss",
    "sigmoid_varifocal_loss",
    "smooth_l1",
    "softmax_focal_loss",
]
