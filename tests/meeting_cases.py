"""What two processes do that differ, hang or fail; `test_meeting_of_two.py` starts it twice.

RANK=0 WORLD_SIZE=2 ... python meeting_cases.py CASE DATA OUT
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import distributed as dist

import two_processes
from retinanet.errors import RetinaNetError
from retinanet.processes import Processes, joined_processes, joining
from retinanet.training import run, signals
from retinanet.training.configuration import TrainingOptions

QUIET = Console(file=io.StringIO())


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except RetinaNetError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def differ(processes: Processes, data: Path, out: Path) -> None:
    """Processes of different versions, data, settings, states."""
    mine = {**two_processes.TINY, "data": str(data), "steps": 2, "output": str(out / "refused")}
    version = run.__version__
    found = {}

    def begin(**changed: Any) -> str:
        told = {**mine, **({} if processes.main else changed)}
        return refused(lambda: run.run_training(TrainingOptions(**told), QUIET))

    run.__version__ = version if processes.main else "0.0.9"
    found["version"] = begin()
    run.__version__ = version
    found["data"] = begin(data=str(data.with_name("other")))
    found["plan"] = begin(lr=0.5)
    found["taken back"] = str((out / "refused").exists())
    run.run_training(TrainingOptions(**{**mine, "output": str(out / "run"), "save_every_steps": 1}), QUIET)
    if not processes.main:  # as a disk that is not shared, or shows what was there before
        shutil.copytree(out / "run", out / "copy")
        shutil.rmtree(sorted((out / "copy" / "checkpoints").iterdir())[-1])
    processes.wait()
    found["state"] = refused(lambda: run.resume_training(out / ("run" if processes.main else "copy"), QUIET))
    (out / f"differ-{processes.rank}.json").write_text(json.dumps(found))


def hang(processes: Processes, data: Path, out: Path) -> None:
    """Wait for each other; the second one is stopped before it comes."""
    signals.AGAIN_AFTER = 0.5
    with signals.noted_signals(patient=True):
        (out / f"ready-{processes.rank}").touch()
        if not processes.main:
            time.sleep(600)
        processes.largest(0)


def fail(processes: Processes, data: Path, out: Path) -> None:
    """Wait for the other process, longer than a step may; then fail while it does not answer."""
    quick = replace(processes, messages=dist.new_group(backend="gloo", timeout=timedelta(seconds=1)))
    if not processes.main:
        time.sleep(2)
    quick.wait()  # for work of any length
    if processes.main:
        (out / "waited").write_text(refused(lambda: quick.largest(0)))
    else:
        time.sleep(2.5)
    joining.PARTING = 0.5
    if not processes.main:
        while not (out / "left").exists():
            time.sleep(0.1)
        (out / "told").write_text(refused(lambda: processes.largest(0)))
        return
    wait = processes.add_later(torch.ones(3))
    raise ValueError(f"a mistake of ours, with {wait} under way")


CASES = {function.__name__: function for function in (differ, hang, fail)}


def main() -> None:
    case, data, out = sys.argv[1:]
    torch.set_num_threads(1)
    with joined_processes() as processes:
        CASES[case](processes, Path(data), Path(out))
    assert not dist.is_initialized()


if __name__ == "__main__":
    main()
