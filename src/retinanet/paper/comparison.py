"""What several seeds say: means with intervals, and whether the paper's order of rows is found again.

Three seeds say little of how far seeds spread: an interval from them alone is 4.3 standard errors on either side. Rows
of one table differ in a loss or a size, and their seeds are taken to spread alike, so that all of them say how far.
"""

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
class Spread:
    """How far single seeds are from the mean of their row: standard deviation, and its degrees of freedom."""

    deviation: float
    freedom: int

    def half(self, shares: float, *, comparisons: int = 1) -> float:
        """Return half the width of a 95 % interval by Student's t of what has `shares` times the variance of a seed:
        1 / n for a mean of n, 1 / n + 1 / m for the difference of two.
        """
        return float(t.ppf(1 - 0.025 / comparisons, self.freedom)) * self.deviation * math.sqrt(shares)


def spread_of(rows: Sequence[Sequence[float]]) -> Spread | None:
    """Return how far seeds spread around the means of their rows, the same in all rows; None where none has two.

    s^2 = sum over rows and seeds of (x - mean of the row)^2 / sum over rows of (n - 1)
    """
    freedom = sum(len(seeds) - 1 for seeds in rows if seeds)
    if not freedom:
        return None
    squares = sum(float(np.var(seeds)) * len(seeds) for seeds in rows if seeds)
    return Spread(math.sqrt(squares / freedom), freedom)


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval; None of a single value."""

    mean: float
    half: float | None

    def percent(self) -> str:
        """Return it in percent, as AP is printed."""
        spread = "" if self.half is None else f" ± {100 * self.half:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


def interval(values: Sequence[float], spread: Spread | None = None) -> Interval:
    """Return the mean of seeds and its 95 % interval by Student's t: t s / sqrt(n).

    Args:
        spread: of the table's rows together; without it that of these seeds.
    """
    known = spread or spread_of([values])
    return Interval(float(np.mean(values)), None if known is None else known.half(1 / len(values)))


@dataclass(frozen=True)
class Difference:
    """The difference of two means and its 95 % interval; None where no seeds say how far they spread."""

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


def difference(
    first: Sequence[float], second: Sequence[float], *, comparisons: int = 1, spread: Spread | None = None
) -> Difference:
    """Return by how much the mean of the first seeds is above that of the second.

    Args:
        comparisons: how many are made at once, of which none is to be wrong in 95 % (Bonferroni).
        spread: of the table's rows together; without it that of each of the two, which may not be the same (Welch).
    """
    mean = float(np.mean(first) - np.mean(second))
    if spread is not None:
        half = spread.half(1 / len(first) + 1 / len(second), comparisons=comparisons)
        return Difference(mean, mean - half, mean + half)
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

    `low` and `high` hold 95 % of what it is when the rows' means are drawn again from Student's distribution around
    them, which is what the seeds leave open, no test against an order drawn by lot; None where no row has two seeds.
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
            known = "no row has two seeds, so how certain that is is unknown"
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


def compare_order(
    published: Sequence[float], measured: Sequence[Sequence[float]], spread: Spread | None = None
) -> Order:
    """Compare the order of rows; `measured` holds a row's seeds.

    Args:
        spread: of seeds; without it that of these rows together. Where all seeds of a row found the same, as when all
            diverged, its mean is certain.
    """
    means = np.array([np.mean(seeds) for seeds in measured])
    paper = np.array(published)
    pairs = [(i, j) for i in range(len(paper)) for j in range(len(paper)) if paper[i] > paper[j]]
    same = bool(pairs) and all(means[i] > means[j] for i, j in pairs)
    found = float(_tau(paper, means[None])[0])
    tau = None if math.isnan(found) else found
    spread = spread or spread_of(measured)
    if tau is None or spread is None:
        return Order(tau, None, None, same, len(paper))
    random = np.random.default_rng(0)
    errors = np.array([
        0.0 if len(seeds) > 1 and np.ptp(seeds) == 0 else spread.deviation / math.sqrt(len(seeds))
        for seeds in measured
    ])  # fmt: skip
    # Normal around the means, by a deviation that is itself known from so many degrees of freedom, one for all rows.
    wider = np.sqrt(spread.freedom / random.chisquare(spread.freedom, size=(DRAWS, 1)))
    drawn = means + errors * wider * random.standard_normal((DRAWS, len(means)))
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
