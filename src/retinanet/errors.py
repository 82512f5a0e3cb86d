"""One tree of errors: everything this library raises on purpose is a `RetinaNetError`, but for `Stopped`.

A message says who speaks, what is required, what came, where, and what to do. The command line
prints it on one line and exits with 2; a traceback means a defect of ours.
"""

import difflib
from collections.abc import Iterable


class RetinaNetError(Exception):
    """Base of all errors raised on purpose."""


class DataError(RetinaNetError):
    """A data set, image or annotation cannot be used."""


class ImageError(DataError):
    """One image cannot be decoded."""


class ConfigError(RetinaNetError):
    """A request, option or specification is impossible or contradicts itself."""


class CheckpointError(RetinaNetError):
    """A model file is missing, damaged, foreign or made for something else."""


class DiskError(RetinaNetError):
    """A file cannot be written: the disk is full, or refuses; what was there before is untouched."""


class TrainingError(RetinaNetError):
    """A run cannot go on."""


class DivergedError(TrainingError):
    """The loss or the weights of a run are no longer finite."""


class LostProcessError(TrainingError):
    """Another process of a run has ended or does not answer, so that this one cannot go on."""


class Stopped(BaseException):
    """A run was stopped by a signal, after saving; `exit_code` is 128 + the signal's number.

    No error, as KeyboardInterrupt is none: what handles errors (an image that cannot be read, say) must not take it.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class MissingExtraError(RetinaNetError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'retinanet[{extra}]'")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
