"""A timed run on a machine that is not as fast as its trial takes fewer or more steps, and so its schedule ends."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from dataclasses import dataclass, field

from retinanet.training.plan import Plan
from retinanet.training.time_left import Pace

# What is not planned of the time, for what differs between a trial and a run, and for its last pictures: this share of
# it, or of long runs, whose last look at the clock comes when little is left to go wrong, so many seconds and less.
RESERVE, RESERVE_SECONDS, RESERVE_OF_LONG = 0.08, 30.0, 0.02
# How often a run looks whether it will end in time.
LOOKS = 10
# Smaller differences than this share of the time to come are left alone.
TOLERATED = 0.1
# What is left of a schedule takes at least this share of the steps done, so that the rate does not fall at once; and a
# run takes at most this many times the steps that were planned.
LEAST, MOST = 0.05, 4


@dataclass
class Deadline:
    """When a run of `--time` has to be over.

    Args:
        at: of `time.monotonic`.
        seconds: of the whole run.
        looked: when the clock was looked at last.
    """

    at: float
    seconds: float
    looked: float = field(default_factory=time.monotonic)

    def steps(self, plan: Plan, step: int, pace: Pace | None) -> int:
        """Return how many steps the run should have, so that those after `step` end in time, validations included; the
        plan's where that is about what it has, nothing is known yet, or the last look was a moment ago.

        Args:
            step: is done, and validated where the plan says so.
            pace: of late.
        """
        now = time.monotonic()
        if step >= plan.steps or pace is None or now < self.looked + self.seconds / LOOKS:
            return plan.steps
        self.looked = now
        room = self.at - now - reserve(self.seconds)

        def taken(steps: int) -> float:
            """Return the seconds to come, if the run has so many steps."""
            validations = math.ceil(steps / plan.validate_every) - step // plan.validate_every
            return (steps - step) * pace.step + validations * pace.validation

        left = taken(plan.steps)
        if abs(room - left) <= TOLERATED * left:
            return plan.steps
        most = MOST * plan.schedule_steps
        least = min(step + max(1, round(LEAST * step)), most)
        fitting = bisect_right(range(least, most + 1), room, key=taken)
        return least + max(0, fitting - 1)


def reserve(seconds: float) -> float:
    """Return the seconds of so many that no steps are planned for.

    >>> reserve(100), reserve(3600)
    (8.0, 102.0)
    """
    return min(RESERVE * seconds, RESERVE_SECONDS + RESERVE_OF_LONG * seconds)
