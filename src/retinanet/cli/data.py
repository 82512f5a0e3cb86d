"""`retinanet data COMMAND`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from retinanet.cli.data_anchors import Anchors
from retinanet.cli.data_check import Check
from retinanet.cli.data_convert import Convert
from retinanet.cli.data_view import View


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Make the synthetic data set: disks, squares and triangles, told apart by shape alone."""

    output: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """New folder; COCO JSON and PNG images go there."""
    train: int = 2000
    """Images of the train split."""
    val: int = 300
    """Images of the val split."""
    test: int = 0
    """Images of the test split."""
    image_size: int = 160
    """Side of the square images, pixels."""
    seed: int = 0
    """Equal seeds make equal files."""

    def run(self) -> int:
        from rich.console import Console
        from rich.progress import Progress

        from retinanet.data.shapes import generate_shapes

        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("drawing", total=self.train + self.val + self.test)
            path = generate_shapes(
                Path(self.output),
                **self._arguments(),
                progress=lambda done: progress.update(task, completed=done),
            )
        console.print(f"{self.train + self.val + self.test:,} images in {path}", highlight=False)
        return 0

    def there(self) -> bool:
        """Whether `output` holds these very images already."""
        from retinanet.data.shapes import holds_shapes

        return holds_shapes(Path(self.output), **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        from retinanet.data.shapes import ShapesSpec

        return {
            "train": self.train,
            "val": self.val,
            "test": self.test,
            "seed": self.seed,
            "spec": ShapesSpec(image_size=self.image_size),
        }


DATA_SETS: dict[str, type] = {
    "check": Check,
    "view": View,
    "anchors": Anchors,
    "convert": Convert,
    "shapes": Shapes,
}


@dataclass(frozen=True)
class Data:
    """Check data sets, look at them, fit anchors to them, convert and make them."""

    command: (
        Annotated[Check, tyro.conf.subcommand("check")]
        | Annotated[View, tyro.conf.subcommand("view")]
        | Annotated[Anchors, tyro.conf.subcommand("anchors")]
        | Annotated[Convert, tyro.conf.subcommand("convert")]
        | Annotated[Shapes, tyro.conf.subcommand("shapes")]
    )
    """What to do."""

    def run(self) -> int:
        return self.command.run()
