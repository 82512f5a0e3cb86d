"""Losses as pure functions of tensors; usable without the rest of the library."""

from retinanet.losses.box import giou_loss, l1, smooth_l1
from retinanet.losses.focal import Reduction, sigmoid_focal_loss

__all__ = ["Reduction", "giou_loss", "l1", "sigmoid_focal_loss", "smooth_l1"]
