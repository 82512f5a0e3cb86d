"""Processes meet, compare what they have, tell errors of others from their own, and can be ended while they wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed as dist

from retinanet.cli.train import Train
from retinanet.errors import ConfigError, LostProcessError
from retinanet.processes import Processes, device_of_process, joined_processes, joining, meeting
from retinanet.processes.group import exchange, first_difference
from retinanet.processes.meeting import name_of_meeting
from retinanet.training import run as run_module
from retinanet.training.configuration import TrainingOptions
from retinanet.training.folder import RunFolder, launch_of_process


def meet(store: dist.Store, count: int, *, but: tuple[int, ...] = ()) -> list[str]:
    """Let processes meet, each in a thread; return the names that they agree on."""
    ranks = [rank for rank in range(count) if rank not in but]
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(lambda rank: name_of_meeting(store, rank, count, 10.0), ranks))


def until(store: dist.Store, key: str) -> None:
    deadline = time.monotonic() + 10
    while not store.check([key]) and time.monotonic() < deadline:
        time.sleep(0.01)


def test_each_meeting_at_a_store_has_a_name_of_its_own() -> None:
    store = dist.HashStore()
    names = [set(meet(store, 3)) for _ in range(3)]
    assert [len(name) for name in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


def test_what_ended_processes_left_misleads_nobody() -> None:
    store = dist.HashStore()
    store.set("retinanet/hello/1", "dead")  # it never answers
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(name_of_meeting, store, 0, 3, 10.0)
        until(store, "retinanet/answer/dead")
        others = [threads.submit(name_of_meeting, store, rank, 3, 10.0) for rank in (2, 1)]
        assert {one.result() for one in others} == {first.result()}


def test_a_first_process_that_ends_is_followed_by_the_next() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as threads:
        second = threads.submit(name_of_meeting, store, 1, 3, 10.0)
        until(store, "retinanet/hello/1")
        word = store.get("retinanet/hello/1").decode()
        store.set(f"retinanet/answer/{word}", "ended")
        until(store, f"retinanet/here/ended/{word}")
        third = threads.submit(name_of_meeting, store, 2, 3, 10.0)
        first = threads.submit(name_of_meeting, store, 0, 3, 10.0)
        assert first.result() == second.result() == third.result() != "ended"


def test_processes_that_do_not_come_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    says = r"waited 0.1 s for the 12 processes of the run to begin: {}\. See whether all were started"
    with pytest.raises(LostProcessError, match=says.format("11 did not come, of rank 1, 2, .*, 8, ...")):
        name_of_meeting(store, 0, 12, 0.1)
    with pytest.raises(LostProcessError, match=says.format("the first one does not answer")):
        name_of_meeting(store, 1, 12, 0.1)
    words = iter(["first", "second"])  # what the two would tell each other, whichever is slow
    monkeypatch.setattr(meeting, "uuid4", lambda: SimpleNamespace(hex=next(words)))
    store.set("retinanet/hello/1", "second")
    store.set("retinanet/here/first/second", "")
    with pytest.raises(LostProcessError, match=says.format("10 did not come, of rank 2, 3, .*")):
        name_of_meeting(store, 0, 12, 0.1)
    with pytest.raises(LostProcessError, match=says.format("others did not come")):
        name_of_meeting(store, 1, 12, 0.1)


def test_without_a_place_to_meet_the_message_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(
            ConfigError, match=r"WORLD_SIZE is 2: .*MASTER_ADDR.*torchrun --nproc-per-node N -m retinanet"
        ),
        joined_processes(),
    ):
        pass
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "9")  # where nobody listens
    monkeypatch.setattr(joining, "MEETING", timedelta(seconds=0.2))
    with (
        pytest.raises(
            LostProcessError, match=r"cannot meet at 127.0.0.1:9 in up to 0.2 s: .*whether all were started"
        ),
        joined_processes(),
    ):
        pass


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/{}] {}"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            RuntimeError(GLOO.format("pair.cc:561", "Connection closed by peer")),
            "has ended, or cannot be reached",
        ),
        (
            RuntimeError(f"Gloo connectFullMesh failed with {GLOO.format('pair.cc:99', 'no route')}"),
            "has ended",
        ),
        (
            RuntimeError(GLOO.format("unbound_buffer.cc:78", "Timed out waiting 4000ms")),
            "does not answer, and may hang",
        ),
        (dist.DistNetworkError("Broken pipe"), "has ended"),
        (dist.DistStoreError("wait timeout after 300000ms"), "does not answer"),
        (dist.DistBackendError("NCCL error: remote process exited"), "has ended"),
        (dist.DistBackendError("NCCL error: CUDA out of memory"), None),
        (dist.DistBackendError("NCCL error: invalid usage"), None),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), None),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), None),
        (
            RuntimeError(f"[enforce fail at {GLOO.format('pair.cc:464', 'op.preamble.length <= op.nbytes')}"),
            None,
        ),
    ],
)
def test_only_what_others_brought_about_is_told_of_them(error: RuntimeError, says: str | None) -> None:
    def fail() -> None:
        raise error

    if says is None:
        with pytest.raises(type(error)) as raised:
            exchange(fail)
        assert raised.value is error
    else:
        with pytest.raises(LostProcessError, match=rf"^another process of the run {says}.*--resume$"):
            exchange(fail)


def test_differences_are_found_and_named() -> None:
    assert first_difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}) is None
    assert first_difference({"a": {"b": [1, 2], "c": 0}}, {"a": {"b": [1, 3], "c": 1}}) == (
        "a.b",
        [1, 2],
        [1, 3],
    )
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ("b", None, 2)
    assert first_difference({"plan": {"x": 1}}, {"plan": None}) == ("plan", {"x": 1}, None)


def test_processes_that_have_not_the_same_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    first, third = {"torch": "2.15", "plan": {"lr": 0.1}}, {"torch": "2.15", "plan": {"lr": 0.2}}
    found = [first, first, third]
    monkeypatch.setattr(Processes, "gathered", lambda self, value: found)
    monkeypatch.setattr(Processes, "_told", lambda self, value, group: "" if self.main else "ConfigError")
    says = (
        r"the processes of a run need the same plan.lr; process 0 has 0.1, process 2 0.2. Give every machine"
    )
    with pytest.raises(ConfigError, match=says):
        Processes(0, 3).require_alike(first)
    with pytest.raises(
        LostProcessError, match="the first process of the run could not begin; its message says why"
    ):
        Processes(1, 3).require_alike(first)
    Processes().require_alike(first)


def test_a_process_whose_number_is_known_has_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, several = torch.device("cuda"), Processes(1, 4, here=2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of_process(cuda) == cuda  # alone
    assert device_of_process(cuda, Processes(1, 4)) == cuda  # on its machine
    assert device_of_process(cuda, several) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ConfigError,
        match=r"torch sees 2 here for the 2 processes of this machine, of which this is number 2\. Give",
    ):
        device_of_process(cuda, several)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(
        ConfigError, match=r"LOCAL_RANK, which is not set; torch sees 2 here\. Start with torchrun"
    ):
        device_of_process(cuda, several)
    assert device_of_process(torch.device("cpu"), several) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_of_process(cuda, several) == cuda


def test_a_run_knows_its_own_earlier_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = TrainingOptions(data="data", output=str(tmp_path / "run"), steps=3, lr=1e-3)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch_of_process() is None
    folder = RunFolder.create(options.output, options)
    assert RunFolder.begun_by_this_launch(options) is None  # begun by hand
    folder.take_back()

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "big")
    assert RunFolder.begun_by_this_launch(options) is None
    RunFolder.create(options.output, options)
    assert RunFolder.begun_by_this_launch(options) == RunFolder(tmp_path / "run")
    assert RunFolder.begun_by_this_launch(replace(options, lr=2e-3)) is None  # another run of the same name
    monkeypatch.chdir(tmp_path)
    nameless = replace(options, output=None)
    assert RunFolder.begun_by_this_launch(nameless) is None
    for lr in (5e-3, 1e-3, 7e-3):
        RunFolder.create(None, replace(nameless, lr=lr))
    assert RunFolder.begun_by_this_launch(nameless) == RunFolder(Path("runs/train-2"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    assert RunFolder.begun_by_this_launch(options) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun says of every launch without a name
    assert str(os.getppid()) in str(launch_of_process())


def test_a_run_that_torchrun_began_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone_on: list[Any] = []
    monkeypatch.setattr(
        run_module, "_go_on", lambda folder, console, change, workers, *_: gone_on.append((folder, workers))
    )
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "big")
    command = Train(data="data", output=str(tmp_path / "run"), workers=3)
    RunFolder.create(command.output, command)
    assert command.run() == 0
    assert gone_on == [(RunFolder(tmp_path / "run"), command)]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    with pytest.raises(ConfigError, match="--output needs a new folder"):
        command.run()


def test_a_run_that_cannot_meet_takes_its_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        Train(data="data", output=str(tmp_path / "run")).run()
    assert not (tmp_path / "run").exists()


# A lock that is locked twice: a wait that no handler of Python's ever gets into.
WAITS = """
import ctypes
from retinanet.training import signals

signals.AGAIN_AFTER = 1.5
with signals.noted_signals(patient=True) as stop:
    lock, system = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    system.pthread_mutex_lock(lock)
    print("waits", flush=True)
    system.pthread_mutex_lock(lock)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_another_signal_ends_a_process_that_waits_for_ever(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(number)
        process.send_signal(number)
        time.sleep(0.1)
        process.send_signal(number)  # one wish, told on several ways
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        time.sleep(1.4)
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number
        assert process.stderr.read() == (
            "retinanet: ended at once by another signal; go on from the last state with --resume\n"
        )


def test_nothing_is_left_of_the_watch_over_signals() -> None:
    from retinanet.training.signals import noted_signals

    before = signal.getsignal(signal.SIGTERM), threading.active_count()
    with noted_signals(patient=True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    assert before == (signal.getsignal(signal.SIGTERM), threading.active_count())
    assert signal.set_wakeup_fd(-1) == -1
