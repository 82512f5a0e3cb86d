"""Two processes train as one: same sums, same steps, same validations, same end."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import two_processes
from retinanet.batches import Batch
from retinanet.checkpoint import load_model
from retinanet.data import open_dataset
from retinanet.data.sampling import share_of
from retinanet.data.shapes import ShapesSpec, generate_shapes
from retinanet.errors import ConfigError, DivergedError
from retinanet.inference import Detector, validate
from retinanet.processes import ALONE, Processes, device_of_process, joined_processes
from retinanet.training import skipping
from retinanet.training.configuration import TrainingOptions
from retinanet.training.planning import plan_run
from retinanet.training.replay import replay
from retinanet.training.run import resume_training, run_training
from retinanet.training.starting import build_network
from retinanet.training.state import newest_state
from retinanet.training.step import TrainingStep

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
    told = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-W", "error", str(SCRIPT), str(data), str(out), *cases]
    processes = [
        subprocess.Popen(
            command, env={**told, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=500)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said

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
    return two(data, out, "exchange", "gradients", "fitting", "steps", "empty", "spoilt", "run", "left")


def test_what_the_main_process_says_is_told_to_all(found: Found) -> None:
    first, second = found("exchange")
    assert first["order"] == second["order"] == ["body"]
    assert first.pop("failed") == "DataError"
    assert second.pop("failed") == "LostProcessError"
    assert first == second
    assert first["told"] == "rank 0"
    assert first["gathered"] == [0, 1]
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
    expected: list[Any] = [0, 0, 0, 0, None, None]
    for rank in range(2):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3))
        torch.manual_seed(1 + rank)
        layers(torch.randn(2, 3, 8, 8)).square().sum().backward()
        for place, parameter in enumerate(layers.parameters()):
            expected[place] = expected[place] + parameter.grad
    for bucket in (1, 200, 10**9):
        for ours, theirs, wanted in zip(first[bucket], second[bucket], expected, strict=True):
            if wanted is None:
                assert ours is None
                assert theirs is None
                continue
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "batch_size", "normalizer"),
    [("image", 4, "image"), ("all-processes", 4, "all-processes"), ("uneven, in parts", 3, "all-processes")],
)
def test_two_processes_train_as_one_with_all_images(
    case: str, batch_size: int, normalizer: str, data: Path, found: Found
) -> None:
    alone = two_processes.steps_of(two_processes.plan_of(str(data), batch_size, normalizer), ALONE)
    first, second = (of[case] for of in found("steps"))
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert nearly_the_same_way(first, alone)
    for ours, theirs in zip(first["said"], alone["said"], strict=True):
        torch.testing.assert_close(ours["total"], theirs["total"], rtol=1e-3, atol=0)
        assert ours["positives"] == theirs["positives"]


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


def nearly_the_same_way(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Return whether the weights went the same way, but for rounding."""
    apart = (ours["moved"] - theirs["moved"]).norm() / theirs["moved"].norm()
    print(f"apart by {apart:.1e} of the way")
    return bool(apart < 1e-4)


def test_a_process_that_sees_no_object_for_twenty_steps_keeps_in_step(found: Found) -> None:
    first, second = found("empty")
    assert len(first["said"]) == 20
    assert all(said["finite"] for said in first["said"])
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert all(torch.equal(value, second["average"][name]) for name, value in first["average"].items())


def test_what_is_no_number_in_one_process_is_skipped_in_both(found: Found) -> None:
    first, second = found("spoilt")
    assert [bool(said["finite"]) for said in first["said"]] == [True, False, True]
    assert [bool(said["finite"]) for said in second["said"]] == [True, False, True]
    for kind in ("weights", "average"):
        for name, value in first[kind].items():
            assert torch.equal(value, second[kind][name])
            assert torch.isfinite(value).all()


def assert_same_run(run: Path, whole: Path) -> None:
    (ours, damaged), (theirs, _) = newest_state(run / "checkpoints"), newest_state(whole / "checkpoints")
    assert damaged == []
    assert ours is not None
    assert theirs is not None
    assert (ours.step, ours.values) == (theirs.step, theirs.values)
    for name, part in ours.parts.items():
        assert all(torch.equal(value, theirs.parts[name][key]) for key, value in part.items()), name
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
    assert "processes" in first["said"]
    assert "2, with 1 or 2 images of a step each" in first["said"]
    assert "resuming at epoch 1/3, step 2" in first["said"]
    assert second["said"] == ""
    assert_same_run(out / "stopped", out / "whole")


def test_two_processes_validate_each_image_once(found: Found, out: Path, data: Path) -> None:
    found("run")
    line = [record for record in story(out / "whole") if "ap" in record][-1]
    model = load_model(out / "whole" / "last")
    alone = validate(Detector(model, device="cpu"), open_dataset(data, "val"), batch_size=3)
    assert alone.metrics.to_json()["ap50"] == line["ap50"]
    assert alone.metrics.to_json()["ar100"] == line["ar100"]


