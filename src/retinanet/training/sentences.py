"""A finding in words, and numbers as people say them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["stop", "look", "good"]

SHARES = (
    (1 / 4, "a quarter"),
    (1 / 3, "a third"),
    (1 / 2, "half"),
    (2 / 3, "two thirds"),
    (3 / 4, "three quarters"),
)


@dataclass(frozen=True)
class Sentence:
    """One finding: "stop" where training or its figures would be wrong, "look" where a person should, else "good"."""

    level: Level
    text: str


def share(value: float) -> str:
    """Return a share as people say it.

    >>> share(0.26), share(0.183), share(0.004)
    ('a quarter', '18 %', 'less than 1 %')
    """
    for exact, words in SHARES:
        if abs(value - exact) < 0.015:
            return words
    if 0 < value < 0.01 or 0.99 < value < 1:
        return "less than 1 %" if value < 0.5 else "nearly all"
    return f"{value * 100:.0f} %"
