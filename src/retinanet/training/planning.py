"""From options, recipe and data to a plan: every setting of a run, each with the reason for it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from retinanet.checkpoint import Model, load_model
from retinanet.data import Dataset
from retinanet.data.sampling import epoch_length, share_of
from retinanet.data.transforms import Augmentation
from retinanet.devices import choose_device, require_cpp_compiler, resolve_precision
from retinanet.errors import ConfigError
from retinanet.images import Preprocessing
from retinanet.model import ModelSpec, fitting_norm
from retinanet.objective import Objective
from retinanet.processes import ALONE, Processes, available_cores, device_of_process
from retinanet.training import objectives
from retinanet.training.choosing import choose_rate, choose_recipe, find_pretrained, started_from
from retinanet.training.configuration import EVERY_SETTING, TrainingOptions
from retinanet.training.objectives import build_objective, choose_loss
from retinanet.training.recipes import Recipe
from retinanet.training.sizing import (
    anchor_choices,
    choose_anchors,
    choose_batch,
    choose_max_detections,
    choose_preprocessing,
    choose_steps,
)

# Validations in a run, unless --validate-every-steps says otherwise or --time leaves no time for as many.
VALIDATIONS = 5
# The share of a run that they may take, and how long a validated image takes beside a trained one: it has no way back.
VALIDATIONS_TAKE, LOOKED_AT = 0.1, 1 / 3
# With fewer passes over the images each is new often enough, and zooming only makes it harder.
FEW_PASSES = 3
# Padded sides of training images are multiples of this with --compile.
COMPILED_DIVISOR = 128
# What is another on another machine, in the same run.
OF_A_MACHINE = ("reasons", "workers")


@dataclass(frozen=True)
class Plan:
    """A run, decided. `reasons` explains it line by line: (setting, value, why).

    `start` is the model of `--weights`, `weights_file` that of the backbone alone; `train_images` are an epoch's.
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
    warmup_steps: int = 0
    validate_every: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)

    @property
    def preprocessing(self) -> Preprocessing:
        """How training batches are prepared."""
        return training_preprocessing(self.spec, self.options)

    def lasting(self, steps: int, why: str, validations: int = VALIDATIONS) -> Plan:
        """Return the plan with that many steps, and with everything that follows from their number.

        Args:
            validations: how many there are, unless --validate-every-steps says otherwise.
        """
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
            warmup_steps=min(recipe.warmup_steps, steps // 20),
            validate_every=self.options.validate_every_steps or math.ceil(steps / validations),
            augmentation=augmentation,
            reasons=tuple((setting, *row) for setting, row in {**known, **changed}.items()),
        )

    def validating(self, images: int) -> Plan:
        """Return the plan with fewer validations where those of so many images would take more than their share."""
        if self.options.validate_every_steps is not None or not images:
            return self
        affordable = VALIDATIONS_TAKE / LOOKED_AT * self.steps * self.batch_size / images
        validations = max(1, min(VALIDATIONS, int(affordable)))
        return dataclasses.replace(self, validate_every=math.ceil(self.steps / validations))

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
            plan = self.lasting(stored["steps"], "as the run began")
            plan = dataclasses.replace(
                plan,
                validate_every=stored["validate_every"],
                reasons=_reasons_as_begun(plan.reasons, stored["reasons"]),
            )
        except (KeyError, TypeError, ValueError) as error:
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


