"""Short forms of `faults.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import faults


def test_every_flip_and_cut_in_a_state_is_noticed(tmp_path: Path) -> None:
    times, missed = faults.damage(tmp_path, 200, 1)
    assert times == 200
    assert missed == []


# In processes of their own: they fork, which a process that has computed with threads must not.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("kills", "0 failures"),
        ("kills-of-two", "0 failures"),
        ("disk", "right: files of no byte, page"),
        ("few-signals", "right: SIGTERM in validation, process 2 of 2"),
    ],
)
def test_runs_survive(what: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, faults.__file__, what, "--times", "5", "--seed", "3"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout
