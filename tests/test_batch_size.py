"""`--batch-size auto`: the worst case, the search that tries nothing dangerous, and what a run makes of it."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from retinanet.cli.main import main
from retinanet.data import Dataset
from retinanet.data.loading import training_batches
from retinanet.data.transforms import Augmentation
from retinanet.errors import ConfigError, Stopped, TrainingError
from retinanet.processes import Processes
from retinanet.training import batch_size, preparation
from retinanet.training.batch_size import (
    MOST,
    PLANNED,
    Need,
    WorstCase,
    doubled,
    fit_batch,
    in_words,
    largest,
    measured,
    with_batch,
    worst_case,
)
from retinanet.training.choosing import choose_rate
from retinanet.training.configuration import TrainingOptions
from retinanet.training.memory import Limit
from retinanet.training.plan import Plan
from retinanet.training.planning import plan_run
from retinanet.training.run import resume_training, run_training
from retinanet.training.starting import build_network
from test_resume import stop_at, terminate
from test_training import TINY

pytestmark = pytest.mark.usefixtures("undrawn")

GB = 10**9
CASE = WorstCase(height=640, width=1024, boxes=7)
AUTO: dict[str, Any] = {**TINY, "backbone": "test_resnet", "image_size": 64, "batch_size": "auto"}


def plan_of(train: Dataset, **options: Any) -> Plan:
    return plan_run(TrainingOptions(data="x", **{**AUTO, "steps": 3, **options}), train)


# --- the option -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["four", "", "AUTO", "-1"])
def test_other_words_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        TrainingOptions(data="x", batch_size=value)  # type: ignore[arg-type]
    assert str(refused.value) == f"--batch-size needs a whole number or auto; got {value!r}"
    if value != "-1":
        with pytest.raises(SystemExit, match="2"):
            main(["train", "x", f"--batch-size={value}"])
        assert f"--batch-size needs a whole number or auto; got {value!r}" in capsys.readouterr().err


def test_auto_and_numbers_are_taken(tmp_path: Path) -> None:
    assert TrainingOptions(data="x", batch_size="auto").asked_batch() is None
    assert TrainingOptions(data="x", batch_size=3).asked_batch() == 3
    assert TrainingOptions(data="x").asked_batch() is None


def test_until_it_is_found_out_the_recipe_decides(train: Dataset) -> None:
    assert plan_of(train).batch_size == plan_of(train, batch_size=None).batch_size == 4


# --- the worst case ---------------------------------------------------------------------------------------------


def shaped(train: Dataset, sizes: list[tuple[int, int]]) -> Dataset:
    widths, heights = np.array((sizes * 6)[:6], np.int32).T
    return dataclasses.replace(
        train,
        widths=widths,
        heights=heights,
        boxes=np.tile(np.float32([1, 1, 9, 9]), (len(train.boxes), 1)),
    )


@pytest.mark.parametrize(
    ("sizes", "changes", "padded"),
    [
        ([(300, 200)], {}, (96, 64)),  # (width, height); 64 at the shortest side, 107 at the longest
        ([(200, 300)], {}, (64, 96)),
        ([(300, 200), (200, 300)], {}, (96, 96)),  # in one batch
        ([(300, 200)], {"quarter_turn": 0.5}, (96, 96)),
        ([(300, 200)], {"scales": (0.5, 2.0)}, (128, 96)),  # the longest side is then the shortest asked for
        ([(200, 200)], {"zoom": (0.5, 2.0)}, (64, 64)),
        ([(800, 100)], {}, (128, 32)),  # the longest side decides
    ],
)
def test_the_largest_input(
    train: Dataset, sizes: list[tuple[int, int]], changes: dict[str, Any], padded: tuple[int, int]
) -> None:
    plan = dataclasses.replace(plan_of(train), augmentation=Augmentation(**changes))
    assert plan.preprocessing.max_size == 107
    case = worst_case(plan, shaped(train, sizes))
    assert (case.width, case.height) == padded


def test_no_batch_is_larger(train: Dataset) -> None:
    plan = plan_of(train, mosaic=0.5, zoom="0.5,2", quarter_turn=0.5, scales="0.5,1,2", batch_size=3)
    case = worst_case(plan, train)
    for batch in training_batches(
        train, plan.preprocessing, plan.augmentation, batch_size=3, seed=1, steps=20
    ):
        assert batch.images.shape[2] <= case.height
        assert batch.images.shape[3] <= case.width
        assert batch.targets.boxes.shape[1] <= case.boxes
    assert case.boxes == 4 * int(np.diff(train.offsets).max())


def test_compiling_pads_further(train: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retinanet.training.planning.require_cpp_compiler", lambda: None)
    case = worst_case(plan_of(train, compile=True), train)
    assert (case.width, case.height, case.divisor) == (128, 128, 128)


def test_its_batch_is_what_training_gets() -> None:
    batch = CASE.batch(2, 3)
    assert batch.images.shape == (2, 3, 640, 1024)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    x1, y1, x2, y2 = batch.targets.boxes.unbind(dim=2)
    assert (x1 < x2).all()
    assert (y1 < y2).all()
    assert x1.min() >= 0
    assert x2.max() <= 1024
    assert y2.max() <= 640
    assert int(batch.targets.classes.max()) < 3
    assert CASE.halved() == WorstCase(320, 512, 7)
    assert WorstCase(32, 160, 1).halved() == WorstCase(32, 96, 1)
    assert WorstCase(64, 96, 1).halved() == WorstCase(64, 64, 1)


# --- the search on a CPU ----------------------------------------------------------------------------------------


class Machine:
    """Takes memory in a straight line, and kills who asks for more than there is."""

    def __init__(self, each: int, held: int = GB, limit: int = 16 * GB) -> None:
        self.each, self.rest, self.limit = each, held, limit
        self.tried: list[tuple[int, int]] = []

    def held(self) -> int:
        return self.rest

    def peak(self, case: WorstCase, images: int) -> int:
        taken = self.rest + round(images * self.each * case.pixels / CASE.pixels)
        assert taken <= self.limit, "killed"
        self.tried.append((case.height, images))
        return taken

    def need(self, most: int = 16) -> Need:
        return measured(self, CASE, Limit(self.limit, "this machine"), most=most)


@pytest.mark.parametrize(
    ("each", "images"),
    [
        (GB // 10, 16),  # no more than asked for
        (GB, 8),  # 1 + 8 of 12.8
        (2 * GB, 4),
        (5 * GB, 2),
        (6 * GB, 1),  # 13 would fit into 16, but not into what is planned with
        (11 * GB, 1),
    ],
)
def test_a_line_says_how_many_fit(each: int, images: int) -> None:
    machine = Machine(each)
    need = machine.need()
    assert largest(need, Limit(machine.limit, "this machine"), 16) == images
    assert need.of(images) == GB + images * each
    assert max(tried for _, tried in machine.tried) <= 4


def test_what_does_not_grow_is_no_danger() -> None:
    """The line is then above what is taken."""
    need = Need({1: 3 * GB, 2: 4 * GB, 4: 6 * GB}, held=GB)  # 2 and 1 for each
    assert [need.of(n) / GB for n in (1, 2, 4, 8)] == [3, 4, 6, 11]


def test_what_may_not_fit_is_not_tried() -> None:
    """Neither the second image nor, where half of its sides tell enough, the first."""
    machine = Machine(7 * GB)
    assert machine.need().peaks == {1: 8 * GB}
    machine = Machine(20 * GB)
    with pytest.raises(
        ConfigError, match=r"no room for one image of 1024 x 640 \(width x height\): a step takes 131%"
    ):
        machine.need()
    assert {height for height, _ in machine.tried} == {320}


def test_one_that_fits_only_without_a_margin_is_none() -> None:
    machine = Machine(13 * GB)
    assert largest(machine.need(), Limit(machine.limit, "this machine"), 16) is None


def test_nobody_measures_more_images_than_one_may_have() -> None:
    machine = Machine(GB)
    machine.need(most=1)
    assert machine.tried == [(320, 1), (320, 1), (640, 1)]
    assert set(machine.need(most=3).peaks) == {1, 2}


def test_a_recipe_s_own_number_counts_before_powers_of_two() -> None:
    limit = Limit(16 * GB, "this machine")
    assert largest(Need({1: GB}), limit, 12) == 12
    assert largest(Need({1: GB}), limit, 24) == 8


def test_images_that_wait_count_as_well() -> None:
    limit = Limit(10 * GB, "this machine")
    assert largest(Need({1: GB // 10}), limit, 16) == 16
    assert largest(Need({1: GB // 10}, waiting=0.5 * GB), limit, 16) == 8
    assert largest(Need({1: GB // 10}, held=0.5 * GB, loading=0.5 * GB), limit, 16) == 8


def test_what_the_loader_holds(train: Dataset) -> None:
    plan, case = plan_of(train, zoom="0.5,1"), WorstCase(64, 64, 1)
    decoded, prepared = 96 * 96 * 3 * 4, 64 * 64 * 12  # on a canvas of twice its sides
    assert batch_size._of_loader(plan, train, case) == (decoded + prepared, 0)
    plan = dataclasses.replace(plan, workers=2)
    assert batch_size._of_loader(plan, train, case) == (0, 2 * (decoded + 4 * prepared))


# --- the search on CUDA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("each", "refuses_above", "images"),
    [(GB, 99, 8), (GB // 100, 99, MOST), (GB, 4, 4), (12 * GB, 99, 1), (15 * GB, 99, 0), (GB, 0, 0)],
)
def test_a_device_is_asked_for_twice_as_much_until_it_refuses(
    each: int, refuses_above: int, images: int
) -> None:
    taken = doubled(
        lambda images: images * each if images <= refuses_above else None, Limit(16 * GB, "cuda:0")
    )
    assert list(taken) == [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= images]
    assert all(taken[n] <= PLANNED["cuda"] * 16 * GB for n in taken)


def test_a_refusal_of_the_device_is_no_end(train: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dataclasses.replace(plan_of(train), device=torch.device("cuda"))
    tried: list[int] = []

    class Step:
        """As a real one: where there is no room it takes more parts, and complains when an image is one."""

        parts = 1

        def __call__(self, batch: Any, lr: float) -> None:
            assert lr == 0
            tried.append(len(batch.images))
            if room[0] == 0:
                raise TrainingError("no memory left")
            self.parts = -(-len(batch.images) // room[0])

    room = [4]
    monkeypatch.setattr(batch_size.TrainingStep, "of", lambda *_: Step())
    monkeypatch.setattr(batch_size, "limit_of", lambda *_: Limit(16 * GB, "cuda"))
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: tried[-1] * GB)
    fitted = fit_batch(plan, SimpleNamespace(), train)  # type: ignore[arg-type]
    assert fitted.batch_size == 4
    assert tried == [1, 2, 4, 8]
    why = next(why for setting, _, why in fitted.reasons if setting == "batch size")
    assert why.endswith(" boxes 1 takes 1.0 GB, 4 take 4.0 GB, 25% of the 16.0 GB of cuda; 64 at most")
    room[0] = 0
    with pytest.raises(ConfigError, match="a step takes more than there is"):
        fit_batch(plan, SimpleNamespace(), train)  # type: ignore[arg-type]


# --- a plan and a run -------------------------------------------------------------------------------------------


def test_rate_and_steps_follow(train: Dataset) -> None:
    plan = plan_of(train, steps=None, epochs=4)
    assert (plan.batch_size, plan.steps) == (4, 6)
    fitted = with_batch(plan, train, 2, "why")
    assert (fitted.batch_size, fitted.recipe.batch_size, fitted.steps) == (2, 2, 12)
    assert fitted.lr == choose_rate(fitted.recipe)[0] == pytest.approx(plan.lr / 2**0.5)
    rows = {setting: (value, why) for setting, value, why in fitted.reasons}
    assert rows["batch size"] == ("2", "why")
    assert rows["lr"][1].endswith("2/16; Muon's own rate is 10 times that") or "2/16" in rows["lr"][1]
    assert [setting for setting, *_ in fitted.reasons] == [setting for setting, *_ in plan.reasons]


class Two(Processes):
    """This process and another one, that found this."""

    theirs: tuple[int, str] = (1, "theirs")

    def wait(self) -> None: ...

    def gathered(self, value: Any) -> list[Any]:
        return [value, self.theirs]


@pytest.mark.parametrize(
    ("device", "ours", "theirs", "together"),
    [("cpu", 2, 1, 2), ("cpu", 2, 2, 3), ("cuda", 8, 4, 8), ("cuda", 8, 16, 16)],
)
def test_what_fits_each_process_is_taken_by_all(
    train: Dataset, monkeypatch: pytest.MonkeyPatch, device: str, ours: int, theirs: int, together: int
) -> None:
    monkeypatch.setattr(Two, "theirs", (theirs, "theirs"))
    monkeypatch.setattr(batch_size, "limit_of", lambda *_: Limit(GB, "what there is"))
    asked: list[int] = []
    for search in ("_on_cpu", "_on_cuda"):
        monkeypatch.setattr(
            batch_size, search, lambda plan, *_: asked.append(plan.batch_size) or (ours, "ours")
        )
    plan = with_batch(plan_of(train), train, 3, "as many")
    plan = dataclasses.replace(plan, device=torch.device(device))
    plan = dataclasses.replace(plan, reasons=(*plan.reasons, ("processes", "as it was", "torchrun")))
    fitted = fit_batch(plan, SimpleNamespace(), train, Two(0, 2))  # type: ignore[arg-type]
    assert asked == [2]  # of the 3 images of a step
    assert fitted.batch_size == together
    rows = {setting: (value, why) for setting, value, why in fitted.reasons}
    at_most = "; 3, the plan's, at most on a CPU" if device == "cpu" else ""
    assert rows["batch size"][1] == ("ours" if ours <= theirs else "theirs") + at_most
    each = "1 or 2" if together == 3 else f"{together // 2}"
    assert rows["processes"] == (f"2, with {each} images of a step each", "torchrun")


@pytest.mark.parametrize("theirs", [0, 4])
def test_all_hear_that_there_is_no_room_in_one(
    train: Dataset, monkeypatch: pytest.MonkeyPatch, theirs: int
) -> None:
    """Nobody waits for it."""

    def search(*_: object) -> tuple[int, str]:
        if theirs:
            raise ConfigError("no room")
        return 4, "enough"

    monkeypatch.setattr(batch_size, "_on_cpu", search)
    monkeypatch.setattr(Two, "theirs", (theirs, "no room" if not theirs else "enough"))
    with pytest.raises(ConfigError, match=r"^no room$"):
        fit_batch(plan_of(train), SimpleNamespace(), train, Two(0, 2))  # type: ignore[arg-type]


def test_fewer_images_than_processes_are_refused_when_a_run_goes_on(train: Dataset) -> None:
    with pytest.raises(ConfigError, match="2 processes need --batch-size 2 or more, an image each; it is 1"):
        batch_size.with_stored_batch(plan_of(train), train, {"batch_size": 1}, Two(0, 2))


def test_the_reason_has_the_figures() -> None:
    need, limit = Need({1: GB, 4: 3 * GB}, held=0.5 * GB), Limit(16 * GB, "this container")
    assert in_words(need, 16, limit, CASE) == (
        "auto: of images of 1024 x 640 with 7 boxes 1 takes 1.0 GB, 4 take 3.0 GB, 16 by that 10.5 GB, "
        "66% of the 16.0 GB of this container"
    )
    assert need.figures(4) == "1 takes 1.0 GB, 4 take 3.0 GB"
    assert Need({1: GB}).figures(1) == "1 takes 1.0 GB"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells")
@pytest.mark.slow
def test_the_line_says_about_what_more_images_take(train: Dataset) -> None:
    """With a real network."""
    plan = plan_of(train, image_size=256, max_size=256)
    network = build_network(plan)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    case = worst_case(plan, train)
    trial = batch_size.CpuTrial(plan, network)
    need = measured(trial, case, Limit(64 * GB, "this machine"), most=4)
    taken = trial.peak(case, 8) - need.held
    assert taken > 8 * 3 * 4 * 256 * 256
    assert 0.5 * taken < need.of(8) - need.held < 2 * taken
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_system_that_does_not_tell_is_named(train: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "restart_peak", lambda: False)
    plan = plan_of(train)
    with pytest.raises(
        ConfigError, match=r"on a CPU needs a system that tells .* \(Linux\); give a number of images"
    ):
        fit_batch(plan, build_network(plan), train)


def test_the_random_numbers_of_the_caller_stay(train: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(train)
    network = build_network(plan)
    before = torch.random.get_rng_state()
    monkeypatch.setattr(batch_size, "limit_of", lambda *_: Limit(10**15, "this machine"))
    fit_batch(plan, network, train)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells")
@pytest.mark.slow
def test_a_run_takes_what_fits_and_is_resumed_with_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is tried when it goes on, wherever that is."""
    run, said = tmp_path / "run", io.StringIO()
    monkeypatch.setattr(batch_size, "limit_of", lambda *_: Limit(10**15, "this machine"))
    monkeypatch.setattr(batch_size, "measured", lambda *_, **__: Need({1: 3 * 10**14}))
    options = TrainingOptions(data=str(data), output=str(run), steps=4, **AUTO)
    with monkeypatch.context() as patch:
        stop_at(2, patch, terminate)
        with pytest.raises(Stopped):
            run_training(options, Console(file=said, width=200))
    assert "finding out how many images fit into memory" in said.getvalue()
    plan = json.loads((run / "plan.json").read_text())
    assert plan["batch_size"] == plan["recipe"]["batch_size"] == 2  # 600 of 800 TB; the recipe has 4
    assert "batch_size: auto" in (run / "config.yaml").read_text()
    for module in (batch_size, preparation):
        monkeypatch.setattr(module, "fit_batch", None)
    said = io.StringIO()
    resume_training(run, Console(file=said, width=200))
    assert "auto: of images of" in said.getvalue()  # what was found out when the run began
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4


def test_a_stored_plan_without_a_batch_is_damaged(train: Dataset) -> None:
    plan = plan_of(train)
    assert batch_size.with_stored_batch(plan, train, {"batch_size": "two"}) is plan