def test_a_run_of_two_goes_on_with_one(found: Found, out: Path) -> None:
    """What a step sees does not depend on how many share it, so that this works at any step."""
    found("run")
    resume_training(out / "handed", Console(file=io.StringIO()))
    ours, theirs = ([line for line in story(out / run) if "loss" in line] for run in ("handed", "whole"))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    # The backbone's BatchNorm sees three images where it saw one or two.
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=0.1)
    state, damaged = newest_state(out / "handed" / "checkpoints")
    assert state is not None
    assert (state.step, damaged) == (two_processes.TINY["steps"], [])


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


def test_each_process_of_a_machine_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert device_of_process(cuda) == cuda
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert device_of_process(cuda) == torch.device("cuda", 1)
    assert device_of_process(cpu) == cpu
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="torch sees 1 here for 2 processes"):
        device_of_process(cuda)


# One process: parts, and numbers that are not finite.


def test_parts_of_a_step_add_up_to_the_step(data: Path) -> None:
    whole, parts = (
        two_processes.steps_of(two_processes.plan_of(str(data)), ALONE, parts=parts) for parts in (1, 3)
    )
    assert nearly_the_same_way(whole, parts)
    for ours, theirs in zip(whole["said"], parts["said"], strict=True):
        torch.testing.assert_close(ours["total"], theirs["total"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("what", ["image", "loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(
    what: str, on_device: bool, optimizer: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = open_dataset(data, "train")
    plan = plan_run(TrainingOptions(data=str(data), **{**two_processes.TINY, "optimizer": optimizer}), train)
    network = build_network(plan)
    train_on = TrainingStep.of(plan, network)
    train_on.decides_on_device = on_device
    batches = two_processes.training_batches(
        train, plan.preprocessing, plan.augmentation, batch_size=2, seed=0, steps=3
    )
    good, bad, last = batches
    assert train_on(good, 0.01).finite
    before = {name: value.clone() for name, value in network.state_dict().items()}
    momenta = {
        id(p): {k: v.clone() for k, v in s.items()} for o in train_on.optimizers for p, s in o.state.items()
    }
    with monkeypatch.context() as patch:
        if what == "image":
            bad.images[0, 0, 3, 3] = float("nan")
        elif what == "loss":
            objective = replace(
                plan.objective, class_loss=lambda logits, targets, weight: (logits * float("inf")).sum()
            )
            patch.setattr(train_on, "objective", objective)
        else:
            weight = (
                network.pyramid.output[0].weight
                if hasattr(network.pyramid, "output")
                else train_on.trained[0]
            )
            handle = weight.register_hook(lambda gradient: gradient * float("inf"))
        done = train_on(bad, 0.01)
        if what == "gradient":
            handle.remove()
    assert not done.finite
    assert bool(torch.isfinite(done.total)) == (what == "gradient")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for o in train_on.optimizers:
        for parameter, kept in o.state.items():
            assert all(torch.equal(kept[name], value) for name, value in momenta[id(parameter)].items())
    assert train_on.average is not None
    assert all(torch.isfinite(value).all() for value in train_on.average.model.state_dict().values())
    assert train_on(last, 0.01).finite
    assert not torch.equal(network.state_dict()["class_head.last.bias"], before["class_head.last.bias"])


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
    good, bad = two_processes.training_batches(
        train, plan.preprocessing, plan.augmentation, batch_size=2, seed=0, steps=2
    )
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
    said = io.StringIO()
    run = tmp_path / "run"
    seen: list[Batch] = []
    note = skipping.SkippedSteps.note

    def noting(self: Any, step: int, images: tuple[int, ...], *rest: Any) -> None:
        seen.append(images)  # type: ignore[arg-type]
        note(self, step, images, *rest)

    monkeypatch.setattr(skipping.SkippedSteps, "note", noting)
    with monkeypatch.context() as patch:
        spoil_steps({3}, patch)
        run_training(
            TrainingOptions(data=str(data), output=str(run), **two_processes.TINY),
            Console(file=said, width=2000),
        )
    (line,) = [line for line in story(run) if "skipped" in line]
    train = open_dataset(data, "train")
    files = [str(train.files[index]) for index in seen[2]]
    assert line["step"] == 3
    assert line["skipped"] == {"reason": "the loss was nan", "files": files}
    assert (
        f"step 3 was skipped, as the loss was nan; weights stay as they were. Its images: {', '.join(files)}"
        in (said.getvalue())
    )
    (written,) = (run / "skipped").iterdir()
    batch = replay(written)
    assert batch.indices == seen[2]
    assert batch.images.shape[0] == 3
    assert torch.isfinite(batch.images).all()  # it was spoilt on its way, not in the data
    model = load_model(run / "best")
    assert all(torch.isfinite(value).all() for value in model.network.state_dict().values())
    assert all(np.isfinite(line["loss"]) for line in story(run) if "loss" in line)


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
        DivergedError, match=r"the last 10 steps until step 11 were skipped.* lower --lr"
    ) as raised:
        run_training(options, Console(file=io.StringIO()))
    assert "--precision fp32" in str(raised.value)
    assert len(list((run / "skipped").iterdir())) <= skipping.REPLAYS
