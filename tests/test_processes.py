"""Two processes train as one: same sums, same steps, same validations, same end."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import fresh
import two_processes
from kernel_cases import torch_threads
from retinanet.batches import Batch
from retinanet.checkpoint import load_model
from retinanet.data import open_dataset
from retinanet.data.sampling import share_of
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.devices import deterministic_algorithms
from retinanet.errors import ConfigError, DivergedError
from retinanet.objective import focal
from retinanet.processes import ALONE, Processes, joined_processes
from retinanet.training import judging, skipping
from retinanet.training.configuration import TrainingOptions
from retinanet.training.folder import RunFolder
from retinanet.training.parts import batch_norm_in_words
from retinanet.training.plan import Plan
from retinanet.training.planning import plan_run
from retinanet.training.preparation import prepare
from retinanet.training.recipes import Recipe
from retinanet.training.replay import replay
from retinanet.training.run import resume_training, run_training
from retinanet.training.starting import build_network
from retinanet.training.state import State, newest_state
from retinanet.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("undrawn")

SCRIPT = Path(two_processes.__file__)
Found = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    # Of one size, as images that are padded together are: padding is the one thing that a batch shares.
    return generate_shapes(folder, train=6, val=5, spec=ShapesSpec(image_size=96))


def two(data: Path, out: Path, *cases: str) -> Found:
    """Run cases in two processes; return what gives a case's results by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = fresh.run(SCRIPT, data, out, *cases, environment=told, seconds=500)
    assert done.returncode == 0, done.stdout + done.stderr

    def found(case: str) -> list[dict[str, Any]]:
        return [
            torch.load(out / f"{case}-{rank}.pt") for rank in range(2) if (out / f"{case}-{rank}.pt").exists()
        ]

    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def found(data: Path, out: Path) -> Found:
    options = two_processes.handed_over(str(data), str(out / "one-two"))
    two_processes.stop(ALONE, 3, 0, lambda: options, two_processes.exact)
    cases = (
        "exchange",
        "gradients",
        "fitting",
        "steps",
        "empty",
        "spoilt",
        "skipped",
        "validated",
        "run",
        "turned",
        "handed",
    )
    return two(data, out, *cases, "left")


def test_what_the_main_process_says_is_told_to_all(found: Found) -> None:
    first, second = found("exchange")
    assert first["order"] == second["order"] == ["body"]
    assert first.pop("failed") == "DataError: no data"
    told = "LostProcessError: the first process of the run could not begin; its message says why"
    assert second.pop("failed") == told
    assert first == second
    assert first["told"] == "rank 0"
    assert first["gathered"] == [0, 1]
    assert first["here"] == (2, 2)
    assert first["largest"] == [1, 5]
    assert first["added"] == [3, 3, 3]
    assert first["copied"] == [1, 1]


def test_alone_everything_is_a_matter_of_course() -> None:
    assert ALONE.main
    assert not ALONE.several
    assert ALONE.told("a") == "a"
    assert ALONE.gathered(3) == [3]
    assert ALONE.largest(1, True) == [1, 1]
    assert ALONE.add(torch.ones(2)).tolist() == [1, 1]
    ALONE.wait()
    with ALONE.main_first(), joined_processes() as processes:
        assert processes == ALONE


