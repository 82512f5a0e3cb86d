"""Stopping on a signal at a moment of our choice instead of in the middle of something."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from retinanet.errors import LostProcessError, Stopped


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; where nothing would be lost by it, stops at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._message: str | None = None

    def note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self.check()

    def check(self) -> None:
        """Raise `Stopped` if a signal came and this is `at_once`."""
        if self.number is not None and self._message is not None:
            raise Stopped(self.number, self._message)

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """Let a signal stop what is done inside right away, with this message: everything worth saving is saved."""
        before, self._message = self._message, message
        try:
            self.check()
            yield
        except (KeyboardInterrupt, LostProcessError):
            # What is left of a signal that came while a kernel ran; or another process obeyed the signal first.
            self.check()
            raise
        finally:
            self._message = before


@contextmanager
def noted_signals(*, patient: bool = False) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that the run reads where it can stop.

    A second signal acts as usual, so that a stuck process can still be stopped by hand. Outside the main
    thread, where Python allows no handlers, nothing changes.

    Args:
        patient: a second signal does nothing more: one Ctrl-C reaches the processes of `torchrun` from the terminal and
            once more from torchrun, which ends those that stay for half a minute.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # What is ignored, as in the background of a script, stays ignored; what is not Python's stays as it is.
    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN)
    }

    def note(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, signal.SIG_IGN if patient else handler)
        request.note(number, frame)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
