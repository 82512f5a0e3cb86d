"""What a run will take: the line of `--dry-run` and of `--time`, and the trial behind it."""

from __future__ import annotations

import dataclasses
import doctest
import io
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from retinanet.data import Dataset
from retinanet.training import timing
from retinanet.training.configuration import TrainingOptions
from retinanet.training.estimate import Estimate
from retinanet.training.memory import Limit
from retinanet.training.plan import Plan
from retinanet.training.planning import plan_run
from retinanet.training.run import run_training
from retinanet.training.starting import build_network
from test_training import TINY

pytestmark = pytest.mark.usefixtures("undrawn")

GB = 10**9
MACHINE = Limit(16 * GB, "this machine")
TEST: dict[str, Any] = {**TINY, "backbone": "test_resnet", "image_size": 64, "steps": 12}
LINE = re.compile(
    r"estimate: about [\d:]+ (s|min) \(12 steps of [\d.,]+ m?s, 1 validation of [\d.,]+ m?s\), "
    r"memory \d+\.\d+ GB, \d+% of the [\d.]+ GB of .*; tried for [\d:]+ (s|min)$"
)


def plan_of(train: Dataset, **options: Any) -> Plan:
    return plan_run(TrainingOptions(data="x", **{**TEST, **options}), train)


# --- the line ---------------------------------------------------------------------------------------------------


def test_the_line_has_every_figure(train: Dataset) -> None:
    plan = dataclasses.replace(plan_of(train), steps=429, validate_every=90)
    estimate = Estimate(step=3.1, validation=20, memory=2.1 * GB, limit=MACHINE, tried=8.2)
    assert estimate.line(plan) == (
        "estimate: about 23:50 min (429 steps of 3.1 s, 5 validations of 20 s), "
        "memory 2.1 GB, 13% of the 16.0 GB of this machine; tried for 8 s"
    )
    short = dataclasses.replace(plan, steps=1, validate_every=1)
    silent = Estimate(step=0.052, validation=0.4, memory=None, limit=MACHINE, tried=0.3)
    assert silent.line(short) == (
        "estimate: about 1 s (1 step of 52 ms, 1 validation of 400 ms); tried for 1 s"
    )


def test_more_than_there_is_gets_advice(train: Dataset) -> None:
    line = Estimate(1.0, 1.0, 20 * GB, MACHINE, 8.0).line(plan_of(train))
    assert "memory 20.0 GB, 125% of the 16.0 GB of this machine" in line
    assert line.endswith(
        "That is more memory than there is: give a smaller --batch-size, or --batch-size auto"
    )


def test_examples_hold() -> None:
    assert tuple(doctest.testmod(timing)) == (0, 1)


# --- the trial --------------------------------------------------------------------------------------------------


def test_a_dry_run_ends_with_an_estimate_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    began = time.monotonic()
    told = {**TEST, "output": str(tmp_path / "dry"), "validate_every_steps": 12}
    options = TrainingOptions(data=str(data), dry_run=True, **told)
    assert run_training(options, Console(file=said, width=200)) is None
    assert not (tmp_path / "dry").exists()
    assert time.monotonic() - began < 60  # it is a second or two where nothing has to be compiled
    *_, estimate, last = said.getvalue().splitlines()
    assert last == "dry run: nothing was written"
    assert LINE.match(estimate), estimate


