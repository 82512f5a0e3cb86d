"""A timed run on a machine that is not as fast as its trial takes fewer or more steps, and so its schedule ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from retinanet.training.plan import Plan

# Share of the time that is planned; the rest is for what differs between a trial and a run, and for its last pictures.
PLANNED_TIME = 0.92
# How often a run looks whether it will end in time.
LOOKS = 10
# Smaller differences than this share of the steps to come are left alone.
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

    def steps(self, plan: Plan, step: int, left: float | None) -> int:
        """Return how many steps the run should have, so that those after `step` end in time; the plan's where that is
        about what it has, nothing is known yet, or the last look was a moment ago.

        Args:
            left: seconds that the steps and validations to come will take at the speed of late.
        """
        now = time.monotonic()
        if step >= plan.steps or not left or now < self.looked + self.seconds / LOOKS:
            return plan.steps
        self.looked = now
        room = self.at - now - (1 - PLANNED_TIME) * self.seconds
        to_come = plan.steps - step
        if abs(room - left) <= TOLERATED * left:
            return plan.steps
        fitting = max(round(LEAST * step), int(to_come * room / left), 1)
        return min(step + fitting, MOST * plan.schedule_steps)
