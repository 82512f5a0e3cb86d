"""How long a run still takes, validations included."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

# Lines of `metrics.jsonl` that tell the speed: the later half of what there is, at most so many.
RECENT = 20


class Pace(NamedTuple):
    """Seconds of a step and of a validation."""

    step: float
    validation: float


class TimeLeft:
    """An estimate from the lines of `metrics.jsonl`.

    time left = (steps to come) x (seconds of a step) + (validations to come) x (seconds of a validation)

    A step takes as long as the recent ones did, with waiting for images and with states that are saved between
    validations. The first of a process, which compiles and fills caches, does not count, and those after it are
    forgotten soon: the later half of the lines counts.
    A validation takes as long as those before did, with the state that is saved before each; the first as long as a
    trial says, or a guess.

    Args:
        steps: of the run.
        validate_every: steps between validations, of which the last step has one, too.
        validation_in_steps: how many steps' time a validation is guessed to take.
        validation: seconds of one in a trial; None where there was none.
        first: steps that are done.
    """

    def __init__(
        self,
        *,
        steps: int,
        validate_every: int,
        validation_in_steps: float,
        validation: float | None = None,
        first: int = 0,
    ) -> None:
        self.steps = steps
        self.every = validate_every
        self.guess, self.tried = validation_in_steps, validation
        self.done = first
        self.starting = 0.0
        self.told_lines = 0
        self.lines: deque[tuple[int, float]] = deque()
        self.validations = self.judged = 0
        self.validating = 0.0

    def started(self, seconds: float) -> None:
        """Take up how long the first step of this process took, its images included; one that has a line of its own is
        as good as forgotten."""
        if not self.told_lines:
            self.starting = seconds

    def told(self, record: Mapping[str, Any]) -> None:
        """Take up a line that was just written."""
        self.remember(record)
        seconds = sum(record.get(f"seconds_{name}", 0.0) for name in ("data", "step", "saving"))
        if "loss" in record and record["step"] > self.done:
            steps = record["step"] - self.done
            if self.starting:
                steps, seconds, self.starting = steps - 1, max(0.0, seconds - self.starting), 0.0
            self.lines.append((steps, seconds))
            self.told_lines += 1
            self.done = record["step"]
            while len(self.lines) > min(RECENT, -(-self.told_lines // 2)):
                self.lines.popleft()

    def remember(self, record: Mapping[str, Any]) -> None:
        """Take up a line of an earlier process: how long validations take, not how fast that machine was."""
        # What a validation's page takes to write is told by the line after it.
        self.validating += record.get("seconds_validating", 0.0)
        if "ap" in record:
            self.judged = max(self.judged, record["step"])
            self.validations += "seconds_validating" in record
            self.validating += record.get("seconds_saving", 0.0)

    def seconds(self) -> float | None:
        """Return how long the run still takes after the last line; None before the first."""
        pace = self.pace()
        if pace is None:
            return None
        to_come = math.ceil(self.steps / self.every) - math.ceil(self.judged / self.every)
        return (self.steps - self.done) * pace.step + to_come * pace.validation

    def pace(self) -> Pace | None:
        """Return how fast the run is of late; None before the first line."""
        if not self.lines:
            return None
        step = sum(seconds for _, seconds in self.lines) / sum(steps for steps, _ in self.lines)
        if self.validations:
            return Pace(step, self.validating / self.validations)
        return Pace(step, self.guess * step if self.tried is None else self.tried)


def in_time(seconds: float) -> str:
    """Return a duration for people: 45 s, 4:10 min, 2 h 05 min, 1 d 3 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, of_hour = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {of_hour:02d} min"
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
