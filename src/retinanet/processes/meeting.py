"""A name for this meeting of processes, under which nothing lies that ended processes left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from uuid import uuid4

from retinanet.errors import LostProcessError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # which a torch without it does not have

# Seconds between two looks.
LOOKS = 0.05


def name_of_meeting(store: Store, rank: int, count: int, seconds: float) -> str:
    """Return a name that all processes which are there now agree on, and none that was there before has used.

    `torchrun` starts processes again at the same store, in which torch 2.15 leaves addresses of those that have ended;
    and it counts restarts for each machine, so that no count is the same for all. Hence every process calls itself by a
    word of its own, new in each life. The first one answers each word that it reads with its own, which becomes the
    name; who is answered says so; when the newest word of every rank has said so, the first one lets them go.

    Only `hello` is ever written twice. A word there that an ended process left is answered too, but never says so, and
    is overwritten by its successor's. An answer of a first process that ends before it lets go is overwritten by the
    next one's, which all then follow.

    Args:
        seconds: longest to wait.

    Raises:
        LostProcessError: they are not all there in time.
    """
    own, patience = uuid4().hex, _Patience(seconds, count)
    if rank == 0:
        _lead(store, own, count, patience)
        return own
    store.set(f"retinanet/hello/{rank}", own)
    name = None
    while True:
        answer = _read(store, f"retinanet/answer/{own}")
        if answer is not None and answer != name:
            name = answer
            store.set(f"retinanet/here/{name}/{own}", "")
        if name is not None and store.check([f"retinanet/go/{name}"]):
            return name
        patience.wait("the first one does not answer" if name is None else "others did not come")


def _lead(store: Store, own: str, count: int, patience: _Patience) -> None:
    """Answer the other processes until all have heard it."""
    answered: dict[int, str] = {}
    while True:
        missing = []
        for rank in range(1, count):
            word = _read(store, f"retinanet/hello/{rank}")
            if word is not None and answered.get(rank) != word:
                store.set(f"retinanet/answer/{word}", own)
                answered[rank] = word
            if word is None or not store.check([f"retinanet/here/{own}/{word}"]):
                missing.append(rank)
        if not missing:
            store.set(f"retinanet/go/{own}", "")
            return
        few = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        patience.wait(f"{len(missing)} did not come, of rank {few}")


def _read(store: Store, key: str) -> str | None:
    """Return what is written there now."""
    return store.get(key).decode() if store.check([key]) else None


class _Patience:
    """Waits for the other processes a little at a time, and no longer than `seconds` in all."""

    def __init__(self, seconds: float, count: int) -> None:
        self.seconds, self.count = seconds, count
        self.deadline = time.monotonic() + seconds

    def wait(self, lacking: str) -> None:
        if time.monotonic() > self.deadline:
            raise LostProcessError(
                f"waited {self.seconds:g} s for the {self.count} processes of the run to begin: {lacking}. See whether "
                "all were started with the same command, and what the others say"
            )
        time.sleep(LOOKS)
