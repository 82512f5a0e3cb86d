"""Means of the losses between two lines of the log, and the speed."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from retinanet.training.step import Stepped


class Meter:
    """Means of the losses and the speed since the last reading. Sums stay on the device until read.

    A step whose numbers were not finite does not count.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last reading (a validation) out of the speed."""
        self.began = time.monotonic()
        self.timed_images = 0

    def add(self, done: Stepped, images: int) -> None:
        counted = done.finite.float()
        values = torch.stack([done.total, done.classes, done.boxes, counted])
        values = torch.where(done.finite, values, 0.0)
        self.sums = values if self.sums is None else self.sums + values
        self.timed_images += images

    def read(self) -> dict[str, float]:
        """Return the means and begin anew; nothing where no step counts."""
        assert self.sums is not None
        *sums, steps = self.sums.tolist()
        speed = self.timed_images / max(1e-9, time.monotonic() - self.began)
        self.sums = None
        self.restart_clock()
        if not steps:
            return {}
        total, classes, boxes = (value / steps for value in sums)
        return {"loss": total, "loss_class": classes, "loss_box": boxes, "images_per_second": speed}
