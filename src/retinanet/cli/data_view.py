"""`retinanet data view`: pictures as the network sees them in training."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from retinanet.errors import ConfigError
from retinanet.folders import require_outside
from retinanet.training.augmentation_options import AugmentationOptions
from retinanet.training.configuration import TrainingOptions
from retinanet.training.hints import OPTIONAL, OPTIONAL_FOLDER, option

if TYPE_CHECKING:
    from PIL import Image

    from retinanet.batches import Batch
    from retinanet.data import Dataset
    from retinanet.images import Preprocessing
    from retinanet.training.plan import Plan

COLUMNS = 4


@dataclass(frozen=True, kw_only=True)
class _ViewOptions:
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Data set."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """Picture to write, .png or .jpg; one that is there is replaced."""
    split: str = "train"
    """Split of DATA; whichever it is, it is shown as training would."""
    images: int = 12
    """How many are drawn."""
    epoch: int = 0
    """Which pass over the data, from 0: every one shows the images in another order and otherwise augmented."""
    recipe: Literal["auto", "paper", "paper-jitter", "modern", "small"] = "auto"
    """Set of defaults, as train chooses it; needs no weights here."""
    image_size: Annotated[int | None, OPTIONAL] = None
    """Shortest side of the network input, pixels."""
    max_size: Annotated[int | None, OPTIONAL] = None
    """Longest side of the network input, pixels."""
    batch_size: Annotated[int | None, OPTIONAL] = None
    """Images a step, which are padded to the largest of them."""
    seed: int = 0
    """Order and augmentation follow from it."""
    image_root: Annotated[str | None, OPTIONAL_FOLDER] = None
    """Folder of the images, where it is another than the format says; links may lead there, nowhere else."""
    box_format: Literal["auto", "xyxy", "xywh"] = "auto"
    """How boxes of a Hugging Face data set are written; auto takes what they prove."""


# In this order its own options stand first in `--help`.
@dataclass(frozen=True, kw_only=True)
class View(AugmentationOptions, _ViewOptions):
    """Draw images as training shows them to the network: the first batches of an epoch, augmented, resized and padded,
    with their boxes. Options that train has, too, mean the same.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("images", 1), ("epoch", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{option(name)} needs {least} or more; got {getattr(self, name)}")
        if Path(self.output).suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise ConfigError(f"--output needs a file named .png or .jpg; got {self.output!r}")

    def run(self) -> int:
        from retinanet.drawing import contact_sheet, save_image

        require_outside(Path(self.output), self.data)
        shown = self._open(self.split)
        require_outside(Path(self.output), shown.root)
        output = Path(self.output).resolve()
        plan = self._plan(shown)
        tiles: list[Image.Image] = []
        captions: list[str] = []
        failed: dict[str, None] = {}
        for batch in self._batches(plan, shown):
            failed |= dict.fromkeys(batch.failed)
            for row, index in enumerate(batch.indices[: self.images - len(tiles)]):
                tiles.append(_tile(batch, row, shown, plan.preprocessing))
                height, width = batch.images.shape[2:]
                captions.append(f"{width} x {height}: {Path(str(shown.files[index])).name}")
        title = self._title(plan, shown)
        output.parent.mkdir(parents=True, exist_ok=True)
        save_image(contact_sheet(tiles, columns=COLUMNS, captions=captions, title=title), output)
        print(f"{title}\n{len(tiles)} images in {self.output}")
        for failure in failed:
            print(f"retinanet: left out: {failure}", file=sys.stderr)
        return 1 if failed else 0

    def _open(self, split: str) -> Dataset:
        from retinanet.data import open_dataset

        return open_dataset(self.data, split, image_root=self.image_root, box_format=self.box_format)

    def _title(self, plan: Plan, shown: Dataset) -> str:
        reasons = {setting: value for setting, value, _ in plan.reasons}
        alone = f"; every box: {shown.classes.names[0]}" if len(shown.classes) == 1 else ""
        return (
            f"{shown.name}, {self.split}, epoch {self.epoch}, recipe {plan.recipe.name}: "
            f"{reasons['image size']}; {reasons['augmentation']}{alone}"
        )

    def _plan(self, shown: Dataset) -> Plan:
        """Return the plan that `train` would make, but without asking for the weights that a recipe needs."""
        from dataclasses import replace

        from retinanet.data import available_splits
        from retinanet.devices import choose_device
        from retinanet.training import recipes
        from retinanet.training.planning import plan_run

        of_train = {field.name for field in fields(TrainingOptions)} & {field.name for field in fields(self)}
        asked = {name: getattr(self, name) for name in of_train - {"recipe", "output"}}
        named = self.recipe in ("paper", "paper-jitter", "modern")
        options = TrainingOptions(**asked, recipe="small" if named else self.recipe)

        def as_named(recipe: recipes.Recipe) -> recipes.Recipe:
            device = choose_device(options.device).type
            wanted = recipes.from_weights(self.recipe, shown.classes, options.backbone_name(), None, device)
            return replace(wanted, freeze="none")

        train = shown
        if self.split != "train" and "train" in available_splits(self.data, image_root=self.image_root):
            train = self._open("train")
        return plan_run(options, train, as_named if named else None)

    def _batches(self, plan: Plan, shown: Dataset) -> list[Batch]:
        from retinanet.data.loading import training_batches
        from retinanet.data.sampling import epoch_length

        first = math.ceil(self.epoch * epoch_length(shown, plan.recipe.repeat_rare) / plan.batch_size)
        return list(
            training_batches(
                shown,
                plan.preprocessing,
                plan.augmentation,
                batch_size=plan.batch_size,
                seed=self.seed,
                first_step=first,
                steps=first + math.ceil(self.images / plan.batch_size),
                repeat_rare=plan.recipe.repeat_rare,
            )
        )


def _tile(batch: Batch, row: int, shown: Dataset, preprocessing: Preprocessing) -> Image.Image:
    """Return an image of a batch and its boxes, with the names of their classes where there are several; what is
    ignored is hatched.
    """
    from retinanet.drawing import draw_boxes

    boxes = batch.targets.boxes[row].numpy()
    real = boxes[:, 2] > boxes[:, 0]  # the rest is padding
    labels, ignored = batch.targets.classes[row].numpy()[real], batch.targets.ignored[row].numpy()[real]
    names = list(shown.classes.names) if len(shown.classes) > 1 else [""]
    captions = [
        ", ".join(filter(None, [names[label], "ignored" * bool(skipped)]))
        for label, skipped in zip(labels, ignored, strict=True)
    ]
    picture = preprocessing.restore(batch.images[row].numpy())
    return draw_boxes(picture, boxes[real], captions=captions, groups=labels, ignored=ignored)
