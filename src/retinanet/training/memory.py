"""How much memory this process holds, has held and may hold; on CUDA, what its device has held for it.

What the system says is read from files under a root, "/" unless a test has another. Sizes are bytes.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path("/")
GB = 1e9
# Of both generations of control groups: the folder under /sys/fs/cgroup, the files with limits, and the lines of
# memory.stat that say what no one can take back without swapping.
UNIFIED = (("", "unified"), ("memory.max", "memory.high"), ("anon", "shmem"))
LEGACY = (("memory",), ("memory.limit_in_bytes",), ("total_rss", "total_shmem"))
# How glibc is told from which size on a block is mapped for itself, and how much may be free at the end of the heap.
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
# What `return_large_blocks` calls large, and what `keep_freed` does; an older glibc takes no more than the last.
LARGE, HUGE, HUGE_OF_OLDER = 4 * 2**20, 2**30, 32 * 2**20
# Seconds between two looks at the workers: the system counts their pages one by one.
WORKERS_EVERY = 30.0


@dataclass(frozen=True)
class Limit:
    """How much this process may hold resident in all: what it holds now and what is left, and who says so."""

    bytes: int
    source: str

    def share(self, bytes: float) -> str:
        """Return "64% of the 16.0 GB of this container"."""
        return f"{bytes / max(1, self.bytes):.0%} of the {gigabytes(self.bytes)} of {self.source}"

    def shared(self, held: int, processes: int) -> Limit:
        """Return the part of one of several processes, of which this one holds so much already."""
        if processes == 1:
            return self
        left = max(0, self.bytes - held) // processes
        return Limit(held + left, f"{self.source} for each of {processes} processes")


def gigabytes(bytes: float) -> str:
    """Return a size as people say it, in units of 10^9 bytes.

    >>> gigabytes(2_140_000_000), gigabytes(31_000_000)
    ('2.1 GB', '0.03 GB')
    """
    size = bytes / GB
    return f"{size:.1f} GB" if size >= 0.95 else f"{size:.2f} GB"


def memory_limit(root: Path = ROOT) -> Limit | None:
    """Return the smallest of all limits: the machine's memory, every control group from the process's own up to the
    root, and `ulimit -v` and `-d`; None where the system tells nothing.

    What other processes hold is taken off: of a container's limit what is not page cache, of the machine's memory
    what is not available. Swap does not count.
    """
    status = _sizes(root / "proc/self/status")
    resident = status.get("VmRSS", 0)
    own = status.get("RssAnon", resident) + status.get("RssShmem", 0)
    found = [
        *(Limit(resident + left, "this machine") for left in _left_on_machine(root)),
        *(Limit(resident + left, "this container") for left in _left_in_groups(root, own)),
        *(Limit(resident + left, f"ulimit {flag}") for flag, left in _left_by_ulimit(status)),
    ]
    return min(found, key=lambda limit: limit.bytes, default=None)


def resident(root: Path = ROOT) -> int | None:
    """Return what this process holds; None where the system does not tell (only Linux does)."""
    return _sizes(root / "proc/self/status").get("VmRSS")


def peak_resident(root: Path = ROOT) -> int | None:
    """Return the most that this process has held, since `restart_peak` where that is possible; None on Windows."""
    peak = _sizes(root / "proc/self/status").get("VmHWM")
    if peak is None and root == ROOT:
        with suppress(ImportError):  # Windows has no such module
            import resource

            kilo = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo
    return peak


def restart_peak(root: Path = ROOT) -> bool:
    """Let `peak_resident` begin anew with what is held now; return whether the system can do that (Linux)."""
    try:
        file = os.open(
            root / "proc/self/clear_refs", os.O_WRONLY
        )  # which cannot be read; not made where there is none
        try:
            os.write(file, b"5")
        finally:
            os.close(file)
    except OSError:
        return False
    return True


def return_freed() -> None:
    """Give memory that was freed back to the system, where the C library keeps it and can be asked to (glibc)."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_large_blocks() -> None:
    """Let the C library (glibc) give every large block back to the system when it is freed, from now on: what is
    resident is then what is in use, for the price of a page fault a page whenever it is taken again.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)


def keep_freed() -> None:
    """Let the C library (glibc) keep what is freed for later, from now on, but for `return_freed`.

    By itself it returns the end of the heap and the largest blocks, which a training step takes again at once: the
    system clears 100 MB of pages and more a second for it, while the most that is held is the same to a few percent
    (decision 0007).
    """
    with suppress(AttributeError, OSError, TypeError):
        tell = ctypes.CDLL(None).mallopt
        tell(TRIM_THRESHOLD, HUGE)
        if not tell(MMAP_THRESHOLD, HUGE):
            tell(MMAP_THRESHOLD, HUGE_OF_OLDER)


def held_by(processes: Iterable[int], root: Path = ROOT) -> int:
    """Return what other processes of this user hold together, pages that several share counted once."""
    sizes = (_sizes(root / "proc" / str(number) / "smaps_rollup") for number in processes)
    return sum(of.get("Pss", 0) for of in sizes)


def peak_memory(device: torch.device) -> int | None:
    """Return the most that tensors have taken on a CUDA device, or this process on a CPU; see `peak_resident`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()


