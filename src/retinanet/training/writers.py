"""Where a run's figures go beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from retinanet.errors import MissingExtraError
from retinanet.training.configuration import TrainingOptions, WriterName
from retinanet.training.folder import RunFolder

# What is imported, which is also the name of the extra.
PACKAGES: dict[WriterName, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
# Exit codes above are of signals.
SIGNALS = 128


class Writer(Protocol):
    """Takes the figures of a run as they come."""

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        """Take named figures of a step."""

    def close(self, exit_code: int) -> None:
        """Bring away what was taken; nothing comes any more.

        Args:
            exit_code: the command's: 0 where the run is finished, 130 or 143 where it was stopped, 2 where it failed.
        """


class TensorBoardWriter:
    """Event files in RUN/tensorboard. What a killed process told of steps that are made again is purged."""

    def __init__(self, folder: RunFolder, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first + 1)

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.events.add_scalar(name, value, step)
        self.events.flush()  # or a kill would take minutes of them, and leave a gap

    def close(self, exit_code: int) -> None:
        self.events.close()


class WandbWriter:
    """A run on Weights & Biases, in the project of $WANDB_PROJECT, else "retinanet"; resumed, the same one.

    Figures are told over "step": W&B's own count of steps only rises, and would refuse those of a resumed run. What a
    killed process told of steps that are made again stays there, beside what is told of them again.
    """

    def __init__(self, folder: RunFolder, options: TrainingOptions) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "retinanet"),
            name=folder.path.name,
            dir=str(folder.path),
            id=folder.remote_ids().get("wandb"),
            resume="allow",
            config=dataclasses.asdict(options),
        )
        folder.keep_remote_id("wandb", self.run.id)
        self.run.define_metric("*", step_metric="step")

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log({**figures, "step": step})

    def close(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)  # all but 0 is "failed" there, until the run is resumed


class MlflowWriter:
    """A run of MLflow, where $MLFLOW_TRACKING_URI and $MLFLOW_EXPERIMENT_NAME say; resumed, the same one.

    What a killed process told of steps that are made again stays there, beside what is told of them again.

    A server that is away is asked a few times ($MLFLOW_HTTP_REQUEST_MAX_RETRIES, here 2): training waits meanwhile.
    """

    def __init__(self, folder: RunFolder, options: TrainingOptions) -> None:
        # Before the import; MLflow's own 7 take five minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow

        self.mlflow = mlflow
        known = folder.remote_ids().get("mlflow")
        # Nested: a notebook may have a run of its own open.
        run = mlflow.start_run(
            run_id=known,
            run_name=None if known else folder.path.name,
            nested=mlflow.active_run() is not None,
        )
        self.id = run.info.run_id
        if known is None:
            folder.keep_remote_id("mlflow", self.id)
            mlflow.log_params(dataclasses.asdict(options))

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        # Names may hold letters, digits, and few signs.
        plain = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in figures.items()}
        self.mlflow.log_metrics(plain, step=step, run_id=self.id)

    def close(self, exit_code: int) -> None:
        stopped = "KILLED" if exit_code > SIGNALS else "FAILED"
        self.mlflow.end_run(status=stopped if exit_code else "FINISHED")


class Writers:
    """All writers of a run. One that fails is left out from then on, with a warning: a run never ends by it.

    Args:
        say: takes a warning.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.writers: dict[WriterName, Writer] = {}

    def open(self, options: TrainingOptions, folder: RunFolder, first: int) -> None:
        """Open those that are asked for.

        Args:
            first: steps that are done; figures of later ones are to come.
        """
        for name in chosen_writers(options):
            try:
                self.writers[name] = _opened(name, options, folder, first)
            except Exception as error:  # a server that is away, a key that is missing, whatever it raises
                self._leave_out(name, error)

    def tell(self, record: Mapping[str, Any]) -> None:
        """Tell the figures of a line of `metrics.jsonl`."""
        figures = figures_of(record)
        for name, writer in list(self.writers.items()) if figures else []:
            try:
                writer.scalars(figures, record["step"])
            except Exception as error:
                self._leave_out(name, error)

    def close(self, exit_code: int) -> None:
        """Say how the run ended; see `Writer.close`."""
        for name, writer in list(self.writers.items()):
            try:
                writer.close(exit_code)
            except Exception as error:
                self._leave_out(name, error)
        self.writers.clear()

    def _leave_out(self, name: WriterName, error: Exception) -> None:
        self.writers.pop(name, None)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        self.say(f"{name} gets nothing from here on, the run goes on without it: {reason}")


def chosen_writers(options: TrainingOptions) -> tuple[WriterName, ...]:
    """Return the writers of `--log-to`; auto is TensorBoard where it is installed.

    Raises:
        MissingExtraError: one that was asked for is not installed.
    """
    asked = options.writers()
    if asked is None:
        return ("tensorboard",) if _installed("tensorboard") else ()
    for name in asked:
        if not _installed(PACKAGES[name]):
            raise MissingExtraError(PACKAGES[name], name)
    return asked


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a line by name: train/..., val/..., and val/ap of class/NAME. Other lines have none."""
    if "ap" not in record and "loss" not in record:
        return {}
    part = "val" if "ap" in record else "train"
    figures = {
        f"{part}/{name}": float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
    for name, of in record.get("per_class", {}).items():
        figures |= {f"val/{key} of class/{name}": of[key] for key in ("ap", "ap50") if of[key] is not None}
    return figures


def _opened(name: WriterName, options: TrainingOptions, folder: RunFolder, first: int) -> Writer:
    if name == "tensorboard":
        return TensorBoardWriter(folder, first)
    return WandbWriter(folder, options) if name == "wandb" else MlflowWriter(folder, options)


def _installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return find_spec(package) is not None
