"""Anchors fitted to the objects of a data set: base sizes of the levels, scales and ratios.

What is maximised is the share of objects whose best anchor reaches IoU 0.5 on the real grid (`data.coverage`), the
mean over the classes, as AP counts every class alike; among equals the higher mean IoU of the best anchors wins. The
optimiser is SciPy's differential evolution: a share has no gradient, and many local optima.

Reference: Storn and Price, "Differential Evolution", Journal of Global Optimization 11, 1997.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import differential_evolution

from retinanet.anchors import AnchorSpec
from retinanet.data.coverage import NetworkObjects, distances
from retinanet.errors import ConfigError, DataError
from retinanet.records import Float32Array, Int64Array

Levels: TypeAlias = Literal["doubling", "free"]

# Objects that the optimiser looks at: with many classes as many of each as LEAST_OF_CLASS, while all stay below MOST.
SAMPLE, LEAST_OF_CLASS, MOST = 1500, 50, 6000
# What the mean IoU weighs beside the share: it decides between anchors that reach as many objects.
TIE_BREAK = 0.01
GENERATIONS, POPULATION, TOLERANCE = 60, 12, 1e-3
MOST_PER_LOCATION = 36


@dataclass(frozen=True, eq=False)
class _Sample:
    """Objects in the form that an evaluation needs, the objects on the last axis.

    Args:
        sides: `[2, n]` width and height.
        reach: `[L, 2, n]` half a side less the distance from the nearest location.
        weights: `[n]`, those of a class equal, of every class summing to the same, all to 1.
    """

    sides: Float32Array
    reach: Float32Array
    weights: Float32Array


def fit_anchors(
    usual: AnchorSpec,
    objects: NetworkObjects,
    labels: Int64Array,
    *,
    per_location: int | None = None,
    levels: Levels = "doubling",
    seed: int = 0,
) -> AnchorSpec:
    """Return `usual` with the sizes, scales and ratios that reach most objects; equal input gives equal anchors.

    Never worse than `usual` on the sample it looks at, where `per_location` is that of `usual`.

    Args:
        labels: `[M]` class index of each object.
        per_location: anchors a location, scales times ratios. As many as `usual` has when None.
        levels: "doubling" makes each level's anchors twice as large as those of the level below; "free" lets them grow
            by any factor from 1 to 4, each level its own.

    Raises:
        ConfigError: an impossible number of anchors.
        DataError: there are no objects to fit to.
    """
    count = usual.per_location if per_location is None else per_location
    if not 1 <= count <= MOST_PER_LOCATION:
        raise ConfigError(f"fit_anchors needs 1 to {MOST_PER_LOCATION} anchors a location; got {count}")
    if not len(objects):
        raise DataError("anchors are fitted to objects; the data set has none")
    sample = _sample(usual, objects, labels)
    choices = [_fit(usual, sample, scales, ratios, levels, seed) for scales, ratios in _splits(count)]
    if count == usual.per_location:
        choices.append(usual)
    return max(choices, key=lambda spec: _gain(sample, spec))


def _splits(count: int) -> list[tuple[int, int]]:
    """Return the (scales, ratios) whose product is `count` and which are most alike: many of one alone fit worse.

    >>> _splits(9), _splits(12)
    ([(3, 3)], [(3, 4), (4, 3)])
    """
    pairs = [(scales, count // scales) for scales in range(1, count + 1) if count % scales == 0]
    nearest = min(max(pair) / min(pair) for pair in pairs)
    return [pair for pair in pairs if max(pair) / min(pair) == nearest]


def _sample(spec: AnchorSpec, objects: NetworkObjects, labels: Int64Array) -> _Sample:
    present = np.unique(labels)
    most = max(SAMPLE // len(present), min(LEAST_OF_CLASS, MOST // len(present)), 1)
    chosen, weights = [], []
    for label in present:
        own = np.flatnonzero(labels == label)
        own = own[np.linspace(0, len(own) - 1, min(most, len(own))).astype(int)]
        chosen.append(own)
        weights.append(np.full(len(own), 1 / len(own) / len(present), np.float32))
    rows = np.concatenate(chosen)
    some = NetworkObjects(objects.boxes[rows], objects.padded[rows], objects.rows[rows])
    sides = np.ascontiguousarray((some.boxes[:, 2:] - some.boxes[:, :2]).T)
    away = np.stack([distances(spec, level, some).T for level in range(len(spec.sizes))])
    reach = (sides / 2 - away).astype(np.float32)
    return _Sample(sides, reach, np.concatenate(weights))


def _fit(
    usual: AnchorSpec, sample: _Sample, scales: int, ratios: int, levels: Levels, seed: int
) -> AnchorSpec:
    """Return the best anchors of that many scales and ratios."""
    growths = len(usual.sizes) - 1
    sides = np.log2(np.sqrt(sample.sides.prod(axis=0)))
    smallest, largest = np.quantile(sides, (0.01, 0.99))
    slants = np.log2(sample.sides[1] / sample.sides[0])
    widest = float(np.clip(np.quantile(np.abs(slants), 0.99) + 0.5, 1.1, 4.0))
    bounds = [(min(smallest - 1, 3.0), max(largest, 5.5))]
    bounds += [(0.0, 1.0 if scales > 2 else 1.5)] * (scales - 1)
    bounds += [(-widest, widest)] * ratios
    if levels == "free":
        bounds += [(0.0, 2.0)] * growths

    def anchors(values: NDArray[np.float64]) -> AnchorSpec:
        return _anchors(usual, values, scales, ratios, levels)

    def lacking(values: NDArray[np.float64]) -> float:
        return -_gain(sample, anchors(values))

    start = None
    if (scales, ratios) == (len(usual.scales), len(usual.ratios)):
        start = _values(usual, levels)
        bounds = [(min(low, at), max(high, at)) for (low, high), at in zip(bounds, start, strict=True)]
    found = differential_evolution(
        lacking,
        bounds,
        x0=start,
        seed=seed,
        maxiter=GENERATIONS,
        popsize=POPULATION,
        tol=TOLERANCE,
        polish=False,
    )
    return _rounded(anchors(found.x))


def _anchors(
    usual: AnchorSpec, values: NDArray[np.float64], scales: int, ratios: int, levels: Levels
) -> AnchorSpec:
    """Return the anchors of an optimiser's values, base-2 logarithms all: the first size, steps of the scales, ratios,
    and growth from level to level.
    """
    steps, slants = values[1:scales], values[scales : scales + ratios]
    growth: NDArray[np.float64] = np.ones(len(usual.sizes) - 1)
    if levels == "free":
        growth = values[scales + ratios :]
    return replace(
        usual,
        sizes=tuple((2 ** (values[0] + np.cumsum([0.0, *growth]))).tolist()),
        scales=tuple((2 ** np.cumsum([0.0, *steps])).tolist()),
        ratios=tuple((2 ** np.sort(slants)).tolist()),
    )


def _values(spec: AnchorSpec, levels: Levels) -> NDArray[np.float64]:
    """Return the optimiser's values of anchors, as far as it can say them."""
    sizes, scales = np.log2(spec.sizes), np.log2(sorted(spec.scales))
    values = [sizes[0] + scales[0], *np.diff(scales), *np.log2(spec.ratios)]
    return np.array([*values, *np.diff(sizes)] if levels == "free" else values)


