"""Validations of a run: the weights that will be shipped are judged, and the best are kept."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from retinanet.batches import Batch
from retinanet.checkpoint import Model, find_model, load_model, save_model
from retinanet.data import Dataset
from retinanet.folders import write_json
from retinanet.inference import Detector, Validation, validate
from retinanet.model import RetinaNet
from retinanet.processes import ALONE, Processes
from retinanet.training.folder import RunFolder
from retinanet.training.patience import EarlyStop, early_stop
from retinanet.training.plan import Plan
from retinanet.training.story import RunStory


@dataclass
class Judge:
    """Validates the weights that will be shipped (the average where there is one) and keeps the best.

    What was judged before the run was resumed is known from `metrics.jsonl`; a line there says that the models of that
    validation are written.
    """

    plan: Plan
    network: RetinaNet
    val: Dataset
    folder: RunFolder
    processes: Processes = ALONE
    steps: set[int] = field(default_factory=set)
    best_ap: float = 0.0
    newest_best: Validation | None = None
    early: EarlyStop | None = None

    def remember(self) -> None:
        """Take up what an earlier process of this run judged, as the main process reads it: a shared disk may show
        others what it was a moment ago."""
        validations = self.folder.validations() if self.processes.main else []
        judged = self.processes.told([(record["step"], record["ap"] or 0.0) for record in validations])
        self.steps.update(step for step, _ in judged)
        self.best_ap = max((ap for _, ap in judged), default=0.0)
        self._decide()

    def until_enough(self, batches: Iterable[Batch], done: int) -> Iterator[Batch]:
        """Yield batches after `done` steps until the last one of the plan as it then is, or until validations say that
        the run stops early."""
        waiting = iter(batches)
        while done < self.plan.steps and self.early is None:
            yield next(waiting)
            done += 1

    def _decide(self) -> None:
        """Find out whether the run stops early; the main process knows what was told."""
        patience = self.plan.options.patience
        if patience is not None:
            validations = self.folder.validations() if self.processes.main else []
            self.early = self.processes.told(early_stop(validations, patience))

    def knows(self, step: int) -> bool:
        """Return whether the weights of a step are judged."""
        return step in self.steps

    def best(self) -> Validation:
        """Return the best validation; that of an earlier process is made again from its model."""
        if self.newest_best is None:
            detector = Detector(load_model(find_model(self.folder.path)), device=str(self.plan.device))
            self.newest_best = self._validated(detector)
        return self.newest_best

    def __call__(self, step: int, story: RunStory) -> None:
        with story.clock.during("validating"):
            self._judge(step, story)
            self._decide()
            story.early = self.early

    def _judge(self, step: int, story: RunStory) -> None:
        began = time.monotonic()
        # Just as `retinanet evaluate` will do it with the saved file, fp32 included: the figures must agree.
        detector = Detector(self.model(step), device=str(self.plan.device))
        found = self._validated(detector)
        self.steps.add(step)
        best = (found.ap or 0) >= self.best_ap
        if best:
            self.newest_best, self.best_ap = found, found.ap or 0.0
        if self.processes.main:
            self._keep(step, found, best, story, time.monotonic() - began)
        self.processes.wait()  # for what it writes and draws

    def _validated(self, detector: Detector) -> Validation:
        # As many at once as in a step: what fits there fits here, where no gradients are kept.
        at_once = -(-self.plan.batch_size // (self.processes.count * self.plan.options.accumulate))
        return validate(detector, self.val, batch_size=at_once, processes=self.processes)

    def _keep(self, step: int, found: Validation, best: bool, story: RunStory, seconds: float) -> None:
        """Save and tell a validation; its line in the log comes last and says that the models are there."""
        save_model(self.folder.last, self.model(step, found))
        if best:
            save_model(self.folder.best, self.model(step, found))
            write_json(self.folder.path / "metrics.json", found.metrics.to_json())
        story.validated(step, found, seconds)

    def model(self, step: int, found: Validation | None = None) -> Model:
        """Return the model file's content after a step."""
        summary = {
            "step": step,
            "steps": self.plan.steps,
            "images_seen": step * self.plan.batch_size,
            "recipe": self.plan.recipe.name,
            "data": self.val.name,
        }
        if self.plan.options.weights is not None:
            summary["weights"] = self.plan.options.weights
        if found is None:
            return Model(self.network, self.plan.spec, training=summary)
        return Model(
            self.network,
            self.plan.spec,
            found.operating_points,
            {**summary, "ap": found.ap, "ap50": found.metrics.ap50},
        )
