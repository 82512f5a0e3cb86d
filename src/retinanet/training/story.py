"""What a run tells while it trains, in its log, to writers, in the terminal and on its page: one story."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from types import TracebackType
from typing import Any, Literal

from rich.console import Console

from retinanet.batches import Batch
from retinanet.data import Dataset
from retinanet.errors import Stopped
from retinanet.inference import Validation
from retinanet.report.run_page import Status
from retinanet.training.clock import Clock
from retinanet.training.examples import Examples
from retinanet.training.folder import RunFolder, go_on
from retinanet.training.memory import MemoryLog
from retinanet.training.patience import early_stop
from retinanet.training.planning import LOOKED_AT, Plan
from retinanet.training.progress import TrainingProgress
from retinanet.training.run_report import write_report
from retinanet.training.time_left import TimeLeft, in_time
from retinanet.training.writers import Writers

# Seconds after which the page is written anew between two validations.
REWRITTEN = 60.0


class RunStory:
    """Tells a run, from the first step that a process makes to the last.

    Nothing that only tells ends a run: a page, picture or writer that fails is said once, and left out.

    Args:
        first: steps that are done.
        main: whether this process is the one that writes; the others of a run only take the time.
    """

    def __init__(
        self,
        plan: Plan,
        train: Dataset,
        val: Dataset,
        folder: RunFolder,
        console: Console,
        first: int,
        *,
        main: bool = True,
    ) -> None:
        self.main = main
        self.plan, self.train, self.val, self.folder = plan, train, val, folder
        self.step = self.first = first
        self.clock, self.memory = Clock(plan.device), MemoryLog(plan.device)
        self.progress = TrainingProgress(console, plan.steps, first)
        self.writers = Writers(self.say)
        self.examples = Examples(val, folder.pictures)
        self.left = TimeLeft(
            steps=plan.steps,
            validate_every=plan.validate_every,
            validation_in_steps=LOOKED_AT * len(val) / plan.batch_size,
            first=first,
        )
        self.failed: set[str] = set()
        self.told_unreadable: set[str] = set()
        self.written_at = time.monotonic()

    def __enter__(self) -> RunStory:
        if self.main:
            self._begin()
        return self

    def _begin(self) -> None:
        history = self.folder.history()
        for record in history:
            self.left.remember(record)
            self.told_unreadable.update(record.get("unreadable", []))
        self.writers.open(self.plan.options, self.folder, self.first)
        over = early_stop((record for record in history if "ap" in record), self.plan.options.patience)
        if 0 < self.first < self.plan.steps and not over:
            self.folder.note_resume(self.first)
        self._report_progress()
        self.progress.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.main:
            return
        self.progress.__exit__(kind, error, trace)
        reached = f"step {self.step:,} of {self.plan.steps:,}"
        if error is None:
            early = early_stop(self.folder.validations(), self.plan.options.patience)
            over = str(early) if early and early.step < self.plan.steps else ""
            if over:
                self.say(over)
            self.report(
                "finished",
                f"{over[:1].upper()}{over[1:]}." if over else f"Finished: all {self.plan.steps:,} steps.",
            )
        elif isinstance(error, Stopped | KeyboardInterrupt):
            self.report("stopped", f"Stopped at {reached}.", "To go on:")
        else:
            what = str(error) or type(error).__name__
            self.report("failed", f"Failed at {reached}: {what}", "When the cause is mended:")
        self.writers.close()  # last: it may take its time, which a process that is being stopped has not

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of the steps to come, and take the time."""
        for batch in self.clock.over(batches):
            self.step += 1
            yield batch

    def say(self, text: str) -> None:
        """Print a line."""
        self.progress.say(text)

    def unreadable(self, step: int, failures: list[str]) -> None:
        """Tell of training images that could not be read."""
        if not self.main:
            return
        for failure in failures:
            self.say(f"skipped, and replaced by the next image: {failure}")
        self._log_unreadable(step, failures)

    def trained(self, step: int, figures: dict[str, float]) -> None:
        """Tell the means of the steps since the last telling.

        Args:
            figures: "loss", "loss_class", "loss_box", "images_per_second" and "lr", at least; without a loss, as all
                steps were skipped, there is nothing to tell.
        """
        if "loss" not in figures:
            return
        record = {"step": step, "epoch": self._epoch(step), **figures, **self.clock.take()}
        if not self.main:
            return
        record |= self.memory.read()
        self.log(record)
        self.left.told(record)
        self.progress.step(step, record, self.left.seconds())
        if time.monotonic() - self.written_at > REWRITTEN:
            self._report_progress()

    def validated(self, step: int, found: Validation, seconds: float) -> None:
        """Tell a validation, when its models are written: a line in the log says that they are."""
        self.progress.evaluated(step, found.metrics, seconds)
        for file, failure in found.failed.items():
            self.say(f"left out of the validation: {file}: {failure}")
        self._log_unreadable(step, list(found.failed.values()))
        self._safely("pictures", lambda: self.examples.draw(step, found))
        metrics = found.metrics.to_json()
        figures = {name: value for name, value in metrics.items() if name.startswith(("ap", "ar"))}
        per_class = {
            name: {"ap": of["ap"], "ap50": of["ap50"]} for name, of in found.metrics.per_class.items()
        }
        record = {
            "step": step,
            "epoch": self._epoch(step),
            **figures,
            "per_class": per_class,
            **self.clock.take(),
        }
        self.log(record)
        self.left.told(record)
        self._report_progress()

    def log(self, record: dict[str, Any]) -> None:
        """Write a line of `metrics.jsonl`, with "step" and "epoch", and tell its figures to the writers."""
        self.folder.log(record)
        self.writers.tell(record)

    def report(
        self, kind: Literal["running", "finished", "stopped", "failed"], text: str, hint: str = ""
    ) -> None:
        """Write the page as the run stands.

        Args:
            hint: when one would resume the run, before the command for it.
        """
        status = Status(kind, text, self.step / self.plan.steps, hint, go_on(self.folder) if hint else "")
        self._safely(
            "report.html",
            lambda: write_report(self.plan, self.train, self.val, self.folder, self.examples, status),
        )
        self.written_at = time.monotonic()

    def _report_progress(self) -> None:
        left = self.left.seconds()
        about = "" if left is None else f", about {in_time(left)} left at {datetime.now():%H:%M}"
        text = f"In training: step {self.step:,} of {self.plan.steps:,}{about}."
        self.report("running", text, "If this page no longer changes, the run was killed. To go on:")

    def _log_unreadable(self, step: int, failures: list[str]) -> None:
        """Log those that are not in the log: at every validation the same images fail."""
        new = [failure for failure in failures if failure not in self.told_unreadable]
        self.told_unreadable.update(new)
        if new:
            self.log({"step": step, "epoch": self._epoch(step), "unreadable": new})

    def _epoch(self, step: int) -> float:
        return step * self.plan.batch_size / self.plan.train_images

    def _safely(self, what: str, tell: Callable[[], None]) -> None:
        """Do what only tells; say once of each kind that it failed."""
        try:
            tell()
        except Exception as error:
            if what not in self.failed:
                self.say(
                    f"{what} cannot be written, the run goes on without: {str(error) or type(error).__name__}"
                )
            self.failed.add(what)
