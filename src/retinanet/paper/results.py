"""What was asked for, which runs that takes, and what is known of their results."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinanet.paper.comparison import Interval, Spread, interval, spread_of
from retinanet.paper.running import Job, Store
from retinanet.paper.settings import SCALES, Scale, Setting, best_rate
from retinanet.paper.tables import STUDIES, Study, with_own_loss, with_peers


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Args:
        rows: names, or parts of names that are no row's whole name, of the rows to train; empty is all.
        seeds: how many the figures are of. Where there are rates to choose from, seed 0 chooses and these come after
            it: a seed that was looked at to choose would lift its row.
        model: for figure 4, instead of a row's.
        peers: train torchvision's detectors beside ours in Table 2.
        own_loss: a loss that becomes a row of every table, as of `Setting`.
        about_data, images, conditions: what `prepare` finds: the data in words, how many images are trained on, and
            what tells results apart.
    """

    scale: Scale
    data: Path | None
    output: Path
    seeds: int
    rows: tuple[str, ...]
    parallel: int
    pretrained: str = "auto"
    model: str | None = None
    peers: bool = False
    own_loss: tuple[str, str] | None = None
    about_data: str = ""
    images: int = 0
    conditions: str = ""

    def job(self, setting: Setting, rate: float, seed: int) -> Job:
        """Return the run of a setting."""
        return Job(
            setting,
            self.scale.name,
            str(self.data),
            rate,
            seed,
            self.pretrained,
            self.conditions,
            steps=self.scale.steps,
            sgd=self.scale.sgd,
        )

    def command(self, item: str, rows: str | None = None) -> str:
        """Return the command that trains an item as it was asked for here."""
        given, usual = self.data, SCALES[self.scale.name]
        parts = ["retinanet", "paper", item, *(["--rows", rows] if rows else [])]
        if self.scale.name != "tiny":
            parts += ["--scale", self.scale.name]
        if given is not None and given != self.output / "data" / f"shapes-{self.scale.name}":
            parts += ["--data", str(given)]
        if self.scale.steps != usual.steps:
            parts += ["--steps", str(self.scale.steps)]
        if self.scale.sgd:
            parts.append("--sgd")
        if self.pretrained != "auto":
            parts += ["--pretrained", self.pretrained]
        return shlex.join([*parts, "--output", str(self.output)])

    def study(self, name: str) -> Study:
        """Return a table with the rows that were asked for besides the paper's."""
        study = STUDIES[name](self.scale)
        if self.peers and name == "table2":
            study = with_peers(study)
        return study if self.own_loss is None else with_own_loss(study, self.own_loss)


@dataclass(frozen=True)
class Measured:
    """What is known of a setting: AP at each rate that was tried with seed 0, the best rate when no other is left to
    try, the results at it, and the rates that diverged.
    """

    rates: dict[float, float]
    rate: float | None
    results: list[dict[str, Any]]
    diverged: tuple[float, ...] = ()

    @property
    def seconds(self) -> float | None:
        """Mean time of the runs at the best rate, by the clock that peers are given as much of; None if unknown."""
        known = [
            result["own_seconds"]
            for result in self.results
            if "own_seconds" in result and "diverged" not in result  # that ended before its time
        ]
        return sum(known) / len(known) if known else None

    def seeds(self, figure: str) -> list[float]:
        """Return a figure of every seed that has it."""
        return [result[figure] for result in self.results if result.get(figure) is not None]

    def of(self, figure: str, spread: Spread | None = None) -> Interval | None:
        values = self.seeds(figure)
        return interval(values, spread) if values else None


def common_spread(rows: Iterable[Measured], figure: str = "ap") -> Spread | None:
    """Return how far the seeds of a table's rows spread; what diverged, and then finds nothing, is left out."""
    sound = [row for row in rows if not any("diverged" in result for result in row.results)]
    return spread_of([row.seeds(figure) for row in sound])


def search_jobs(settings: Iterable[Setting], request: Request, store: Store) -> list[Job]:
    """Return the next runs that look for each setting's rate: what they find says whether it takes more."""
    return [
        request.job(setting, rate, 0)
        for setting in settings
        for rate in request.scale.next_rates(what_is_known(setting, request, store).rates)
    ]


def seed_jobs(settings: Iterable[Setting], request: Request, store: Store) -> list[Job]:
    """Return the runs of the seeds that figures are of, of settings whose rate is known."""
    jobs = []
    for setting in settings:
        rate = what_is_known(setting, request, store).rate
        if rate is not None:
            jobs += [request.job(setting, rate, seed) for seed in seeds_of(request)]
    return jobs


def what_is_known(setting: Setting, request: Request, store: Store) -> Measured:
    """Return the results of a setting so far."""
    found = {rate: store.result(request.job(setting, rate, 0)) for rate in request.scale.rates}
    rates = {rate: float(result["ap"]) for rate, result in found.items() if result is not None}
    diverged = tuple(rate for rate, result in found.items() if result is not None and "diverged" in result)
    if request.scale.next_rates(rates):
        return Measured(rates, None, [], diverged)
    rate = best_rate(rates)
    results = [store.result(request.job(setting, rate, seed)) for seed in seeds_of(request)]
    return Measured(rates, rate, [result for result in results if result is not None], diverged)


def seeds_of(request: Request) -> range:
    """Return the seeds that figures are of: without rates to choose from, seed 0 is one of them."""
    first = int(len(request.scale.rates) > 1)
    return range(first, first + request.seeds)
