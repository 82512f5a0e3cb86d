"""`retinanet train DATA`."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from retinanet.errors import ConfigError
from retinanet.training.configuration import TrainingOptions, read_config

LENGTHS = ("--epochs", "--steps", "--time")


@dataclass(frozen=True, kw_only=True)
class Train(TrainingOptions):
    """Train on the train split of DATA and validate on its val split. --config FILE reads options from YAML, such
    as a run's config.yaml; --debug shows the traceback of an error.
    """

    def run(self) -> int:
        from retinanet.training.run import run_training

        run_training(self)
        return 0


def options_of_config(arguments: list[str]) -> tuple[list[str], Train | None]:
    """Take `--config FILE` out of the arguments; return the rest, and the file's options as defaults for it."""
    rest = list(arguments)
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--config":
            continue
        if not equals and place + 1 == len(arguments):
            raise ConfigError("--config needs a file")
        rest[place : place + (1 if equals else 2)] = []
        options = read_config(value if equals else arguments[place + 1])
        # How long is one choice, in three units: given here in any of them, it replaces the file's.
        if any(given.partition("=")[0] in LENGTHS for given in rest):
            options = {name: value for name, value in options.items() if f"--{name}" not in LENGTHS}
        return rest, Train(**{"data": tyro.MISSING, **options})
    return rest, None
