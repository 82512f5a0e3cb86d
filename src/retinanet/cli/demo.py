"""`retinanet demo`: synthetic shapes -> train -> evaluate -> draw -> report, on a CPU, in minutes."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Make synthetic images, train a small RetinaNet from scratch, evaluate it, draw what it finds."""

    output: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "runs/demo"
    """New run folder; the images go into one beside it, and are used again."""
    time: Annotated[str, tyro.conf.arg(metavar="TIME")] = "5m"
    """Training ends in that time: 90s, 5m, 1h."""
    images: int = 4000
    """Training images."""
    seed: int = 0
    """Images, initial weights and order follow from it."""

    def run(self) -> int:
        from retinanet.cli.data import Shapes
        from retinanet.errors import DataError
        from retinanet.folders import require_new
        from retinanet.training.configuration import TrainingOptions
        from retinanet.training.progress import plain_console
        from retinanet.training.run import run_training

        folder = Path(self.output)
        data = folder.with_name(f"{folder.name}-shapes-{self.images}-{self.seed}")
        options = TrainingOptions(
            data=str(data),
            output=str(folder),
            backbone="test_resnet",  # timm's smallest ResNet, 0.37 M parameters: every step counts here
            recipe="small",
            channels=64,
            image_size=160,
            batch_size=8,  # with so small a network a step costs more than its images (decision 0008)
            time=self.time,
            seed=self.seed,
        )
        require_new(folder)
        console = plain_console()
        shapes = Shapes(output=str(data), train=self.images, seed=self.seed)
        if not data.exists():
            console.print("1. Drawing images of disks, squares and triangles")
            shapes.run()
        elif not shapes.there():
            raise DataError(
                f"the demo needs the images that this version draws; {data} holds others, of an older version or "
                "changed since. Remove that folder, or choose another place with --output"
            )
        console.print(f"2. Training from scratch, validating on {shapes.val} unseen images")
        began = time.monotonic()
        run = run_training(options, console)
        assert run is not None  # only a dry run has no result
        minutes = (time.monotonic() - began) / 60
        console.print(f"\nDone in {minutes:.1f} minutes: AP {run.validation.ap or 0:.3f}", style="bold")
        for what, name in (
            ("ground truth beside detections", "pictures.png"),
            ("losses and AP over time", "curves.png"),
            ("the report, for a browser", "report.html"),
            ("the figures", "metrics.json"),
        ):
            console.print(f"  {folder / name!s:<28} {what}")
        then = [*_this_command(), "predict", str(folder), str(data / "images" / "val"), "--draw"]
        console.print(f"Now try: {shlex.join(then)}", soft_wrap=True)
        return 0


def _this_command() -> list[str]:
    """Return what calls `retinanet` as it was called now, be it `python -m retinanet`."""
    called = Path(sys.argv[0])
    return [sys.executable, "-m", "retinanet"] if called.name == "__main__.py" else [str(called)]
