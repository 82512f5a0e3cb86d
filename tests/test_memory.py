"""What the process may hold, holds and has held, by made-up systems and by this one."""

from __future__ import annotations

import doctest
import mmap
import resource
from pathlib import Path

import pytest
import torch

import fresh
from retinanet.training import memory
from retinanet.training.memory import (
    Limit,
    MemoryLog,
    held_by,
    memory_limit,
    most_held,
    peak_memory,
    peak_resident,
    resident,
    restart_peak,
    restart_peak_memory,
    return_freed,
)

KB, MB, GB = 1024, 2**20, 2**30
ANON = 900 * MB
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 16 GB with 10 GB available, of which this process holds 1 GB, a tenth of it files."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    status = {"VmSize": 5 * GB, "VmHWM": 2 * GB, "VmRSS": GB, "RssAnon": ANON, "VmData": 3 * GB}
    write(
        tmp_path,
        {
            "proc/meminfo": f"MemTotal: {16 * MB} kB\nMemFree: {MB} kB\nMemAvailable: {10 * MB} kB\n",
            "proc/self/status": "Name:\tpython\n"
            + "".join(f"{k}:\t{v // KB} kB\n" for k, v in status.items()),
        },
    )
    return tmp_path


def test_the_machine_is_the_limit_where_there_is_no_other(root: Path) -> None:
    assert memory_limit(root) == Limit(11 * GB, "this machine")  # what it holds, and what is left
    (root / "proc/meminfo").write_text(f"MemTotal: {16 * MB} kB\n")  # before Linux 3.14
    assert memory_limit(root) == Limit(17 * GB, "this machine")


def test_a_system_that_tells_nothing_has_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None
    assert resident(tmp_path) is None
    assert peak_resident(tmp_path) is None
    assert not restart_peak(tmp_path)


V2, V1 = "0::{}\n", "12:cpu,cpuacct:{0}\n4:memory:{0}\n1:name=systemd:/\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        # A container sees its own group as the root of all.
        (V2.format("/"), {"memory.max": f"{4 * GB}\n"}, 4 * GB),
        (V2.format("/"), {"memory.max": "max\n"}, None),
        (
            V2.format("/docker/1f"),
            {"memory.max": f"{4 * GB}"},
            4 * GB,
        ),  # a path of the host's, not seen inside
        (V2.format("/../../1f"), {"memory.max": f"{4 * GB}"}, 4 * GB),
        (V2.format("/a/b"), {"a/b/memory.max": "max", "a/memory.max": f"{3 * GB}"}, 3 * GB),  # a parent's
        (V2.format("/a/b"), {"a/b/memory.max": f"{2 * GB}", "a/memory.max": f"{3 * GB}"}, 2 * GB),
        (V2.format("/a/b"), {"a/memory.max": f"{3 * GB}", "memory.max": f"{2 * GB}"}, 2 * GB),
        (
            V2.format("/a"),
            {"a/memory.max": f"{4 * GB}", "a/memory.high": f"{3 * GB}"},
            3 * GB,
        ),  # slowed down there
        (V2.format("/a"), {"b/memory.max": f"{2 * GB}"}, None),  # of others
        (V2.format("/a"), {"unified/a/memory.max": f"{2 * GB}"}, 2 * GB),
        (V1.format("/"), {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),  # how it says none
        (V1.format("/"), {"memory/memory.limit_in_bytes": f"{4 * GB}\n"}, 4 * GB),
        (V1.format("/a/b"), {"memory/a/memory.limit_in_bytes": f"{4 * GB}\n"}, 4 * GB),
        (V1.format("/a"), {"cpu,cpuacct/a/memory.limit_in_bytes": f"{2 * GB}"}, None),
        ("rubbish\n\n", {"memory.max": f"{2 * GB}"}, 2 * GB),
        (V2.format("/"), {"memory.max": "rubbish"}, None),
        (V2.format("/"), {"memory.max": ""}, None),
    ],
)
def test_limits_of_containers(root: Path, groups: str, files: dict[str, str], left: int | None) -> None:
    write(
        root, {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}
    )
    # What it holds in files can be taken back, so that it does not count against the group's limit.
    container = None if left is None else Limit(GB + left - ANON, "this container")
    assert memory_limit(root) == (container or Limit(11 * GB, "this machine"))


@pytest.mark.parametrize(
    ("groups", "folder", "limit", "stat"),
    [
        (V2.format("/a"), "a", "memory.max", f"anon {2 * GB}\nfile {GB}\nshmem {GB // 2}\n"),
        (
            V1.format("/a"),
            "memory/a",
            "memory.limit_in_bytes",
            f"rss 0\ntotal_rss {2 * GB}\ntotal_shmem {GB // 2}\n",
        ),
    ],
)
def test_what_others_in_the_container_hold_is_taken_off(
    root: Path, groups: str, folder: str, limit: str, stat: str
) -> None:
    place = f"sys/fs/cgroup/{folder}"
    write(root, {"proc/self/cgroup": groups, f"{place}/{limit}": f"{8 * GB}", f"{place}/memory.stat": stat})
    assert memory_limit(root) == Limit(GB + 8 * GB - 5 * GB // 2, "this container")


@pytest.mark.parametrize(
    ("kind", "flag", "left"), [(resource.RLIMIT_AS, "-v", 2 * GB), (resource.RLIMIT_DATA, "-d", 4 * GB)]
)
def test_limits_of_the_shell(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: int, flag: str, left: int
) -> None:
    """They count addresses, of which a process has more than memory."""
    infinite = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda of: (7 * GB if of == kind else infinite, infinite))
    assert memory_limit(root) == Limit(GB + left, f"ulimit {flag}")


