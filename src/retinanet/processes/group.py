"""What processes tell each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

from retinanet.errors import ConfigError, LostProcessError

T = TypeVar("T")
P = ParamSpec("P")

# Longest that a process waits for another in a step: far beyond the slowest compilation or batch, and yet a run of
# which one process hangs ends the same night. Torch's own for gloo; for NCCL it has 10 minutes.
STEP_WAITS = timedelta(minutes=30)
# Longest where the main process reads, plans, saves or draws for all, which takes as long as it takes. One that ends
# meanwhile is noticed at once all the same, by its closed connection.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """This process among those of its run.

    Every method but the properties is to be called by all of them, in the same order; alone each is a matter of course.

    Args:
        rank: of this one, from 0.
        count: of all.
        messages: the group through which what lies in the host's memory goes; None is the group of all.
        patient: the same, for waits of any length (`PATIENCE`).
        here: how many of them are on this machine, and share its processors and memory.
    """

    rank: int = 0
    count: int = 1
    messages: Any = field(default=None, compare=False, repr=False)
    patient: Any = field(default=None, compare=False, repr=False)
    here: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.count > 1

    def told(self, value: T) -> T:
        """Return the main process's value."""
        return self._told(value, self.messages)

    def _told(self, value: T, group: Any) -> T:
        if not self.several:
            return value
        box = [value]
        exchange(dist.broadcast_object_list, box, src=0, group=group)
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """Return every process's value, by rank."""
        if not self.several:
            return [value]
        found: list[T | None] = [None] * self.count
        exchange(dist.all_gather_object, found, value, group=self.messages)
        return cast(list[T], found)

    def largest(self, *values: int) -> list[int]:
        """Return the largest of every process's values, place by place."""
        return self._largest(values, self.messages)

    def _largest(self, values: tuple[int, ...], group: Any) -> list[int]:
        if not self.several:
            return list(values)
        together = torch.tensor(values)
        exchange(dist.all_reduce, together, op=dist.ReduceOp.MAX, group=group)
        return [int(value) for value in together]

    def add(self, tensor: Tensor) -> Tensor:
        """Add every process's tensor, in place; return it."""
        if self.several:
            exchange(dist.all_reduce, tensor)
        return tensor

    def add_later(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to add every process's tensor, in place; return what waits for the end of it."""
        if not self.several:
            return lambda: None
        work = exchange(dist.all_reduce, tensor, async_op=True)

        def wait() -> None:
            exchange(work.wait)

        return wait

    def copy_of_main(self, tensor: Tensor) -> None:
        """Give a tensor the main process's values, in place."""
        if self.several:
            exchange(dist.broadcast, tensor, src=0)

    def wait(self) -> None:
        """Return when every process is here, however long that takes."""
        self._largest((0,), self.patient)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process do what is inside before the others: it compiles, downloads and caches for all, and
        complains for all. All leave together.

        Raises:
            LostProcessError: in the others, where it failed in the main one.
        """
        if not self.several:
            yield
            return
        if not self.main and self._told("", self.patient) != "":
            raise LostProcessError("the first process of the run could not begin; its message says why")
        try:
            yield
        except BaseException as error:
            if self.main:
                with suppress(LostProcessError):  # else another process's end would hide this error
                    self._told(type(error).__name__, self.patient)
            raise
        if self.main:
            self._told("", self.patient)
        self.wait()

    def require_alike(self, values: Mapping[str, Any]) -> None:
        """Refuse what processes do not have alike, before they go different ways and wait for each other.

        Args:
            values: plain values by what they are called.

        Raises:
            ConfigError: in the main process, with the first difference; the others raise `LostProcessError`.
        """
        if not self.several:
            return
        everywhere = self.gathered(json.loads(json.dumps(values)))
        with self.main_first():
            for rank, theirs in enumerate(everywhere if self.main else ()):
                found = first_difference(everywhere[0], theirs)
                if found is not None:
                    name, here, there = found
                    raise ConfigError(
                        f"the processes of a run need the same {name}; process 0 has {_shown(here)}, process {rank} "
                        f"{_shown(there)}. Give every machine the same installation, data and command"
                    )


ALONE = Processes()


def first_difference(first: Any, second: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Return where two plain values differ ("plan.recipe.lr") and both there; None where they are equal."""
    if first == second:
        return None
    if not isinstance(first, dict) or not isinstance(second, dict):
        return name, first, second
    for key in (*first, *second):
        if first.get(key) != second.get(key):
            return first_difference(first.get(key), second.get(key), f"{name}.{key}" if name else key)
    return name, first, second


def _shown(value: Any) -> str:
    return json.dumps(value)[:200]


def exchange(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call into torch.distributed. An error that has its cause here (no memory, a wrong shape) stays what it is.

    Raises:
        LostProcessError: another process has ended, or does not answer.
    """
    try:
        return call(*args, **kwargs)
    except RuntimeError as error:
        message = _of_another_process(error)
        if message is None:
            raise
        raise LostProcessError(message) from None


def _of_another_process(error: RuntimeError) -> str | None:
    """Return the message for an error that another process brought about, None for one of this process.

    Gloo raises plain RuntimeErrors that begin with the place in its transport; NCCL and stores raise `DistError`s.
    """
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    low = text.lower()
    of_gloo = "gloo/transport/" in low and "enforce fail" not in low
    if not of_gloo and not isinstance(error, dist.DistError):
        return None
    if any(own in low for own in ("out of memory", "invalid usage", "invalid argument")):
        return None
    if "timed out" in low or "timeout" in low:
        return (
            f"another process of the run does not answer, and may hang ({text[:200]}). Look what it does, end all and "
            "go on with --resume"
        )
    return (
        f"another process of the run has ended, or cannot be reached; its message says why ({text[:200]}). "
        "Go on with --resume"
    )