def plan_run(
    options: TrainingOptions,
    train: Dataset,
    change: Callable[[Recipe], Recipe] | None = None,
    processes: Processes = ALONE,
    begun: dict[str, Any] | None = None,
) -> Plan:
    """Decide every setting: the user's option first, then the recipe, then a rule of the data and device.

    Args:
        change: what an experiment changes of the recipe that the options choose.
        processes: that will train together. What is decided does not depend on them, but for devices and workers.
        begun: `plan.json` of a run that has a training state: what it says of the weights that the run started from is
            enough, as the state has them.
    """
    reasons: list[tuple[str, str, str]] = []
    device = device_of_process(choose_device(options.device), processes)
    if options.compile and device.type == "cpu":
        require_cpp_compiler()
    if begun is None:
        start = None if options.weights is None else load_model(options.weights)
        weights, why = find_pretrained(options)
    else:
        start, weights, why = started_from(options, begun)
    recipe = choose_recipe(options, start, weights, train.classes, device.type)
    if change is not None:
        recipe = change(recipe)
    origin = f"model {options.weights}" if start else f"weights of {weights}" if weights else "scratch"
    reasons.append(("backbone", f"{recipe.model.backbone.name}, from {origin}", why))
    if start and begun is None:
        reasons.append(("classes", train.classes.changes_from(start.spec.classes), "by name"))
    auto = f"auto: {'weights' if weights else 'no weights'} for the backbone"
    if start:
        auto = f"auto: the model was trained by {start.training.get('recipe', 'a recipe unknown')}"
    reasons.append(("recipe", recipe.name, auto if options.recipe == "auto" else "asked for"))
    recipe = _with_options(recipe, options, reasons)
    if recipe.freeze != "none" and not weights and start is None:
        raise ConfigError(
            f"--freeze {recipe.freeze} keeps a stage as loaded and needs weights, of which there are none: "
            "give --pretrained FILE or --weights MODEL, or leave --freeze out"
        )
    backbone = recipe.model.backbone
    norm = fitting_norm(backbone.name, backbone.norm)
    if norm != backbone.norm:
        why = f"recipe {recipe.name} wants {backbone.norm}, which {backbone.name} cannot have"
        reasons.append(("backbone norm", norm, why))
    if recipe.repeat_rare:
        length = epoch_length(train, recipe.repeat_rare)
        why = f"classes in fewer than {recipe.repeat_rare:.3g} of the images are seen more often"
        reasons.append(("epoch", f"{length:,} images of {len(train):,}", why))
    choices = anchor_choices(options, recipe.model.anchors, fixed=start is not None)
    recipe = choose_batch(recipe, options, train, device, reasons)
    if processes.several and options.batch_size != "auto":
        reasons.append(("processes", shares_in_words(recipe.batch_size, processes), "torchrun"))
    preprocessing = choose_preprocessing(recipe, options, train, choices, device, reasons)
    anchors = choose_anchors(options, train, choices, preprocessing, reasons)
    max_detections = choose_max_detections(options, train, reasons)
    spec = dataclasses.replace(
        recipe.model,
        backbone=dataclasses.replace(backbone, norm=norm),
        anchors=anchors,
        preprocessing=preprocessing,
        post_processing=dataclasses.replace(recipe.model.post_processing, max_detections=max_detections),
    )
    lr, why = choose_rate(recipe)
    reasons.append(("lr", f"{lr:g}", why))
    precision = resolve_precision(device, options.precision)
    reasons.append(
        ("device", f"{device}, {precision}", "as asked" if options.device != "auto" else "what there is")
    )
    if options.patience is not None:
        many = "1 validation" if options.patience == 1 else f"{options.patience} validations"
        stops = f"after {many} without a better AP"
        reasons.append(("early stop", stops, "asked for; the schedule stays that of all steps"))
    if options.compile:
        sizes = f"compiled, for padded sides in steps of {COMPILED_DIVISOR}"
        reasons.append(("network", sizes, "asked for"))
    if options.checkpoint_gradients:
        reasons.append(("activations", "computed again in the backward pass", "asked for"))
    cores = len(available_cores()) // processes.sharing
    # On a CPU the network has every core already: a worker only takes turns with it.
    fitting = 0 if device.type == "cpu" else min(8, max(1, cores - 1))
    workers = fitting if options.workers is None else options.workers
    plan = Plan(
        options=options,
        recipe=recipe,
        spec=spec,
        objective=build_objective(recipe, spec),
        start=start,
        weights_file=weights,
        device=device,
        batch_size=recipe.batch_size,
        lr=lr,
        train_images=epoch_length(train, recipe.repeat_rare),
        workers=workers,
        reasons=tuple(reasons),
    )
    return plan.lasting(*choose_steps(recipe, options, train, plan.preprocessing))


def shares_in_words(images: int, processes: Processes) -> str:
    """Return how processes share the images of a step.

    Raises:
        ConfigError: there are not enough for all.
    """
    each = [len(share_of(images, rank, processes.count)) for rank in range(processes.count)]
    if not min(each):
        raise ConfigError(
            f"{processes.count} processes need --batch-size {processes.count} or more, an image each; it is {images}"
        )
    shown = f"{min(each)}" if min(each) == max(each) else f"{min(each)} or {max(each)}"
    return f"{processes.count}, with {shown} images of a step each"


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


def _with_options(recipe: Recipe, options: TrainingOptions, reasons: list[tuple[str, str, str]]) -> Recipe:
    """Replace what the user asked for."""
    shared = {field.name for field in dataclasses.fields(Recipe)} & {
        f.name for f in dataclasses.fields(options)
    }
    asked = {
        name: getattr(options, name)
        for name in sorted(shared - {"epochs", "loss"})
        if getattr(options, name) is not None
    }
    if options.asked_batch() is None:  # auto is found out when the rest is known
        asked.pop("batch_size", None)
    if options.box_loss == "l1":
        asked |= {"box_beta": 0.0}
    augmentation = dataclasses.replace(recipe.augmentation, **options.augmentation())
    changed = dataclasses.replace(choose_loss(recipe, options), augmentation=augmentation, **asked)
    if options.channels is not None:
        pyramid = dataclasses.replace(recipe.model.pyramid, channels=options.channels)
        changed = dataclasses.replace(changed, model=dataclasses.replace(recipe.model, pyramid=pyramid))
    if options.box_beta is not None and changed.box_loss != "smooth-l1":
        raise ConfigError(
            f"--box-beta belongs to --box-loss smooth-l1; recipe {recipe.name} has --box-loss {changed.box_loss}"
        )
    why = f"recipe {recipe.name}"
    channels = changed.model.pyramid.channels
    of_model = why if options.weights is None else "the model's"
    reasons.append(("channels", f"{channels}", of_model if options.channels is None else "asked for"))
    reasons += [
        (name.replace("_", " "), _in_words(getattr(changed, name)), "asked for" if name in asked else why)
        for name in ("optimizer", "schedule", "batch_size", "box_loss", "box_weight", "freeze")
    ]
    of_loss = [name for name in ("loss", *EVERY_SETTING, "prior") if getattr(options, name) is not None]
    reasons += [
        (
            "class loss",
            objectives.in_words(changed),
            f"asked for: {', '.join(of_loss)}" if of_loss else f"recipe {recipe.name}",
        ),
        (
            "held in check by",
            f"weight decay {changed.weight_decay:g}, gradient norm {_in_words(changed.clip_norm or 'free')}, "
            f"average of weights {changed.average_decay or 'none'}",
            "weight decay asked for" if "weight_decay" in asked else f"recipe {recipe.name}",
        ),
    ]
    return changed


def _in_words(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


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
