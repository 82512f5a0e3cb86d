"""`retinanet data anchors DATA`."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from retinanet.errors import ConfigError, DataError
from retinanet.folders import require_new_file, require_outside
from retinanet.training.anchor_file import AskedAnchors, write_anchors
from retinanet.training.hints import OPTIONAL, OPTIONAL_FOLDER, Flag, shown

if TYPE_CHECKING:
    from retinanet.data.coverage import Coverage


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """Fit sizes, scales and ratios of the anchors to the boxes of the train split, so that as many objects as can be
    have an anchor of IoU 0.5; every class counts alike.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Data set, as for `retinanet train`."""
    image_size: int
    """Shortest side of the network input that they are fitted for, pixels; train with the same."""
    max_size: Annotated[int | None, OPTIONAL] = None
    """Longest side of the network input, pixels; by default 5/3 of the shortest, as training has it."""
    split: Annotated[str, tyro.conf.arg(metavar="NAME")] = "train"
    """Split of DATA."""
    levels: Literal["doubling", "free"] = "doubling"
    """doubling: each pyramid level's anchors are twice those below; free: each level has a size of its own."""
    per_location: int = 9
    """Anchors a location, scales times ratios; more take longer to train."""
    seed: int = 0
    """The search follows from it."""
    image_root: Annotated[str | None, OPTIONAL_FOLDER] = None
    """Folder of the images, where it is another than the format says; links may lead there, nowhere else."""
    box_format: Literal["auto", "xyxy", "xywh"] = "auto"
    """How boxes of a Hugging Face data set are written; auto takes what they prove."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=shown)] = None
    """New file, YAML, that `retinanet train --anchors` reads."""
    json: Flag = False
    """Print the anchors and their coverage as JSON instead of the table."""

    def run(self) -> int:
        self._check()  # before seconds are spent on imports
        from retinanet.anchors import AnchorSpec
        from retinanet.data import open_dataset
        from retinanet.data.anchor_fit import fit_anchors
        from retinanet.data.coverage import Coverage, best_overlaps, coverage_by_class, objects_in_network
        from retinanet.images import Preprocessing
        from retinanet.training.sizing import longest_of

        dataset = open_dataset(self.data, self.split, image_root=self.image_root, box_format=self.box_format)
        frame = Preprocessing(
            image_size=self.image_size, max_size=self.max_size or longest_of(self.image_size, dataset)
        )
        if self.output:
            require_outside(Path(self.output), dataset.root)
        objects = objects_in_network(dataset, frame)
        if not len(objects):
            raise DataError(f"{self.data}: anchors are fitted to objects; the split {self.split} has none")
        usual = AnchorSpec()
        fitted = fit_anchors(
            usual,
            objects,
            dataset.labels[objects.rows],
            per_location=self.per_location,
            levels=self.levels,
            seed=self.seed,
        )
        found = {name: best_overlaps(spec, objects) for name, spec in (("usual", usual), ("fitted", fitted))}
        rows = {
            name: Fit(Coverage.of(overlaps), coverage_by_class(dataset, objects.rows, overlaps))
            for name, overlaps in found.items()
        }
        asked = AskedAnchors(fitted.sizes, fitted.scales, fitted.ratios, self.image_size, self.max_size)
        if self.output:
            write_anchors(Path(self.output), asked, self._comment(rows))
        if self.json:
            plain = {name: asdict(fit) for name, fit in rows.items()}
            print(json.dumps({"anchors": asdict(asked), **plain}, indent=2, allow_nan=False))
        else:
            self._show(asked, rows)
        return 0

    def _check(self) -> None:
        if self.per_location < 1:
            raise ConfigError(f"--per-location needs 1 or more; got {self.per_location}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed needs 0 or more and below 2^32; got {self.seed}")
        if self.output:
            require_outside(Path(self.output), self.data)
            require_new_file(Path(self.output))

    def _comment(self, rows: dict[str, Fit]) -> str:
        before, after = (rows[name].overall.at_50 or 0.0 for name in ("usual", "fitted"))
        of_longest = f", longest at most {self.max_size}" if self.max_size else ""
        return (
            f"Anchors fitted by `retinanet data anchors` to {rows['fitted'].overall.objects:,} objects at shortest "
            f"side {self.image_size}{of_longest}:\n{after:.1%} of them have an anchor of IoU 0.5, {before:.1%} with "
            "the usual ones."
        )

    def _show(self, asked: AskedAnchors, rows: dict[str, Fit]) -> None:
        from rich.console import Console
        from rich.table import Table

        console = Console(markup=False, highlight=False)
        console.print(
            "Share of objects whose best anchor reaches IoU 0.5 (0.4), with the usual anchors and with fitted ones:\n"
        )
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for heading in ("class", "objects", "usual", "fitted"):
            table.add_column(heading, justify="left" if heading == "class" else "right", overflow="fold")
        usual, fitted = rows["usual"], rows["fitted"]
        for name, before in usual.per_class.items():
            table.add_row(name, f"{before.objects:,}", _words(before), _words(fitted.per_class[name]))
        if len(usual.per_class) > 1:
            table.add_row(
                "all",
                f"{usual.overall.objects:,}",
                _words(usual.overall),
                _words(fitted.overall),
                style="bold",
            )
        console.print(table)
        console.print()
        for name in ("sizes", "scales", "ratios"):
            console.print(f"{name}: [{', '.join(f'{value:g}' for value in getattr(asked, name))}]")
        file = self.output or "FILE"
        then = shlex.join(["retinanet", "train", self.data, *self._of_train(), "--anchors", file])
        written = f"written to {file}; " if self.output else "--output FILE writes them; "
        console.print(f"\n{written}train with: {then}", soft_wrap=True)

    def _of_train(self) -> list[str]:
        """Return the options that training needs, too, for these anchors to be the right ones."""
        given = {
            "--image-size": self.image_size,
            "--max-size": self.max_size,
            "--image-root": self.image_root,
        }
        words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        return words + (["--box-format", self.box_format] if self.box_format != "auto" else [])


@dataclass(frozen=True)
class Fit:
    """How some anchors cover all objects, and those of each class."""

    overall: Coverage
    per_class: dict[str, Coverage]


def _words(coverage: Coverage) -> str:
    if coverage.at_50 is None or coverage.at_40 is None:
        return "-"
    return f"{coverage.at_50:.1%} ({coverage.at_40:.1%})"
