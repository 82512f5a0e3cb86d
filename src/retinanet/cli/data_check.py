"""`retinanet data check DATA`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from retinanet.errors import ConfigError, DataError
from retinanet.folders import new_folder, write_json
from retinanet.training.configuration import TrainingOptions
from retinanet.training.hints import OPTIONAL, OPTIONAL_FOLDER, Flag, shown

if TYPE_CHECKING:
    from rich.console import Console

    from retinanet.data import Dataset
    from retinanet.training.checking import AuditedSplit, Frame
    from retinanet.training.findings import AnchorFindings, Findings
    from retinanet.training.sentences import Sentence

CLASSES_SHOWN = 12
MARKS = {"stop": "!!", "look": " !", "good": "ok"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """Read every split of DATA, decode every image, and say what is in it, what is wrong with it and whether anchors
    fit. Exit code 0: clean; 1: something was repaired or left out; 2: it cannot be used.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Data set, as for `retinanet train`."""
    output: Annotated[str | None, OPTIONAL_FOLDER] = None
    """New folder for report.html and report.json; runs/check-N by default."""
    image_size: Annotated[int | None, OPTIONAL] = None
    """Shortest side of the network input that anchors are judged at, pixels; by default what training would take."""
    max_size: Annotated[int | None, OPTIONAL] = None
    """Longest side of the network input, pixels."""
    anchors: Annotated[str | None, tyro.conf.arg(metavar="SIZES|FILE", help_behavior_hint=shown)] = None
    """Anchors to judge: five base sizes with commas, or a file of `retinanet data anchors`; by default what training
    would take."""
    workers: Annotated[int | None, OPTIONAL] = None
    """Processes that decode; by default one a core, at most 8."""
    image_root: Annotated[str | None, OPTIONAL_FOLDER] = None
    """Folder of the images, where it is another than the format says; links may lead there, nowhere else."""
    box_format: Literal["auto", "xyxy", "xywh"] = "auto"
    """How boxes of a Hugging Face data set are written; auto takes what they prove."""
    strict: Flag = False
    """Refuse a data set of which anything was repaired or left out: exit code 2."""
    json: Flag = False
    """Print report.json instead of the summary."""

    def run(self) -> int:
        from retinanet.data import read_as
        from retinanet.training.advice import exit_code, sentences
        from retinanet.training.progress import plain_console

        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"--workers needs 0 or more; got {self.workers}")
        options = self._options()
        datasets, refused, one_set = read_splits(
            self.data, image_root=self.image_root, box_format=self.box_format
        )
        roots = [dataset.root for dataset in datasets]
        folder = new_folder(self.output, "check", outside=(self.data, *roots))
        console = plain_console()
        read = read_as(*datasets)
        console.print(read, soft_wrap=True)
        splits = [self._audited(dataset, console) for dataset in datasets]
        if console.is_terminal:
            console.print("comparing anchors ...")
        found, frame = self._found(options, splits, refused, one_set=one_set)
        said = sentences(found)
        values = {
            **found.to_json(),
            "read_as": read,
            "sentences": [{"level": one.level, "text": one.text} for one in said],
        }
        write_json(folder / "report.json", values)
        _write_page(folder / "report.html", values, splits, frame)
        if self.json:
            print(json.dumps(values, indent=2, allow_nan=False))
        else:
            show(found, said)
        console.print(f"written to {folder}: open {folder / 'report.html'}", soft_wrap=True)
        code = exit_code(found)
        if self.strict and code == 1:
            raise DataError(
                f"--strict: {self.data} has {_first_problem(found)}. {folder / 'report.html'} says more"
            )
        return code

    def _options(self) -> TrainingOptions:
        return TrainingOptions(
            data=self.data,
            backbone="resnet18",
            pretrained="none",
            image_size=self.image_size,
            max_size=self.max_size,
            anchors=self.anchors,
            image_root=self.image_root,
            box_format=self.box_format,
        )

    def _audited(self, dataset: Dataset, console: Console) -> AuditedSplit:
        from rich.progress import Progress

        from retinanet.data.auditing import audit_images
        from retinanet.training.checking import AuditedSplit

        workers = min(8, os.cpu_count() or 1) if self.workers is None else self.workers
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task(f"decoding {dataset.split}", total=len(dataset))
            facts, faults = audit_images(
                dataset,
                workers=workers,
                progress=lambda done: progress.update(task, completed=done),
                data=self.data,
            )
        return AuditedSplit(dataset, facts, tuple(faults))

    def _found(
        self,
        options: TrainingOptions,
        splits: Sequence[AuditedSplit],
        refused: dict[str, str],
        *,
        one_set: bool,
    ) -> tuple[Findings, Frame | None]:
        import dataclasses

        from retinanet.data.auditing import unlisted_images
        from retinanet.devices import choose_device
        from retinanet.records import Ignore
        from retinanet.training.checking import check, frame_of, of_training

        # A single file, or a split that is lacking, says nothing about the images of the others.
        whole = Path(self.data).is_dir() and not refused
        others = unlisted_images([split.dataset for split in splits]) if whole else []
        train = of_training(splits).dataset
        frame, suggested = None, {}
        if (train.ignore == Ignore.NO).any():
            frame = frame_of(options, train, choose_device("auto").type)
            left_open = dataclasses.replace(options, image_size=None)
            for device in ("cpu", "cuda"):
                taken = frame_of(left_open, train, device)
                suggested[device] = (taken.preprocessing.image_size, taken.why)
        found = check(
            self.data,
            splits,
            refused=refused,
            others=others,
            frame=frame,
            suggested=suggested,
            one_set=one_set,
        )
        return found, frame


def _first_problem(found: Findings) -> str:
    if not found.faults:
        return f"splits that cannot be read, the first: {next(iter(found.refused.values()))}"
    number = found.fault_total
    return f"{number:,} fault{'s' * (number > 1)}, the first: {found.faults[0][1]}"


def read_splits(
    data: str, *, image_root: str | None, box_format: Literal["auto", "xyxy", "xywh"]
) -> tuple[list[Dataset], dict[str, str], bool]:
    """Read every split of a data set; return those that could be read, of the others why not, and whether it is one set
    without splits.

    Raises:
        DataError: not one can be read.
    """
    from retinanet.data import available_splits, open_dataset

    splits = available_splits(data, image_root=image_root)
    names = splits or (_split_of_file(data),)
    read, refused, first = [], {}, None
    for name in names:
        try:
            read.append(open_dataset(data, name, image_root=image_root, box_format=box_format))
        except DataError as error:
            refused[name] = str(error)
            first = first or error
    if not read and first is not None:
        raise first
    return read, refused, not splits


def _split_of_file(data: str) -> str:
    """Return what a single file is, by its name: val, test or else train."""
    words = re.split(r"[^a-z]+", Path(data).stem.lower())
    return next((name for name in ("val", "test") if name in words), "train")


def _write_page(
    page: Path, values: dict[str, Any], splits: Sequence[AuditedSplit], frame: Frame | None
) -> None:
    from retinanet.report.data_page import write_data_page
    from retinanet.report.histograms import Histogram, draw_histograms
    from retinanet.training.check_pictures import draw_objects
    from retinanet.training.checking import measures, of_training

    drawn = measures(splits)
    panels = [
        Histogram("Images", "shortest side, pixels", drawn["image_side"]),
        Histogram("Objects", "side, pixels", drawn["object_side"]),
        Histogram("Objects", "height / width", drawn["object_ratio"]),
    ]
    pictures: dict[str, Any] = {"histograms": (draw_histograms(panels), "png")}
    if frame is not None:
        sheet = draw_objects(of_training(splits).dataset, frame)
        if sheet is not None:
            pictures["boxes"] = (sheet, "jpeg")
    said = [(one["level"], one["text"]) for one in values["sentences"]]
    write_data_page(page, values, sentences=said, pictures=pictures)


def show(found: Findings, said: Sequence[Sentence]) -> None:
    """Print the sentences, what is there, and coverage at several sizes."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    for one in said:
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(MARKS[one.level], one.text)
        console.print(grid)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("split", "images", "empty", "objects", "classes"):
        table.add_column(
            heading, justify="left" if heading in ("split", "classes") else "right", overflow="fold"
        )
    for split in found.splits:
        counts = [f"{name} {count:,}" for name, count in split.per_class.items()]
        if len(counts) > CLASSES_SHOWN:
            counts[CLASSES_SHOWN:] = [f"and {len(counts) - CLASSES_SHOWN} more"]
        classes = ", ".join(counts)
        table.add_row(split.split, f"{split.images:,}", f"{split.empty:,}", f"{split.objects:,}", classes)
    console.print()
    console.print(table)
    _show_anchors(found.anchors, console)


def _show_anchors(found: AnchorFindings | None, console: Console) -> None:
    from rich.table import Table

    if found is None:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("shortest side", "anchors", "from", "IoU 0.5 reached", "0.4 reached"):
        table.add_column(heading, justify="left" if heading == "anchors" else "right")
    for row in found.compared:
        covered = [f"{value:.1%}" for value in (row.coverage.at_50, row.coverage.at_40) if value is not None]
        table.add_row(f"{row.image_size}", row.anchors.name, f"{row.anchors.sizes[0]:g}", *covered)
    console.print()
    console.print(table)
    sizes = " and ".join(f"{size} on a {device.upper()}" for device, (size, _) in found.suggested.items())
    console.print(f"\nshortest side that training from scratch takes: {sizes}".replace("CUDA", "GPU"))
