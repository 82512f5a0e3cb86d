"""What several seeds say: means with intervals, and whether the paper's order of rows is found again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

Float64Array: TypeAlias = NDArray[np.float64]

DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval; None of a single value."""

    mean: float
    half: float | None

    def percent(self) -> str:
        """Return it in percent, as AP is printed."""
        spread = "" if self.half is None else f" ± {100 * self.half:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of seeds and its 95 % interval by Student's t: t s / sqrt(n)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, None)
    spread = float(np.std(values, ddof=1))
    return Interval(mean, float(t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values)))


@dataclass(frozen=True)
class Difference:
    """The difference of two means and its 95 % interval, by Welch's t (variances may differ); None with one seed."""

    mean: float
    low: float | None
    high: float | None

    @property
    def above(self) -> bool | None:
        """Whether the first is above the second; None where the interval holds 0 or nobody knows it."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return None
        return self.mean > 0

    def cells(self) -> tuple[str, str]:
        """Return the difference and its interval, in points of AP."""
        known = (
            ""
            if self.low is None or self.high is None
            else f"{100 * self.low:+z.1f} to {100 * self.high:+z.1f}"
        )
        return f"{100 * self.mean:+z.1f}", known

    def verdict(self, published: float | None) -> str:
        """Return what the seeds say of the direction of a published difference; None: which is not published."""
        if self.low is None:
            return "of one seed"
        if self.above is None:
            return "not told apart"
        if not published:
            return "above" if self.above else "below"
        return "as published" if self.above == (published > 0) else "the other way"


def difference(first: Sequence[float], second: Sequence[float], *, comparisons: int = 1) -> Difference:
    """Return by how much the mean of the first seeds is above that of the second.

    Args:
        comparisons: how many are made at once, of which none is to be wrong in 95 % (Bonferroni).
    """
    mean = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return Difference(mean, None, None)
    parts = [float(np.var(seeds, ddof=1)) / len(seeds) for seeds in (first, second)]
    if not sum(parts):
        return Difference(mean, mean, mean)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(seeds) - 1) for part, seeds in zip(parts, (first, second), strict=True)
    )
    half = float(t.ppf(1 - 0.025 / comparisons, freedom)) * math.sqrt(sum(parts))
    return Difference(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Order:
    """Kendall's tau-b between published and measured AP of the rows: 1 is the same order where no two rows are equal,
    -1 the reverse, None without any order.

    `low` and `high` hold 95 % of what it is when every row's mean is drawn again from Student's distribution around
    it, which is what the seeds leave open, no test against an order drawn by lot; None where a row has one seed.
    `same` says whether the means stand in the published order, where that is strict.
    """

    tau: float | None
    low: float | None
    high: float | None
    same: bool
    rows: int

    def in_words(self) -> str:
        """Return a sentence."""
        if self.tau is None:
            return f"The {self.rows} measured rows are all alike, and have no order."
        if self.low is None or self.high is None:
            known = "a row has one seed, so how certain that is is unknown"
            verdict = "are in the paper's order" if self.same else "are not in the paper's order"
            return f"The means of the rows {verdict}: Kendall's tau over {self.rows} rows is {self.tau:.2f} ({known})."
        known = f"{self.low:.2f} to {self.high:.2f} when the means are drawn again within their uncertainty"
        if self.low > 0:
            verdict = "is reproduced" if self.same else "is reproduced in part"
        elif self.high < 0:
            verdict = "is reversed" if self.tau == -1 else "is reversed in part"
        else:
            verdict = "is neither confirmed nor refuted by these seeds"
        tau = f"Kendall's tau over {self.rows} rows is {self.tau:.2f}"
        return f"The order of the paper's rows {verdict}: {tau} ({known})."


def compare_order(published: Sequence[float], measured: Sequence[Sequence[float]]) -> Order:
    """Compare the order of rows; `measured` holds a row's seeds."""
    means = np.array([np.mean(seeds) for seeds in measured])
    paper = np.array(published)
    pairs = [(i, j) for i in range(len(paper)) for j in range(len(paper)) if paper[i] > paper[j]]
    same = bool(pairs) and all(means[i] > means[j] for i, j in pairs)
    found = float(_tau(paper, means[None])[0])
    tau = None if math.isnan(found) else found
    if tau is None or any(len(seeds) < 2 for seeds in measured):
        return Order(tau, None, None, same, len(paper))
    random = np.random.default_rng(0)
    counts = np.array([len(seeds) for seeds in measured])
    errors = np.array([np.std(seeds, ddof=1) for seeds in measured]) / np.sqrt(counts)
    drawn = means + errors * random.standard_t(counts - 1, size=(DRAWS, len(means)))
    low, high = (float(q) for q in np.nanquantile(_tau(paper, drawn), (0.025, 0.975)))
    return Order(tau, low, high, same, len(paper))


def _tau(paper: Float64Array, means: Float64Array) -> Float64Array:
    """Return tau-b for each of N lists of means `[N, rows]`: concordant minus discordant pairs, divided by the root of
    the pairs not tied on one side times those not tied on the other; NaN where one side has no order.
    """
    first, second = np.triu_indices(len(paper), 1)
    a, b = np.sign(paper[first] - paper[second]), np.sign(means[:, first] - means[:, second])
    with np.errstate(invalid="ignore"):
        tau: Float64Array = (a * b).sum(axis=1) / np.sqrt(np.abs(a).sum() * np.abs(b).sum(axis=1))
    return tau
