"""Stopping on a signal at a moment of our choice instead of in the middle of something."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

from retinanet.errors import LostProcessError, Stopped

# One wish to stop may come several times (from the terminal, from torchrun, from the queue's manager, at once); who
# asks again so many seconds later means now.
AGAIN_AFTER = 5.0
_END = b"\0"


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
        patient: a second signal does nothing more, as one wish to stop reaches the processes of `torchrun` on several
            ways; but one that comes `AGAIN_AFTER` seconds after the first ends the process at once, with 128 + its
            number, even while it waits for another process that hangs.
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
        if not patient:
            for each, handler in before.items():
                signal.signal(each, handler)
        if request.number is None:
            request.note(number, frame)

    for number in before:
        signal.signal(number, note)
    try:
        with _ended_by_a_later_signal() if patient else nullcontext():
            yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _ended_by_a_later_signal() -> Iterator[None]:
    """End this process at a signal that comes well after the first.

    Handlers of Python run between two of its instructions, of which there are none in a wait for another process. What
    the interpreter itself does when a signal comes, it writes the number to a descriptor, another thread can read.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.send(_END)  # closing would not do: a forked process may have it open
        watcher.join()
        writer.close()
        reader.close()


def _watch(reader: socket.socket) -> None:
    first: float | None = None
    while (came := reader.recv(1)) not in (b"", _END):
        if came[0] not in (signal.SIGINT, signal.SIGTERM):
            continue
        now = time.monotonic()
        first = now if first is None else first
        if now - first >= AGAIN_AFTER:
            os.write(
                2, b"retinanet: ended at once by another signal; go on from the last state with --resume\n"
            )
            os._exit(128 + came[0])
