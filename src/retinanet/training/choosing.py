"""What a run starts from and trains by: weights, recipe, rate."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import timm
import torch

from retinanet.checkpoint import Model
from retinanet.errors import ConfigError
from retinanet.model import ModelSpec, build_retinanet
from retinanet.records import Classes
from retinanet.training.configuration import TrainingOptions
from retinanet.training.optimizer import MUON_FACTOR
from retinanet.training.recipes import Recipe, from_weights, small


def find_pretrained(options: TrainingOptions) -> tuple[Path | None, str]:
    """Return the backbone's weights file, or None, and why. Nothing is ever downloaded here."""
    if options.weights is not None:
        return None, "--weights"
    if options.recipe == "small":
        if options.pretrained not in ("auto", "none"):
            raise ConfigError(
                "--recipe small starts from scratch; leave --pretrained out, or use --recipe modern"
            )
        return None, "recipe small starts from scratch"
    if options.pretrained == "none":
        return None, "--pretrained none"
    if options.pretrained != "auto":
        path = Path(options.pretrained)
        if not path.is_file():
            raise ConfigError(f"--pretrained needs auto, none or a weights file; {path} is no file")
        return path, f"--pretrained {path}"
    backbone = options.backbone_name()
    if not timm.is_model(backbone):
        return None, "unknown backbone"  # refused with its nearest name when the network is built
    hub = timm.get_pretrained_cfg(backbone)
    hub_id = getattr(hub, "hf_hub_id", None)
    if hub_id:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(hub_id, "model.safetensors")
        if isinstance(found, str):
            return Path(found), f"found in the cache: {hub_id}"
    return None, f"no weights of {hub_id or backbone} in the cache; give a file with --pretrained"


def started_from(options: TrainingOptions, begun: dict[str, Any]) -> tuple[Model | None, Path | None, str]:
    """Return the model and the backbone's weights that a run started from, by its `plan.json`, and why. The model has
    no values: a training state has them.

    Raises:
        ConfigError: the file is damaged.
    """
    start = None
    try:
        weights = None if begun["weights_file"] is None else Path(begun["weights_file"])
        if options.weights is not None:
            spec = ModelSpec.from_json(begun["spec"])
            with torch.device("meta"):
                start = Model(build_retinanet(spec), spec, training={"recipe": begun["recipe"]["name"]})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"plan.json of the run is damaged: {error!r}") from None
    return start, weights, "as the run began"


def choose_recipe(
    options: TrainingOptions, start: Model | None, weights: Path | None, classes: Classes, device_type: str
) -> Recipe:
    """Return the recipe asked for; auto is `modern` with weights and `small` without. A model to start from says
    which network it is, and goes on with `small` where that made it, else with `modern`.
    """
    name = options.recipe
    if name == "auto":
        pretrained = weights if start is None else start.training.get("recipe") != "small"
        name = "modern" if pretrained else "small"
    backbone = options.backbone_name() if start is None else start.spec.backbone.name
    if name != "small" and not weights and start is None:
        raise ConfigError(
            f"--recipe {name} freezes BatchNorm and needs weights for {backbone}, of which there are none: "
            "give --pretrained FILE or --weights MODEL, or use --recipe small"
        )
    if name == "small":
        recipe = small(classes, backbone, device_type)
    else:
        recipe = from_weights(name, classes, backbone, weights.name if weights else None, device_type)
    if start is None:
        return recipe
    _refuse_another_network(options, start)
    return dataclasses.replace(recipe, model=dataclasses.replace(start.spec, classes=classes))


def _refuse_another_network(options: TrainingOptions, start: Model) -> None:
    """Raise where an option asks for another network than the model's."""
    for option, asked, has in (
        ("--backbone", options.backbone, start.spec.backbone.name),
        ("--channels", options.channels, start.spec.pyramid.channels),
        ("--head-depth", options.head_depth, start.spec.head.depth),
    ):
        if asked not in (None, has):
            raise ConfigError(
                f"{option} needs to be that of the model of --weights or left out: {options.weights} has {has}; "
                f"got {asked}"
            )


def choose_rate(recipe: Recipe) -> tuple[float, str]:
    """Return the learning rate for the recipe's batch size, and why.

    SGD's goes with the batch size (Goyal et al., 2017). Where steps have a size of their own, whatever the gradient's,
    it goes with the root of it (Malladi et al., 2022).
    """
    ratio = recipe.batch_size / 16
    if recipe.optimizer == "sgd":
        return recipe.lr * ratio, f"{recipe.lr:.3g} at 16 images a step, times {recipe.batch_size}/16"
    why = f"{recipe.lr:.3g} at 16 images a step, times the root of {recipe.batch_size}/16"
    if recipe.optimizer == "muon":
        why += f"; Muon's own rate is {MUON_FACTOR:g} times that"
    return recipe.lr * math.sqrt(ratio), why
