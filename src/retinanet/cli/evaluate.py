"""`retinanet evaluate MODEL DATA`, or `retinanet evaluate --detections FILE DATA`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from retinanet.errors import ConfigError, DataError
from retinanet.folders import folders_among, new_folder, write_json
from retinanet.training.hints import OPTIONAL, OPTIONAL_FOLDER, Flag, shown

if TYPE_CHECKING:
    from retinanet.data import Dataset


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Judge a model on a split of DATA by COCO's figures; or any detector, by its COCO results file."""

    inputs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[MODEL] DATA", help_behavior_hint="(required)"),
    ]
    """MODEL is a run, model directory or file; with --detections only DATA is given."""
    detections: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=shown)] = None
    """COCO results file to judge instead of a model; needs no image files."""
    split: Annotated[str, tyro.conf.arg(metavar="NAME")] = "val"
    """Split of DATA."""
    output: Annotated[str | None, OPTIONAL_FOLDER] = None
    """New folder for metrics.json and, of a model, detections.json; runs/evaluate-N by default."""
    max_detections: Annotated[int | None, OPTIONAL] = None
    """Detections kept an image, and COCO's maxDets; the model's own cap by default, 100 for --detections."""
    batch_size: Annotated[int | None, OPTIONAL] = None
    """Images that meet the network together."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """auto: bf16 where the device computes it natively."""
    image_root: Annotated[str | None, OPTIONAL_FOLDER] = None
    """Folder of the images, where it is another than the format says; links may lead there, nowhere else."""
    box_format: Literal["auto", "xyxy", "xywh"] = "auto"
    """How boxes of a Hugging Face data set are written; auto takes what they prove."""
    strict: Flag = False
    """Refuse a data set of which anything has to be repaired or dropped."""
    json: Flag = False
    """Print metrics.json instead of the table."""

    def run(self) -> int:
        for name in ("max_detections", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} needs 1 or more; got {value}")
        self._check_inputs()
        if self.detections and (
            self.batch_size is not None or (self.device, self.precision) != ("auto", "fp32")
        ):
            raise ConfigError("--batch-size, --device and --precision are a model's; --detections runs none")
        return self._judge_file(self.detections) if self.detections else self._judge_model()

    def _check_inputs(self) -> None:
        form = "evaluate --detections FILE DATA" if self.detections else "evaluate MODEL DATA"
        if len(self.inputs) == (1 if self.detections else 2):
            return
        if not self.inputs:
            problem = "DATA is missing" if self.detections else "MODEL and DATA are missing"
        elif len(self.inputs) == 1:
            only = self.inputs[0]
            is_data = _is_data_set(only)
            problem = (
                f"{'MODEL' if is_data else 'DATA'} is missing, {only} is the {'DATA' if is_data else 'MODEL'}"
            )
        else:
            problem = f"got {len(self.inputs)} paths: {', '.join(self.inputs)}"
        raise ConfigError(f"retinanet {form} is required; {problem}")

    def _open(self, data: str, images: Literal["required", "absent"] = "required") -> Dataset:
        from retinanet.data import open_dataset

        return open_dataset(
            data,
            self.split,
            images=images,
            image_root=self.image_root,
            box_format=self.box_format,
            strict=self.strict,
        )

    def _judge_model(self) -> int:
        from rich.console import Console
        from rich.progress import Progress

        from retinanet.checkpoint import load_model
        from retinanet.data import read_as
        from retinanet.evaluation import write_results
        from retinanet.inference import Detector, check_classes, validate

        model, data = self.inputs
        detector = Detector(
            load_model(model),
            device=self.device,
            precision=self.precision,
            max_detections=self.max_detections,
        )
        dataset = self._open(data)
        print(read_as(dataset), file=sys.stderr)
        check_classes(detector, dataset)
        folder = new_folder(self.output, "evaluate", outside=folders_among(data))
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("evaluate", total=len(dataset))
            found = validate(
                detector,
                dataset,
                batch_size=self.batch_size,
                progress=lambda done: progress.update(task, completed=done),
            )
        # A results file speaks the data set's ids, whatever ids the model was trained with.
        results = [one.in_classes(dataset.classes) for one in found.detections]
        write_results(folder / "detections.json", results, dataset.image_ids.tolist())
        write_json(folder / "metrics.json", found.metrics.to_json())
        if found.capped:
            console.print(
                f"{found.capped} images reached the cap of {detector.max_detections} detections; "
                "--max-detections N raises it",
                highlight=False,
            )
        for failure in found.failed.values():
            print(f"retinanet: left out: {failure}", file=sys.stderr)
        self._show(found.metrics.to_json(), found.metrics.table())
        print(f"written to {folder}", file=sys.stderr)
        return 1 if found.failed else 0

    def _judge_file(self, results: str) -> int:
        from retinanet.data import read_as
        from retinanet.evaluation import evaluate_detections, read_results

        dataset = self._open(self.inputs[0], images="absent")
        print(read_as(dataset), file=sys.stderr)
        sizes = [dataset.size(i) for i in range(len(dataset))]
        ids = dataset.image_ids.tolist()
        found = read_results(results, image_ids=ids, sizes=sizes, classes=dataset.classes)
        folder = new_folder(self.output, "evaluate", outside=folders_among(self.inputs[0]))
        metrics = evaluate_detections(
            [dataset.ground_truth(i) for i in range(len(dataset))],
            found,
            dataset.classes,
            max_detections=self.max_detections or 100,
        )
        write_json(folder / "metrics.json", metrics.to_json())
        self._show(metrics.to_json(), metrics.table())
        print(f"written to {folder}", file=sys.stderr)
        return 0

    def _show(self, metrics: dict[str, object], table: str) -> None:
        print(json.dumps(metrics, indent=2) if self.json else table)


def _is_data_set(path: str) -> bool:
    from retinanet.data import available_splits

    try:
        available_splits(path)
    except DataError:
        return False
    return True
