"""Timing several contestants fairly, and what a measured row says."""

from __future__ import annotations

import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from retinanet import kernels
from retinanet.anchors import CPU
from retinanet.devices import require_cpp_compiler
from retinanet.errors import ConfigError

PACKAGES = (
    "retinanet",
    "torch",
    "torchvision",
    "numba",
    "triton",
    "numpy",
    "pillow",
    "fvcore",
    "opencv-python",
    "opencv-python-headless",
)
OURS = "retinanet"


@dataclass(frozen=True)
class Row:
    """One comparison: medians (and minima) of ours and a peer's, in `unit`.

    `equal` says whether outputs agreed before the timing; None where there is nothing to compare. For `images` see
    `Contest`.
    """

    item: str
    case: str
    peer: str
    ours: float
    theirs: float
    equal: bool | None
    our_least: float | None = None
    their_least: float | None = None
    unit: Literal["ms", "MiB"] = "ms"
    images: int | None = None

    @property
    def ratio(self) -> float:
        """Peer / ours: above 1 we are ahead."""
        return self.theirs / self.ours

    def to_json(self) -> dict[str, Any]:
        """Return the row of `--json`: the keys end in `_ms`, or in `_mib` where memory is compared."""
        unit = self.unit.lower()
        rates = {"ours_images_per_second": self.ours, "peer_images_per_second": self.theirs}
        return {
            "item": self.item,
            "case": self.case,
            "peer": self.peer,
            f"ours_{unit}": round(self.ours, 4),
            f"peer_{unit}": round(self.theirs, 4),
            "ratio": round(self.ratio, 3),
            "equal": self.equal,
            f"ours_min_{unit}": self.our_least,
            f"peer_min_{unit}": self.their_least,
            **(
                {name: round(per_second(self.images, ms), 1) for name, ms in rates.items()}
                if self.images
                else {}
            ),
        }


@dataclass(frozen=True)
class Contest:
    """A case: what to time, and whether each peer's output equals ours.

    Args:
        ours, peers: calls without arguments. Each does all of the work anew.
        equal: by peer; missing or None where there is nothing to compare.
        images: how many a call gives, where images a second are of interest.
    """

    item: str
    case: str
    ours: Callable[[], object]
    peers: Mapping[str, Callable[[], object]]
    equal: Mapping[str, bool | None]
    images: int | None = None


def measure(contest: Contest, *, repeats: int, seconds: float, device: torch.device = CPU) -> list[Row]:
    """Time ours and the peers in turns, `repeats` times each, but no longer than `seconds` after three turns.

    Every contestant runs once before, which is when things are compiled. The order changes from turn to turn, so
    that nobody always runs on the heels of the same one.
    """
    contestants = {OURS: contest.ours, **contest.peers}
    for call in contestants.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    began = time.monotonic()
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken[name].append(seconds_of(contestants[name], device) * 1e3)
        if turn >= 2 and time.monotonic() - began > seconds:
            break
    return [
        Row(
            contest.item,
            contest.case,
            peer,
            statistics.median(taken[OURS]),
            statistics.median(taken[peer]),
            contest.equal.get(peer),
            min(taken[OURS]),
            min(taken[peer]),
            images=contest.images,
        )
        for peer in contest.peers
    ]


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of a call; on CUDA from the device's being idle until it is idle again."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def can_compile(device: torch.device) -> bool:
    """Return whether `torch.compile` has what it needs: on a CPU a C++ compiler, on CUDA Triton. Log what it lacks."""
    if device.type == "cuda":
        return kernels.available("cuda")
    try:
        require_cpp_compiler()
    except ConfigError as error:
        logging.getLogger("retinanet").warning("no compiled rows: %s", error)
        return False
    return True


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """Return what a figure depends on: processor, device, threads, versions, and how busy the machine was."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    capabilities = torch.cpu.get_capabilities()
    wide = ("amx_bf16", "avx512_bf16", "avx512_f", "avx512f", "avx2")
    return {
        "processor": _processor(),
        "instructions": next((name for name in wide if capabilities.get(name)), "unknown"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": versions,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the rows as text: item, case, peer, ours, peer's, ratio, equal."""
    words = {True: "yes", False: "NO", None: ""}
    return [
        (
            row.item,
            row.case,
            row.peer,
            with_rate(row.ours, row.unit, row.images),
            with_rate(row.theirs, row.unit, row.images),
            f"{row.ratio:.2f}x" if row.ratio < 10 else f"{row.ratio:.0f}x",
            words[row.equal],
        )
        for row in rows
    ]


def with_rate(value: float, unit: str, images: int | None) -> str:
    """Return a time or a size, and how many images a second that is where it is the time of images."""
    return shown(value, unit) + (f", {per_second(images, value):.0f}/s" if images else "")


def per_second(images: int, ms: float) -> float:
    """Return the rate of so many images in that time."""
    return images / ms * 1e3


def shown(value: float, unit: str) -> str:
    """Return a time or a size with three digits.

    >>> shown(0.07132, "ms"), shown(592.3, "ms"), shown(2850.0, "ms"), shown(1234.5, "MiB")
    ('0.0713 ms', '592 ms', '2.85 s', '1.21 GiB')
    """
    if unit == "ms" and value >= 1000:
        value, unit = value / 1000, "s"
    if unit == "MiB" and value >= 1000:
        value, unit = value / 1024, "GiB"
    return f"{float(f'{value:.3g}'):g} {unit}"
