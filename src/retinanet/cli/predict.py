"""`retinanet predict MODEL PATHS...`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from retinanet.errors import ConfigError, ImageError
from retinanet.folders import new_folder
from retinanet.training.hints import OPTIONAL, OPTIONAL_FOLDER, Flag

if TYPE_CHECKING:
    from retinanet.records import Detections


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Find objects in images: detections.jsonl, one line an image, and pictures with --draw."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run, model directory or file."""
    paths: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATHS", help_behavior_hint="(required)")
    ]
    """Image files, and folders of them."""
    output: Annotated[str | None, OPTIONAL_FOLDER] = None
    """New folder; runs/predict-N by default."""
    draw: Flag = False
    """Also write each image with its boxes."""
    threshold: Annotated[float | None, OPTIONAL] = None
    """Least score kept; by default each class's best-F1 threshold of validation, else 0.3."""
    max_detections: Annotated[int | None, OPTIONAL] = None
    """Detections kept an image; the model's own cap by default."""
    batch_size: Annotated[int | None, OPTIONAL] = None
    """Images that meet the network together."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """auto: bf16 where the device computes it natively."""

    def run(self) -> int:
        for name in ("max_detections", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} needs 1 or more; got {value}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ConfigError(f"--threshold needs a number in [0, 1]; got {self.threshold}")
        files = _images(self.paths)

        from retinanet.checkpoint import load_model
        from retinanet.inference import Detector

        detector = Detector(
            load_model(self.model),
            device=self.device,
            precision=self.precision,
            max_detections=self.max_detections,
        )
        folder = new_folder(self.output, "predict")
        failures = boxes = 0
        with (folder / "detections.jsonl").open("w", encoding="utf-8") as lines:
            found = detector.detect(files, threshold=self.threshold, batch_size=self.batch_size)
            for file, result in zip(files, found, strict=True):
                if isinstance(result, ImageError):
                    failures += 1
                    print(f"retinanet: {result}", file=sys.stderr)
                    line: dict[str, object] = {"file": str(file), "error": str(result)}
                else:
                    boxes += len(result)
                    line = record(file, result)
                    if self.draw:
                        _draw(folder / "images", file, result)
                lines.write(json.dumps(line) + "\n")
                lines.flush()
        print(
            f"{boxes} detections in {len(files) - failures} of {len(files)} images, written to {folder}",
            file=sys.stderr,
        )
        return 1 if failures else 0


def record(file: Path, found: Detections) -> dict[str, object]:
    """Return one line of detections.jsonl."""
    rows = zip(found.boxes, found.scores, found.names, found.category_ids, strict=True)
    return {
        "file": str(file),
        "width": found.width,
        "height": found.height,
        "detections": [
            {
                "box": [round(float(side), 2) for side in box],
                "score": round(float(score), 4),
                "label": name,
                "category_id": int(category),
            }
            for box, score, name, category in rows
        ],
    }


def _images(paths: tuple[str, ...]) -> list[Path]:
    from retinanet.data.image_files import is_image_name

    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if is_image_name(file.name))
            if not inside:
                raise ConfigError(f"predict needs image files; the folder {path} holds none")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise ConfigError(f"predict needs image files or folders; {path} does not exist")
    if not files:
        raise ConfigError("predict needs at least one image file or folder; none was given")
    return files


def _draw(folder: Path, file: Path, found: Detections) -> None:
    from retinanet.drawing import save_image

    folder.mkdir(exist_ok=True)
    place, number = folder / f"{file.stem}.jpg", 1
    while place.exists():  # files of equal name from different folders
        number += 1
        place = folder / f"{file.stem}-{number}.jpg"
    save_image(found.draw(file), place)