def test_gradients_are_summed_over_processes_whatever_the_buckets(found: Found) -> None:
    first, second = found("gradients")
    assert second["sent"] == 2  # before it had to begin anew
    expected: list[Any] = [0, 0, 0, 0, None, None]
    for rank in range(2):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3))
        torch.manual_seed(1 + rank)
        layers(torch.randn(2, 3, 8, 8)).square().sum().backward()
        for place, parameter in enumerate(layers.parameters()):
            expected[place] = expected[place] + parameter.grad
    for bucket in (1, 200, 10**9, "taken again"):
        for ours, theirs, wanted in zip(
            first[bucket], second[bucket], expected, strict=bucket != "taken again"
        ):
            if wanted is None:
                assert ours is None
                assert theirs is None
                continue
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "plan", "within"),
    [
        ("image", lambda data: two_processes.plan_of(data, 4, "image"), 1e-5),
        ("all-processes", two_processes.plan_of, 1e-5),
        ("uneven, in parts", lambda data: two_processes.plan_of(data, 3), 1e-5),
        ("uneven, no room on the way back", lambda data: two_processes.plan_of(data, 3), 1e-5),
        ("whole heads", two_processes.whole_heads, 5e-5),
    ],
    ids=["image", "all-processes", "uneven, in parts", "uneven, no room on the way back", "whole heads"],
)
def test_two_processes_train_as_one_with_all_images(
    case: str, plan: Callable[[str], Plan], within: float, data: Path, found: Found
) -> None:
    alone = two_processes.steps_of(plan(str(data)), ALONE)
    first, second = (of[case] for of in found("steps"))
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert nearly_the_same_way(first, alone, within)
    for ours, theirs in zip(first["said"], alone["said"], strict=True):
        torch.testing.assert_close(ours["total"], theirs["total"], rtol=1e-5, atol=0)
        assert ours["positives"] == theirs["positives"]


def test_memory_that_ended_on_the_way_back_did_so_when_sums_were_sent(found: Found) -> None:
    first, second = (of["sent before"] for of in found("steps"))
    assert first == []  # it had one image
    (sent,) = second
    assert sent > 0


def test_as_many_images_are_taken_as_fit_into_the_fullest_process(found: Found) -> None:
    """All take the same number, or none go on."""
    first, second = found("fitting")
    assert first == second
    assert first["asked"] == 4
    images, _, reasons = first["fewer"]
    assert images == 2  # of both together
    why = {setting: why for setting, _, why in reasons}
    assert "50% of the 2000.0 GB of rank 1" in why["batch size"]
    assert "of rank 1. Give a smaller" in first["none"]


def nearly_the_same_way(ours: dict[str, Any], theirs: dict[str, Any], within: float = 1e-5) -> bool:
    """Return whether the weights went the same way, but for rounding."""
    apart = (ours["moved"] - theirs["moved"]).norm() / theirs["moved"].norm()
    print(f"apart by {apart:.1e} of the way")
    return bool(apart < within)


def test_a_process_that_sees_no_object_for_twenty_steps_keeps_in_step(found: Found) -> None:
    first, second = found("empty")
    assert len(first["said"]) == 20
    assert all(said["finite"] for said in first["said"])
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert all(torch.equal(value, second["average"][name]) for name, value in first["average"].items())


def test_what_is_no_number_in_one_process_changes_nothing_in_either(found: Found) -> None:
    """An image, the loss and a gradient of the second process: neither weights nor statistics nor memories move."""
    first, second = found("spoilt")
    for rank in (first, second):
        assert rank["finite"] == [True, False, False, False, True]
        for after in rank["after"][1:4]:
            assert_same_tensors(after, rank["after"][0])
        assert not all(torch.equal(value, rank["after"][0][name]) for name, value in rank["after"][4].items())
        assert any("running_mean" in name for name in rank["after"][0])
        assert any("momentum" in name for name in rank["after"][0])
    for name, value in first["after"][4].items():
        if "running_" not in name:  # which each process gathers from its own images, until a state is saved
            assert torch.equal(value, second["after"][4][name]), name


def test_a_skipped_step_names_and_keeps_the_images_of_both_processes(
    found: Found, out: Path, data: Path
) -> None:
    first, second = found("skipped")
    (line,) = [line for line in story(out / "skipped") if "skipped" in line]
    train = open_dataset(data, "train")
    indices = first["indices"] + second["indices"]
    files = [str(train.files[index]) for index in indices]
    assert len(set(files)) == 3
    assert line["step"] == 2
    assert line["skipped"] == {"reason": "a gradient was not finite", "files": files}
    assert f"Its images: {', '.join(files)}; the batch again" in first["said"]
    (written,) = (out / "skipped" / "skipped").iterdir()
    batch = replay(written)
    assert list(batch.indices) == indices
    assert torch.equal(batch.images, torch.cat([first["images"], second["images"]]))


