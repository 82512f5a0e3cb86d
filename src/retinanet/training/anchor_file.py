"""The anchors a user asks for, `--anchors`: five base sizes in the command line, or a file of sizes, scales and ratios.

The file is YAML (JSON is YAML, too), as `retinanet data anchors` writes it:

    image_size: 512
    max_size: 640
    sizes: [11.4, 22.8, 45.5, 91.1, 182.2]
    scales: [1.0, 1.53, 2.31]
    ratios: [0.36, 0.88, 2.18]

`scales` and `ratios` are the usual ones where they are left out; `image_size` and `max_size`, which may be left out as
well, are the shortest and the longest side of the network input that the rest was fitted at. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from retinanet.errors import ConfigError
from retinanet.folders import write_text
from retinanet.plain import from_plain

LEVELS = 5
LARGEST_FILE = 100_000
# Scales or ratios; with more, heads become large enough to run out of memory.
MOST_VALUES = 36


@dataclass(frozen=True)
class AskedAnchors:
    """Base sizes of the anchors on P3 to P7 in pixels, and factors and height / width ratios of each, where asked for.

    Args:
        image_size: shortest side that they were fitted at; None where nobody says.
        max_size: longest side that they were fitted at, where it was not what training takes by itself.
    """

    sizes: tuple[float, ...]
    scales: tuple[float, ...] | None = None
    ratios: tuple[float, ...] | None = None
    image_size: int | None = None
    max_size: int | None = None


def parse_anchors(text: str) -> AskedAnchors:
    """Return the anchors of `--anchors`.

    Raises:
        ConfigError: neither five sizes nor a file of anchors.
    """
    try:
        sizes = tuple(float(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) == LEVELS and _are_positive(sizes):
        return AskedAnchors(sizes)
    path = Path(text)
    if sizes or not _is_file(path):
        raise ConfigError(
            f"--anchors needs five positive sizes with commas, such as 32,64,128,256,512, or a file that "
            f"`retinanet data anchors` wrote; got {text!r}" + ("" if sizes else ", and no such file exists")
        )
    return _read(path)


def write_anchors(path: Path, anchors: AskedAnchors, comment: str) -> None:
    """Write a file that `parse_anchors` reads. `comment` may have several lines."""
    lines = [f"# {line}" for line in comment.splitlines()]
    sides = {"image_size": anchors.image_size, "max_size": anchors.max_size}
    lines += [f"{name}: {side}" for name, side in sides.items() if side is not None]
    for name in ("sizes", "scales", "ratios"):
        values = getattr(anchors, name)
        if values is not None:
            lines.append(f"{name}: [{', '.join(str(float(value)) for value in values)}]")
    write_text(path, "\n".join(lines) + "\n")


def _read(path: Path) -> AskedAnchors:
    where = f"--anchors {path}"
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{where} needs a file below {LARGEST_FILE // 1000} kB; it is larger")
        text = path.read_text(encoding="utf-8")
        # A few aliases of aliases are lists without end for whoever prints them.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ConfigError(f"{where} needs plain lists of numbers; it has a YAML alias")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"{where} cannot be read: {reason}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where} needs `sizes: [...]`, and may have scales, ratios, image_size and max_size; "
            f"got {type(values).__name__}"
        )
    anchors = from_plain(AskedAnchors, {str(key): value for key, value in values.items()}, where)
    if len(anchors.sizes) != LEVELS:
        raise ConfigError(
            f"{where}: sizes needs {LEVELS} numbers, one for each of P3 to P7; got {len(anchors.sizes)}"
        )
    for name in ("sizes", "scales", "ratios"):
        given = getattr(anchors, name)
        if given is not None and not (0 < len(given) <= MOST_VALUES and _are_positive(given)):
            raise ConfigError(
                f"{where}: {name} needs 1 to {MOST_VALUES} numbers above 0; got {str(list(given))[:100]}"
            )
    for name in ("image_size", "max_size"):
        side = getattr(anchors, name)
        if side is not None and side < 1:
            raise ConfigError(f"{where}: {name} needs 1 or more; got {side}")
    return anchors


def _are_positive(values: tuple[float, ...]) -> bool:
    return all(math.isfinite(value) and value > 0 for value in values)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
