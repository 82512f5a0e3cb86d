"""`retinanet train DATA`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from retinanet.errors import ConfigError
from retinanet.training.config_file import read_config
from retinanet.training.configuration import ALSO_RESUMED, TrainingOptions, nothing_else
from retinanet.training.folder import RunFolder
from retinanet.training.hints import option

LENGTHS = ("--epochs", "--steps", "--time")


@dataclass(frozen=True, kw_only=True)
class Train(TrainingOptions):
    """Train on the train split of DATA and validate on its val split. --config FILE reads options from YAML, such
    as a run's config.yaml; --debug shows the traceback of an error.
    """

    def run(self) -> int:
        if self.resume is not None:
            from retinanet.training.run import resume_training

            resume_training(Path(self.resume), asked=self)
            return 0
        folder = None
        if is_main() and not self.dry_run and RunFolder.begun_by_this_launch(self) is None:
            # Before torch is imported: a run that is killed from now on can be started again by its folder.
            folder = RunFolder.create(self.output, self)
        from retinanet.training.run import run_training

        run_training(self, folder=folder)
        return 0


def is_main() -> bool:
    """Return whether this process writes the run: alone it does, and of those of `torchrun` the first."""
    return os.environ.get("RANK", "0") == "0"


def options_of_config(arguments: list[str]) -> tuple[list[str], Train | None]:
    """Take `--config FILE` out of the arguments; return the rest, and the file's options as defaults for it.

    With `--resume RUN`, whose options are the run's own, only `ALSO_RESUMED` may be given beside it, not even DATA.
    """
    rest = list(arguments)
    named = [argument.partition("=")[0] for argument in arguments]
    if "--resume" in named:
        others = _beside_resume(arguments[1:])
        if others:
            raise nothing_else(others[0])
        place = named.index("--resume")
        _, equals, run = arguments[place].partition("=")
        run = run if equals else (arguments[place + 1] if place + 1 < len(arguments) else "")
        if run and not run.startswith("--"):  # else it is told below that a value is missing
            RunFolder.existing(Path(run))
            return rest, Train(data="")
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


def _beside_resume(arguments: list[str]) -> list[str]:
    """Return the arguments that are neither --resume, nor of `ALSO_RESUMED`, nor a value of these."""
    flag = option("checkpoint_gradients")
    known = {"--resume", *map(option, ALSO_RESUMED)}
    others, is_value = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name in known:
            is_value = not equals and name != flag
        elif is_value and not argument.startswith("--"):
            is_value = False
        else:
            others.append(argument)
    return others
