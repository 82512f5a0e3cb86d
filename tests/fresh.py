"""Processes that have computed nothing yet, for tests of what a process does first or all by itself.

An interpreter of their own would take seven seconds to import what training imports. They are forked instead from a
server that has imported it and nothing more: no kernel is loaded (nor numba imported), no thread has been started.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TypeAlias

import pytest

Process: TypeAlias = ForkServerProcess

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["retinanet.training.run", "retinanet.paper.running", "torch.distributed"])


def begin() -> None:
    """Let the server import while something else is done."""
    forkserver.ensure_running()


def start(
    script: str | Path, *arguments: object, said: Path, environment: dict[str, str] | None = None
) -> Process:
    """Run Python source or a file of it; its output goes to the file `said`, its errors to `said` with ".err"."""
    given = (script, [*map(str, arguments)], said, environment or {})
    process = _context.Process(target=_run, args=given)
    process.start()
    return process


def _run(script: str | Path, arguments: list[str], said: Path, environment: dict[str, str]) -> None:
    assert "numba" not in sys.modules
    for number, file in ((1, said), (2, errors_of(said))):
        written = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(written, number)
        os.close(written)
    os.environ.update(environment)
    warnings.simplefilter("error")
    sys.argv = [str(script) if isinstance(script, Path) else "-c", *arguments]
    if isinstance(script, Path):
        runpy.run_path(str(script), run_name="__main__")
    else:
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


def errors_of(said: Path) -> Path:
    return said.with_name(f"{said.name}.err")


def run(
    script: str | Path, *arguments: object, environment: dict[str, str] | None = None, seconds: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run Python source or a file of it to its end; return what it said and its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        process = start(script, *arguments, said=said, environment=environment)
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        out, errors = (file.read_text() if file.exists() else "" for file in (said, errors_of(said)))
    assert process.exitcode is not None
    return subprocess.CompletedProcess(sys.argv, process.exitcode, out, errors)


def run_python(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python source that must end well, on two threads."""
    threads = "import torch; torch.set_num_threads(2)\n"
    done = run(threads + script, *arguments, environment=environment)
    if done.returncode != 0:
        pytest.fail(f"{done.stdout}{done.stderr}", pytrace=False)
    return done
