"""Kernels on threads, torch's or their own, called from several at once, and in child processes, forked or not."""

import functools
import hashlib
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("numba")

from fresh import run_python
from kernel_cases import torch_threads
from retinanet.kernels.cpu import focal, matching, memory, selection, threads
from retinanet.kernels.cpu import nms as nms_kernel
from test_kernels_focal import check_focal
from test_kernels_matching import check_match
from test_kernels_nms import check_nms


@pytest.fixture(params=["team of torch", "pool"])
def any_way(request, monkeypatch):
    """Both kinds of threads, where torch has a team that can be used."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("no OpenMP runtime of a known kind")


@pytest.mark.usefixtures("any_threads", "any_way")
@pytest.mark.parametrize("least", [0, 1, 2, 7, 100])
def test_parts_cover_the_range_in_order(least):
    for count in (0, 1, 2, 3, 7, 100, 101):
        parts = threads.in_parallel(lambda *part: part, count, least=least)
        assert [number for number, _, _ in parts] == list(range(len(parts)))
        assert [i for _, start, stop in parts for i in range(start, stop)] == list(range(count))
        assert len(parts) == max(1, min(torch.get_num_threads(), count // max(1, least)))
        lengths = [stop - start for _, start, stop in parts]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.usefixtures("any_way")
def test_parts_run_at_the_same_time():
    meeting = threading.Barrier(3)
    with torch_threads(3):
        places = threads.in_parallel(lambda *_: meeting.wait(timeout=30), 3, least=1)
    assert sorted(places) == [0, 1, 2]


@pytest.mark.usefixtures("any_way")
def test_results_are_in_order_whichever_ends_first():
    def slowest_first(part, *_):
        time.sleep(0.05 * (2 - part))
        return part

    with torch_threads(3):
        assert threads.in_parallel(slowest_first, 3, least=1) == [0, 1, 2]


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("broken", [{0}, {1}, {2}, {0, 2}, {0, 1, 2}])
def test_a_failure_is_raised_after_all_parts_have_ended(broken, failure):
    ended = []

    def work(part, *_):
        if part in broken:
            raise failure(f"part {part}")
        time.sleep(0.05)
        ended.append(part)

    with torch_threads(3):
        with pytest.raises(failure, match="part") as raised:
            threads.in_parallel(work, 3, least=1)
        assert set(ended) == {0, 1, 2} - broken
        assert int(str(raised.value)[-1]) in broken
        assert threads.in_parallel(lambda part, *_: part, 3, least=1) == [0, 1, 2]


def test_a_team_may_be_smaller_than_asked_for(monkeypatch):
    alone = SimpleNamespace(
        GOMP_parallel=lambda run, *_: run(None),
        omp_get_thread_num=lambda: 0,
        omp_get_num_threads=lambda: 1,
    )
    monkeypatch.setattr(threads, "_openmp", lambda: alone)
    with torch_threads(3):
        assert threads.in_parallel(lambda part, *_: part, 3, least=1) == [0, 1, 2]


@pytest.mark.skipif(not hasattr(os, "RTLD_NOLOAD"), reason="needs dlopen")
def test_an_openmp_runtime_that_torch_has_not_loaded_is_left_alone(monkeypatch):
    # A second runtime in a process would have threads of its own, which is what is to be avoided.
    def not_loaded(_, mode):
        assert mode & os.RTLD_NOLOAD
        raise OSError("not loaded")

    monkeypatch.setattr(threads.ctypes, "CDLL", not_loaded)
    assert threads._openmp.__wrapped__() is None


def test_one_thread_after_the_other_looks_for_the_pool():
    with ThreadPoolExecutor(1) as pool:
        with threads._lock:
            found = pool.submit(threads._threads, 1)
            with pytest.raises(TimeoutError):
                found.result(timeout=0.2)
        assert found.result(timeout=30) is threads._pool


def test_kernels_leave_the_interpreters_lock():  # or else the threads of a team would take turns
    assert selection._smallest.targetoptions["nogil"]


# Large enough for two threads in each kernel. Only NumPy makes and compares them: in a forked child torch's own
# threads may hang.
@functools.cache
def large_case() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    corner, size = random.random((2, 70_030, 2), np.float32) * 200
    every = np.concatenate((corner, corner + size), axis=1)
    return {
        "logits": random.normal(size=(7000, 80)).astype(np.float32),
        "classes": random.integers(-3, 80, 7000),
        "weight": random.integers(0, 3, 7000).astype(np.float32),
        "anchors": every[30:],
        "boxes": every[:30].reshape(3, 10, 4),
        "ignored": random.random((3, 10)) < 0.3,
        "scores": random.random(300, np.float32).round(1),
        "labels": random.integers(0, 2, 300),
    }


def answers() -> dict[str, str]:
    """Digests of what each kernel returns for one case."""
    case = {name: torch.from_numpy(array) for name, array in large_case().items()}
    found = {
        "focal": focal.focal_sum(case["logits"], case["classes"], case["weight"], 0.25, 0.75, 2.0, True),
        "match": matching.match(case["anchors"], case["boxes"], case["ignored"], 0.5, 0.4, True, 0.5),
        "select": selection.select([case["logits"], case["logits"][:2]], [1.0, 0.0], 1000),
        "nms": [nms_kernel.nms(case["anchors"][:300], case["scores"], case["labels"], 0.5, None)],
    }
    return {
        name: hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
        for name, tensors in found.items()
    }


def answers_of_two_threads() -> dict[str, str]:
    with torch_threads(2):
        return answers()


@pytest.fixture
def expected_answers() -> dict[str, str]:
    """Those of one thread; torch's team and the kernels' own pool have threads from now on."""
    answers_of_two_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "_openmp", lambda: None)
        answers_of_two_threads()
    assert threads._pool is not None
    with torch_threads(1):
        return answers()


def test_the_answers_are_right(expected_answers):
    case = {name: torch.from_numpy(array) for name, array in large_case().items()}
    focal_case = case["logits"], case["classes"], case["weight"]
    check_focal(*focal_case)
    check_match(case["anchors"], case["boxes"], case["ignored"], low_quality=True)
    check_nms(case["anchors"][:300], case["scores"], case["labels"])
    assert answers_of_two_threads() == expected_answers


def test_a_part_that_never_began_is_an_interrupt(monkeypatch):
    class Runtime:
        """A team whose callback is lost, as when a signal's handler raises before its first line."""

        def GOMP_parallel(self, *_):
            pass

    monkeypatch.setattr(threads, "_openmp", Runtime)
    with torch_threads(2), pytest.raises(KeyboardInterrupt):
        threads.in_parallel(lambda *part: part, 2, least=1)