def test_the_network_is_not_touched(train: Dataset) -> None:
    plan = plan_of(train)
    network = build_network(plan)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    estimate = timing.estimate_run(plan, network, train, train)
    assert estimate.step > 0
    assert estimate.validation > 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Clock:
    """Steps of 0.3 s and 0.1 s an image, which take 1 GB and 1 GB an image beside the 2 of the process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow: float = 1.0) -> None:
        self.tried: list[int] = []

        def tried(plan: Plan, *_: object) -> tuple[float, int]:
            images = plan.batch_size
            self.tried.append(images)
            return slow * (0.3 + 0.1 * images), (3 + -(-images // plan.options.accumulate)) * GB

        monkeypatch.setattr(timing, "_tried", tried)
        monkeypatch.setattr(timing, "resident", lambda: 2 * GB)


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "limit", "slow", "tried"),
    [
        (1, 1, MACHINE, 1, [1]),
        (4, 1, MACHINE, 1, [1, 3]),  # no more than half of the memory, by the first image's
        (4, 1, None, 1, [1, 4]),
        (16, 1, Limit(32 * GB, "this machine"), 1, [1, 7]),
        (16, 1, None, 10, [1, 3]),  # there is half a minute for two steps
        (16, 4, None, 10, [1, 3]),  # all of them in a part of one
        (16, 4, None, 1, [1, 16]),
    ],
)
def test_a_part_of_the_batch_says_the_rest(
    train: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    accumulate: int,
    limit: Limit | None,
    slow: float,
    tried: list[int],
) -> None:
    clock = Clock(monkeypatch, slow)
    plan = plan_of(train, batch_size=batch_size, accumulate=accumulate)
    step, memory = timing._by_few_images(plan, None, train, limit)  # type: ignore[arg-type]
    assert clock.tried == tried
    assert step == pytest.approx(slow * (0.3 + 0.1 * batch_size))
    at_once = -(-batch_size // accumulate)
    # Of one image at once nobody knows what of it is the optimiser's.
    both = max(tried) > accumulate or at_once == 1
    assert memory == pytest.approx((3 + at_once if both else 2 + 2 * at_once) * GB)


@pytest.mark.parametrize(("limit", "slow"), [(Limit(3 * GB, "this machine"), 1), (None, 100)])
def test_one_image_says_at_most_how_much_the_batch_takes(
    train: Dataset, monkeypatch: pytest.MonkeyPatch, limit: Limit | None, slow: float
) -> None:
    clock = Clock(monkeypatch, slow)
    plan = plan_of(train, batch_size=8)
    assert timing._by_few_images(plan, None, train, limit) == (8 * slow * 0.4, 18 * GB)  # type: ignore[arg-type]
    assert clock.tried == [1]


def test_a_device_is_tried_with_the_whole_batch(train: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(timing, "_validation_seconds", lambda *_: 3.0)
    monkeypatch.setattr(timing, "limit_of", lambda *_: MACHINE)
    monkeypatch.setattr(timing.TrainingStep, "of", lambda *_: None)
    plan = dataclasses.replace(plan_of(train, batch_size=16), device=torch.device("cuda"))
    estimate = timing.estimate_run(plan, build_network(plan), train, train)
    assert clock.tried == [16]
    assert (estimate.step, estimate.validation, estimate.memory) == (0.3 + 0.1 * 16, 3.0, 19 * GB)


def test_a_trial_does_not_wait_for_a_compiler(train: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retinanet.training.planning.require_cpp_compiler", lambda: None)
    monkeypatch.setattr(torch, "compile", None)
    plan = plan_of(train, compile=True)
    assert timing.estimate_run(plan, build_network(plan), train, train).step > 0


@pytest.mark.parametrize(("seconds", "looked_at"), [(0.0, 1), (1e9, 6)])
def test_few_images_are_looked_at_where_they_take_long(
    train: Dataset, monkeypatch: pytest.MonkeyPatch, seconds: float, looked_at: int
) -> None:
    plan = plan_of(train)
    seen: list[int] = []
    detect_all = timing.Detector.detect_all
    monkeypatch.setattr(
        timing.Detector,
        "detect_all",
        lambda self, images, **options: seen.append(len(images)) or detect_all(self, images, **options),
    )
    assert timing._validation_seconds(plan, build_network(plan), train, seconds) > 0
    assert seen == [1, 1, looked_at]


def test_a_run_with_a_time_says_it_as_well(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured for it is what it is told by; nothing is tried twice."""
    monkeypatch.setattr(timing, "estimate_run", None)
    monkeypatch.setattr("retinanet.training.preparation.estimate_run", None)
    monkeypatch.setattr(timing, "_step_seconds", lambda *_: 2.0)
    monkeypatch.setattr(timing, "_validation_seconds", lambda *_: 0.5)
    said = io.StringIO()
    options = TrainingOptions(data=str(data), dry_run=True, **{**TEST, "steps": None, "time": "60s"})
    run_training(options, Console(file=said, width=200))
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith("estimate")]
    assert re.match(r"estimate: about 5\d s \(2\d steps of 2\.0 s, 5 validations of 500 ms\), memory ", line)


def test_a_run_says_nothing_that_nobody_measured(data: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    options = TrainingOptions(data=str(data), output=str(tmp_path / "run"), **{**TEST, "steps": 1})
    run_training(options, Console(file=said, width=200))
    assert "estimate" not in said.getvalue()
    assert re.search(r"^memory at most \d+\.\d+ GB$", said.getvalue(), re.MULTILINE)
