"""From options, recipe and data to a plan: the user's option first, then the recipe, then a rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from retinanet.checkpoint import load_model
from retinanet.data import Dataset
from retinanet.data.sampling import epoch_length, share_of
from retinanet.devices import choose_device, require_cpp_compiler, resolve_precision
from retinanet.errors import ConfigError
from retinanet.model import fitting_norm
from retinanet.processes import ALONE, Processes, available_cores, device_of_process
from retinanet.training import objectives
from retinanet.training.choosing import choose_rate, choose_recipe, find_pretrained, started_from
from retinanet.training.configuration import EVERY_SETTING, TrainingOptions
from retinanet.training.objectives import build_objective, choose_loss
from retinanet.training.plan import COMPILED_DIVISOR, Plan
from retinanet.training.recipes import Recipe
from retinanet.training.sizing import (
    PIXELS_A_SECOND,
    anchor_choices,
    choose_anchors,
    choose_batch,
    choose_max_detections,
    choose_preprocessing,
    choose_steps,
)


def plan_run(
    options: TrainingOptions,
    train: Dataset,
    change: Callable[[Recipe], Recipe] | None = None,
    processes: Processes = ALONE,
    begun: dict[str, Any] | None = None,
    speed: float = PIXELS_A_SECOND,
) -> Plan:
    """Decide every setting: the user's option first, then the recipe, then a rule of the data and device.

    Args:
        change: what an experiment changes of the recipe that the options choose.
        processes: that will train together. What is decided does not depend on them, but for devices and workers.
        begun: `plan.json` of a run that has a training state: what it says of the weights that the run started from is
            enough, as the state has them.
        speed: pixels a second that `--time` is taken for.
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
        before = start.training.get("recipe", "a recipe unknown")
        goes_on = "" if before == recipe.name else f"; {recipe.name} goes on with it"
        auto = f"auto: the model was trained by {before}{goes_on}"
    reasons.append(("recipe", recipe.name, auto if options.recipe == "auto" else "asked for"))
    own_batch = recipe.batch_size
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
    choices = anchor_choices(options, recipe, of_model=start is not None)
    recipe = choose_batch(recipe, options, train, device, reasons, own=own_batch)
    if processes.several and options.batch_size != "auto":
        reasons.append(("processes", shares_in_words(recipe.batch_size, processes), "torchrun"))
    preprocessing = choose_preprocessing(recipe, options, train, choices, device, reasons, speed=speed)
    stands = "the model's" if start else f"recipe {recipe.name}"
    anchors = choose_anchors(options, train, choices, preprocessing, reasons, stands)
    max_detections, usual = choose_max_detections(options, train, reasons), recipe.model.post_processing
    spec = dataclasses.replace(
        recipe.model,
        backbone=dataclasses.replace(backbone, norm=norm),
        anchors=anchors,
        preprocessing=preprocessing,
        post_processing=dataclasses.replace(
            usual, max_detections=max_detections, top_k=max(usual.top_k, max_detections)
        ),
    )
    lr, why = choose_rate(recipe)
    reasons.append(("lr", f"{lr:g}", why))
    precision = resolve_precision(device, options.precision)
    reasons.append(
        ("device", f"{device}, {precision}", "as asked" if options.device != "auto" else "what there is")
    )
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
        speed=None if speed == PIXELS_A_SECOND else speed,
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
    model = recipe.model
    if options.channels is not None:
        model = dataclasses.replace(
            model, pyramid=dataclasses.replace(model.pyramid, channels=options.channels)
        )
    if options.head_depth is not None:
        model = dataclasses.replace(model, head=dataclasses.replace(model.head, depth=options.head_depth))
    changed = dataclasses.replace(changed, model=model)
    if options.box_beta is not None and changed.box_loss != "smooth-l1":
        raise ConfigError(
            f"--box-beta belongs to --box-loss smooth-l1; recipe {recipe.name} has --box-loss {changed.box_loss}"
        )
    why = f"recipe {recipe.name}"
    of_model = why if options.weights is None else "the model's"
    reasons += [
        (name, f"{value}", of_model if asked_for is None else "asked for")
        for name, value, asked_for in (
            ("channels", model.pyramid.channels, options.channels),
            ("head depth", model.head.depth, options.head_depth),
        )
    ]
    reasons += [
        (name.replace("_", " "), _in_words(getattr(changed, name)), "asked for" if name in asked else why)
        for name in ("optimizer", "schedule", "batch_size", "box_loss", "box_weight", "freeze")
    ]
    of_loss = [name for name in ("loss", *EVERY_SETTING, "prior") if getattr(options, name) is not None]
    reasons += [
        (
            "class loss",
            objectives.in_words(changed),
            f"asked for: {', '.join(of_loss)}" if of_loss else why,
        ),
        ("matching", objectives.matching_in_words(changed), why),
        (
            "held in check by",
            f"weight decay {changed.weight_decay:g}, gradient norm {_in_words(changed.clip_norm or 'free')}, "
            f"weights {_averaged(changed.average_decay)}",
            "weight decay asked for" if "weight_decay" in asked else why,
        ),
    ]
    return changed


def _averaged(decay: float | None) -> str:
    """Return how far back the average of `WeightAverage` reaches: 1 / (1 - d) steps."""
    return (
        "not averaged"
        if decay is None
        else f"averaged over the last ninth of the steps, {1 / (1 - decay):,.0f} at most"
    )


def _in_words(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