def _rounded(spec: AnchorSpec) -> AnchorSpec:
    """Return anchors whose numbers a person can read: sizes in tenths of a pixel, the rest in hundredths."""
    return replace(
        spec,
        sizes=tuple(max(0.1, round(size, 1)) for size in spec.sizes),
        scales=tuple(round(scale, 2) for scale in spec.scales),
        ratios=tuple(max(0.01, round(ratio, 2)) for ratio in spec.ratios),
    )


def _gain(sample: _Sample, spec: AnchorSpec) -> float:
    """Return what is maximised; `coverage.overlaps_of_shapes`, all levels at once and the objects on the last axis."""
    areas = np.outer(spec.sizes, spec.scales).astype(np.float32)
    slants = np.sqrt(spec.ratios).astype(np.float32)
    widths = (areas[:, :, None] / slants).reshape(len(spec.sizes), -1)
    heights = (areas[:, :, None] * slants).reshape(len(spec.sizes), -1)
    shared = None
    for axis, lengths in enumerate((widths, heights)):
        overlap = sample.reach[:, axis, None] + lengths[:, :, None] / 2  # [L, A, n]
        np.minimum(overlap, sample.sides[axis], out=overlap)
        np.minimum(overlap, lengths[:, :, None], out=overlap)
        np.maximum(overlap, 0, out=overlap)
        shared = overlap if shared is None else np.multiply(shared, overlap, out=shared)
    assert shared is not None
    union = sample.sides.prod(axis=0) + (widths * heights)[:, :, None] - shared
    best = np.divide(shared, union, out=shared).max(axis=(0, 1))
    return float(sample.weights @ (best >= 0.5) + TIE_BREAK * (sample.weights @ best))
