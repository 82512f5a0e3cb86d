"""The records of a data check: what was found, as plain values that a page, a JSON file and sentences are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinanet.anchors import AnchorSpec
from retinanet.data import Fault
from retinanet.data.coverage import Coverage


@dataclass(frozen=True)
class FaultCount:
    """How many faults of a kind a split has ("" for the whole set), of which perhaps only the first are kept."""

    split: str
    kind: str
    action: str
    count: int


@dataclass(frozen=True)
class SplitCounts:
    """How much there is. `objects` are boxes that count, `ignored` those that do not (crowds, difficult ones);
    `class_ids` are the data set's own, in the order of `per_class`.
    """

    split: str
    images: int
    unreadable: int
    empty: int
    objects: int
    ignored: int
    per_class: Mapping[str, int]
    class_ids: tuple[int, ...]
    fullest: int
    fullest_file: str


@dataclass(frozen=True)
class Leak:
    """An image of one split that is equal to one of another, or looks like it (`bits` of 64 differ)."""

    split_a: str
    file_a: str
    split_b: str
    file_b: str
    equal: bool
    bits: int


@dataclass(frozen=True)
class Double:
    """An image of a split whose file has the same bytes as an earlier one of it."""

    split: str
    file: str
    again: str


@dataclass(frozen=True)
class Stored:
    """How some of the images are stored, how many, and what becomes of their pixels."""

    how: str
    images: int
    becomes: str


@dataclass(frozen=True)
class Shapes:
    """Anchors as numbers, and which they are."""

    name: str
    sizes: tuple[float, ...]
    scales: tuple[float, ...]
    ratios: tuple[float, ...]

    @classmethod
    def of(cls, name: str, spec: AnchorSpec) -> Shapes:
        return cls(name, spec.sizes, spec.scales, spec.ratios)


@dataclass(frozen=True)
class CoverageAt:
    """The coverage of some anchors at a shortest side of the network input."""

    image_size: int
    anchors: Shapes
    coverage: Coverage


@dataclass(frozen=True)
class ClassFit:
    """How the anchors suit a class; shares of its objects that are smaller than the smallest anchor, larger than the
    largest, and longer or flatter than any by a factor of 1.5.
    """

    coverage: Coverage
    too_small: float
    too_large: float
    too_long: float


@dataclass(frozen=True)
class Positives:
    """Anchors an image that learn to find an object, on average and at least, of how many in all."""

    mean: float
    least: int
    anchors: float


@dataclass(frozen=True)
class AnchorFindings:
    """Whether the network has boxes to start from, at the size that was asked for or that training would take."""

    split: str
    image_size: int
    max_size: int
    why: str
    anchors: Shapes
    overall: Coverage
    per_class: Mapping[str, ClassFit]
    per_size: Mapping[str, Coverage]
    compared: tuple[CoverageAt, ...]
    positives: Positives
    suggested: Mapping[str, tuple[int, str]]


@dataclass(frozen=True)
class Spread:
    """Where a measure lies: quantiles of it over all splits."""

    least: float
    quarter: float
    half: float
    three_quarters: float
    most: float

    @classmethod
    def of(cls, values: NDArray[Any]) -> Spread | None:
        """Return the quantiles, None of nothing."""
        return cls(*np.quantile(values, (0, 0.25, 0.5, 0.75, 1)).tolist()) if len(values) else None


@dataclass(frozen=True)
class Findings:
    """Everything. `faults` are pairs of a split's name ("" for the whole set) and a fault, of very many the first;
    `fault_counts` count them all. `refused` splits could not be read at all, with the reason. `one_set`: the data set
    has no splits. `label_frames` count what the labels of EXIF-turned images follow, see
    `retinanet.data.auditing.label_frames`.
    """

    data: str
    one_set: bool
    classes: tuple[str, ...]
    splits: tuple[SplitCounts, ...]
    refused: Mapping[str, str]
    faults: tuple[tuple[str, Fault], ...]
    fault_counts: tuple[FaultCount, ...]
    leaks: tuple[Leak, ...]
    doubles: tuple[Double, ...]
    stored: tuple[Stored, ...]
    label_frames: Mapping[str, int]
    spreads: Mapping[str, Spread | None]
    anchors: AnchorFindings | None

    @property
    def fault_total(self) -> int:
        """How many faults there are, kept or only counted."""
        return sum(of.count for of in self.fault_counts)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        plain = dataclasses.asdict(self)
        plain["faults"] = [{"split": split, **dataclasses.asdict(fault)} for split, fault in self.faults]
        return plain
