"""When a training state is saved, what is in it, and how a run takes it up again."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from retinanet.errors import CheckpointError, DivergedError
from retinanet.processes import ALONE, Processes
from retinanet.training.folder import RunFolder
from retinanet.training.meter import Meter
from retinanet.training.plan import Plan
from retinanet.training.skipping import SkippedSteps, UnreadableImages
from retinanet.training.state import State, optimizer_tensors, restore_optimizers, save_state
from retinanet.training.step import TrainingStep


@dataclass
class Saving:
    """When a training state is saved, what is in it, and how a run takes it up again."""

    plan: Plan
    folder: RunFolder
    train_on: TrainingStep
    meter: Meter
    skipped: SkippedSteps
    unreadable: UnreadableImages
    processes: Processes = ALONE
    saved_at: float = field(default_factory=time.monotonic)

    def due(self, step: int) -> bool:
        """Return whether the steps or the minutes between two states are over."""
        options = self.plan.options
        by_steps = options.save_every_steps is not None and step % options.save_every_steps == 0
        return by_steps or time.monotonic() - self.saved_at >= 60 * options.save_every_minutes

    def save(self, step: int) -> None:
        """Save everything that the next step depends on, and what has been told: what every process has alike.

        Raises:
            DivergedError: a weight is not finite; the states before stay.
            DiskError: the disk has no room or refuses.
        """
        train_on = self.train_on
        for name, weight in train_on.network.named_parameters():
            if not torch.isfinite(weight).all():
                raise DivergedError(
                    f"the weights are no longer finite at step {step}, {name} for one; start anew with a lower --lr"
                )
        train_on.share_statistics()
        self.unreadable.share()
        parts = {
            "network": train_on.network.state_dict(),
            "optimizer": optimizer_tensors(train_on.optimizers),
            "meter": {} if self.meter.sums is None else {"sums": self.meter.sums},
        }
        (in_parts,) = self.processes.largest(train_on.parts)
        values = {
            "skipped_in_a_row": self.skipped.in_a_row,
            "unreadable": sorted(self.unreadable.told),
            "unreadable_untold": sorted(self.unreadable.untold),
            "parts_of_a_step": in_parts,
        }
        if train_on.average is not None:
            parts["average"] = train_on.average.model.state_dict()
            values["averaged"] = int(train_on.average.updates)
        if self.processes.main:
            save_state(self.folder.checkpoints, State(step, parts, values))
        self.processes.wait()  # in a step, where they would meet next, none waits for a slow disk
        self.saved_at = time.monotonic()

    def restore(self, state: State) -> int:
        """Put a state back into place; return its step.

        Raises:
            CheckpointError: it is of another network or optimiser.
        """
        try:
            self._restore(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"--resume needs the state of this very network and optimiser; that of step {state.step} in "
                f"{self.folder.checkpoints} is of others: {reason}"
            ) from None
        return state.step

    def _restore(self, state: State) -> None:
        train_on, values = self.train_on, state.values
        train_on.network.load_state_dict(state.parts["network"])
        restore_optimizers(train_on.optimizers, state.parts["optimizer"])
        if train_on.average is not None:
            train_on.average.model.load_state_dict(state.parts["average"])
            train_on.average.updates.fill_(values["averaged"])
        sums = state.parts["meter"].get("sums")
        self.meter.sums = None if sums is None else sums.to(train_on.device)
        self.skipped.in_a_row = values["skipped_in_a_row"]
        self.unreadable.told.update(values["unreadable"])
        # The first states of this format do not have the rest.
        self.unreadable.untold.update(values.get("unreadable_untold", ()))
        # Where memory ran out it would again.
        train_on.parts = max(train_on.parts, values.get("parts_of_a_step", 1))
