"""`config.yaml`: the options of a run, written whole and read back strictly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from retinanet.errors import ConfigError
from retinanet.folders import write_text
from retinanet.plain import from_plain
from retinanet.training.configuration import TrainingOptions


def read_config(path: str | Path, instead: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Read options from a YAML file as `write_config` makes it; unknown keys are errors.

    Args:
        instead: options that take the place of the file's.
    """
    path = Path(path)
    try:
        if path.stat().st_size > 1_000_000:
            raise ConfigError(f"--config needs a file below 1 MB; {path} is larger")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config needs a YAML file; {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"--config {path} cannot be read: {reason}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} needs one `option: value` a line; got {type(values).__name__}")
    plain = {**{str(key).replace("-", "_"): value for key, value in values.items()}, **instead}
    # Built once with a data set's name filled in, so that a wrong key or value is named with its file.
    from_plain(TrainingOptions, {"data": "", **plain}, f"--config {path}")
    return plain


def write_config(path: Path, options: TrainingOptions) -> None:
    """Write every option, also those left to the recipe, to a YAML file."""
    write_text(path, yaml.safe_dump(dataclasses.asdict(options), sort_keys=False))
