"""Compose what `retinanet data check` finds: counts, faults, leakage, and whether anchors fit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from retinanet.anchors import AnchorSpec
from retinanet.batches import MatchState
from retinanet.data import Dataset, Fault
from retinanet.data.anchor_fit import fit_anchors
from retinanet.data.auditing import ImageFacts, near_duplicates
from retinanet.data.coverage import (
    Coverage,
    NetworkObjects,
    best_overlaps,
    coverage_by_class,
    coverage_by_size,
    objects_in_network,
)
from retinanet.data.faults import FAULTS_KEPT
from retinanet.data.near_duplicates import equal_files
from retinanet.images import Geometry, Preprocessing
from retinanet.objective import Matching
from retinanet.records import Ignore
from retinanet.training.configuration import TrainingOptions
from retinanet.training.findings import (
    AnchorFindings,
    ClassFit,
    CoverageAt,
    Double,
    FaultCount,
    Findings,
    Leak,
    Positives,
    Shapes,
    SplitCounts,
    Spread,
)
from retinanet.training.objectives import matching_of
from retinanet.training.recipes import Recipe, small
from retinanet.training.sizing import (
    anchor_choices,
    anchors_at,
    choose_anchors,
    choose_batch,
    choose_preprocessing,
)
from retinanet.training.storage import images_as_stored, label_frames_of

# Shortest sides that are looked at beside the one that training would take.
SIDES = (256, 512)
# Objects and images that speak for all of a data set.
MOST_OBJECTS, MOST_IMAGES = 200_000, 64


@dataclass(frozen=True, eq=False)
class AuditedSplit:
    """A split that was read and whose images were decoded; `faults` are those of decoding."""

    dataset: Dataset
    facts: Sequence[ImageFacts | None]
    faults: tuple[Fault, ...]

    @property
    def name(self) -> str:
        return self.dataset.split

    def kept_faults(self) -> tuple[Fault, ...]:
        """Return the faults of reading and of decoding, of very many the first of either."""
        return (*self.dataset.faults, *self.faults[:FAULTS_KEPT])

    def fault_counts(self) -> Counter[tuple[str, str]]:
        """Count all of them by (kind, action)."""
        return Counter(self.dataset.fault_counts) + _by_kind(self.faults)


@dataclass(frozen=True)
class Frame:
    """The input size, the anchors and their matching that a data set is judged by; `choices` are the anchors that
    training chooses from."""

    preprocessing: Preprocessing
    matching: Matching
    anchors: AnchorSpec
    usual: AnchorSpec
    choices: tuple[AnchorSpec, ...]
    why: str

    def name_of(self, anchors: AnchorSpec) -> str:
        """Return what anchors are called that training takes at some size."""
        if len(self.choices) == 1:
            return "asked for"
        return "usual" if anchors == self.usual else "training's choice"


def check(
    data: str,
    splits: Sequence[AuditedSplit],
    *,
    refused: Mapping[str, str],
    others: Sequence[Fault],
    frame: Frame | None,
    suggested: Mapping[str, tuple[int, str]],
    one_set: bool = False,
) -> Findings:
    """Compose what was found.

    Args:
        refused: splits that could not be read, and why.
        others: faults that belong to no split.
        frame: what anchors are judged by, on the split that is trained on; None where that has no object.
        one_set: the data set has no splits.
    """
    trained = of_training(splits)
    anchors = None if frame is None else _anchor_findings(trained.dataset, frame, suggested)
    faults = [(split.name, fault) for split in splits for fault in split.kept_faults()]
    counts = {**{split.name: split.fault_counts() for split in splits}, "": _by_kind(others)}
    decoded = [(split.dataset, split.facts) for split in splits]
    frames = label_frames_of(decoded)
    return Findings(
        data=data,
        one_set=one_set,
        classes=trained.dataset.classes.names,
        splits=tuple(_counts(split) for split in splits),
        refused=dict(refused),
        faults=(*faults, *(("", fault) for fault in others[:FAULTS_KEPT])),
        fault_counts=tuple(
            FaultCount(split, *of, number) for split, found in counts.items() for of, number in found.items()
        ),
        leaks=tuple(leak for a, b in combinations(splits, 2) for leak in _leaks(a, b)),
        doubles=tuple(double for split in splits for double in _doubles(split)),
        stored=images_as_stored(decoded, frames),
        label_frames=frames,
        spreads={name: Spread.of(values) for name, values in measures(splits).items()},
        anchors=anchors,
    )


def measures(splits: Sequence[AuditedSplit]) -> dict[str, NDArray[Any]]:
    """Return what there is to draw, over all splits: pixels of images and objects as annotated, height / width, and
    objects an image.
    """
    sets = [split.dataset for split in splits]
    widths, heights = (np.concatenate([getattr(one, side) for one in sets]) for side in ("widths", "heights"))
    boxes = np.concatenate([one.boxes[one.ignore == Ignore.NO] for one in sets])
    sides = boxes[:, 2:] - boxes[:, :2]
    return {
        "image_side": np.minimum(widths, heights),
        "image_ratio": heights / widths,
        "object_side": np.sqrt(sides.prod(axis=1)),
        "object_ratio": sides[:, 1] / sides[:, 0],
        "objects_per_image": np.concatenate([_objects_per_image(one) for one in sets]),
    }


def _objects_per_image(dataset: Dataset) -> NDArray[np.int64]:
    before = np.concatenate([[0], np.cumsum(dataset.ignore == Ignore.NO)])
    per_image: NDArray[np.int64] = np.diff(before[dataset.offsets])
    return per_image


def of_training(splits: Sequence[AuditedSplit]) -> AuditedSplit:
    """Return the split that is trained on: `train`, or else the first."""
    return next((split for split in splits if split.name == "train"), splits[0])


def frame_of(options: TrainingOptions, train: Dataset, device: str) -> Frame:
    """Return the input size and anchors that training from scratch would take with these options on a device."""
    target = torch.device(device)
    recipe = _with_sides(small(train.classes, "resnet18", target.type), options)
    choices = anchor_choices(options, recipe, of_model=False)
    reasons: list[tuple[str, str, str]] = []
    recipe = choose_batch(recipe, options, train, target, reasons, own=recipe.batch_size)
    preprocessing = choose_preprocessing(recipe, options, train, choices, target, reasons)
    why = reasons[-1][2]
    anchors = choose_anchors(options, train, choices, preprocessing, reasons, f"recipe {recipe.name}")
    return Frame(preprocessing, matching_of(recipe), anchors, recipe.model.anchors, tuple(choices), why)


def _with_sides(recipe: Recipe, options: TrainingOptions) -> Recipe:
    asked = {
        name: getattr(options, name)
        for name in ("image_size", "max_size")
        if getattr(options, name) is not None
    }
    return dataclasses.replace(recipe, **asked)


def _counts(split: AuditedSplit) -> SplitCounts:
    dataset = split.dataset
    is_object = dataset.ignore == Ignore.NO
    counts = np.bincount(dataset.labels[is_object], minlength=len(dataset.classes)).tolist()
    per_image = _objects_per_image(dataset)
    fullest = int(per_image.argmax())
    return SplitCounts(
        split=split.name,
        images=len(dataset),
        unreadable=sum(fact is None for fact in split.facts),
        empty=int((per_image == 0).sum()),
        objects=int(is_object.sum()),
        ignored=int((~is_object).sum()),
        per_class=dict(zip(dataset.classes.names, counts, strict=True)),
        class_ids=dataset.classes.ids,
        fullest=int(per_image[fullest]),
        fullest_file=str(dataset.files[fullest]),
    )


def _leaks(a: AuditedSplit, b: AuditedSplit) -> list[Leak]:
    return [
        Leak(
            a.name,
            str(a.dataset.files[pair.a]),
            b.name,
            str(b.dataset.files[pair.b]),
            pair.equal,
            pair.distance,
        )
        for pair in near_duplicates(a.facts, b.facts)
    ]


def _doubles(split: AuditedSplit) -> list[Double]:
    files = split.dataset.files
    return [Double(split.name, str(files[a]), str(files[b])) for a, b in equal_files(split.facts)]


def _by_kind(faults: Sequence[Fault]) -> Counter[tuple[str, str]]:
    return Counter((str(fault.kind), str(fault.action)) for fault in faults)


def _anchor_findings(
    train: Dataset, frame: Frame, suggested: Mapping[str, tuple[int, str]]
) -> AnchorFindings:
    objects = objects_in_network(train, frame.preprocessing, most=MOST_OBJECTS)
    overlaps = best_overlaps(frame.anchors, objects)
    by_class = coverage_by_class(train, objects.rows, overlaps)
    return AnchorFindings(
        split=train.split,
        image_size=frame.preprocessing.image_size,
        max_size=frame.preprocessing.max_size,
        why=frame.why,
        anchors=Shapes.of(frame.name_of(frame.anchors), frame.anchors),
        overall=Coverage.of(overlaps),
        per_class={name: _class_fit(train, objects, name, of, frame) for name, of in by_class.items()},
        per_size=coverage_by_size(train, objects.rows, overlaps),
        compared=tuple(_compared(train, frame)),
        positives=_positives(train, frame),
        suggested=dict(suggested),
    )


def _class_fit(
    train: Dataset, objects: NetworkObjects, name: str, coverage: Coverage, frame: Frame
) -> ClassFit:
    own = train.labels[objects.rows] == train.classes.names.index(name)
    if not own.any():
        return ClassFit(coverage, 0.0, 0.0, 0.0)
    sides = objects.boxes[own, 2:] - objects.boxes[own, :2]
    root, slant = np.sqrt(sides.prod(axis=1)), sides[:, 1] / sides[:, 0]
    spec = frame.anchors
    smallest, largest = min(spec.sizes) * min(spec.scales), max(spec.sizes) * max(spec.scales)
    longer = (slant > 1.5 * max(spec.ratios)) | (slant < min(spec.ratios) / 1.5)
    return ClassFit(
        coverage, float((root < smallest).mean()), float((root > largest).mean()), float(longer.mean())
    )


def _compared(train: Dataset, frame: Frame) -> list[CoverageAt]:
    """Return the coverage of the usual anchors, of those that training takes and of fitted ones at several sizes."""
    rows = []
    share = frame.preprocessing.max_size / frame.preprocessing.image_size
    for side in sorted({*SIDES, frame.preprocessing.image_size}):
        preprocessing = dataclasses.replace(
            frame.preprocessing, image_size=side, max_size=max(side, round(side * share))
        )
        objects = objects_in_network(train, preprocessing, most=MOST_OBJECTS)
        fitted = fit_anchors(frame.usual, objects, train.labels[objects.rows])
        # Training chooses anew at every size.
        taken = anchors_at(frame.choices, train, preprocessing).spec
        specs = {"usual": frame.usual, frame.name_of(taken): taken, "fitted": fitted}
        rows += [
            CoverageAt(side, Shapes.of(name, spec), Coverage.of(best_overlaps(spec, objects)))
            for name, spec in specs.items()
        ]
    return rows


def _positives(train: Dataset, frame: Frame) -> Positives:
    """Match anchors of some images, at equal distances in the data set, as training does."""
    found, total = [], []
    for index in np.unique(np.linspace(0, len(train) - 1, min(MOST_IMAGES, len(train))).astype(int)).tolist():
        truth, original = train.ground_truth(index), train.size(index)
        resized = frame.preprocessing.resized_size(*original)
        width, height = (
            -(-side // frame.preprocessing.divisor) * frame.preprocessing.divisor for side in resized
        )
        boxes = torch.from_numpy(Geometry(original, resized).to_network(truth.boxes))
        regions = torch.from_numpy(truth.ignore != Ignore.NO)
        state = frame.matching(frame.anchors, height, width, boxes[None], regions[None]).state
        found.append(int((state == MatchState.POSITIVE).sum()))
        total.append(state.shape[1])
    return Positives(float(np.mean(found)), min(found), float(np.mean(total)))
