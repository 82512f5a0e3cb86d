"""How options look on the command line and in `--help`. No torch."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import tyro


def option(name: str) -> str:
    """Return how a field is written on the command line."""
    return "--" + name.replace("_", "-")


def shown(default: str) -> str:
    """Return what `--help` says of a default: nothing where it says nothing."""
    return "" if default in ("", "None", "False") else f"(default: {default})"


def shown_or_recipe(default: str) -> str:
    """Return the same of an option that the recipe decides when it is left out."""
    return shown(default) or "(default: the recipe's)"


def shown_or_loss(default: str) -> str:
    """Return the same of an option of one class loss."""
    return shown(default) or "(default: the loss's)"


Flag: TypeAlias = Annotated[bool, tyro.conf.arg(help_behavior_hint=shown)]
OPTIONAL = tyro.conf.arg(help_behavior_hint=shown)
OPTIONAL_FOLDER = tyro.conf.arg(metavar="FOLDER", help_behavior_hint=shown)
BY_LOSS = tyro.conf.arg(help_behavior_hint=shown_or_loss)
BY_RECIPE = tyro.conf.arg(help_behavior_hint=shown_or_recipe)