def restart_peak_memory(device: torch.device) -> bool:
    """Let `peak_memory` begin anew with what is held now; return whether that is possible."""
    if device.type != "cuda":
        return restart_peak()
    torch.cuda.reset_peak_memory_stats(device)
    return True


def limit_of(device: torch.device, processes: int = 1) -> Limit | None:
    """Return what this process may hold: on a CUDA device its tensors, beside what others have there; on a CPU
    `memory_limit`, of which each of so many processes of this machine gets its part.
    """
    if device.type != "cuda":
        limit = memory_limit()
        return limit and limit.shared(resident() or 0, processes)
    return Limit(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), str(device))


class MemoryLog:
    """What a line of `memory.jsonl` says: the most until then, in units of 10^9 bytes.

    "memory_gb" is of the device, see `peak_memory`; "workers_gb" what the loader's processes held together, by looks at
    them that are half a minute apart.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.workers = 0
        self.looked_at: float | None = None

    def read(self) -> dict[str, float]:
        """Return the fields; none of what the system does not tell."""
        now = time.monotonic()
        if self.looked_at is None or now - self.looked_at >= WORKERS_EVERY:
            self.looked_at = now
            numbers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
            self.workers = max(self.workers, held_by(numbers))
        sizes = {"memory_gb": peak_memory(self.device), "workers_gb": self.workers or None}
        return {name: round(size / GB, 3) for name, size in sizes.items() if size is not None}


def most_held(history: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what a run held at most, by the lines of `memory.jsonl`, which need not tell.

    >>> most_held([{"memory_gb": 1.0}, {"memory_gb": 2.14, "workers_gb": 0.8}, {"ap": 0.5}])
    [('memory at most', '2.1 GB'), ("the loader's processes", '0.80 GB')]
    """
    lines = list(history)
    names = {"memory_gb": "memory at most", "workers_gb": "the loader's processes"}
    found = [
        (what, max((line.get(name) or 0.0 for line in lines), default=0.0)) for name, what in names.items()
    ]
    return [(what, gigabytes(size * GB)) for what, size in found if size]


def _left_on_machine(root: Path) -> Iterator[int]:
    sizes = _sizes(root / "proc/meminfo")
    left = sizes.get("MemAvailable", sizes.get("MemTotal"))
    if left is None and root == ROOT:
        with suppress(AttributeError, OSError, ValueError):  # Windows, or a system without these names
            left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if left is not None:
        yield left


def _left_in_groups(root: Path, own: int) -> Iterator[int]:
    """Yield what is left of every limit of the process's control groups, of their parents, and of the root's."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        places, limits, counted = LEGACY if controllers else UNIFIED
        for place in places:
            top = root / "sys/fs/cgroup" / place
            # A path that leads out of the container's own view is of no use: its root stands for it.
            folder = top if ".." in group else top / group.lstrip("/")
            for at in (folder, *folder.parents):
                sizes = [_number(at / name) for name in limits]
                stat = _sizes(at / "memory.stat")
                used = max(own, sum(stat.get(name, 0) for name in counted))
                yield from (max(0, size - used) for size in sizes if size is not None)
                if at == top:
                    break


def _left_by_ulimit(status: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    with suppress(ImportError):  # Windows
        import resource

        for kind, flag, counted in (
            (resource.RLIMIT_AS, "-v", "VmSize"),
            (resource.RLIMIT_DATA, "-d", "VmData"),
        ):
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY and counted in status:
                yield flag, max(0, limit - status[counted])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Return the number in a file; None where there is none, as in "max"."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _sizes(path: Path) -> dict[str, int]:
    """Return the sizes of lines such as "VmRSS:  1684 kB" or "anon 1724416"."""
    sizes = {}
    for line in _lines(path):
        name, *rest = line.replace(":", " ").split() or [""]
        if rest and rest[0].isdigit():
            sizes[name] = int(rest[0]) * (1024 if rest[1:] == ["kB"] else 1)
    return sizes