# In a process of its own: what ctypes prints of lost exceptions would count as a failure here.
INTERRUPTED = """
import signal, time, torch
from retinanet.kernels.cpu.threads import in_parallel

class Alarm(Exception):
    pass

def ring(*_):
    raise Alarm

torch.set_num_threads(2)
signal.signal(signal.SIGALRM, ring)
raised, until = 0, time.monotonic() + 1
while time.monotonic() < until:
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4)
        for _ in range(100):
            assert in_parallel(lambda *part: part[0], 2, least=1) == [0, 1]
        time.sleep(1e-3)
    except (Alarm, KeyboardInterrupt):
        raised += 1
signal.signal(signal.SIGALRM, signal.SIG_IGN)
print(raised > 10)
"""


@pytest.mark.skipif(threads._openmp() is None, reason="no OpenMP runtime of a known kind")
def test_an_interrupt_never_leaves_half_a_result():
    """Signals come at every moment; each call gives everything or raises."""
    assert run_python(INTERRUPTED).stdout == "True\n"


@pytest.mark.usefixtures("any_way")
def test_python_threads_may_call_kernels_at_once(expected_answers):
    start = threading.Barrier(4)

    def call(_):
        start.wait(timeout=30)
        return [answers() for _ in range(5)]

    with torch_threads(3), ThreadPoolExecutor(4) as pool:
        for found in pool.map(call, range(4)):
            assert found == [expected_answers] * 5


# ---------------------------------------------------------------------------------- processes

# Python says so from 3.12 on; that it does work is what is tested.
may_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
start_methods = pytest.mark.parametrize(
    "method", sorted({"fork", "spawn"} & set(multiprocessing.get_all_start_methods()))
)
SECONDS = 120  # for a child to start and answer


def send_answers(pipe) -> None:
    pipe.send(answers_of_two_threads())


def answers_of_child(method: str, target=send_answers) -> dict[str, str]:
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs,))
    child.start()
    try:
        assert ours.poll(SECONDS), "the child hangs"
        found = ours.recv()
        child.join(SECONDS)
        assert child.exitcode == 0
        return found
    finally:
        child.kill()
        child.join()


# A spawned one imports everything anew, and is tried as a worker of a data loader anyway.
@may_fork
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[pytest.mark.slow] if method == "spawn" else [])
        for method in sorted({"fork", "spawn"} & set(multiprocessing.get_all_start_methods()))
    ],
)
def test_a_child_process(method, expected_answers):
    assert answers_of_child(method) == expected_answers


@may_fork
@needs_fork
def test_a_child_that_is_forked_while_kernels_run(expected_answers):
    stop = threading.Event()

    def keep_calling():
        while not stop.is_set():
            answers_of_two_threads()

    caller = threading.Thread(target=keep_calling)
    caller.start()
    try:
        assert answers_of_child("fork") == expected_answers
    finally:
        stop.set()
        caller.join()


@may_fork
@needs_fork
@pytest.mark.parametrize("module", [threads, memory])
def test_a_lock_that_another_thread_holds_does_not_stop_a_forked_child(module, expected_answers):
    held, release = threading.Event(), threading.Event()

    def hold():
        with module._lock:
            held.set()
            release.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        assert answers_of_child("fork") == expected_answers
    finally:
        release.set()
        holder.join()


class Answers(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> dict[str, str]:
        return answers_of_two_threads()


@may_fork
@start_methods
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than the machine has cores
def test_workers_of_a_data_loader(method, expected_answers):
    workers = {"fork": 2, "spawn": 1}[method]  # to import all this takes a while
    loader = DataLoader(
        Answers(), batch_size=None, num_workers=workers, multiprocessing_context=method, timeout=SECONDS
    )
    assert [*loader] == [expected_answers] * 4
