"""Options of augmentation, which training and `data view` share. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from retinanet.errors import ConfigError
from retinanet.training.hints import BY_RECIPE, option, shown_or_recipe


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions:
    """What a training image goes through, and how often it is seen: options that several commands have."""

    flip: Annotated[float | None, BY_RECIPE] = None
    """Probability that an image is mirrored left to right; 0 for pictures of text."""
    flip_vertical: Annotated[float | None, BY_RECIPE] = None
    """Probability that it stands upside down, for micrographs and aerial photographs."""
    quarter_turn: Annotated[float | None, BY_RECIPE] = None
    """Probability that it is turned by 90 degrees, for the same."""
    zoom: Annotated[str | None, tyro.conf.arg(metavar="LEAST,MOST", help_behavior_hint=shown_or_recipe)] = (
        None
    )
    """Factors between which it is zoomed: above 1 it is cropped, below 1 put on a larger canvas."""
    scales: Annotated[str | None, tyro.conf.arg(metavar="FACTORS", help_behavior_hint=shown_or_recipe)] = None
    """Factors of the image size, of which each batch draws one: numbers with commas."""
    photometric: Annotated[float | None, BY_RECIPE] = None
    """Probability that its brightness, contrast, saturation and hue change."""
    mosaic: Annotated[float | None, BY_RECIPE] = None
    """Probability that it becomes one of four images on a canvas."""
    repeat_rare: Annotated[float | None, BY_RECIPE] = None
    """Share of the images below which a class is rare, and its images are seen more often; 0.001 for LVIS."""

    def __post_init__(self) -> None:
        for name in ("flip", "flip_vertical", "quarter_turn", "photometric", "mosaic", "repeat_rare"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{option(name)} needs a number in [0, 1]; got {value}")
        self.augmentation()

    def augmentation(self) -> dict[str, Any]:
        """Return the fields of `Augmentation` that are asked for."""
        names = ("flip", "flip_vertical", "quarter_turn", "photometric", "mosaic")
        asked: dict[str, Any] = {
            name: getattr(self, name) for name in names if getattr(self, name) is not None
        }
        if self.zoom is not None:
            asked["zoom"] = _factors("zoom", self.zoom)
            if len(asked["zoom"]) != 2 or asked["zoom"][0] > asked["zoom"][1]:
                raise ConfigError(
                    f"--zoom needs two factors, the smaller first, such as 0.8,1.4; got {self.zoom!r}"
                )
        if self.scales is not None:
            asked["scales"] = _factors("scales", self.scales)
        return asked


def _factors(name: str, text: str) -> tuple[float, ...]:
    try:
        factors = tuple(float(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if not factors or not all(0 < factor < float("inf") for factor in factors):
        raise ConfigError(f"{option(name)} needs numbers above 0 with commas, such as 0.8,1; got {text!r}")
    return factors
