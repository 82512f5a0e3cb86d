"""The same few validation images at every validation, with what the model finds in them then: a strip of small pictures
for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from retinanet.data import Dataset
from retinanet.drawing import draw_boxes, save_image
from retinanet.images import UInt8Array, decode
from retinanet.inference import Validation
from retinanet.records import Float32Array, Ignore, Int64Array
from retinanet.training.pictures import sure_detections

IMAGES = 4
# Longest side of a picture, pixels; white between two of them.
SIDE, GAP = 200, 5
TRUTH = "truth.jpg"


class Examples:
    """Writes a strip a validation into a folder, and one with the annotated boxes.

    Args:
        dataset: the validation split.
        folder: for the pictures; made when the first is drawn.
    """

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self.dataset = dataset
        self.folder = folder
        self.images: list[tuple[int, UInt8Array, float]] = []  # index, small image, its scale

    def draw(self, step: int, found: Validation) -> None:
        """Draw what was found at a step, from the best-F1 thresholds on."""
        self.folder.mkdir(exist_ok=True)
        if not self.images:
            self.images = [(index, *self._small(index)) for index in choose_examples(self.dataset, found)]
            truths = [(i, self.dataset.ground_truth(i)) for i, *_ in self.images]
            kept = {i: truth.select(truth.ignore == Ignore.NO) for i, truth in truths}
            self._write(TRUTH, {i: (truth.boxes, truth.classes) for i, truth in kept.items()})
        sure = {index: sure_detections(found, index) for index, *_ in self.images}
        self._write(f"{step:08d}.jpg", {i: (of.boxes, of.labels) for i, of in sure.items()})

    def columns(self, steps: list[int], most: int) -> list[tuple[int | None, Path]]:
        """Return the strips to show beside each other, as (step, file): the ground truth, whose step is None, and those
        of some of the steps, the first and the last among them, `most` columns in all."""
        strips = [(step, self.folder / f"{step:08d}.jpg") for step in steps]
        strips = [(step, file) for step, file in strips if file.is_file()]
        truth = self.folder / TRUTH
        if not strips or not truth.is_file():
            return []
        places = np.linspace(0, len(strips) - 1, min(most - 1, len(strips)))
        return [(None, truth), *(strips[round(place)] for place in places)]

    def _small(self, index: int) -> tuple[UInt8Array, float]:
        image = Image.fromarray(decode(self.dataset.path(index)))
        scale = SIDE / max(image.size)  # small ones are enlarged: a line is then as thin as in the others
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)), scale

    def _write(self, name: str, boxes: dict[int, tuple[Float32Array, Int64Array]]) -> None:
        pictures = [
            draw_boxes(small, boxes[index][0] * scale, groups=boxes[index][1], min_side=1)
            for index, small, scale in self.images
        ]
        height = sum(picture.height for picture in pictures) + GAP * (len(pictures) - 1)
        strip = Image.new("RGB", (max(picture.width for picture in pictures), height), "white")
        top = 0
        for picture in pictures:
            strip.paste(picture, (0, top))
            top += picture.height + GAP
        save_image(strip, self.folder / name)


def choose_examples(dataset: Dataset, found: Validation) -> list[int]:
    """Return the images to show: at equal distances among those that hold objects and can be read.

    They are the same at every validation, and neither the best nor the worst are picked.
    """
    shown = np.zeros(len(dataset), bool)
    owners = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    shown[owners[dataset.ignore == Ignore.NO]] = True
    if found.failed:
        shown &= ~np.isin(dataset.files, list(found.failed))
    candidates = np.flatnonzero(shown)
    places = np.linspace(0, len(candidates) - 1, min(IMAGES, len(candidates)))
    return [int(candidates[int(place)]) for place in places]
