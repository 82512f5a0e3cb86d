"""What a process knows of the machine that it runs on."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path


def available_cores() -> list[int]:
    """Return the numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def name_of_machine() -> str:
    """Return what tells this machine from others of the same name: when it was started, where the system says so."""
    with suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text()}"
    return socket.gethostname()
