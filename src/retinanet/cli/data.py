"""`retinanet data COMMAND`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

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


DATA_SETS: dict[str, type] = {"shapes": Shapes, "view": View}


@dataclass(frozen=True)
class Data:
    """Make data sets and look at them."""

    command: Annotated[Shapes, tyro.conf.subcommand("shapes")] | Annotated[View, tyro.conf.subcommand("view")]
    """What to do."""

    def run(self) -> int:
        return self.command.run()
