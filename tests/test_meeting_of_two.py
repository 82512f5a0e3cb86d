"""Two processes that differ, hang, fail or are started again by two agents of `torchrun`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import meeting_cases
import two_processes
from retinanet.data.shapes import ShapesSpec, generate_shapes
from test_processes import assert_same_run, children

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate_shapes(folder / "other", train=5, val=2, spec=ShapesSpec(image_size=96))
    return generate_shapes(folder / "shapes", train=6, val=2, spec=ShapesSpec(image_size=96))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def two(command: Sequence[str]) -> list[subprocess.Popen[str]]:
    told = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**told, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def case(name: str, data: Path, out: Path) -> list[subprocess.Popen[str]]:
    return two(["-W", "error", meeting_cases.__file__, name, str(data), str(out)])


def until(there: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_differs_between_processes_is_named_by_one(data: Path, tmp_path: Path) -> None:
    processes = case("differ", data, tmp_path)
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    first, second = (json.loads((tmp_path / f"differ-{rank}.json").read_text()) for rank in range(2))
    same = "ConfigError: the processes of a run need the same"
    assert first["version"].startswith(f'{same} retinanet; process 0 has "')
    assert 'process 1 "0.0.9". Give every machine the same installation, data and command' in first["version"]
    assert first["data"].startswith(f'{same} data.train; process 0 has "')
    assert first["plan"].startswith(f"{same} plan.lr; process 0 has 0.0")
    assert first["state"] == (
        f"{same} step to go on from; process 0 has 2, process 1 1. Give every machine the same installation, data and "
        "command"
    )
    assert first["taken back"] == "False"
    others = "LostProcessError: the first process of the run could not begin; its message says why"
    assert {second[name] for name in ("version", "data", "plan", "state")} == {others}


def test_a_process_that_waits_for_one_that_hangs_can_be_ended(data: Path, tmp_path: Path) -> None:
    first, second = case("hang", data, tmp_path)
    try:
        until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(2)))
        second.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        first.send_signal(signal.SIGTERM)
        first.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            first.wait(timeout=1)
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=60) == 143
        assert first.stdout is not None
        assert "ended at once by another signal" in first.stdout.read()
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_a_process_waits_for_one_that_works_not_for_one_that_hangs_and_leaves_with_its_own_error(
    data: Path, tmp_path: Path
) -> None:
    first, second = case("fail", data, tmp_path)
    try:
        said = first.communicate(timeout=120)[0]  # long before the other one answers
    finally:
        (tmp_path / "left").touch()
    assert first.returncode == 1
    assert "ValueError: a mistake of ours" in said
    assert (
        (tmp_path / "waited")
        .read_text()
        .startswith("LostProcessError: another process of the run does not answer, and may hang (")
    )
    assert second.communicate(timeout=120)[0] == ""
    assert second.returncode == 0
    assert (
        (tmp_path / "told").read_text().startswith("LostProcessError: another process of the run has ended")
    )


def train(data: Path, run: Path) -> list[str]:
    told = {**two_processes.TINY, "steps": 40, "validate_every_steps": 20, "save_every_steps": 2}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in told.items()]
    return ["-m", "retinanet", "train", str(data), "--output", str(run), *options]


def test_two_agents_start_a_run_again_that_lost_processes(data: Path, tmp_path: Path) -> None:
    """One agent counts the loss of its process, the other one does not; then the other way round."""
    whole = two(train(data, tmp_path / "whole"))
    said = [process.communicate(timeout=200)[0] for process in whole]
    assert [process.returncode for process in whole] == [0, 0], said

    run, files = tmp_path / "run", [tmp_path / "said-0", tmp_path / "said-1"]
    agent = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]
    agent += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{free_port()}",
        "--rdzv-id",
        "together",
    ]
    agents = []
    for file in files:
        with file.open("w") as stream:
            command = [sys.executable, *agent, *train(data, run)]
            agents.append(subprocess.Popen(command, stdout=stream, stderr=stream))

    def text() -> str:
        return "".join(file.read_text() for file in files)

    try:
        until(lambda: any((run / "checkpoints").glob("0*")))
        os.kill(children(agents[1].pid)[0], signal.SIGKILL)
        until(lambda: text().count("resuming at epoch") == 1)
        os.kill(children(agents[0].pid)[0], signal.SIGKILL)
        assert [one.wait(timeout=240) for one in agents] == [0, 0], text()
    finally:
        for one in agents:
            one.terminate()
            one.wait()
    assert text().count("resuming at epoch") == 2
    assert_same_run(run, tmp_path / "whole")
    assert len((run / "resumes.jsonl").read_text().splitlines()) >= 1
