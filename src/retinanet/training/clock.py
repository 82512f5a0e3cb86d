"""Where the time of a run goes: waiting for images, steps, validations, savings."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, TypeVar

import torch

T = TypeVar("T")
Activity: TypeAlias = Literal["data", "step", "validating", "saving"]


class Clock:
    """Give every second to one activity.

    On CUDA the host runs ahead: it waits for images while the device still works, which is no loss. There a step lasts
    from its first to its last operation on the device, and waiting for images is what is left of the time.
    """

    def __init__(self, device: torch.device) -> None:
        self.doing: Activity | None = None
        self.since = time.monotonic()
        self.spent: dict[Activity, float] = {}
        self.stream = _StreamTime() if device.type == "cuda" else None

    def now(self, doing: Activity | None) -> None:
        """Say what is done from now on; what was done until now gets the time since it was said."""
        now = time.monotonic()
        if self.doing is not None:
            self.spent[self.doing] = self.spent.get(self.doing, 0.0) + now - self.since
        self.doing, self.since = doing, now

    @contextmanager
    def during(self, doing: Activity) -> Iterator[None]:
        """Give the time inside to an activity; afterwards the one before goes on."""
        before = self.doing
        self.now(doing)
        try:
            yield
        finally:
            self.now(before)

    def over(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield batches: to get one is "data", what is done with it a "step", but for what is said inside."""
        waiting = iter(batches)
        while True:
            self.now("data")
            batch = next(waiting, None)
            self.now("step")
            if batch is None:
                return
            if self.stream:
                self.stream.begin()
            yield batch
            if self.stream:
                self.stream.end()

    def take(self) -> dict[str, float]:
        """Return the seconds of each activity since the last taking, as "seconds_data" and so on.

        On CUDA this waits for the device: call it where the host has just read a value from there.
        """
        self.now(self.doing)
        spent, self.spent = self.spent, {}
        if self.stream:
            others = sum(spent.get(name, 0.0) for name in ("validating", "saving"))
            both = spent.get("data", 0.0) + spent.get("step", 0.0)
            step = min(both, max(0.0, self.stream.take() - others))
            if both:
                spent |= {"data": both - step, "step": step}
        return {f"seconds_{name}": round(seconds, 4) for name, seconds in spent.items() if seconds > 0}


class _StreamTime:
    """The time that a CUDA stream takes between marks, without waiting for it until it is asked."""

    def __init__(self) -> None:
        self.began: torch.cuda.Event | None = None
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        self.began = self._mark()

    def end(self) -> None:
        if self.began is not None:
            self.spans.append((self.began, self._mark()))
        self.began = None

    def take(self) -> float:
        """Return the seconds of all spans so far; one that is open is cut here."""
        is_open = self.began is not None
        self.end()
        spans, self.spans = self.spans, []
        if is_open:
            self.begin()
        if not spans:
            return 0.0
        spans[-1][1].synchronize()
        return float(sum(first.elapsed_time(last) for first, last in spans)) / 1000

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
