"""From the names of a recipe's losses to an objective."""

from __future__ import annotations

import dataclasses

from retinanet.atss import DEVIATIONS, match_atss
from retinanet.model import ModelSpec
from retinanet.objective import (
    BoxLoss,
    ByIou,
    ClassLoss,
    Matching,
    Mining,
    Objective,
    QualityLoss,
    focal,
    focal_star,
    giou_of_boxes,
    hinge,
    ohem,
    ohem_one_to_three,
    smooth_l1_of_deltas,
    varifocal,
)
from retinanet.training.configuration import EVERY_SETTING, SETTINGS, TrainingOptions, require_of_loss
from retinanet.training.recipes import Recipe


def choose_loss(recipe: Recipe, options: TrainingOptions) -> Recipe:
    """Return the recipe with the class loss that was asked for; refuse what does not belong to it."""
    loss = options.loss or recipe.loss
    require_of_loss(loss, options)
    known = SETTINGS[loss]
    asked = {name: getattr(options, name) for name in EVERY_SETTING if getattr(options, name) is not None}
    usual = recipe.loss_settings if loss == recipe.loss else {}
    return dataclasses.replace(recipe, loss=loss, loss_settings={**known, **usual, **asked})


def in_words(recipe: Recipe) -> str:
    """Return the class loss for the table of a plan."""
    if recipe.class_loss is not None:
        return f"one of your own, prior {recipe.prior:g}"
    settings = (f"{name.replace('_', ' ')} {value:g}" for name, value in settings_of(recipe).items())
    return ", ".join((recipe.loss, *settings, f"prior {recipe.prior:g}"))


def settings_of(recipe: Recipe) -> dict[str, float]:
    """Return what the recipe's loss is told."""
    return {**SETTINGS[recipe.loss], **recipe.loss_settings}


def build_objective(recipe: Recipe, spec: ModelSpec) -> Objective:
    """Return what a recipe trains a model with."""
    return Objective(
        anchors=spec.anchors,
        coding=spec.coding,
        matching=matching_of(recipe),
        class_loss=_class_loss(recipe),
        box_loss=_box_loss(recipe),
        mining=_mining(recipe),
        box_weight=recipe.box_weight,
        normalizer=recipe.normalizer,
    )


def matching_of(recipe: Recipe) -> Matching:
    """Return who answers for which object."""
    if recipe.matching == "atss":
        return match_atss
    return ByIou(
        positive_iou=recipe.positive_iou, negative_iou=recipe.negative_iou, low_quality=recipe.low_quality
    )


def matching_in_words(recipe: Recipe) -> str:
    """Return the same for the table of a plan."""
    if recipe.matching == "atss":
        return f"ATSS: of each object's nearest anchors those {DEVIATIONS:g} deviations above their mean IoU"
    best = ", each object's best anchors positive" if recipe.low_quality else ""
    return f"positive from IoU {recipe.positive_iou:g}, background below {recipe.negative_iou:g}{best}"


def _class_loss(recipe: Recipe) -> ClassLoss | QualityLoss:
    if recipe.class_loss is not None:
        return recipe.class_loss
    settings = settings_of(recipe)
    if recipe.loss == "fl-star":
        return focal_star(settings["alpha"], settings["gamma"], settings["beta"])
    if recipe.loss == "varifocal":
        return varifocal(settings["alpha"], settings["gamma"])
    if recipe.loss == "hinge":
        return hinge(settings["margin"])
    return focal(settings.get("alpha"), settings.get("gamma", 0.0))


def _mining(recipe: Recipe) -> Mining | None:
    settings = settings_of(recipe)
    if recipe.loss == "ohem":
        return ohem(int(settings["mining_batch"]), settings["mining_nms"])
    if recipe.loss == "ohem-1to3":
        return ohem_one_to_three(int(settings["mining_batch"]), settings["mining_nms"])
    return None


def _box_loss(recipe: Recipe) -> BoxLoss:
    return giou_of_boxes() if recipe.box_loss == "giou" else smooth_l1_of_deltas(recipe.box_beta)
