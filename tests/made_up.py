"""Data sets without images, as much of them as planning looks at."""

from types import SimpleNamespace

import numpy as np

from retinanet.records import Classes


class Photographs(SimpleNamespace):
    """Photographs of one size with as many objects each, of one class, at random places; sides in pixels."""

    def __init__(
        self,
        count: int,
        *,
        objects: int = 7,
        width: int = 640,
        height: int = 480,
        sides: tuple[float, float] = (60, 120),
    ) -> None:
        random, boxes = np.random.default_rng(0), objects * count
        most = (width - sides[1] - 20, height - sides[1] - 10)
        corners = random.uniform((0, 0), most, (boxes, 2)).astype(np.float32)
        super().__init__(
            widths=np.full(count, width),
            heights=np.full(count, height),
            boxes=np.hstack([corners, corners + random.uniform(*sides, (boxes, 2)).astype(np.float32)]),
            labels=np.zeros(boxes, np.int64),
            ignore=np.zeros(boxes, np.int8),
            offsets=np.arange(0, boxes + 1, objects),
            classes=Classes(("cell",)),
            size=lambda _: (width, height),
        )

    def __len__(self) -> int:
        return len(self.widths)
