"""What a person sees while a run trains: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from retinanet.evaluation import Metrics
from retinanet.training.time_left import in_time

# Seconds between plain lines where there is no terminal.
PLAIN_INTERVAL = 15.0


def plain_console() -> Console:
    """Return a console on stderr that takes brackets in file names and messages for what they are."""
    return Console(stderr=True, markup=False, highlight=False)


def silent_console() -> Console:
    """Return a console that says nothing, for processes beside the one that speaks."""
    return Console(quiet=True, force_terminal=False)


class TrainingProgress:
    """Show steps, losses, rate and speed of a run of `steps` steps, of which the `first` are done already."""

    def __init__(self, console: Console, steps: int, first: int = 0) -> None:
        self.console = console
        self.steps = steps
        self.live = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            _TimeLeftColumn(Column(no_wrap=True)),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.live.add_task("train", total=steps, completed=first, figures="", ends_at=None)
        self.shown_at = time.monotonic()

    def lasts(self, steps: int) -> None:
        """Take up that the run has another number of steps."""
        self.steps = steps
        self.live.update(self.task, total=steps)

    def __enter__(self) -> TrainingProgress:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def step(self, step: int, record: Mapping[str, Any], left: float | None) -> None:
        """Show what `metrics.jsonl` got for a step.

        Args:
            left: seconds to the end of the run, if known.
        """
        figures = (
            f"loss {record['loss']:.3f} (class {record['loss_class']:.3f}, box {record['loss_box']:.3f})  "
            f"lr {record['lr']:.2g}  {record['images_per_second']:.1f} images/s"
        )
        now = time.monotonic()
        ends_at = None if left is None else now + left
        self.live.update(self.task, completed=step, figures=figures, ends_at=ends_at)
        if not self.console.is_terminal and (now - self.shown_at > PLAIN_INTERVAL or step == self.steps):
            self.shown_at = now
            remaining = "" if left is None else f"  {in_time(left)} left"
            self.say(f"step {step}/{self.steps}  {figures}{remaining}")

    def evaluated(self, step: int, metrics: Metrics, seconds: float) -> None:
        """Show a validation."""
        shown = "  ".join(
            f"{name.upper()} {'-' if value is None else f'{value:.3f}'}"
            for name, value in (("ap", metrics.ap), ("ap50", metrics.ap50), ("ap75", metrics.ap75))
        )
        self.say(f"step {step}/{self.steps}  validation: {shown}  ({seconds:.0f} s)")

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)


class _TimeLeftColumn(ProgressColumn):
    """Count down what was estimated last."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """Return the time left, for rich."""
        ends_at = task.fields["ends_at"]
        left = "" if ends_at is None else f"{in_time(max(0.0, ends_at - time.monotonic()))} left"
        return Text(left, style="progress.remaining")