def assert_same_run(run: Path, whole: Path) -> None:
    (ours, damaged), (theirs, _) = newest_state(run / "checkpoints"), newest_state(whole / "checkpoints")
    assert damaged == []
    assert ours is not None
    assert theirs is not None
    assert (ours.step, ours.values) == (theirs.step, theirs.values)
    assert ours.parts.keys() == theirs.parts.keys()
    for name, part in ours.parts.items():
        assert_same_tensors(part, theirs.parts[name])
    assert story(run) == story(whole)


def story(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = ("images_per_second", "seconds_", "memory_gb", "workers_gb")
    return [{k: v for k, v in line.items() if not k.startswith(measured)} for line in lines]


def test_a_run_of_two_stopped_by_a_signal_to_one_goes_on_as_if_it_never_had(found: Found, out: Path) -> None:
    first, second = found("run")
    for rank in (first, second):
        code, message = rank["stopped"]
        assert code == 143
        assert "stopped by a signal at step 2 of 6; go on with: retinanet train --resume" in message
        assert len(rank["images"]) == 6
        assert rank["images"] == rank["images of the whole"]
    assert not any(
        set(ours) & set(theirs) for ours, theirs in zip(first["images"], second["images"], strict=True)
    )
    assert "processes" in first["said"]
    assert "2, with 1 or 2 images of a step each" in first["said"]
    assert "resuming at epoch 1/3, step 2" in first["said"]
    assert second["said"] == ""
    assert_same_run(out / "stopped", out / "whole")


def test_a_timed_run_of_two_has_as_many_steps_as_the_main_process_finds(found: Found, out: Path) -> None:
    first, second = found("turned")
    assert first["steps"] == second["steps"] == 12
    plan = json.loads((out / "turned" / "plan.json").read_text())
    assert (plan["steps"], plan["turns"]) == (12, [[10, 10.0]])
    assert plan["schedule_steps"] > 12


def test_two_processes_validate_each_image_once(found: Found, data: Path) -> None:
    """By a network that finds a hundred things in every image, some of them right."""
    first, second = found("validated")
    with torch_threads(1):  # as each of the two has
        alone = two_processes.validated(ALONE, str(data), "")
    assert first == second == alone
    assert alone["metrics"]["ap50"] > 0
    assert alone["metrics"]["ar100"] > 0
    assert len(alone["boxes"]) == alone["capped"] == 5


def test_a_run_of_two_goes_on_with_one_and_one_of_one_with_two(found: Found, data: Path, out: Path) -> None:
    """What a step sees does not depend on how many share it, so that this works at any step. Rounding differs;
    docs/training.md says by how much where no BatchNorm trains."""
    assert [rank["code"] for rank in found("handed")] == [143, 143]
    options = two_processes.handed_over(str(data), str(out / "one"))
    quiet = Console(file=io.StringIO())
    run_training(options, quiet, two_processes.exact)
    resume_training(out / "two-one", quiet, two_processes.exact)
    whole = last_state(out / "one")
    plan = plan_run(options, open_dataset(data, "train"), two_processes.exact)
    way = distance(whole.parts["network"], build_network(plan).state_dict())
    for name in ("one-two", "two-one"):
        state = last_state(out / name)
        assert state.step == two_processes.TINY["steps"]
        for part in ("network", "average"):
            assert distance(state.parts[part], whole.parts[part]) < 1e-5 * way
        ours, theirs = ([line for line in story(run) if "loss" in line] for run in (out / name, out / "one"))
        assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [4, 6]
        assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)


