"""What a run tells while it trains, in its log, to writers, in the terminal and on its page: one story."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from retinanet.training.estimate import Estimate
from retinanet.training.examples import Examples
from retinanet.training.folder import RunFolder, go_on
from retinanet.training.memory import MemoryLog
from retinanet.training.patience import EarlyStop
from retinanet.training.plan import LOOKED_AT, Plan
from retinanet.training.progress import TrainingProgress
from retinanet.training.run_report import write_report
from retinanet.training.time_left import TimeLeft, in_time
from retinanet.training.writers import Writers

# Seconds after which the page is written anew between two validations.
REWRITTEN = 60.0
# Exit codes of the command that writers are told, beside 0 and those of signals.
FAILED, INTERRUPTED = 2, 130


class RunStory:
    """Tells a run, from the first step that a process makes to the last.

    Nothing that only tells ends a run: a page, picture or writer that fails is said once, and left out.

    Args:
        first: steps that are done.
        tried: what a trial before it measured.
        early: where the run stopped early, as an earlier process found, and from then on each validation.
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
        tried: Estimate | None = None,
        early: EarlyStop | None = None,
        main: bool = True,
    ) -> None:
        self.main, self.early = main, early
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
            validation=None if tried is None else tried.validation,
            first=first,
        )
        self.held: dict[str, float] = {}
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
        if 0 < self.first < self.plan.steps and self.early is None:
            self.folder.note_resume(self.first)
        self.writers.open(
            self.plan.options, self.folder, self.first
        )  # last of what may fail: it has to be closed
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
            self.report("finished", self._finished())
            code = 0
        elif isinstance(error, Stopped | KeyboardInterrupt):
            self.report("stopped", f"Stopped at {reached}.", "To go on:")
            code = error.exit_code if isinstance(error, Stopped) else INTERRUPTED
        else:
            what = str(error) or type(error).__name__
            self.report("failed", f"Failed at {reached}: {what}", "When the cause is mended:")
            code = FAILED
        self.writers.close(code)  # last: it may take its time, which a process that is being stopped has not

    def _finished(self) -> str:
        if self.early is None or self.early.step == self.plan.steps:
            return f"Finished: all {self.plan.steps:,} steps."
        why = str(self.early)
        self.say(why)
        return f"{why[:1].upper()}{why[1:]}."

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of the steps to come, and take the time."""
        began = time.monotonic()
        for batch in self.clock.over(batches):
            self.step += 1
            yield batch
            if self.step == self.first + 1:
                self.left.started(time.monotonic() - began)

    def turned(self, plan: Plan) -> None:
        """Tell that a timed run takes another number of steps than it had."""
        what = "fewer" if plan.steps < self.plan.steps else "more"
        self.plan, self.left.steps = plan, plan.steps
        self.progress.lasts(plan.steps)
        if self.main:
            self.folder.keep_length(plan.to_json())
            self.say(
                f"{plan.steps:,} steps in all fit into the time at the speed of late, {what} than before; the "
                "schedule goes with them"
            )

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
        self.log(record, self._memory(step))
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

    def log(self, record: dict[str, Any], measured: Mapping[str, float] | None = None) -> None:
        """Write a line of `metrics.jsonl`, with "step" and "epoch", and tell its figures to the writers.

        Args:
            measured: further figures, for the writers alone.
        """
        self.folder.log(record)
        self.writers.tell({**record, **(measured or {})})

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

    def _memory(self, step: int) -> dict[str, float]:
        """Return the most memory held until now; where it rose it has a line in a log of its own, as no two runs hold
        the same."""
        held = self.memory.read()
        if held != self.held:
            self._safely("memory.jsonl", lambda: self.folder.log_memory({"step": step, **held}))
        self.held = held
        return held

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
