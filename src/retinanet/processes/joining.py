"""How processes find each other, and how they part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
from torch import distributed as dist

from retinanet.errors import ConfigError, LostProcessError
from retinanet.processes.group import ALONE, PATIENCE, STEP_WAITS, Processes, exchange
from retinanet.processes.machine import available_cores, name_of_machine
from retinanet.processes.meeting import name_of_meeting

# Longest that processes wait for each other to begin: to import torch from a slow disk, on the slowest of machines.
MEETING = timedelta(minutes=10)
# Seconds for a process that fails to close its connections: torch waits for exchanges under way, which may get no
# answer.
PARTING = 10.0


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that `torchrun` started with this one, for as long as the block runs; alone without it.

    Raises:
        ConfigError: nothing tells where they are.
        LostProcessError: they do not come.
    """
    if dist.is_available() and dist.is_initialized():  # by whoever calls us from Python, Ray for one
        backends = dist.get_backend_config()
        messages: Any = None if "gloo" in backends else _gloo(STEP_WAITS)
        patient = _gloo(PATIENCE)
        try:
            yield _described(messages, patient)
        finally:
            for group in (messages, patient):
                if group is not None:
                    dist.destroy_process_group(group)
        return
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        yield ALONE
        return
    if not dist.is_available():
        raise ConfigError(
            "several processes need a torch with torch.distributed; this one was built without it"
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    exchange(_meet, backend)
    try:
        yield _described(None, _gloo(PATIENCE))
    except BaseException:
        _leave_at_once()
        raise
    dist.destroy_process_group()


def _described(messages: Any, patient: Any) -> Processes:
    """Return the processes of the default group. Who is on which machine, and on which of its processors, they tell
    each other: not everything that starts processes says so."""
    joined = Processes(dist.get_rank(), dist.get_world_size(), messages, patient)
    places = joined.gathered((name_of_machine(), available_cores()))
    machine, _ = places[joined.rank]
    here = sum(other == machine for other, _ in places)
    return replace(joined, here=here, sharing=places.count(places[joined.rank]))


def _gloo(timeout: timedelta) -> Any:
    return exchange(dist.new_group, backend="gloo", timeout=timeout)


def _meet(backend: str) -> None:
    """Find the other processes, at the place that the environment names."""
    from torch.distributed.rendezvous import rendezvous  # which a torch without distributed does not have

    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, count = next(rendezvous("env://", timeout=MEETING))
    except ValueError as error:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: a run of several processes needs RANK, MASTER_ADDR and "
            f"MASTER_PORT as well ({error}). Start it with: torchrun --nproc-per-node N -m retinanet train ..., or "
            "alone without WORLD_SIZE"
        ) from None
    except dist.DistError as error:
        reason = str(error).splitlines()[0][:200].rstrip(".")
        raise LostProcessError(
            f"the processes of the run cannot meet at {where} in up to {MEETING.total_seconds():g} s: {reason}. See "
            "whether all were started, and whether that machine can be reached"
        ) from None
    name = name_of_meeting(store, rank, count, MEETING.total_seconds())
    own = dist.PrefixStore(f"retinanet/{name}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=count, timeout=STEP_WAITS)


def _leave_at_once() -> None:
    """Close all connections, so that the other processes notice; what is under way is given up."""
    from torch.distributed.distributed_c10d import _abort_process_group

    def leave() -> None:
        with suppress(Exception):  # what went wrong is being told already
            _abort_process_group()

    thread = Thread(target=leave, daemon=True)
    thread.start()
    thread.join(PARTING)
