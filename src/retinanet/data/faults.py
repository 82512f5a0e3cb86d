"""Keeping the faults of a reading: the first ones whole, of all of them exact counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from retinanet.data.dataset import Action, Fault
from retinanet.data.kinds import Kind

FAULTS_KEPT = 10_000


class FaultLog:
    """What was wrong, in bounded memory: `kept` holds the first faults, `counts` all by (kind, action).

    A million faults say no more than the first ten thousand and their number.
    """

    def __init__(self, limit: int = FAULTS_KEPT) -> None:
        self.kept: list[Fault] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self._limit = limit

    @property
    def room(self) -> int:
        """How many more are kept whole; beyond them nobody has to find words."""
        return max(0, self._limit - len(self.kept))

    def drop(self, file: str, record: str, reason: str, kind: Kind, fix: str = "") -> None:
        """Name a record that has no meaning; `fix` is the kind's unless a better one is given."""
        self._add(file, record, reason, "dropped", kind, fix)

    def repair(self, file: str, record: str, reason: str, kind: Kind, fix: str = "") -> None:
        """Name a record that has one meaning and got it."""
        self._add(file, record, reason, "repaired", kind, fix)

    def take(self, faults: Iterable[Fault]) -> None:
        """Add faults that are worded already."""
        for fault in faults:
            self.counts[str(fault.kind), fault.action] += 1
            if self.room:
                self.kept.append(fault)

    def count(self, action: Action, kind: Kind, number: int) -> None:
        """Count faults that are not worded."""
        if number:
            self.counts[str(kind), action] += number

    def _add(self, file: str, record: str, reason: str, action: Action, kind: Kind, fix: str) -> None:
        self.counts[str(kind), action] += 1
        if self.room:
            self.kept.append(Fault(file, record, reason, action, kind, fix or kind.fix))