def distance(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """Return the length of what all weights differ by."""
    return float(sum((value - theirs[name]).double().square().sum() for name, value in ours.items()) ** 0.5)


def last_state(run: Path) -> State:
    state, damaged = newest_state(run / "checkpoints")
    assert state is not None
    assert damaged == []
    return state


def test_a_process_that_goes_away_is_told_in_a_sentence(found: Found) -> None:
    (first,) = found("left")
    assert first["message"].startswith("another process of the run has ended, or cannot be reached")
    assert first["message"].endswith("Go on with --resume")


@pytest.mark.slow
def test_two_processes_stopped_anywhere_resume_to_the_same_weights(data: Path, tmp_path: Path) -> None:
    first, second = two(data, tmp_path, "matrix")("matrix")
    assert first.keys() == second.keys()
    for name in first:
        assert first[name][0] == second[name][0] == 143, (name, first[name], second[name])
        assert first[name][2], name  # the same images
        assert second[name][2], name
        assert_same_run(tmp_path / name, tmp_path / "whole-2")


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_lost_a_process(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "retinanet", "train", str(data), "--output", str(run), "--save-every-steps", "2"]
    told = {**two_processes.TINY, "steps": 60, "validate_every_steps": 60}
    for name, value in told.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([sys.executable, *command], stdout=said, stderr=said)
        deadline = time.monotonic() + 120
        while not list((run / "checkpoints").glob("0*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = children(process.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        assert process.wait(timeout=200) == 0, (tmp_path / "said").read_text()
    text = (tmp_path / "said").read_text()
    assert "resuming at epoch" in text
    lines = [line["step"] for line in story(run) if "loss" in line]
    assert lines == list(range(10, 61, 10))
    state, damaged = newest_state(run / "checkpoints")
    assert state is not None
    assert (state.step, damaged) == (60, [])


def children(parent: int) -> list[int]:
    """Return the processes that a process started and that train."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(parent)], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 1) for line in listed.stdout.splitlines()]
    return sorted(int(pid) for pid, command in rows if "retinanet train" in command.replace("-m ", ""))


def test_shares_of_a_step_are_all_of_it() -> None:
    for count, processes in ((8, 2), (7, 3), (3, 3)):
        shares = [share_of(count, rank, processes) for rank in range(processes)]
        assert [place for share in shares for place in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_images_a_step_are_refused(data: Path) -> None:
    options = TrainingOptions(data=str(data), **two_processes.TINY)
    with pytest.raises(ConfigError, match="4 processes need --batch-size 4 or more, an image each; it is 3"):
        plan_run(options, open_dataset(data, "train"), processes=Processes(0, 4))
    fitted = replace(options, batch_size="auto")  # is found out later
    assert plan_run(fitted, open_dataset(data, "train"), processes=Processes(0, 5)).batch_size == 4


@pytest.mark.parametrize(("processes", "accumulate", "at_once"), [(1, 1, 7), (2, 1, 4), (2, 2, 2), (8, 1, 1)])
def test_no_more_images_are_validated_at_once_than_pass_in_a_step(
    data: Path, monkeypatch: pytest.MonkeyPatch, processes: int, accumulate: int, at_once: int
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(judging, "validate", lambda *_, batch_size, **__: seen.append(batch_size))
    options = TrainingOptions(
        data=str(data), **{**two_processes.TINY, "batch_size": 7, "accumulate": accumulate}
    )
    train = open_dataset(data, "train")
    plan = plan_run(options, train)
    judge = judging.Judge(plan, build_network(plan), train, RunFolder(data), Processes(0, processes))
    judge._validated(None)  # type: ignore[arg-type]
    assert seen == [at_once]


@pytest.mark.parametrize(
    ("backbone", "processes", "accumulate", "sees"),
    [
        ("test_resnet", 1, 1, None),
        ("test_resnet", 1, 2, "sees at most 4 of a step's 7 images at once"),
        ("test_resnet", 2, 2, "sees at most 2 of a step's 7 images at once"),
        ("test_efficientnet_gn", 2, 2, None),
    ],
)
def test_the_plan_says_where_a_batchnorm_sees_a_part_of_a_step(
    backbone: str, processes: int, accumulate: int, sees: str | None, data: Path
) -> None:
    told = {**two_processes.TINY, "backbone": backbone, "batch_size": 7, "accumulate": accumulate}
    console = Console(record=True, width=200, file=io.StringIO())

    class Described(Processes):  # which exchange nothing
        several = property(lambda self: False)  # type: ignore[assignment]

    options = TrainingOptions(data=str(data), **told)
    prepare(options, console, None, None, processes=Described(0, processes))
    assert ("BatchNorm" in console.export_text(clear=False)) == (sees is not None)
    assert (sees or "") in console.export_text()


def test_a_batchnorm_that_stays_as_loaded_sees_nothing(data: Path) -> None:
    options = TrainingOptions(data=str(data), **two_processes.TINY)
    network = build_network(plan_run(options, open_dataset(data, "train")))
    assert batch_norm_in_words(network, 7, 2, 2) is not None
    network.backbone.freeze("backbone")
    assert batch_norm_in_words(network, 7, 2, 2) is None


# One process: parts, and numbers that are not finite.


def test_parts_of_a_step_add_up_to_the_step(data: Path) -> None:
    whole, parts = (
        two_processes.steps_of(two_processes.plan_of(str(data)), ALONE, parts=parts) for parts in (1, 3)
    )
    assert nearly_the_same_way(whole, parts)
    for ours, theirs in zip(whole["said"], parts["said"], strict=True):
        torch.testing.assert_close(ours["total"], theirs["total"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
@pytest.mark.parametrize("on_device", [False, True])
def test_a_run_with_skipped_steps_is_the_run_without_them(
    on_device: bool, optimizer: str, data: Path
) -> None:
    """The first step of all among them: what an optimiser makes in it must not stay as memory happened to be, which
    deterministic algorithms fill with NaN. On the device: as on CUDA, where the host does not know what is skipped."""
    train = open_dataset(data, "train")
    plan = plan_run(TrainingOptions(data=str(data), **{**two_processes.TINY, "optimizer": optimizer}), train)
    first, second, third = two_processes.batches_of(plan, ALONE, 3)
    whole, spoilt = (TrainingStep.of(plan, build_network(plan)) for _ in range(2))
    spoilt.decides_on_device = on_device
    with deterministic_algorithms(True):
        for batch in (first, second):
            assert two_processes.step_with(whole, batch).finite
        for batch, spoil in (
            (third, "image"),
            (first, None),
            (third, "loss"),
            (third, "gradient"),
            (second, None),
            (third, "gradient"),
        ):
            done = two_processes.step_with(spoilt, batch, spoil)  # type: ignore[arg-type]
            assert bool(done.finite) == (spoil is None)
            assert bool(torch.isfinite(done.total)) == (spoil in (None, "gradient"))
    assert_same_tensors(two_processes.everything(spoilt), two_processes.everything(whole))


def assert_same_tensors(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("read_every", [1, 10])
def test_a_streak_of_skipped_steps_counts_though_it_is_over_when_it_is_read(read_every: int) -> None:
    """On CUDA values are read every ten steps: ten in a row may lie between."""
    skipped, told = skipping.SkippedSteps(ALONE), []
    for step in range(1, 31):
        spoilt = 3 <= step <= 11 or 16 <= step <= 25
        value = torch.tensor(float("nan") if spoilt else 1.0)
        skipped.note(step, (step,), value.isfinite(), value)
        if step % read_every == 0:
            told += skipped.read()
        if step == 20:
            skipped.require_few(0.1)
    with pytest.raises(DivergedError, match="the 10 steps until step 25 were skipped"):
        skipped.require_few(0.1)
    assert [one.step for one in told] == [*range(3, 12), *range(16, 26)]
    assert all(one.images == (one.step,) for one in told)


def test_running_statistics_take_nothing_from_a_skipped_step(data: Path) -> None:
    train = open_dataset(data, "train")

    def native(recipe: Any) -> Any:
        model = replace(recipe.model, backbone=replace(recipe.model.backbone, norm="native"))
        return replace(recipe, model=model)

    plan = plan_run(
        TrainingOptions(data=str(data), **{**two_processes.TINY, "backbone": "resnet18"}), train, native
    )
    network = build_network(plan)
    train_on = TrainingStep.of(plan, network)
    good, bad = two_processes.batches_of(plan, ALONE, 2)
    train_on(good, 0.01)
    before = {name: value.clone() for name, value in network.named_buffers()}
    assert before
    bad.images[1, 2, 3, 3] = float("nan")
    assert not train_on(bad, 0.01).finite
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())


def spoil_steps(steps: set[int], patch: pytest.MonkeyPatch) -> None:
    """Make an image of some steps not a number."""
    call = TrainingStep.__call__
    made = [0]

    def spoilt(self: TrainingStep, batch: Batch, lr: float) -> Any:
        made[0] += 1
        if made[0] in steps:
            batch.images[0, 0, 0, 0] = float("inf")
        return call(self, batch, lr)

    patch.setattr(TrainingStep, "__call__", spoilt)


def test_skipped_steps_are_logged_with_their_files_and_can_be_made_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run with another order and loss than its options say, on a machine that has no such device."""
    said = io.StringIO()
    own = Path(shutil.copytree(data, tmp_path / "own"))
    run = tmp_path / "run"
    seen: list[Batch] = []
    call = TrainingStep.__call__

    def stepping(self: TrainingStep, batch: Batch, lr: float) -> Any:
        seen.append(replace(batch, images=batch.images.clone()))
        if len(seen) == 3:
            batch.images[0, 0, 0, 0] = float("inf")
        return call(self, batch, lr)

    def change(recipe: Recipe) -> Recipe:
        return replace(recipe, class_loss=focal(0.5, 3.0), repeat_rare=0.9)

    options = {**two_processes.TINY, "steps": 4, "mosaic": 0.5}
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", stepping)
        run_training(
            TrainingOptions(data=str(own), output=str(run), **options), Console(file=said, width=2000), change
        )
    (line,) = [line for line in story(run) if "skipped" in line]
    train = open_dataset(own, "train")
    files = [str(train.files[index]) for index in seen[2].indices]
    assert line["step"] == 3
    assert line["skipped"] == {"reason": "the loss was nan", "files": files}
    assert (
        f"step 3 was skipped, as the loss was nan; weights stay as they were. Its images: {', '.join(files)}"
        in (said.getvalue())
    )
    model = load_model(run / "best")
    assert all(torch.isfinite(value).all() for value in model.network.state_dict().values())
    assert all(np.isfinite(line["loss"]) for line in story(run) if "loss" in line)

    (written,) = (run / "skipped").iterdir()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("device: cpu", "device: cuda:7"))
    batch = replay(written)
    assert batch.indices == seen[2].indices
    assert torch.equal(batch.images, seen[2].images)
    assert torch.equal(batch.targets.boxes, seen[2].targets.boxes)
    assert torch.equal(batch.targets.classes, seen[2].targets.classes)

    told = json.loads(written.read_text())
    written.write_text(json.dumps({**told, "images": told["images"][::-1]}))
    with pytest.raises(ConfigError, match=r"replay needs the version of retinanet that wrote .* give others"):
        replay(written)
    written.write_text(json.dumps({**told, "images": [{}]}))
    with pytest.raises(ConfigError, match=r"or plan\.json of its run, is damaged: KeyError\('index'\)"):
        replay(written)
    labels = own / "annotations" / "instances_train.json"
    document = json.loads(labels.read_text())
    document["annotations"][0]["bbox"][2] -= 1
    labels.write_text(json.dumps(document))
    written.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=f"replay needs the data that the run had; {own} has changed since"):
        replay(written)


def test_replay_refuses_what_is_no_replay_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"replay needs RUN/skipped/STEP.json of a run; .*x.json is none"):
        replay(tmp_path / "x.json")


def test_many_skipped_steps_in_a_row_end_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    spoil_steps(set(range(2, 99)), monkeypatch)
    options = TrainingOptions(data=str(data), output=str(run), **{**two_processes.TINY, "steps": 40})
    with pytest.raises(
        DivergedError, match=r"the 10 steps until step 11 were skipped.* lower --lr"
    ) as raised:
        run_training(options, Console(file=io.StringIO()))
    assert "--precision fp32" in str(raised.value)
    assert len(list((run / "skipped").iterdir())) <= skipping.REPLAYS
