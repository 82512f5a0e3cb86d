"""A run that is stopped anywhere and resumed is the run that was never stopped: weights, optimiser, average, order of
images, log; bit for bit."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console

import retinanet
from kernel_cases import torch_threads
from retinanet.checkpoint import load_model
from retinanet.cli.main import main
from retinanet.data import Dataset
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskError,
    DivergedError,
    Stopped,
    TrainingError,
)
from retinanet.folders import write_json
from retinanet.inference import Detector
from retinanet.objective import focal
from retinanet.training import judging, saving, timing
from retinanet.training.configuration import TrainingOptions
from retinanet.training.folder import RunFolder
from retinanet.training.gradients import GradientSum
from retinanet.training.preparation import Prepared
from retinanet.training.recipes import Recipe
from retinanet.training.run import resume_training, run_training
from retinanet.training.state import State, newest_state, read_state, save_state
from retinanet.training.step import TrainingStep

# What a line holds that no two runs have in common.
MEASURED = ("images_per_second", "seconds_")
IMAGES, BATCH, STEPS = 6, 2, 9  # three steps an epoch, three epochs
TINY: dict[str, Any] = {
    "backbone": "test_resnet",
    "pretrained": "none",
    "channels": 64,
    "image_size": 64,
    "batch_size": BATCH,
    "device": "cpu",
    "workers": 0,
    "steps": STEPS,
    "validate_every_steps": 4,
    "mosaic": 0.5,
}


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The runs that came to their pictures, which are not drawn: that takes as long as such a run."""
    runs: list[Path] = []
    monkeypatch.setattr("retinanet.training.run.draw_run", lambda best, val, run: runs.append(run.path))
    return runs


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing handles it."""


def quiet() -> Console:
    return Console(file=io.StringIO())


def images_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the list to which every step adds the images that it trained on."""
    seen: list[tuple[int, ...]] = []
    step = TrainingStep.__call__

    def noting(self: TrainingStep, batch: Any, lr: float) -> Any:
        losses = step(self, batch, lr)
        if lr:  # not the trial
            seen.append(batch.indices)
        return losses

    monkeypatch.setattr(TrainingStep, "__call__", noting)
    return seen


def story(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]


def final(run: Path, steps: int = STEPS) -> State:
    state, damaged = newest_state(run / "checkpoints")
    assert state is not None
    assert damaged == []
    assert state.step == steps
    return state