def test_shares_are_told_with_their_whole() -> None:
    assert Limit(16 * 10**9, "this container").share(10.24e9) == "64% of the 16.0 GB of this container"


def test_processes_share_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: Limit(9 * GB, "this machine"))
    monkeypatch.setattr(memory, "resident", lambda: GB)
    cpu = torch.device("cpu")
    assert memory.limit_of(cpu) == Limit(9 * GB, "this machine")
    assert memory.limit_of(cpu, 4) == Limit(3 * GB, "this machine for each of 4 processes")
    monkeypatch.setattr(memory, "memory_limit", lambda: None)
    assert memory.limit_of(cpu) is None


def test_sizes_are_read_from_a_root(root: Path) -> None:
    assert resident(root) == GB
    assert peak_resident(root) == 2 * GB
    (root / "proc/self/clear_refs").write_text("")
    assert restart_peak(root)
    assert (root / "proc/self/clear_refs").read_text() == "5"
    write(root, {"proc/7/smaps_rollup": "00-ff ---p 00000000 00:00 0 [rollup]\nRss: 900 kB\nPss: 400 kB\n"})
    assert held_by([7, 8], root) == 400 * KB  # another has ended


@LINUX
def test_this_process_is_seen() -> None:
    return_freed()
    assert restart_peak()
    before = resident()
    assert before is not None
    limit = memory_limit()
    assert limit is not None
    assert limit.bytes > before
    # Not from malloc, which keeps what it is given back where it had a hole of that size.
    with mmap.mmap(-1, 64 * MB) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert peak_resident() - before > 60 * MB
    assert peak_memory(torch.device("cpu")) - before > 60 * MB
    assert restart_peak_memory(torch.device("cpu"))
    assert peak_resident() - before < 30 * MB


@LINUX
def test_a_limit_of_this_process_is_found() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, 64 * 2**30));"
        "from retinanet.training.memory import _left_by_ulimit, _sizes, ROOT;"
        "(flag, left), = _left_by_ulimit(_sizes(ROOT / 'proc/self/status')); print(flag, left < 64 * 2**30)"
    )
    assert fresh.run(code).stdout == "-v True\n"


FAULTS = """
import resource, sys
import torch
from retinanet.training.memory import keep_freed, resident, return_freed, return_large_blocks

def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.ones(40 * 2**20, dtype=torch.uint8)  # glibc itself keeps up to 32 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{"keep": keep_freed, "return": return_large_blocks}[sys.argv[1]]()
faults = [faults_of_a_block() for _ in range(20)]  # it takes some until pieces lie side by side
held = resident()
return_freed()
print(faults[-1], held - resident())
"""


@LINUX
@pytest.mark.parametrize("policy", ["keep", "return"])
def test_what_is_freed_is_kept_or_returned(policy: str, tmp_path: Path) -> None:
    process = fresh.start(FAULTS, policy, said=tmp_path / "said")
    process.join(60)
    last, returned = map(int, (tmp_path / "said").read_text().split())
    pages = 40 * MB // mmap.PAGESIZE
    if policy == "keep":
        assert last < pages / 10
        assert returned > 30 * MB  # when it is asked for
    else:
        assert last > 0.9 * pages
        assert returned < 10 * MB


def test_a_device_says_itself_what_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[torch.device] = []
    cuda = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 10**9 if device == cuda else 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * GB, 8 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: GB)
    assert peak_memory(cuda) == 3 * 10**9
    assert restart_peak_memory(cuda)
    assert reset == [cuda]
    assert memory.limit_of(cuda) == Limit(6 * GB, "cuda:1")
    assert MemoryLog(cuda).read() == {"memory_gb": 3.0}


def test_workers_are_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the most that they held stays."""
    held = iter([2 * 10**9, 10**9])
    monkeypatch.setattr(memory, "held_by", lambda _: next(held))
    monkeypatch.setattr(memory, "peak_memory", lambda _: 4 * 10**9)
    now = [0.0]
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    log = MemoryLog(torch.device("cpu"))
    for now[0] in (0.0, 1.0, 40.0):
        assert log.read() == {"memory_gb": 4.0, "workers_gb": 2.0}
    assert list(held) == []


def test_a_system_that_does_not_tell_is_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_memory", lambda _: None)
    assert MemoryLog(torch.device("cpu")).read() == {}


def test_a_log_that_does_not_tell_is_silent() -> None:
    assert most_held([{"memory_gb": 2.14}]) == [("memory at most", "2.1 GB")]
    assert most_held([{"ap": 0.5}]) == most_held([]) == []


def test_examples_hold() -> None:
    result = doctest.testmod(memory)
    assert result.attempted > 0
    assert result.failed == 0
