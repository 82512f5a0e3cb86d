"""A run of --time ends in its time, however fast the machine turns out to be, and its schedule ends with it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import retinanet
from retinanet.checkpoint import load_model
from retinanet.data import open_dataset
from retinanet.errors import ConfigError
from retinanet.training import deadline as of_deadline
from retinanet.training import preparation, timing
from retinanet.training.configuration import TrainingOptions
from retinanet.training.deadline import Deadline
from retinanet.training.estimate import Estimate
from retinanet.training.plan import Plan
from retinanet.training.planning import plan_run
from retinanet.training.run import resume_training, run_training
from retinanet.training.time_left import Pace, TimeLeft
from test_training import TINY

NOW = 1_000.0


@pytest.fixture
def plan(data: Path) -> Plan:
    return plan_run(TrainingOptions(data=str(data), **TINY), open_dataset(data, "train")).lasting(100, "x")  # type: ignore[arg-type]


def test_a_schedule_that_never_turned_is_walked_step_by_step(plan: Plan) -> None:
    assert [plan.place(step) for step in range(101)] == list(range(101))
    assert "turns" not in plan.to_json()


def test_what_is_left_of_a_schedule_is_spread_over_the_steps_to_come(plan: Plan) -> None:
    shorter = plan.turned(50, 75)  # 50 places in 25 steps
    assert shorter.steps == 75
    assert [shorter.place(step) for step in (0, 50, 51, 60, 75)] == [0, 50, 52, 70, 100]
    again = shorter.turned(60, 120)  # 30 places in 60 steps
    assert [again.place(step) for step in (50, 60, 62, 120)] == [50, 70, 71, 100]
    assert again.judges(120)
    assert not again.judges(75)
    assert [value for setting, value, _ in again.reasons if setting == "steps in time"] == ["120"]


def test_a_run_that_goes_on_walks_its_schedule_as_before(plan: Plan) -> None:
    turned = plan.turned(50, 75).turned(60, 120)
    stored = json.loads(json.dumps(turned.to_json()))
    resumed = plan.lasting(7, "whatever is planned now").as_begun(stored)
    assert (resumed.steps, resumed.turns) == (120, ((50, 50.0), (60, 70.0)))
    assert [resumed.place(step) for step in range(121)] == [turned.place(step) for step in range(121)]
    assert (resumed.warmup_steps, resumed.validate_every) == (plan.warmup_steps, plan.validate_every)
    assert (
        "steps in time",
        "120",
        "what fits into the time, as the machine was at step 60; all else as planned for 100",
    ) in resumed.reasons


@pytest.mark.parametrize("turns", [[[1, "x"]], [[1]], 3])
def test_a_plan_with_other_turns_is_damaged(plan: Plan, turns: object) -> None:
    stored = json.loads(json.dumps(plan.turned(50, 75).to_json()))
    with pytest.raises(ConfigError, match=r"plan.json of the run is damaged"):
        plan.as_begun({**stored, "turns": turns})


@pytest.mark.parametrize(
    ("ends_in", "pace", "steps"),
    [
        (68, Pace(1, 0), 100),  # as planned: 60 s of steps and 8 s that are never planned
        (63, Pace(1, 0), 100),  # 55 s for 60: near enough
        (38, Pace(1, 0), 70),  # 30 s for 60: half of the 60 steps to come
        (128, Pace(1, 0), 160),  # twice as many
        (900, Pace(1, 0), 400),  # at most four times as many as were planned
        (8, Pace(1, 0), 42),  # no time is left: the rate still falls over a few steps
        (-100, Pace(1, 0), 42),
        (68, None, 100),  # nothing is known
        # Validations come after steps 60, 80, ... and the last one.
        (98, Pace(1, 10), 100),
        (58, Pace(1, 10), 70),  # 30 s of steps and two validations
        (128, Pace(1, 10), 120),  # 80 s of steps and four
        (208, Pace(0.5, 50), 100),  # 20 s are left over, too few for a fourth validation
    ],
)
def test_as_many_steps_as_end_in_time(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, ends_in: float, pace: Pace | None, steps: int
) -> None:
    monkeypatch.setattr(of_deadline.time, "monotonic", lambda: NOW)
    assert Deadline(NOW + ends_in, seconds=100, looked=NOW - 10).steps(plan, 40, pace) == steps


def test_the_clock_is_looked_at_now_and_then(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [NOW]
    monkeypatch.setattr(of_deadline.time, "monotonic", lambda: clock[0])
    deadline = Deadline(NOW + 100, seconds=100, looked=NOW)
    found = []
    for seconds in (0, 9, 10, 19, 20):
        clock[0] = NOW + seconds
        found.append(deadline.steps(plan, 40, Pace(4, 0)) != plan.steps)
    assert found == [False, False, True, False, True]
    clock[0] = NOW + 40
    assert deadline.steps(plan, 100, Pace(4, 0)) == 100  # nothing comes after the last step


@pytest.mark.parametrize(("found", "what"), [(12, "fewer"), pytest.param(24, "more", marks=pytest.mark.slow)])
def test_a_run_with_another_length_than_planned(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    found: int,
    what: str,
) -> None:
    monkeypatch.setattr(timing, "_step_seconds", lambda *_: 3.0)
    monkeypatch.setattr(timing, "_validation_seconds", lambda *_: 0.1)
    monkeypatch.setattr(
        Deadline, "steps", lambda _, plan, step, pace: found if pace and step == 10 else plan.steps
    )
    tried, pace_of = [], TimeLeft.pace

    def pace(self: TimeLeft) -> Pace | None:
        tried.append(self.tried)
        return pace_of(self)

    monkeypatch.setattr(TimeLeft, "pace", pace)
    run = retinanet.train(data=data, output=tmp_path / "run", time="60s", **TINY)  # type: ignore[arg-type]
    began_with = json.loads((run.path / "plan.json").read_text())
    assert set(tried) == {0.1}  # until the first validation
    assert began_with["steps"] == found
    assert began_with["schedule_steps"] == 18 != found
    assert began_with["turns"] == [[10, 10.0]]
    assert "data" in began_with
    assert load_model(run.path / "last").training["step"] == found
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    last = began_with["lr"] * timing_rate(began_with, 10 + (found - 1 - 10) * 8 / (found - 10))
    assert rates[found] == pytest.approx(last)
    said = capsys.readouterr().err
    assert f"{found} steps in all fit into the time at the speed of late, {what} than before" in said
    assert f"step {found}/{found}" in said
    again = resume_training(run.path)
    assert again.metrics == run.metrics
    assert json.loads((run.path / "plan.json").read_text()) == began_with


def timing_rate(plan: dict[str, Any], place: float) -> float:
    from retinanet.training.optimizer import rate

    return rate(place, plan["schedule_steps"], schedule="cosine", warmup_steps=0, warmup_from=1)


@pytest.mark.slow
@pytest.mark.parametrize("trial", ["a millisecond", "five times as long"])
def test_a_run_ends_in_its_time_whatever_its_trial_said(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trial: str,
) -> None:
    measured = timing._step_seconds
    slow = (
        trial == "five times as long"
    )  # a fifth of the time is over before the steps are: the clock was looked at
    monkeypatch.setattr(timing, "_step_seconds", lambda *of: 5 * measured(*of) if slow else 0.001)
    began = time.monotonic()
    run = retinanet.train(data=data, output=tmp_path / "run", time="40s", **TINY)  # type: ignore[arg-type]
    taken = time.monotonic() - began
    plan = json.loads((run.path / "plan.json").read_text())
    assert plan["steps"] == load_model(run.path / "last").training["step"]
    assert taken < 44
    if slow:
        assert plan["schedule_steps"] < plan["steps"] <= 4 * plan["schedule_steps"]
    else:
        assert 20 < plan["steps"] < plan["schedule_steps"]


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of 512 px, each with 64 objects of 14."""
    root = tmp_path_factory.mktemp("crowded")
    corners = [(x, y) for x in range(20, 500, 60) for y in range(20, 500, 60)]
    for split in ("train", "val"):
        (root / split / "images").mkdir(parents=True)
        (root / split / "labels").mkdir()
        for number in range(2):
            Image.fromarray(np.full((512, 512, 3), 90, np.uint8)).save(
                root / split / "images" / f"{number}.png"
            )
            lines = [f"0 {(x + 7) / 512} {(y + 7) / 512} {14 / 512} {14 / 512}" for x, y in corners]
            (root / split / "labels" / f"{number}.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text("path: .\ntrain: train/images\nval: val/images\nnames: [a]\n")
    return root


@pytest.mark.parametrize(
    ("speed", "sides", "kept"),
    [
        (1e4, [352, 256], 12_500),  # at 352 px not even a validation would fit
        (1.2e5, [352], None),  # nearly as thought
        (1e6, [352, 576], 800_000),
    ],
)
def test_a_trial_says_how_large_images_may_be_in_the_time(
    crowded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    speed: float,
    sides: list[int],
    kept: float | None,
) -> None:
    """Ten minutes were thought 60 megapixels, of which images of 352 px show 30,000 objects. A machine's speed is told
    from that thought by powers of 2."""
    tried: list[int] = []

    def try_out(plan: Plan, *_: object) -> Estimate:
        tried.append(plan.spec.preprocessing.image_size)
        validation = 700.0 if tried[-1] == 352 and speed < 1e5 else 1.0
        return Estimate(plan.batch_size * tried[-1] ** 2 / speed, validation, None, None, 1.0)

    def two_steps(plan: Plan, *rest: Any) -> Plan:
        fit_to_time(plan, *rest)  # there is room
        return plan.lasting(2, "tried")

    fit_to_time = preparation.fit_to_time
    monkeypatch.setattr(preparation, "try_out", try_out)
    monkeypatch.setattr(preparation, "fit_to_time", two_steps)
    options = TrainingOptions(
        data=str(crowded), output=str(tmp_path / "run"), time="10m", backbone="test_resnet", channels=64,
        pretrained="none", device="cpu", workers=0, log_to="none", validate_every_steps=2,
    )  # fmt: skip
    run_training(options)
    stored = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert tried == sides
    assert stored["spec"]["preprocessing"]["image_size"] == sides[-1]
    assert stored.get("speed") == kept
    resume_training(tmp_path / "run")  # as it was planned