def assert_the_same(first: Path, second: Path, steps: int = STEPS) -> None:
    ours, theirs = final(first, steps), final(second, steps)
    assert ours.values == theirs.values
    assert ours.parts.keys() == theirs.parts.keys() == {"network", "average", "optimizer", "meter"}
    for name, part in ours.parts.items():
        assert part.keys() == theirs.parts[name].keys()
        for key, tensor in part.items():
            assert torch.equal(tensor, theirs.parts[name][key]), (name, key)
    assert story(first) == story(second)
    for model in ("best", "last"):
        a, b = load_model(first / model), load_model(second / model)
        assert a.training == b.training
        assert a.operating_points == b.operating_points
        found, expected = a.network.state_dict(), b.network.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert (first / "metrics.json").read_text() == (second / "metrics.json").read_text()


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, ...]]]:
    """A run that nothing stopped, and the images of its steps."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retinanet.training.run.draw_run", lambda *_: None)
        seen = images_of(patch)
        run_training(TrainingOptions(data=str(data), output=str(run), **TINY), quiet())
    assert len(seen) == STEPS
    return run, seen


def stop_at(step: int, patch: pytest.MonkeyPatch, how: Callable[[], None]) -> None:
    """Do something to the process when it has made a step, before anything is saved."""
    made = [0]
    call = TrainingStep.__call__

    def stopping(self: TrainingStep, batch: Any, lr: float) -> Any:
        losses = call(self, batch, lr)
        made[0] += 1
        if made[0] == step:
            how()
        return losses

    patch.setattr(TrainingStep, "__call__", stopping)


def kill() -> None:
    raise Killed


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("step", "workers"),  # mid-epoch, its end, right after a validation
    [
        (1, 0),
        (3, 2),
        (5, 0),
        *(pytest.param(step, workers, marks=pytest.mark.slow) for step, workers in ((1, 2), (3, 0), (5, 2))),
    ],
)
def test_a_run_stopped_by_a_signal_goes_on_as_if_it_never_had(
    step: int,
    workers: int,
    data: Path,
    tmp_path: Path,
    whole: tuple[Path, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = images_of(monkeypatch)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(step, patch, terminate)
        with pytest.raises(
            Stopped, match=f"stopped by a signal at step {step} of 9; go on with: .* --resume"
        ):
            run_training(
                TrainingOptions(data=str(data), output=str(run), **{**TINY, "workers": workers}), quiet()
            )
    assert len(seen) == step
    resume_training(run, quiet())
    assert seen == whole[1]
    assert_the_same(run, whole[0])


def test_a_run_stopped_between_two_parts_of_a_step_ends_that_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**TINY, "steps": 4, "accumulate": 2}
    seen = images_of(monkeypatch)
    run_training(TrainingOptions(data=str(data), output=str(tmp_path / "whole"), **options), quiet())
    expected = [*seen]
    seen.clear()
    begin, parts = GradientSum.begin, [0]

    def signalled(self: GradientSum, last: bool) -> None:
        parts[0] += 1
        if parts[0] == 3:  # between the parts of the second step
            terminate()
        begin(self, last)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(GradientSum, "begin", signalled)
        with pytest.raises(Stopped, match="at step 2 of 4"):
            run_training(TrainingOptions(data=str(data), output=str(run), **options), quiet())
    assert parts == [4]
    resume_training(run, quiet())
    assert seen == expected
    assert_the_same(run, tmp_path / "whole", steps=4)


@pytest.mark.parametrize("step", [1, 4, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 9))])
def test_a_killed_run_goes_on_from_its_last_state(
    step: int,
    data: Path,
    tmp_path: Path,
    whole: tuple[Path, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the first step nothing is saved, and it starts anew; else at most two steps are made again."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(step, patch, kill)
        options = TrainingOptions(data=str(data), output=str(run), save_every_steps=2, **TINY)
        with pytest.raises(Killed):
            run_training(options, quiet())
    seen = images_of(monkeypatch)
    resume_training(run, quiet())
    assert len(seen) == STEPS - (step - 1) // 2 * 2
    assert seen == whole[1][-len(seen) :]
    assert_the_same(run, whole[0])


@pytest.mark.parametrize(
    ("which", "how"),  # at steps 4, 8 and 9, the last
    [
        (1, terminate),
        (3, kill),
        *(
            pytest.param(which, how, marks=pytest.mark.slow)
            for which, how in ((1, kill), (2, kill), (2, terminate), (3, terminate))
        ),
    ],
)
def test_a_run_stopped_in_a_validation_makes_that_validation(
    which: int,
    how: Callable[[], None],
    data: Path,
    tmp_path: Path,
    whole: tuple[Path, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    judged = [0]
    validate = judging.validate

    def stopping(detector: Detector, dataset: Dataset, **told: Any) -> Any:
        judged[0] += 1
        if judged[0] == which:
            how()
        return validate(detector, dataset, **told)

    with monkeypatch.context() as patch:
        patch.setattr(judging, "validate", stopping)
        with pytest.raises((Killed, Stopped)) as raised:
            run_training(TrainingOptions(data=str(data), output=str(run), **TINY), quiet())
    if how is terminate:
        assert f"in the validation of step {(4, 8, 9)[which - 1]}; go on with" in str(raised.value)
    resume_training(run, quiet())
    assert_the_same(run, whole[0])


def test_stopped_three_times_in_one_epoch_with_other_workers(
    data: Path,
    tmp_path: Path,
    whole: tuple[Path, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    seen = images_of(monkeypatch)
    with monkeypatch.context() as patch:
        stop_at(1, patch, terminate)
        with pytest.raises(Stopped):
            run_training(TrainingOptions(data=str(data), output=str(run), **TINY), quiet())
        for workers in (2, 1):
            stop_at(1, patch, terminate)
            with pytest.raises(Stopped):
                resume_training(run, quiet(), asked=TrainingOptions(data="", workers=workers))
    resume_training(run, quiet())
    assert seen == whole[1]
    assert_the_same(run, whole[0])


def test_what_it_needs_to_go_on_with_less_memory_or_elsewhere(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less memory for a step, its own copy of the anchors, and the precision of the machine where it began."""
    run, anchors = tmp_path / "run", tmp_path / "anchors.yaml"
    anchors.write_text("sizes: [9, 18, 36, 72, 144]\nratios: [1.0]\n")
    options = TrainingOptions(data=str(data), output=str(run), **{**TINY, "anchors": str(anchors)})
    with monkeypatch.context() as patch:
        stop_at(1, patch, terminate)
        with pytest.raises(Stopped):
            run_training(options, quiet())
    anchors.unlink()
    began = json.loads((run / "plan.json").read_text())["precision"]
    other = {"fp32": "bf16", "bf16": "fp32"}[began]
    for module in ("plan", "planning"):
        monkeypatch.setattr(
            f"retinanet.training.{module}.resolve_precision",
            lambda _, asked: other if asked == "auto" else asked,
        )
    plans = []

    def trained(prepared: Prepared, *_: object) -> None:
        plans.append(prepared.plan)
        raise Stopped(15, "far enough")

    monkeypatch.setattr("retinanet.training.run.train_network", trained)
    moved = run.rename(tmp_path / "moved")
    for arguments in ([], ["--accumulate", "2", "--checkpoint-gradients"]):
        with pytest.raises(SystemExit) as end:
            main(["train", "--resume", str(moved), *arguments])
        assert end.value.code == 143
    usual, less = (plan.options for plan in plans)
    assert (usual.accumulate, usual.checkpoint_gradients) == (1, False)
    assert (less.accumulate, less.checkpoint_gradients) == (2, True)
    assert usual.precision == less.precision == began
    kept = RunFolder(moved).options()  # a resume without them would run out of memory again
    assert (kept.accumulate, kept.checkpoint_gradients) == (2, True)
    with pytest.raises(
        ConfigError, match="takes --accumulate of the run's 4 or more, for less memory; got 2"
    ):
        replace(kept, accumulate=4).resumed_with(kept)
    assert plans[0].spec.anchors.sizes == (9, 18, 36, 72, 144)


