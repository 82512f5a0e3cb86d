"""What several seeds say: means with intervals, and whether the paper's order of rows is found again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau, t

RESAMPLES = 2000


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
class Order:
    """Kendall's tau-b between published and measured AP of the rows: 1 is the same order, -1 the reverse.

    `low` and `high` hold 95 % of what it is when seeds are drawn again; None with one seed a row. `same` says
    whether the means stand in the published order, where that is strict.
    """

    tau: float
    low: float | None
    high: float | None
    same: bool
    rows: int

    def in_words(self) -> str:
        """Return a sentence."""
        if math.isnan(self.tau):
            return f"The {self.rows} measured rows are all alike, and have no order."
        known = "one seed a row, so its uncertainty is unknown"
        if self.low is not None and self.high is not None:
            known = f"{self.low:.2f} to {self.high:.2f} when seeds are drawn again"
        if self.same:
            verdict = "The order of the paper's rows is reproduced"
        elif self.low is not None and self.low > 0:
            verdict = "The order of the paper's rows is reproduced in part"
        else:
            verdict = "The order of the paper's rows is not reproduced"
        return f"{verdict}: Kendall's tau over {self.rows} rows is {self.tau:.2f} ({known})."


def compare_order(published: Sequence[float], measured: Sequence[Sequence[float]]) -> Order:
    """Compare the order of rows; `measured` holds a row's seeds."""
    means = np.array([np.mean(seeds) for seeds in measured])
    paper = np.array(published)
    tau = float(kendalltau(paper, means).statistic)
    pairs = [(i, j) for i in range(len(paper)) for j in range(len(paper)) if paper[i] > paper[j]]
    same = bool(pairs) and all(means[i] > means[j] for i, j in pairs)
    low = high = None
    if all(len(seeds) > 1 for seeds in measured):
        random = np.random.default_rng(0)
        drawn = []
        for _ in range(RESAMPLES):
            again = [np.mean(random.choice(seeds, len(seeds))) for seeds in measured]
            drawn.append(kendalltau(paper, again).statistic)
        low, high = (float(q) for q in np.nanquantile(drawn, (0.025, 0.975)))
    return Order(tau, low, high, same, len(paper))
