"""Stopping on a signal at a moment of our choice instead of in the middle of something."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Remembers the first SIGINT or SIGTERM."""

    def __init__(self) -> None:
        self.number: int | None = None

    def note(self, number: int, _: FrameType | None) -> None:
        self.number = number


@contextmanager
def noted_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that the loop reads at the end of a step.

    A second signal acts as usual, so that a stuck process can still be stopped by hand. Outside the main
    thread, where Python allows no handlers, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        request.note(number, frame)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
