"""A run, decided: every setting with the reason for it, before the first step."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from retinanet.checkpoint import Model
from retinanet.data.transforms import Augmentation
from retinanet.devices import resolve_precision
from retinanet.errors import ConfigError
from retinanet.images import Preprocessing
from retinanet.model import ModelSpec
from retinanet.objective import Objective
from retinanet.training.configuration import TrainingOptions
from retinanet.training.recipes import Recipe

# Validations in a run, unless --validate-every-steps says otherwise or --time leaves no time for as many.
VALIDATIONS = 5
# With --patience more: that many in a row can only be without a better AP where there are more of them than that.
TIMES_PATIENCE = 4
# The share of a run that they may take, and how long a validated image takes beside a trained one: it has no way back.
VALIDATIONS_TAKE, LOOKED_AT = 0.1, 1 / 3
# With fewer passes over the images each is new often enough, and zooming only makes it harder.
FEW_PASSES = 3
# Padded sides of training images are multiples of this with --compile.
COMPILED_DIVISOR = 128
# The row that says how many steps a timed run takes after all.
TURNED = "steps in time"
# What is another on another machine, in the same run.
OF_A_MACHINE = ("reasons", "workers")


@dataclass(frozen=True)
class Plan:
    """A run, decided. `reasons` explains it line by line: (setting, value, why).

    `start` is the model of `--weights`, `weights_file` that of the backbone alone; `train_images` are an epoch's.

    `speed` is how many pixels a second `--time` was taken for when the size of images was chosen.

    The schedule is made for `schedule_steps`. A timed run may take fewer or more `steps`: at each of `turns` (steps
    done, place in the schedule) it was found how many fit, and what was left of the schedule was spread over them.
    """

    options: TrainingOptions
    recipe: Recipe
    spec: ModelSpec
    objective: Objective
    start: Model | None
    weights_file: Path | None
    device: torch.device
    batch_size: int
    lr: float
    train_images: int
    workers: int
    reasons: tuple[tuple[str, str, str], ...]
    steps: int = 0
    schedule_steps: int = 0
    turns: tuple[tuple[int, float], ...] = ()
    warmup_steps: int = 0
    validate_every: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    speed: float | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """How training batches are prepared."""
        return training_preprocessing(self.spec, self.options)

    @property
    def usual_validations(self) -> int:
        """How many validations there are, unless an option says otherwise or they would take too long."""
        return max(VALIDATIONS, TIMES_PATIENCE * (self.options.patience or 0))

    def lasting(self, steps: int, why: str, validations: int | None = None) -> Plan:
        """Return the plan with that many steps, and with everything that follows from their number.

        Args:
            validations: how many there are, unless --validate-every-steps says otherwise; None: as many as usual.
        """
        validations = validations or self.usual_validations
        recipe = self.recipe
        passes = steps * self.batch_size / self.train_images
        asked = self.options.augmentation()
        augmentation, reason = recipe.augmentation, f"recipe {recipe.name}"
        if passes < FEW_PASSES and augmentation.zoom != (1.0, 1.0) and "zoom" not in asked:
            augmentation = dataclasses.replace(augmentation, zoom=(1.0, 1.0))
            reason = f"no zoom below {FEW_PASSES} passes: every image is still new"
        if asked:
            reason = f"asked for: {', '.join(name.replace('_', ' ') for name in asked)}; else {reason}"
        many = f"{passes:.2g}" if passes < 10 else f"{passes:,.0f}"
        of_images = f"{many} {'pass' if many == '1' else 'passes'} over {self.train_images:,} images"
        changed = {
            "steps": (f"{steps:,}", f"{why}; {of_images}"),
            "augmentation": (_augmentation_in_words(augmentation), reason),
        }
        known = {setting: (value, reason) for setting, value, reason in self.reasons}
        return dataclasses.replace(
            self,
            steps=steps,
            schedule_steps=steps,
            turns=(),
            warmup_steps=min(recipe.warmup_steps, steps // 20),
            augmentation=augmentation,
            reasons=tuple((setting, *row) for setting, row in {**known, **changed}.items()),
        )._validated_every(self.options.validate_every_steps or math.ceil(steps / validations))

    def validating(self, images: int) -> Plan:
        """Return the plan with fewer validations where those of so many images would take more than their share."""
        if self.options.validate_every_steps is not None or not images:
            return self
        affordable = VALIDATIONS_TAKE / LOOKED_AT * self.steps * self.batch_size / images
        validations = max(1, min(self.usual_validations, int(affordable)))
        return self._validated_every(math.ceil(self.steps / validations))

    def _validated_every(self, steps: int) -> Plan:
        """Return the plan with a validation every so many steps, and with what --patience then means."""
        patience = self.options.patience
        if patience is None:
            return dataclasses.replace(self, validate_every=steps)
        validations = math.ceil(self.steps / steps)
        many = "1 validation" if patience == 1 else f"{patience} validations"
        row = (
            f"after {many} of {validations} without a better AP",
            "asked for; the schedule stays that of all steps",
        )
        if validations <= patience:
            why = f"of {validations} no {patience} can be without a better AP; --validate-every-steps makes them more"
            row = ("never", why)
        reasons = {setting: (value, why) for setting, value, why in self.reasons} | {"early stop": row}
        return dataclasses.replace(
            self, validate_every=steps, reasons=tuple((setting, *row) for setting, row in reasons.items())
        )

    def turned(self, step: int, steps: int) -> Plan:
        """Return the plan with `steps` in all, what is left of its schedule after `step` spread over those to come."""
        return self._with_turns((*self.turns, (step, self.place(step))), steps)

    def _with_turns(self, turns: tuple[tuple[int, float], ...], steps: int) -> Plan:
        if not turns:
            return self
        why = (
            f"what fits into the time, as the machine was at step {turns[-1][0]:,}; all else as planned for "
            f"{self.schedule_steps:,}"
        )
        known = [row for row in self.reasons if row[0] != TURNED]
        return dataclasses.replace(
            self, turns=turns, steps=steps, reasons=(*known, (TURNED, f"{steps:,}", why))
        )

    def place(self, step: int) -> float:
        """Return where in the schedule, of `schedule_steps`, a step stands: straight lines from turn to turn."""
        done, places = zip((0, 0.0), *self.turns, (self.steps, float(self.schedule_steps)), strict=True)
        return float(np.interp(step, done, places))

    def judges(self, step: int) -> bool:
        """Return whether the weights of a step are validated."""
        return step > 0 and (step % self.validate_every == 0 or step == self.steps)

    def as_begun(self, stored: dict[str, Any], *, but: Collection[str] = OF_A_MACHINE) -> Plan:
        """Return the plan with the length and the reasons that `plan.json` holds; refuse to go on with another plan.

        Args:
            but: what may be another.

        Raises:
            ConfigError: this version, or this machine, decides something else otherwise.
        """
        try:
            plan = self.lasting(stored.get("schedule_steps", stored["steps"]), "as the run began")
            plan = dataclasses.replace(plan, reasons=_reasons_as_begun(plan.reasons, stored["reasons"]))
            plan = plan._validated_every(stored["validate_every"])
            turns = tuple((int(step), float(place)) for step, place in stored.get("turns", ()))
            plan = plan._with_turns(turns, stored["steps"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"plan.json of the run is damaged: {error!r}") from None
        now = json.loads(json.dumps(plan.to_json()))
        for name in now.keys() - set(but):
            if now[name] != stored.get(name):
                raise ConfigError(
                    f"--resume needs the plan that the run began with; {name.replace('_', ' ')} was "
                    f"{json.dumps(stored.get(name))[:200]} and would be {json.dumps(now[name])[:200]} now, with this "
                    "version and on this machine. Use those it began with, or start anew with --weights"
                )
        return plan

    def to_json(self) -> dict[str, Any]:
        """Return what was decided, for `plan.json`."""
        return {
            "steps": self.steps,
            **({"schedule_steps": self.schedule_steps, "turns": self.turns} if self.turns else {}),
            **({} if self.speed is None else {"speed": self.speed}),
            "batch_size": self.batch_size,
            "lr": self.lr,
            "warmup_steps": self.warmup_steps,
            "validate_every": self.validate_every,
            "workers": self.workers,
            "precision": resolve_precision(self.device, self.options.precision),
            "class_loss": None if self.recipe.class_loss is None else _name_of(self.recipe.class_loss),
            "device": self.device.type,
            "weights": self.options.weights,
            "weights_file": str(self.weights_file) if self.weights_file else None,
            "augmentation": dataclasses.asdict(self.augmentation),
            # The recipe's model went into the spec; a function is no value.
            "recipe": {
                name: value
                for name, value in dataclasses.asdict(self.recipe).items()
                if name not in ("model", "class_loss")
            },
            "spec": self.spec.to_json(),
            "reasons": [list(reason) for reason in self.reasons],
        }

    def table(self) -> Table:
        """Return the reasons for a terminal; a ditto mark stands for the reason above."""
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for heading in ("setting", "value", "why"):
            table.add_column(heading, overflow="fold")
        above = ""
        for setting, value, why in self.reasons:
            table.add_row(setting, value, '"' if why == above else why)
            above = why
        return table

    def show(self, console: Console) -> None:
        console.print(self.table())


def training_preprocessing(spec: ModelSpec, options: TrainingOptions) -> Preprocessing:
    """Return how training batches are prepared: a compiled network gets few sizes, as new ones take compiling."""
    usual = spec.preprocessing
    return dataclasses.replace(usual, divisor=COMPILED_DIVISOR) if options.compile else usual


def _reasons_as_begun(
    now: Sequence[tuple[str, str, str]], stored: Sequence[Sequence[str]]
) -> tuple[tuple[str, str, str], ...]:
    """Return the reasons that a run had when it began, but for what is another now.

    What became of the classes of the model that it started from is known from then alone.
    """
    planned = {setting: (value, why) for setting, value, why in now}
    kept = {"classes", *planned}
    rows = {setting: (value, why) for setting, value, why in stored if setting in kept}
    another = {setting: row for setting, row in planned.items() if row[0] != rows.get(setting, ("",))[0]}
    return tuple((setting, *row) for setting, row in (rows | another).items())


def _augmentation_in_words(augmentation: Augmentation) -> str:
    """Return what the augmentation changes; what it leaves alone is not named."""
    names = ("flip", "flip_vertical", "quarter_turn", "photometric", "mosaic")
    chances = {name.replace("_", " "): getattr(augmentation, name) for name in names}
    parts = [f"{name} {chance:g}" for name, chance in chances.items() if chance]
    for name, (least, most) in (
        ("zoom", augmentation.zoom),
        ("size times", (min(augmentation.scales), max(augmentation.scales))),
    ):
        if (least, most) != (1.0, 1.0):
            parts.append(f"{name} {least:g} to {most:g}")
    return ", ".join(parts) or "none"


def _name_of(function: object) -> str:
    """Return what a function is called, for people and to tell one from another."""
    return (
        f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    )
