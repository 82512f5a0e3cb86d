"""What a run will take, in one line."""

from __future__ import annotations

from dataclasses import dataclass

from retinanet.training.memory import Limit, gigabytes
from retinanet.training.plan import Plan
from retinanet.training.time_left import in_time


@dataclass(frozen=True)
class Estimate:
    """What a trial measured.

    Args:
        step, validation: seconds of one.
        memory: the most bytes that the run will hold; on CUDA, that its tensors will take there. None: unknown.
        limit: how many there are.
        tried: seconds that the trial took.
    """

    step: float
    validation: float
    memory: float | None
    limit: Limit | None
    tried: float

    def line(self, plan: Plan) -> str:
        """Return "estimate: about 23:50 min (429 steps of 3.1 s, 5 validations of 20 s), 2.1 GB ..." for a plan."""
        validations = -(-plan.steps // plan.validate_every)
        seconds = plan.steps * self.step + validations * self.validation
        parts = [_many(plan.steps, "step", self.step), _many(validations, "validation", self.validation)]
        text = f"estimate: about {in_time(max(1.0, seconds))} ({', '.join(parts)})"
        if self.memory is not None and self.limit is not None:
            text += f", memory {gigabytes(self.memory)}, {self.limit.share(self.memory)}"
        text += f"; tried for {in_time(max(1.0, self.tried))}"
        if self.memory is not None and self.limit is not None and self.memory > self.limit.bytes:
            text += ". That is more memory than there is: give a smaller --batch-size, or --batch-size auto"
        return text


def _many(number: int, what: str, seconds: float) -> str:
    """Return "429 steps of 3.1 s"."""
    if seconds < 1:
        each = f"{seconds * 1e3:.0f} ms"
    else:
        each = f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
    return f"{number:,} {what}{'' if number == 1 else 's'} of {each}"