def test_it_says_where_it_goes_on_and_the_log_has_no_repeated_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(6, patch, kill)
        with pytest.raises(Killed):
            run_training(TrainingOptions(data=str(data), output=str(run), **TINY), quiet())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "epoch": 1.7, "loss": 9.0}\n{"step": 6, "epo')  # told, and never saved
    console = Console(record=True, width=200, file=io.StringIO())
    resume_training(run, console)
    assert "resuming at epoch 1/3, step 4" in console.export_text()
    steps = [(line["step"], "ap" in line) for line in story(run)]
    assert steps == sorted(set(steps))
    assert [step for step, judged in steps if judged] == [4, 8, 9]
    assert len((run / "command.txt").read_text().splitlines()) == 2


def test_a_damaged_state_is_named_and_the_one_before_used(
    data: Path,
    tmp_path: Path,
    whole: tuple[Path, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(6, patch, terminate)
        with pytest.raises(Stopped):
            run_training(TrainingOptions(data=str(data), output=str(run), **TINY), quiet())
    newest = run / "checkpoints" / "00000006" / "network.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    console = Console(record=True, width=400, file=io.StringIO())
    resume_training(run, console)
    said = console.export_text()
    assert (
        "00000006/network.safetensors is damaged: it is not what was written; the state before it is used"
        in said
    )
    assert "step 4" in said
    assert_the_same(run, whole[0])


def test_a_finished_run_is_reported_again(
    tmp_path: Path,
    whole: tuple[Path, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
    drawn: list[Path],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    (run / "report.html").unlink()  # killed right before it was written
    seen = images_of(monkeypatch)
    again = resume_training(run, quiet())
    assert seen == []
    assert (run / "report.html").is_file()
    assert drawn == [run]
    assert again.metrics == json.loads((run / "metrics.json").read_text())
    assert_the_same(run, whole[0])


def test_a_run_killed_before_its_plan_starts_at_its_beginning(
    data: Path, tmp_path: Path, whole: tuple[Path, list[tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("retinanet.training.preparation.plan_run", lambda *_: kill())
        with pytest.raises(Killed):
            run_training(TrainingOptions(data=str(data), output=str(run), **TINY), quiet())
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "command.txt",
        "config.yaml",
        "environment.json",
    ]
    resume_training(run, quiet())
    assert_the_same(run, whole[0])


def test_a_signal_in_the_trial_of_time_stops_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**{name: value for name, value in TINY.items() if name != "steps"}, "time": "1h"}
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(timing, "_step_seconds", lambda *_: terminate())
        with pytest.raises(
            Stopped, match=r"before the first step; start it again with: .* --resume"
        ) as raised:
            run_training(TrainingOptions(data=str(data), output=str(run), **options), quiet())
    assert raised.value.exit_code == 143
    assert (run / "config.yaml").is_file()


def test_a_run_with_a_time_goes_on_with_the_steps_that_it_planned(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**{name: value for name, value in TINY.items() if name != "steps"}, "time": "10s"}
    run = tmp_path / "run"
    monkeypatch.setattr(timing, "_step_seconds", lambda *_: 2.0)
    monkeypatch.setattr(timing, "_validation_seconds", lambda *_: 0.1)
    with monkeypatch.context() as patch:
        stop_at(2, patch, terminate)
        with pytest.raises(Stopped):
            run_training(TrainingOptions(data=str(data), output=str(run), **options), quiet())
    planned = json.loads((run / "plan.json").read_text())["steps"]
    monkeypatch.setattr(timing, "_step_seconds", lambda *_: 0.1)
    resume_training(run, quiet())
    assert story(run)[-1]["step"] == planned


# ---------------------------------------------------------------------------------- what is refused


def stopped_run(data: Path, run: Path, steps: int = 3) -> Path:
    """Return a run that was stopped after two steps."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(2, patch, terminate)
        with pytest.raises(Stopped):
            run_training(
                TrainingOptions(data=str(data), output=str(run), **{**TINY, "steps": steps}), quiet()
            )
    return run


@pytest.fixture(scope="module")
def stopped_once(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped_run(data, tmp_path_factory.mktemp("stopped") / "run", STEPS)


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A run of `TINY` that was stopped after two steps."""
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


def test_changed_data_is_refused(tmp_path: Path) -> None:
    own = generate_shapes(tmp_path / "shapes", train=IMAGES, val=2, spec=ShapesSpec(image_size=96))
    run = stopped_run(own, tmp_path / "run")
    file = own / "annotations" / "instances_train.json"
    document = json.loads(file.read_text())
    document["annotations"] = document["annotations"][1:]
    file.write_text(json.dumps(document))
    with pytest.raises(
        DataError, match=r"--resume needs the data that the run began with; .* has changed since"
    ):
        resume_training(run, quiet())


def test_another_plan_is_refused(stopped: Path) -> None:
    run = stopped
    plan = json.loads((run / "plan.json").read_text())
    write_json(run / "plan.json", {**plan, "lr": 2 * plan["lr"]})
    with pytest.raises(ConfigError, match=r"needs the plan that the run began with; lr was .* and would be"):
        resume_training(run, quiet())
    write_json(run / "plan.json", {"steps": 3, "data": plan["data"]})
    with pytest.raises(ConfigError, match=r"plan\.json of the run is damaged"):
        resume_training(run, quiet())
    write_json(run / "plan.json", {name: value for name, value in plan.items() if name != "data"})
    with pytest.raises(
        ConfigError, match=r"needs a run of this version; its plan\.json does not say which data"
    ):
        resume_training(run, quiet())
    (run / "plan.json").unlink()
    with pytest.raises(ConfigError, match=r"needs the run's plan\.json"):
        resume_training(run, quiet())


def test_a_trained_run_without_a_sound_state_is_left_as_it_is(
    data: Path, tmp_path: Path, whole: tuple[Path, list[tuple[int, ...]]]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    for state in (run / "checkpoints").iterdir():
        (state / "state.json").write_text("{}")
    told = story(run)
    with pytest.raises(
        CheckpointError, match=r"needs a training state that can be read: .*state\.json is damaged"
    ):
        resume_training(run, quiet())
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match=f"checkpoints holds none.* --weights {run}"):
        resume_training(run, quiet())
    assert story(run) == told
    assert load_model(run / "best").training["ap"] is not None


def test_the_command_goes_on_with_a_run(
    stopped: Path, whole: tuple[Path, list[tuple[int, ...]]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped
    for arguments in (
        ["--resume", str(run), "--workers", "1"],
        [f"--resume={run}"],
    ):  # the second reports again
        with pytest.raises(SystemExit) as stop:
            main(["train", *arguments])
        assert stop.value.code == 0
        assert "resuming at epoch" in capsys.readouterr().err
    assert_the_same(run, whole[0])


def test_a_state_of_another_network_is_refused(stopped: Path) -> None:
    run = stopped
    state, _ = newest_state(run / "checkpoints")
    assert state is not None
    network = {f"other.{name}": tensor for name, tensor in state.parts["network"].items()}
    shutil.rmtree(run / "checkpoints")
    save_state(run / "checkpoints", State(state.step, {**state.parts, "network": network}, state.values))
    with pytest.raises(CheckpointError, match="needs the state of this very network and optimiser"):
        resume_training(run, quiet())


def test_one_process_trains_a_run_and_python_can_resume_it(
    data: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with (
        RunFolder.existing(stopped).held(),
        pytest.raises(ConfigError, match="another process is training"),
    ):
        resume_training(stopped, quiet())
    with monkeypatch.context() as patch:
        patch.setattr(FileLock, "acquire", refuse)
        with pytest.raises(
            DiskError, match=f"a run needs a folder that it can write to; {stopped}: Read-only"
        ):
            resume_training(stopped, quiet())
    finished = retinanet.train(data=str(data), resume=str(stopped))
    assert finished.path == stopped
    assert read_state(stopped / "checkpoints" / f"{STEPS:08d}").step == STEPS


def test_a_run_is_resumed_from_another_working_directory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    stopped_run(Path(data.name), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    resume_training(Path("run"), quiet())
    assert final(tmp_path / "run", 3).step == 3


def test_a_run_with_a_loss_of_ones_own_is_not_resumed_with_another(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(recipe: Recipe) -> Recipe:
        return replace(recipe, class_loss=focal(0.5, 3.0))

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(2, patch, terminate)
        options = TrainingOptions(data=str(data), output=str(run), **{**TINY, "steps": 3})
        with pytest.raises(Stopped):
            run_training(options, quiet(), own)
    with pytest.raises(ConfigError, match=r"class loss was .*focal.* and would be null now"):
        resume_training(run, quiet())
    resume_training(run, quiet(), own)


def test_a_run_goes_on_without_the_model_that_it_started_from(
    data: Path,
    tmp_path: Path,
    whole: tuple[Path, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its state has all that it took from there; before the first state, the model is needed again. It was named
    relative to where the run was begun, from where nothing is resumed."""
    model = Path(shutil.copytree(whole[0] / "best", tmp_path / "model"))
    options = {**TINY, "pretrained": "auto", "weights": model.name, "steps": 3, "freeze": "stage1"}
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "with"
    with monkeypatch.context() as patch:
        stop_at(2, patch, terminate)
        with pytest.raises(Stopped):
            run_training(TrainingOptions(data=str(data), output=str(run), **options), quiet())
    for name in ("without", "killed"):
        shutil.copytree(run, tmp_path / name)
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    monkeypatch.chdir(data)
    resume_training(run, quiet())
    shutil.rmtree(model)
    console = Console(record=True, width=400, file=io.StringIO())
    resume_training(tmp_path / "without", console)
    assert "--weights" in console.export_text()  # why the backbone is what it is, as the run began
    ours, theirs = (newest_state(tmp_path / name / "checkpoints")[0] for name in ("without", "with"))
    assert ours is not None
    assert theirs is not None
    assert ours.step == theirs.step == 3
    assert ours.parts.keys() == theirs.parts.keys()
    for part in ours.parts:
        assert ours.parts[part].keys() == theirs.parts[part].keys()
        for key, tensor in ours.parts[part].items():
            assert torch.equal(tensor, theirs.parts[part][key]), (part, key)
    with pytest.raises(ConfigError, match=f"has no training state yet; {model} does not exist. Put it back"):
        resume_training(tmp_path / "killed", quiet())


def test_a_dry_run_has_no_result_in_python(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retinanet.training.run.run_training", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"needs dry_run=False; a dry run has no result. Use plan_run for a"
    ):
        retinanet.train(data=str(data), dry_run=True)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("retinanet.training.preparation.open_splits", "stopped by a signal; go on with: "),
        ("retinanet.training.judging.Judge.best", "stopped by a signal after the last step; go on with: "),
        ("retinanet.training.run.draw_run", "after the last step; draw its pictures with: "),
    ],
)
def test_a_signal_to_a_run_that_has_no_step_left_stops_at_once(
    place: str,
    message: str,
    tmp_path: Path,
    whole: tuple[Path, list[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Path(shutil.copytree(whole[0], tmp_path / "run"))
    monkeypatch.setattr(place, lambda *_, **__: terminate())
    with pytest.raises(Stopped, match=f"{message}retinanet train --resume {run}") as raised:
        resume_training(run, quiet())
    assert raised.value.exit_code == 143


def test_settings_beside_resume_are_refused_in_python(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="takes --workers, --accumulate and --checkpoint-gradients alone; got --lr"
    ):
        retinanet.train(data=str(data), resume=str(tmp_path), lr=0.1)


def test_a_signal_while_images_are_read_is_no_unreadable_image(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder's net for errors must not catch the end of a run."""
    run = tmp_path / "run"

    def interrupted(*_: object, **__: object) -> None:
        try:
            terminate()
        except Exception as error:
            raise DataError("an image cannot be read") from error

    with monkeypatch.context() as patch:
        patch.setattr("retinanet.training.preparation.open_splits", interrupted)
        with pytest.raises(Stopped, match="before the first step"):
            run_training(TrainingOptions(data=str(data), output=str(run), **TINY), quiet())
    assert (run / "config.yaml").is_file()


def test_weights_that_are_not_finite_are_never_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    call = TrainingStep.__call__
    made = [0]

    def spoilt(self: TrainingStep, batch: Any, lr: float) -> Any:
        losses = call(self, batch, lr)
        made[0] += 1
        if made[0] == 3:
            next(self.network.parameters()).data.fill_(float("inf"))
        return losses

    monkeypatch.setattr(TrainingStep, "__call__", spoilt)
    with pytest.raises(DivergedError, match="no longer finite at step 3"):
        run_training(TrainingOptions(data=str(data), output=str(run), save_every_steps=1, **TINY), quiet())
    state, _ = newest_state(run / "checkpoints")
    assert state is not None
    assert state.step == 2


@pytest.mark.slow
def test_sgd_with_batchnorm_and_without_an_average_resumes_as_well(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**TINY, "optimizer": "sgd", "backbone": "resnet18", "mosaic": 0.0}

    def plain(made: Recipe) -> Recipe:
        model = replace(made.model, backbone=replace(made.model.backbone, norm="native"))
        return replace(made, average_decay=None, model=model)

    for name in ("whole", "stopped"):
        run = tmp_path / name
        with monkeypatch.context() as patch:
            if name == "stopped":
                stop_at(5, patch, terminate)
                with pytest.raises(Stopped):
                    run_training(TrainingOptions(data=str(data), output=str(run), **options), quiet(), plain)
            else:
                run_training(TrainingOptions(data=str(data), output=str(run), **options), quiet(), plain)
    resume_training(tmp_path / "stopped", quiet(), plain)
    ours, theirs = final(tmp_path / "whole"), final(tmp_path / "stopped")
    for part in ("network", "optimizer"):
        assert ours.parts[part].keys() == theirs.parts[part].keys()
        assert all(torch.equal(tensor, theirs.parts[part][key]) for key, tensor in ours.parts[part].items())
    assert story(tmp_path / "whole") == story(tmp_path / "stopped")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nowhere"], "--resume needs the folder of a run; nowhere does not exist"),
        (["--resume", "."], "--resume needs the folder of a run; . has no config.yaml"),
        (
            ["--resume", "RUN", "--lr", "0.1"],
            "takes --workers, --accumulate and --checkpoint-gradients alone; got --lr",
        ),
        (["--resume"], "--resume needs a value; nothing was given"),
        (
            ["other", "--resume", "RUN"],
            "--workers, --accumulate and --checkpoint-gradients alone; got other",
        ),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_state_that_cannot_be_saved_ends_the_run_and_keeps_the_one_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    save, saved = saving.save_state, []

    def refuse(folder: Path, state: State) -> Path:
        if saved:
            raise TrainingError(f"no room for the training state in {folder}")
        saved.append(state.step)
        return save(folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_state", refuse)
        with pytest.raises(TrainingError, match="no room"):
            run_training(
                TrainingOptions(data=str(data), output=str(run), save_every_steps=2, **TINY), quiet()
            )
    state, _ = newest_state(run / "checkpoints")
    assert state is not None
    assert state.step == 2
    assert (run / "plan.json").is_file()  # the run began: its folder stays


def test_a_run_that_never_began_leaves_its_name_free(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(DataError):
        run_training(TrainingOptions(data=str(tmp_path / "none"), output=str(run)), quiet())
    assert not run.exists()


# ---------------------------------------------------------------------------------- the real thing


@pytest.mark.slow
def test_a_process_that_is_killed_at_random_always_goes_on(data: Path, tmp_path: Path) -> None:
    """SIGKILL after times between its first second and its end, until it ends by itself."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "retinanet", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # With as many threads: torch's sums depend on their number.
    subprocess.run(
        [*command, str(data), "--output", str(whole), *options],
        env=environment,
        check=True,
        capture_output=True,
    )
    arguments = [str(data), "--output", str(run), "--save-every-steps", "1", *options]
    for attempt in range(30):
        process = subprocess.Popen(
            [*command, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait = 0.0
        while not (run / "config.yaml").is_file() and process.poll() is None and wait < 60:
            time.sleep(0.1)
            wait += 0.1
        try:
            process.wait(2 + 1.5 * attempt)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            arguments = ["--resume", str(run)]
            continue
        assert process.returncode == 0
        break
    assert attempt > 1
    assert_the_same(run, whole)


def test_deterministic_runs_write_the_same_log_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS reads what it may do when it begins: that has to be said before anyone asks for CUDA, resumed or not."""
    seen: list[str | None] = []

    def asked() -> bool:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        return False

    monkeypatch.setattr(torch.cuda, "is_available", asked)
    monkeypatch.delenv("MKL_CBWR", raising=False)
    for run, workers in (("first", 0), ("second", 2)):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        told = {**TINY, "device": "auto", "deterministic": True, "steps": 5, "workers": workers}
        run_training(TrainingOptions(data=str(data), output=str(tmp_path / run), **told), quiet())
    assert story(tmp_path / "first") == story(tmp_path / "second")
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    resume_training(tmp_path / "first", quiet())
    assert set(seen) == {":4096:8"}
    assert os.environ["MKL_CBWR"] == "AUTO"


@pytest.mark.parametrize(("channels", "side", "stride"), [(64, 1, 1), (64, 2, 2), (256, 1, 1), (256, 2, 2)])
def test_a_gradient_at_a_single_place_is_the_same_every_time(channels: int, side: int, stride: int) -> None:
    """As P7 of a small image has, in a part of one image: by itself MKL gives it otherwise from call to call."""
    given = torch.randn(1, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3)
    found = []
    with torch_threads(2):
        for _ in range(200):
            pixels = given.clone().requires_grad_()
            out = torch.conv2d(pixels, weight, stride=stride, padding=1)
            out.backward(torch.cos(torch.arange(channels)).reshape(1, channels, 1, 1))
            found.append(pixels.grad)
    assert all(torch.equal(one, found[0]) for one in found)
