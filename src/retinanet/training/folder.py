"""The run folder: what a run leaves behind, written while it runs."""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from retinanet.errors import ConfigError, DiskError
from retinanet.folders import (
    RUNS,
    folders_among,
    new_folder,
    not_written,
    read_json,
    write_json,
    write_text,
)
from retinanet.training.config_file import read_config, write_config
from retinanet.training.configuration import TrainingOptions
from retinanet.version import __version__

LOCK = ".lock"
VERSIONS = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "faster-coco-eval")


@dataclass(frozen=True)
class RunFolder:
    """Paths and writers of one run; docs/architecture.md shows the layout."""

    path: Path
    made: bool = False  # by this process: else it stays, whatever happens

    @classmethod
    def create(cls, output: str | None, options: TrainingOptions) -> RunFolder:
        """Make a new folder with configuration, command and environment, before anything slow starts.

        An existing run is never overwritten, and nothing is written into the folder of the data.

        Raises:
            ConfigError: the folder is there, or cannot be made.
            DiskError: a file cannot be written; nothing is left of it.
        """
        environment = {
            "retinanet": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "directory": os.getcwd(),  # that the paths of the command are of
            **{name: version(name) for name in VERSIONS},
            **({"torchrun": launch} if (launch := launch_of_process()) else {}),
        }
        made = output is None or not Path(output).exists()
        path = new_folder(output, "train", outside=folders_among(options.data))
        folder = cls(path, made)
        try:
            write_json(path / "environment.json", environment)
            write_config(path / "config.yaml", from_anywhere(options))
            if options.anchors is not None and Path(options.anchors).is_file():
                write_text(folder.anchors, Path(options.anchors).read_text(encoding="utf-8"))
            folder.note_command()
        except DiskError as error:
            folder.take_back()
            raise DiskError(f"{error}. Free space, or mend the disk, and start the run again") from None
        return folder

    @classmethod
    def begun_by_this_launch(cls, options: TrainingOptions) -> RunFolder | None:
        """Return the folder of the run that this very `torchrun` began, with these very options, before it started its
        processes again; None where there is none, or somebody else's."""
        launch = launch_of_process()
        if launch is None:
            return None
        places = sorted(RUNS.glob("train-*")) if options.output is None else [Path(options.output)]
        found = (folder for folder in map(cls, places) if folder._is_of(launch, options))
        return next(found, None)

    def _is_of(self, launch: str, options: TrainingOptions) -> bool:
        config = self.path / "config.yaml"
        if self.environment().get("torchrun") != launch or not config.is_file():
            return False
        return read_config(config) == asdict(from_anywhere(options))

    def take_back(self) -> None:
        """Remove what `create` wrote: the run never began, and the same command would write it again."""
        for name in ("config.yaml", "command.txt", "environment.json", self.anchors.name, LOCK):
            (self.path / name).unlink(missing_ok=True)
        if self.made:
            with suppress(OSError):  # something else is in it
                self.path.rmdir()
                if self.path.parent == RUNS:
                    RUNS.rmdir()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training this run meanwhile.

        Raises:
            ConfigError: one does.
            DiskError: a file of the run could not be written; it says how to go on.
        """
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"another process is training {self.path}; wait for its end, or stop it first"
            ) from None
        except OSError as error:
            raise DiskError(
                f"a run needs a folder that it can write to; {self.path}: {error.strerror or error}"
            ) from None
        try:
            yield
        except DiskError as error:
            how = f"go on with: {go_on(self)}" if self.plan.is_file() else "start the run again"
            raise DiskError(
                f"{error}. What was saved before is untouched: free space, or mend the disk, and {how}"
            ) from None
        finally:
            lock.release()

    def note_command(self) -> None:
        """Add a line to `command.txt`: how the run was started, and each time that it was resumed."""
        self._append("command.txt", shlex.join(sys.argv))

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """Return the folder of a run to go on with.

        Raises:
            ConfigError: there is no run.
        """
        if not (path / "config.yaml").is_file():
            what = "has no config.yaml" if path.is_dir() else "does not exist"
            raise ConfigError(f"--resume needs the folder of a run; {path} {what}")
        return cls(path)

    def options(self) -> TrainingOptions:
        """Return what the run was started with, its own copy of a file of anchors among it."""
        instead = {"anchors": str(self.anchors)} if self.anchors.is_file() else {}
        return TrainingOptions(**{"data": "", **read_config(self.path / "config.yaml", instead)})

    def keep(self, options: TrainingOptions) -> None:
        """Write what a run takes less memory by since it was resumed into its `config.yaml`: else the next resume would
        run out of memory again."""
        kept = self.options()
        changed = replace(
            kept, accumulate=options.accumulate, checkpoint_gradients=options.checkpoint_gradients
        )
        if changed != kept:
            write_config(self.path / "config.yaml", changed)

    def keep_length(self, plan: dict[str, Any]) -> None:
        """Keep in `plan.json` how many steps a timed run takes after all."""
        write_json(self.plan, {**read_json(self.plan), **plan})

    @property
    def anchors(self) -> Path:
        """A copy of the file of `--anchors`, where it is one: a run that goes on needs it again."""
        return self.path / "anchors.yaml"

    @property
    def checkpoints(self) -> Path:
        """Training states, `training.state`."""
        return self.path / "checkpoints"

    @property
    def plan(self) -> Path:
        """What was decided, written before the first step."""
        return self.path / "plan.json"

    @property
    def report(self) -> Path:
        """What the run tells people, as it stands."""
        return self.path / "report.html"

    @property
    def pictures(self) -> Path:
        """Detections of some validation images, a file for each validation."""
        return self.path / "pictures"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def last(self) -> Path:
        return self.path / "last"

    @property
    def skipped(self) -> Path:
        """What it takes to make skipped steps again, a file a step."""
        return self.path / "skipped"

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        self._append("metrics.jsonl", json.dumps(record))

    def history(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`."""
        return _lines_of(self.path / "metrics.jsonl")

    def log_memory(self, record: dict[str, Any]) -> None:
        """Append one line to `memory.jsonl`."""
        self._append("memory.jsonl", json.dumps(record))

    def memory(self) -> list[dict[str, Any]]:
        """Return the lines of `memory.jsonl`."""
        return _lines_of(self.path / "memory.jsonl")

    def forget_after(self, step: int) -> None:
        """Take what comes after a step out of `metrics.jsonl` and `resumes.jsonl`: it is going to be done again."""
        for name in ("metrics.jsonl", "resumes.jsonl"):
            if (self.path / name).is_file():
                kept = [record for record in _lines_of(self.path / name) if record["step"] <= step]
                write_text(self.path / name, "".join(json.dumps(record) + "\n" for record in kept))

    def validations(self) -> list[dict[str, Any]]:
        """Return the lines of validations."""
        return [record for record in self.history() if "ap" in record]

    def note_resume(self, step: int) -> None:
        """Add a line to `resumes.jsonl`: after which step the run went on, and when."""
        at = datetime.now().astimezone().isoformat()
        self._append("resumes.jsonl", json.dumps({"step": step, "at": at}))

    def resumes(self) -> list[dict[str, Any]]:
        """Return the lines of `resumes.jsonl`."""
        return _lines_of(self.path / "resumes.jsonl")

    def _append(self, name: str, line: str) -> None:
        """Add a line to a file of the run.

        Raises:
            DiskError: the disk has no room or refuses.
        """
        content = f"{line}\n".encode()
        try:
            with (self.path / name).open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a state must not know of steps that the log does not
        except OSError as error:
            raise not_written(name, self.path, len(content), error) from None

    def commands(self) -> list[str]:
        """Return the lines of `command.txt`."""
        file = self.path / "command.txt"
        return file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []

    def environment(self) -> dict[str, Any]:
        """Return what `environment.json` holds; nothing where it cannot be read."""
        with suppress(ConfigError):
            return read_json(self.path / "environment.json")
        return {}

    def remote_ids(self) -> dict[str, str]:
        """Return what this run is called elsewhere, by the writer's name."""
        file = self.path / "remote.json"
        return read_json(file) if file.is_file() else {}

    def keep_remote_id(self, writer: str, run: str) -> None:
        """Keep what this run is called elsewhere, so that it goes on there when it is resumed."""
        write_json(self.path / "remote.json", {**self.remote_ids(), writer: run})


def launch_of_process() -> str | None:
    """Return which `torchrun` started this process: the same for all its restarts. None where none did.

    Its --rdzv-id tells; without one torch calls every launch "none", and torchrun's own process tells.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"process {os.getppid()} of {socket.gethostname()}" if name == "none" else name


def go_on(folder: RunFolder) -> str:
    """Return the command that resumes a run."""
    return f"retinanet train --resume {shlex.quote(str(folder.path))}"


def _lines_of(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one on each line; a line that a kill cut short is none."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def from_anywhere(options: TrainingOptions) -> TrainingOptions:
    """Return the options with absolute paths: a run may be resumed from another working directory."""
    paths: dict[str, Any] = {"data": options.data, "weights": options.weights}
    for name in ("pretrained", "anchors", "output", "image_root"):
        value = getattr(options, name)
        if value is not None and Path(value).exists():  # else it is no path, or no matter
            paths[name] = value
    found: dict[str, Any] = {name: os.path.abspath(value) for name, value in paths.items() if value}
    return replace(options, **found)
