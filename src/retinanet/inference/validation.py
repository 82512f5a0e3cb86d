"""A detector over a data set: used by training, `retinanet.evaluate` and the command line alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from retinanet.data import Dataset, open_dataset
from retinanet.errors import DataError, ImageError
from retinanet.evaluation import Metrics, choose_operating_points, evaluate_detections
from retinanet.inference.detector import Detector
from retinanet.processes import ALONE, Processes
from retinanet.records import Detections, OperatingPoints


@dataclass(frozen=True)
class Validation:
    """What a detector found in a data set, and how good that is.

    Args:
        metrics: COCO's figures over the images that could be read.
        detections: one an image of the data set; empty for an image that could not be read.
        operating_points: the best-F1 threshold of each class.
        failed: image file -> what was wrong with it. Such images are left out of the metrics.
        capped: images in which the cap on detections was reached.
    """

    metrics: Metrics
    detections: list[Detections]
    operating_points: OperatingPoints
    failed: dict[str, str]
    capped: int

    @property
    def ap(self) -> float | None:
        """COCO's AP, in [0, 1]; None where there is no ground truth."""
        return self.metrics.ap

    @property
    def per_class(self) -> dict[str, object]:
        """AP, AP50 and counts by class name."""
        return dict(self.metrics.per_class)


def validate(
    detector: Detector,
    dataset: Dataset,
    *,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
) -> Validation:
    """Run a detector over a data set at the spec's score threshold and judge what it finds.

    Classes of model and data set meet by name. `detector.max_detections` is the cap and COCO's maxDets.

    Args:
        progress: is told how many images this process has done.
        processes: each looks at every so many-th image, all at the same result: that of one process alone.

    Raises:
        DataError: model and data set have no class in common, or no image could be read.
    """
    check_classes(detector, dataset)
    mine = range(processes.rank, len(dataset), processes.count)
    shares = processes.gathered(_detect(detector, dataset, mine, batch_size, progress))
    found: list[Detections] = []
    failed: dict[str, str] = {}
    for i in range(len(dataset)):
        one = shares[i % processes.count][i // processes.count]
        if isinstance(one, str):
            failed[str(dataset.files[i])] = one
            width, height = dataset.size(i)
            one = Detections.none(detector.spec.classes, width, height)
        found.append(one)
    readable = [i for i in range(len(dataset)) if str(dataset.files[i]) not in failed]
    if not readable:
        raise DataError(
            f"evaluation needs images that can be read; none of {len(dataset)} can. {failed.popitem()[1]}"
        )
    truths, judged = [dataset.ground_truth(i) for i in readable], [found[i] for i in readable]
    return Validation(
        metrics=evaluate_detections(truths, judged, dataset.classes, max_detections=detector.max_detections),
        detections=found,
        operating_points=choose_operating_points(truths, judged, dataset.classes),
        failed=failed,
        capped=sum(len(one) >= detector.max_detections for one in judged),
    )


def _detect(
    detector: Detector,
    dataset: Dataset,
    which: Sequence[int],
    batch_size: int | None,
    progress: Callable[[int], None] | None,
) -> list[Detections | str]:
    """Return what is found in some images, or what is wrong with one."""
    found: list[Detections | str] = []
    results = detector.detect_all((dataset.path(i) for i in which), batch_size=batch_size)
    for i, one in zip(which, results, strict=True):
        try:
            if isinstance(one, ImageError):
                raise one
            dataset.require_size(i, one.width, one.height)
            found.append(one)
        except ImageError as error:
            found.append(str(error))
        if progress is not None:
            progress(len(found))
    return found


def check_classes(detector: Detector, dataset: Dataset) -> None:
    """Refuse a data set that shares no class name with the model: every figure would be 0 and say nothing."""
    known, given = detector.spec.classes.names, dataset.classes.names
    if not set(known) & set(given):
        raise DataError(
            f"the model and {dataset.name} need classes in common; the model has {_few(known)}, "
            f"the data set {_few(given)}"
        )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def evaluate(
    detector: Detector, data: str | Path | Dataset, *, split: str = "val", batch_size: int | None = None
) -> Validation:
    """Judge a detector on a split of a data set: `retinanet.evaluate(detector, "data/").ap`."""
    dataset = data if isinstance(data, Dataset) else open_dataset(data, split)
    return validate(detector, dataset, batch_size=batch_size)
