"""What a run tells: early stopping, the clock, the time left, the parts that are trained."""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kernel_cases import torch_threads
from retinanet.checkpoint import load_model
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import Stopped
from retinanet.model import RetinaNet
from retinanet.training import clock as clocks
from retinanet.training import judging
from retinanet.training.clock import Clock
from retinanet.training.configuration import TrainingOptions
from retinanet.training.parts import parts_of, table_of_parts, trained_in_words
from retinanet.training.patience import early_stop
from retinanet.training.progress import TrainingProgress
from retinanet.training.run import resume_training, run_training
from retinanet.training.story import RunStory
from retinanet.training.time_left import TimeLeft, in_time
from test_resume import TINY, quiet, stop_at, terminate

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return generate_shapes(folder, train=6, val=2, spec=ShapesSpec(image_size=96))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------- early stopping


@pytest.mark.parametrize(
    ("aps", "patience", "stops"),  # at the number of which validation, the best of which
    [
        ([0.1, 0.2, 0.3], 1, None),
        ([0.1, 0.1], 1, (2, 2)),  # no better one, but the later of equals is kept
        ([0.3, 0.2, 0.1, 0.2], 3, (4, 1)),
        ([0.3, 0.2, 0.4, 0.2, 0.1], 3, None),
        ([0.3, 0.2, 0.4, 0.2, 0.1], 2, (5, 3)),
        ([0.3, 0.2, 0.1, 0.9], 2, (3, 1)),  # what would have come after it is not asked
        ([None, 0.0, None], 2, (3, 3)),
        ([0.5, 0.4, 0.3], None, None),
        ([], 1, None),
    ],
)
def test_a_run_stops_after_so_many_validations_without_a_better_ap(
    aps: list[float | None], patience: int | None, stops: tuple[int, int] | None
) -> None:
    found = early_stop([{"step": 10 * i, "ap": ap} for i, ap in enumerate(aps, 1)], patience)
    assert (found and (found.step // 10, found.best_step // 10)) == stops


def test_an_early_stop_in_words() -> None:
    told = [{"step": 1000, "ap": 0.5}, {"step": 2000, "ap": 0.4}]
    assert str(early_stop(told, 1)) == (
        "stopped early at step 2,000: no better AP for 1 validation; best 0.500 at step 1,000"
    )
    assert "for 2 validations" in str(early_stop([*told, {"step": 3000, "ap": 0.5}], 2))


def let_find(monkeypatch: pytest.MonkeyPatch, aps: list[float]) -> None:
    """Let validations find these AP, one after the other."""
    evaluate, found_next = judging.validate, iter(aps)

    def validate(detector: Any, dataset: Any, **told: Any) -> Any:
        found = evaluate(detector, dataset, **told)
        object.__setattr__(found.metrics, "ap", next(found_next))
        return found

    monkeypatch.setattr(judging, "validate", validate)


def test_an_early_stopped_run_is_finished_also_when_it_is_resumed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_find(monkeypatch, [0.1, 0.3, 0.2, 0.3, 0.9, 0.9])
    options = {**TINY, "steps": 12, "validate_every_steps": 2, "patience": 2}
    run, console = tmp_path / "run", Console(record=True, width=200, file=io.StringIO())
    done = run_training(TrainingOptions(data=str(data), output=str(run), **options), console)
    assert done is not None
    words = "stopped early at step 8: no better AP for 2 validations; best 0.300 at step 8"
    said = console.export_text()
    assert words in said
    assert "early stop" in said.split("writing to")[0]  # the plan says that it may
    told = lines(run)
    assert told[-1]["step"] == 8
    assert load_model(run / "best").training["step"] == 8
    assert "Stopped early at step 8" in (run / "report.html").read_text()

    console = Console(record=True, width=200, file=io.StringIO())
    again = resume_training(run, console)
    assert words in console.export_text()
    assert lines(run) == told
    assert again.path == run
    assert not (run / "resumes.jsonl").exists()  # nothing went on


def test_a_resumed_run_stops_early_at_the_same_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_find(monkeypatch, [0.3, 0.2, 0.1, 0.9])
    options = {**TINY, "steps": 8, "validate_every_steps": 2, "patience": 2}
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(5, patch, terminate)
        with pytest.raises(Stopped):
            run_training(TrainingOptions(data=str(data), output=str(run), **options), quiet())
    assert "Stopped at step 5 of 8." in (run / "report.html").read_text()
    resume_training(run, quiet())
    assert lines(run)[-1]["step"] == 6


# ------------------------------------------------------------------------------------- the clock


class Hands:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(clocks.time, "monotonic", lambda: self.now)


def test_every_second_belongs_to_one_activity(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands(monkeypatch)
    clock = Clock(torch.device("cpu"))

    def batches() -> Iterator[int]:
        for number in range(2):
            hands.now += 3  # reading images
            yield number

    taken = []
    with clock.during("validating"):  # of a run that was stopped in one
        hands.now += 100
    for _ in clock.over(batches()):
        hands.now += 1
        with clock.during("saving"):
            hands.now += 10
        taken.append(clock.take())
        with clock.during("validating"):
            hands.now += 20
            taken.append(clock.take())
            hands.now += 0.5
    assert taken == [
        {"seconds_validating": 100, "seconds_data": 3, "seconds_step": 1, "seconds_saving": 10},
        {"seconds_validating": 20},
        {"seconds_validating": 0.5, "seconds_data": 3, "seconds_step": 1, "seconds_saving": 10},
        {"seconds_validating": 20},
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_step_lasts_as_long_as_the_device_works() -> None:
    """The host asks for the next images long before: that is no waiting."""
    device = torch.device("cuda")
    clock, matrix = Clock(device), torch.randn(4096, 4096, device=device)
    taken = {}
    for number in clock.over(range(20)):
        for _ in range(5):
            matrix = (matrix @ matrix).clamp(-1, 1)
        if number == 19:
            matrix.sum().item()
            taken = clock.take()
    assert taken["seconds_step"] > 5 * taken["seconds_data"]


# ------------------------------------------------------------------------------------- the time left


def run_of(
    *, steps: int, every: int, step: float, validation: float, slow_start: float, saved_every: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield the log of a run, whose steps take `step` seconds on average and vary by a third."""
    vary = random.Random(0)
    line: dict[str, Any] = {"seconds_data": 0.0, "seconds_step": 0.0, "seconds_saving": 0.0}
    for number in range(1, steps + 1):
        line["seconds_data"] += 0.3 * step * vary.uniform(0.5, 1.5)
        line["seconds_step"] += 0.7 * step * vary.uniform(0.7, 1.3) + (slow_start if number == 1 else 0)
        judged = number % every == 0 or number == steps
        if saved_every and number % saved_every == 0:
            line["seconds_saving"] += step
        if number % 10 == 0 or judged:
            yield {"step": number, "loss": 1.0, **line}
            line = {"seconds_data": 0.0, "seconds_step": 0.0, "seconds_saving": 0.0}
        if judged:
            yield {"step": number, "ap": 0.5, "seconds_validating": validation, "seconds_saving": 0.1 * step}


def seconds_of(record: dict[str, Any]) -> float:
    return sum(value for name, value in record.items() if name.startswith("seconds_"))


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 1000, "every": 200, "step": 0.2, "validation": 4.0, "slow_start": 0.0},
        # A tenth of the time is validated, and the first steps compile.
        {"steps": 2000, "every": 400, "step": 1.0, "validation": 45.0, "slow_start": 60.0},
        {"steps": 90_000, "every": 18_000, "step": 0.05, "validation": 60.0, "slow_start": 20.0},
        # Half of the time is validated.
        {"steps": 3000, "every": 100, "step": 0.1, "validation": 10.0, "slow_start": 3.0},
        {"steps": 400, "every": 80, "step": 0.5, "validation": 3.0, "slow_start": 5.0, "saved_every": 5},
    ],
)
def test_the_estimate_is_right_within_a_fifth_after_a_twentieth_of_a_run(setting: dict[str, Any]) -> None:
    log = list(run_of(**setting))
    # What is guessed before the first validation is off by a half.
    guess = 1.5 * setting["validation"] / setting["step"] if setting["every"] * 20 > setting["steps"] else 1.0
    left = TimeLeft(steps=setting["steps"], validate_every=setting["every"], validation_in_steps=guess)
    whole = sum(map(seconds_of, log))
    past, asked = 0.0, 0
    for record in log:
        left.told(record)
        past += seconds_of(record)
        estimate = left.seconds()
        if past >= 0.05 * whole and past <= 0.95 * whole:
            assert estimate == pytest.approx(whole - past, rel=0.2), record["step"]
            asked += 1
    assert asked > 5


@pytest.mark.slow
def test_the_estimate_of_a_real_run_is_right_within_a_fifth_after_a_twentieth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By seconds of this process's own work: what others do on the machine meanwhile is no one's to foresee. It changes
    those, too, as they share caches; of three runs two have to be foreseen."""
    data = generate_shapes(tmp_path / "shapes", train=20, val=60, spec=ShapesSpec(image_size=128))
    told: list[tuple[float, float | None]] = []
    tell, leave, draw = RunStory.trained, RunStory.__exit__, "retinanet.training.run.draw_run"

    def trained(self: RunStory, step: int, figures: dict[str, float]) -> None:
        tell(self, step, figures)
        told.append((time.monotonic(), self.left.seconds()))

    def ended(self: RunStory, *how: Any) -> None:
        told.append((time.monotonic(), 0.0))
        leave(self, *how)

    monkeypatch.setattr(RunStory, "trained", trained)
    monkeypatch.setattr(RunStory, "__exit__", ended)
    monkeypatch.setattr(draw, lambda *_: None)
    monkeypatch.setattr(time, "monotonic", time.process_time)
    options = {**TINY, "batch_size": 1, "steps": 400, "validate_every_steps": 40, "log_to": "none"}
    wrong = []
    for number in range(3):
        told.clear()
        began = time.monotonic()
        with torch_threads(1):
            run_training(
                TrainingOptions(data=str(data), output=str(tmp_path / f"run{number}"), **options), quiet()
            )
        end = told[-1][0]
        at, left = next((at, left) for at, left in told if at - began >= 0.05 * (end - began))
        assert left is not None
        wrong.append(left / (end - at) - 1)
        if sum(abs(share) <= 0.2 for share in wrong) == 2:
            return
    pytest.fail(f"estimates were wrong by {', '.join(f'{share:+.0%}' for share in wrong)}")


def test_the_first_step_of_a_process_does_not_count() -> None:
    left = TimeLeft(steps=100, validate_every=100, validation_in_steps=0.0)
    left.started(30.0)
    left.told({"step": 10, "loss": 1.0, "seconds_step": 36.0, "seconds_data": 3.0})
    assert left.seconds() == pytest.approx(90 * 1.0)
    # Nor where it has a line of its own, which is forgotten with the next.
    left = TimeLeft(steps=100, validate_every=100, validation_in_steps=0.0)
    left.told({"step": 1, "loss": 1.0, "seconds_step": 30.0})
    left.started(30.0)
    left.told({"step": 11, "loss": 1.0, "seconds_step": 10.0})
    assert left.seconds() == pytest.approx(89 * 1.0)


def test_the_estimate_follows_the_speed() -> None:
    left = TimeLeft(steps=10_000, validate_every=10_000, validation_in_steps=0.0)
    for number in range(1, 801):
        seconds = 10.0 if number <= 400 else 30.0  # another job came onto the machine
        left.told({"step": 10 * number, "loss": 1.0, "seconds_step": seconds})
    assert left.seconds() == pytest.approx(200 * 30.0)


def test_the_first_validation_takes_as_long_as_in_a_trial() -> None:
    left = TimeLeft(steps=100, validate_every=20, validation_in_steps=5.0, validation=70.0)
    left.told({"step": 10, "loss": 1.0, "seconds_step": 20.0})
    assert left.pace() == (2.0, 70.0)
    left.told({"step": 20, "ap": 0.5, "seconds_validating": 30.0})
    assert left.pace() == (2.0, 30.0)


def test_a_resumed_run_knows_how_long_validations_take_and_measures_its_speed_anew() -> None:
    left = TimeLeft(steps=100, validate_every=20, validation_in_steps=5.0, first=40)
    for step in (20, 40):
        left.remember({"step": step, "loss": 1.0, "seconds_step": 1000.0})
        left.remember({"step": step, "ap": 0.5, "seconds_validating": 7.0, "seconds_saving": 1.0})
    assert left.seconds() is None
    left.told({"step": 50, "loss": 1.0, "seconds_step": 20.0, "seconds_validating": 0.0})
    assert left.seconds() == pytest.approx(50 * 2.0 + 3 * 8.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (754, "12:34 min"),
        (7500, "2 h 05 min"),
        (97_300, "1 d 3 h"),
    ],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_time(seconds) == words


FIGURES = {"loss": 1.0, "loss_class": 0.6, "loss_box": 0.4, "lr": 0.01, "images_per_second": 9.0}


def test_the_live_line_counts_the_same_estimate_down(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands(monkeypatch)
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    progress = TrainingProgress(console, 100)
    progress.step(10, FIGURES, 754.0)
    hands.now += 10
    (task,) = progress.live.tasks
    assert progress.live.columns[-1].render(task).plain == "12:24 min left"  # type: ignore[union-attr]
    progress.step(20, FIGURES, None)
    assert progress.live.columns[-1].render(task).plain == ""  # type: ignore[union-attr]


def test_plain_lines_tell_the_estimate() -> None:
    console = Console(file=io.StringIO(), width=200)
    progress = TrainingProgress(console, 10)
    progress.step(10, FIGURES, 61.0)
    progress.step(10, FIGURES, None)
    first, second = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert first.endswith("9.0 images/s  1:01 min left")
    assert second.endswith("9.0 images/s")


# ------------------------------------------------------------------------------------- what is trained


def small_network() -> RetinaNet:
    from test_detector import make_model

    return make_model().network


def test_every_parameter_belongs_to_one_part() -> None:
    network = small_network()
    names = [name for name, _ in parts_of(network)]
    assert names[0].startswith("backbone, ")
    assert names[-3:] == ["pyramid", "class head", "box head"]
    owned = [id(p) for _, modules in parts_of(network) for module in modules for p in module.parameters()]
    assert sorted(owned) == sorted(id(p) for p in network.parameters())


def test_the_table_says_what_is_frozen() -> None:
    network = small_network()
    assert trained_in_words(network).endswith("parameters, all of them trained")
    network.backbone.freeze("stage1")
    console = Console(file=io.StringIO(), width=80)
    console.print(table_of_parts(network))
    rows = [line.split() for line in console.file.getvalue().splitlines()[1:]]  # type: ignore[attr-defined]
    states = {" ".join(row[:-2]): row[-1] for row in rows}
    assert states["backbone, stage1"] == "frozen"
    assert states["backbone, stage2"] == states["class head"] == "trained"
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    shown = sum(int(row[-2].replace(",", "")) for row in rows if row[-1] == "frozen")
    assert shown == frozen > 0
    assert f"{sum(p.numel() for p in network.parameters()) - frozen:,} of them trained" in trained_in_words(
        network
    )
