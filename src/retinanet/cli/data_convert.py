"""`retinanet data convert DATA OUT --format coco|voc|yolo|csv`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from retinanet.errors import ConfigError, DataError
from retinanet.training.hints import OPTIONAL_FOLDER, Flag, shown

if TYPE_CHECKING:
    from retinanet.data import Dataset

FAULTS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a data set of any format that is read as a new folder of another; its images are hard-linked where the
    file system allows it, else copied.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Data set of any format that is read: a folder, or the file that describes it."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """New folder, outside DATA."""
    format: Literal["coco", "voc", "yolo", "csv"]
    """What to write: COCO JSON, Pascal VOC, YOLO, or the CSV of keras-retinanet."""
    split_shares: Annotated[str | None, tyro.conf.arg(metavar="SHARES", help_behavior_hint=shown)] = None
    """Divide the train split, or a set without splits, into train, val and perhaps test by these shares, such as
    0.8,0.1,0.1: every class in proportion, images of equal bytes together. Other splits stay."""
    seed: int = 0
    """Of --split-shares: equal seeds make equal splits."""
    image_root: Annotated[str | None, OPTIONAL_FOLDER] = None
    """Folder of the images, where it is another than the format says; links may lead there, nowhere else."""
    box_format: Literal["auto", "xyxy", "xywh"] = "auto"
    """How boxes of a Hugging Face data set are written; auto takes what they prove."""
    strict: Flag = False
    """Refuse a data set of which anything has to be repaired or dropped."""

    def run(self) -> int:
        from rich.console import Console
        from rich.progress import Progress

        from retinanet.data import convert_dataset, read_as

        shares = self._shares()
        splits = self._open()
        print(read_as(*splits.values()), file=sys.stderr)
        dropped = _show_faults(list(splits.values()))
        if shares:
            splits = _divided(splits, shares, self.seed)
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("images", total=sum(map(len, splits.values())))
            made = convert_dataset(
                splits,
                self.out,
                self.format,
                source=self.data,
                progress=lambda done: progress.update(task, completed=done),
            )
        for loss in made.losses:
            print(f"lost: {loss}", file=sys.stderr)
        counts = ", ".join(
            f"{name or 'one set without splits'} {len(part):,}" for name, part in splits.items()
        )
        print(
            f"{made.images:,} images ({counts}) in {made.path}; {made.linked:,} are hard links, "
            f"{made.images - made.linked:,} copies",
            file=sys.stderr,
        )
        return 1 if made.losses or dropped else 0

    def _shares(self) -> tuple[float, ...]:
        from retinanet.data.splitting import check_shares

        if self.seed < 0:
            raise ConfigError(f"--seed needs 0 or more; got {self.seed}")
        if self.split_shares is None:
            if self.seed:
                raise ConfigError("--seed belongs to --split-shares, which is not given")
            return ()
        try:
            shares = tuple(float(part) for part in self.split_shares.split(","))
        except ValueError:
            raise ConfigError(
                f"--split-shares needs numbers with commas, such as 0.8,0.1,0.1; got {self.split_shares!r}"
            ) from None
        check_shares(shares)
        return shares

    def _open(self) -> dict[str, Dataset]:
        from retinanet.data import available_splits, open_dataset

        return {
            split: open_dataset(
                self.data,
                split or "train",
                image_root=self.image_root,
                box_format=self.box_format,
                strict=self.strict,
            )
            for split in available_splits(self.data, image_root=self.image_root) or ("",)
        }


def _divided(splits: dict[str, Dataset], shares: Sequence[float], seed: int) -> dict[str, Dataset]:
    """Return the splits with the only set, or `train`, divided."""
    from retinanet.data import split_dataset
    from retinanet.data.splitting import NAMES

    whole = next(iter(splits)) if len(splits) == 1 else "train"
    there = [name for name in NAMES[: len(shares)] if name in splits and name != whole]
    if whole not in splits or there:
        problem = f"{there[0]} is there already" if there else "there is no train"
        raise DataError(
            f"--split-shares divides the train split into {', '.join(NAMES[: len(shares)])}; {problem}: the data set "
            f"has {', '.join(splits)}"
        )
    others = {name: part for name, part in splits.items() if name != whole}
    return {**split_dataset(splits[whole], shares, seed=seed), **others}


def _show_faults(parts: Sequence[Dataset]) -> int:
    """Print the first faults and the number of them; return how many records were dropped."""
    shown = [fault for part in parts for fault in part.faults][:FAULTS_SHOWN]
    for fault in shown:
        print(f"  {fault}", file=sys.stderr)
    more = sum(part.fault_total for part in parts) - len(shown)
    if more:
        print(f"  and {more:,} more fault{'s' * (more > 1)}", file=sys.stderr)
    return sum(
        number for part in parts for (_, action), number in part.fault_counts.items() if action == "dropped"
    )
